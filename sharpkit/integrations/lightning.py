"""Lightning: a callback that measures sharpness while the Trainer trains, and one that learns the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._batches import Batch
from sharpkit._params import ParamSelector
from sharpkit.integrations._attachment import Attachment, logged
from sharpkit.integrations._lightning_hooks import BatchHooks, check_training_step, chosen_optimizer, log_values
from sharpkit.integrations._stand_in import training_step_loss
from sharpkit.integrations.lightning_learner import LearnerCallback as LearnerCallback
from sharpkit.objective import Closure
from sharpkit.training._arguments import MetricLike, plain_optimizer
from sharpkit.training.monitor import Monitor
from sharpkit.training.records import MonitorHistory


class SharpnessCallback(BatchHooks):
    """A :class:`sharpkit.Monitor` for ``lightning.pytorch.Trainer`` (and ``pytorch_lightning.Trainer``).

    Measures just before each optimizer step that is due: after gradients were unscaled, before they are clipped. The micro-batches of an
    accumulated step are measured together. Values go to the Trainer's loggers and to ``trainer.callback_metrics`` as
    ``sharpkit/<metric>``; the series is saved in checkpoints and continued from them. Training is left bit for bit as without the callback.

    Args:
        loss: ``loss(output, target)`` for (input, target) batches, where the module's forward makes the output.
        closure: ``closure(module, batch)`` returning the loss. Without both, the loss is that of the module's own ``training_step``, run
            on a stand-in: it shares parameters and submodules, but logs nothing and has metrics, lists and attributes of its own. A
            ``training_step`` that changes parameters, files or things outside the module needs ``loss`` or ``closure``; so does manual
            optimization.
        optimizer: number of the optimizer to watch, where the module has several.
        count, params, metrics, every, budget, tol, probe, mode, autocast, max_samples, max_interval, top_k, process_group, seed: as in
            :class:`sharpkit.Monitor`. ``autocast`` is not taken over from the Trainer's precision: curvature is measured in the
            parameters' own precision unless asked otherwise.
        sinks: as in Monitor, or paths that end in ``.jsonl`` or ``.csv``; opened when training starts, closed when it ends.

    Raises:
        ValueError: settings that make no sense; when training starts, several optimizers or manual optimization without a word about them.
        UnsupportedError: when training starts, a ``training_step`` that takes the iterator, or a fully sharded model.

    Example:
        >>> callback = SharpnessCallback(every=100, metrics=["lambda_max"])  # Trainer(callbacks=[callback])
        >>> callback.history
        MonitorHistory(no record yet)
    """

    def __init__(
        self,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        closure: Closure | None = None,
        optimizer: int | None = None,
        count: Callable[[Batch], float] | None = None,
        params: ParamSelector = None,
        metrics: Sequence[MetricLike] | None = None,
        every: int | str = "auto",
        budget: float = 0.05,
        tol: float = 0.02,
        probe: Any = None,
        mode: str = "train",
        autocast: torch.dtype | None = None,
        max_samples: int | None = None,
        max_interval: int = 1000,
        top_k: int = 5,
        sinks: Iterable[Any] | Any = (),
        process_group: Any = None,
        seed: int = 0,
    ) -> None:
        settings = {
            "loss": loss,
            "closure": closure,
            "count": count,
            "params": params,
            "metrics": metrics,
            "every": every,
            "budget": budget,
            "tol": tol,
            "probe": probe,
            "mode": mode,
            "autocast": autocast,
            "max_samples": max_samples,
            "max_interval": max_interval,
            "top_k": top_k,
            "sinks": sinks,
            "process_group": process_group,
            "seed": seed,
        }
        self._run = Attachment(settings)
        super().__init__(self._run, optimizer=optimizer)

    @property
    def monitor(self) -> Monitor | None:
        """The monitor, once training has started."""
        return self._run.monitor

    @property
    def history(self) -> MonitorHistory:
        """The records so far."""
        return self._run.history

    # -- the Trainer's hooks -----------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._run.derives_loss:
            check_training_step(pl_module, callback="SharpnessCallback")
        optimizer = chosen_optimizer([plain_optimizer(o) for o in trainer.optimizers], self._which, callback="SharpnessCallback")

        def closure(model: nn.Module, batch: Batch) -> Tensor:
            return training_step_loss(model, batch, self._batch_idx)

        def log(values: dict[str, float]) -> None:
            log_values(trainer, values)

        self._run.start(pl_module, optimizer, closure=closure, log=log, main=trainer.is_global_zero)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.monitor is None or plain_optimizer(optimizer) is not self.monitor.optimizer:
            return
        record = self._run.step(scale=float(trainer.accumulate_grad_batches), mean=True)  # each loss came divided by that number
        if record is not None:  # on every process, for callbacks that decide by it
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in logged(record.to_dict()).items()})
        self._batch = None  # an optimizer that calls back once more for the same batch is not measured again

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to continue the series; the Trainer puts it into its checkpoints."""
        return self._run.state_dict()
