"""Lightning: a callback that learns the learning rate while the Trainer trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._batches import Batch
from sharpkit._params import ParamSelector
from sharpkit.integrations._learner_run import LearnerRun, settings_of
from sharpkit.integrations._lightning_hooks import BatchHooks, check_training_step, chosen_optimizer, log_values
from sharpkit.integrations._stand_in import training_step_loss
from sharpkit.objective import Closure
from sharpkit.training._arguments import plain_optimizer
from sharpkit.training.decisions import LearnerHistory
from sharpkit.training.learner import CurvatureLearner
from sharpkit.training.pace import Schedule


class LearnerCallback(BatchHooks):
    """A :class:`sharpkit.CurvatureLearner` for ``lightning.pytorch.Trainer`` (and ``pytorch_lightning.Trainer``).

    Sets the rate of the optimizer at the end of each training batch on which it made a step; the micro-batches of an accumulated step are
    one batch to it. Each decision goes to the Trainer's loggers and to ``trainer.callback_metrics`` as ``sharpkit/learned_lr``, the rate
    before decay. Its state is saved in checkpoints and continued from them.

    The learner decays the rate itself. A learning-rate scheduler in ``configure_optimizers`` would overwrite it and is refused: pass
    ``schedule``, which multiplies the learned rate, or ``decay``.

    Args:
        total_steps: optimizer steps of the whole training; by default ``trainer.estimated_stepping_batches``.
        loss, closure: as in :class:`SharpnessCallback`; without both, the loss is that of the module's own ``training_step``.
        optimizer: number of the optimizer to set, where the module has several. It may make one step a batch at most.
        count, params, interval, budget, safety, warmup, decay, schedule, momentum, bulk, per_group, max_lr, mode, autocast,
        process_group, seed: as in :class:`sharpkit.CurvatureLearner`.

    Raises:
        ValueError: settings that make no sense; when training starts, a configured scheduler, a Trainer without an end, several
            optimizers or manual optimization without a word about them.
        UnsupportedError: when training starts, an optimizer whose stability limit is not known, or a fully sharded model.

    Example:
        >>> callback = LearnerCallback(safety=0.2)  # Trainer(callbacks=[callback], max_epochs=10)
        >>> callback.history
        LearnerHistory(no decision yet)
    """

    def __init__(
        self,
        *,
        total_steps: int | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        closure: Closure | None = None,
        optimizer: int | None = None,
        count: Callable[[Batch], float] | None = None,
        params: ParamSelector = None,
        interval: int | str = "auto",
        budget: float = 0.05,
        safety: float = 0.25,
        warmup: float = 0.1,
        decay: str | Schedule = "linear",
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        momentum: str = "keep",
        bulk: str | float = 1e3,
        per_group: bool = False,
        max_lr: float = math.inf,
        mode: str = "train",
        autocast: torch.dtype | None = None,
        process_group: Any = None,
        seed: int = 0,
    ) -> None:
        self._run = LearnerRun(settings_of(locals()))
        super().__init__(self._run, optimizer=optimizer)
        self._made: tuple[list[Any], Tensor | None] | None = None

    @property
    def learner(self) -> CurvatureLearner | None:
        """The learner, once training has started."""
        return self._run.learner

    @property
    def history(self) -> LearnerHistory:
        """The decisions so far."""
        return self._run.history

    # -- the Trainer's hooks -----------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._run.derives_loss:
            check_training_step(pl_module, callback="LearnerCallback")
        optimizer = chosen_optimizer([plain_optimizer(o) for o in trainer.optimizers], self._which, callback="LearnerCallback")
        _refuse_scheduler(trainer, optimizer)

        def closure(model: nn.Module, batch: Batch) -> Tensor:
            return training_step_loss(model, batch, self._batch_idx)

        def log(values: dict[str, float]) -> None:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
            log_values(trainer, values)

        done, expected = trainer.global_step, math.inf
        if self._run.settings["total_steps"] is None and pl_module.automatic_optimization:
            expected = trainer.estimated_stepping_batches
        self._run.start(pl_module, optimizer, expected=expected, done=done, closure=closure, log=log)
        self._made = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.learner is None or plain_optimizer(optimizer) is not self.learner.optimizer:
            return
        if self._batch is not None:
            self._made = self._run.take(scale=float(trainer.accumulate_grad_batches), mean=True)  # each loss came divided by that number
        self._batch = None  # what is added to the gradient from here on belongs to other optimizers

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        made, self._made = self._made, None
        if made is not None:
            self._run.step(made[0], loss=made[1])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on learning; the Trainer puts it into its checkpoints."""
        return self._run.state_dict()


def _refuse_scheduler(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    for config in trainer.lr_scheduler_configs:
        if plain_optimizer(config.scheduler.optimizer) is optimizer:
            raise ValueError(
                f"configure_optimizers returns the scheduler {type(config.scheduler).__name__}, which would overwrite the learned rate: "
                "leave it out, and pass LearnerCallback(schedule=lambda optimizer: ...) to multiply the learned rate by it, or decay=..."
            )
