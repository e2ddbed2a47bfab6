"""Hugging Face transformers: a callback that learns the learning rate while the Trainer trains."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharpkit._batches import Batch
from sharpkit._errors import UnsupportedError
from sharpkit._params import ParamSelector
from sharpkit.integrations._learner_run import LearnerRun, settings_of
from sharpkit.integrations._trainer_hooks import TrainerHooks
from sharpkit.objective import Closure
from sharpkit.training._arguments import plain_optimizer
from sharpkit.training.decisions import LearnerHistory
from sharpkit.training.learner import CurvatureLearner
from sharpkit.training.pace import Schedule

STATE_FILE = "sharpkit_learner.pt"
_BY_METRICS = ("reduce_lr_on_plateau", "greedy")


class LearnerCallback(TrainerHooks):
    """A :class:`sharpkit.CurvatureLearner` for ``transformers.Trainer``.

    Sets the rate at the end of each optimizer step; the micro-batches of an accumulated step are one batch to it, each weighed by its
    counted tokens. Each decision is logged as ``sharpkit/learned_lr``, the rate before decay. A file beside each checkpoint lets a resumed
    training go on learning. Batches and loss are seen as by :class:`SharpnessCallback`, by a hook or by :meth:`attach`.

    The Trainer always has a learning-rate scheduler, which sets a rate after each optimizer step. The learner sets its own right after
    that, so neither ``learning_rate`` nor ``lr_scheduler_type`` has a say; the Trainer's log of ``learning_rate`` shows the rate learned.
    To multiply the learned rate by a schedule, pass ``decay``, or ``schedule=lambda o:
    transformers.get_cosine_schedule_with_warmup(o, 100, 1000)`` with ``decay="constant"``. Schedulers that follow a metric are refused.

    Args:
        total_steps: optimizer steps of the whole training; by default ``state.max_steps``.
        loss, closure, count, params, interval, budget, safety, warmup, decay, schedule, momentum, bulk, per_group, max_lr, mode, autocast,
            process_group, seed: as in :class:`sharpkit.CurvatureLearner`; without loss and closure, the loss is the trained one.
        resume_from: folder of the checkpoint whose learner to go on with, where it is not ``output_dir/checkpoint-<step>``.

    Raises:
        ValueError: settings that make no sense; when training starts, a Trainer that must be attached to, or a scheduler by metrics.
        UnsupportedError: when training starts, an optimizer whose stability limit is not known; at the first step, batches not seen.

    Example:
        >>> callback = LearnerCallback(safety=0.2)  # Trainer(..., callbacks=[callback])
        >>> callback.history
        LearnerHistory(no decision yet)
    """

    def __init__(
        self,
        *,
        total_steps: int | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        closure: Closure | None = None,
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
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self._run = LearnerRun(settings_of(locals()))
        super().__init__(self._run, state_file=STATE_FILE, what="the learner", resume_from=resume_from)
        self._made: tuple[list[Any], Tensor | None] | None = None

    @property
    def learner(self) -> CurvatureLearner | None:
        """The learner, once training has started."""
        return self._run.learner

    @property
    def history(self) -> LearnerHistory:
        """The decisions so far."""
        return self._run.history

    # -- the Trainer's events ----------------------------------------------------------------------------------------------
    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        _refuse_metrics(args, lr_scheduler)
        self.load_saved(args, state)

        def log(values: dict[str, float]) -> None:
            self.log_values(state, values)

        plain = plain_optimizer(optimizer)
        self._run.start(model, plain, expected=state.max_steps, done=state.global_step, closure=self.trained_loss, log=log)
        self._made = None
        self.watch(model, args)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._watch is None:
            return
        if (reason := self._watch.end()) and not self.history:
            self.close()
            raise UnsupportedError(f"the learner does not see what is trained: {reason}")
        self._made = self._run.take(mean=self._watch.losses_are_means)

    def on_step_end(self, args: Any, state: Any, control: Any, *, lr_scheduler: Any = None, **_: Any) -> None:
        made, self._made = self._made, None
        if made is None or self.learner is None:
            return
        self._run.step(made[0], loss=made[1])
        for scheduler in (lr_scheduler, getattr(lr_scheduler, "scheduler", None)):  # accelerate's wrapper and what is in it
            if scheduler is not None and hasattr(scheduler, "_last_lr"):
                scheduler._last_lr = [group["lr"] for group in self.learner.optimizer.param_groups]


def _refuse_metrics(args: Any, scheduler: Any) -> None:
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if kind in _BY_METRICS or isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            f"the scheduler {kind} changes the rate after evaluations, against the learner: use another lr_scheduler_type; the learner "
            "takes the rate over from it"
        )
