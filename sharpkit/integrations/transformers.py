"""Hugging Face transformers: a callback that measures sharpness while the Trainer trains, and one that learns the learning rate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpkit._batches import Batch
from sharpkit._errors import SharpkitWarning
from sharpkit._params import ParamSelector
from sharpkit.integrations._attachment import Attachment
from sharpkit.integrations._trainer_hooks import TrainerHooks
from sharpkit.integrations.transformers_learner import LearnerCallback as LearnerCallback
from sharpkit.objective import Closure
from sharpkit.training._arguments import MetricLike
from sharpkit.training.monitor import Monitor
from sharpkit.training.records import MonitorHistory

STATE_FILE = "sharpkit_monitor.pt"


class SharpnessCallback(TrainerHooks):
    """A :class:`sharpkit.Monitor` for ``transformers.Trainer``.

    Measures just before each optimizer step that is due; the micro-batches of an accumulated step are measured together, each weighed by
    its counted tokens. A file beside each checkpoint lets a resumed training continue the series. Training is left bit for bit as
    without the callback.

    The Trainer shows its callbacks neither batches nor losses. Two ways round that:

    - ``Trainer(..., callbacks=[SharpnessCallback(...)])``: a forward hook on the model notes the inputs of each training forward, and the
      loss is the model's own, ``model(**inputs).loss``. Values go to ``state.log_history``. That the model's own loss is what is trained
      is checked on the first step.
    - ``SharpnessCallback(...).attach(trainer)``: the inputs come from ``trainer.training_step`` and the loss from
      ``trainer.compute_loss``, so label smoothing, ``compute_loss_func``, a Trainer with its own loss and compiled models are measured as
      trained. Values go through ``trainer.log`` to all its reporters.

    Args:
        loss: ``loss(output, labels)``, where the output is the model's logits on the inputs without ``labels``.
        closure: ``closure(model, inputs)`` returning the loss.
        count, params, metrics, every, budget, tol, probe, mode, autocast, max_samples, max_interval, top_k, process_group, seed: as in
            :class:`sharpkit.Monitor`. With ``bf16=True`` the model's forward is under autocast also when it is measured.
        sinks: as in Monitor, or paths that end in ``.jsonl`` or ``.csv``; opened when training starts, closed when it ends.
        resume_from: folder of the checkpoint whose series to continue, where it is not ``output_dir/checkpoint-<step>``.

    Raises:
        ValueError: settings that make no sense; when training starts, a Trainer that must be attached to.

    Example:
        >>> callback = SharpnessCallback(every=100, metrics=["lambda_max"])  # Trainer(..., callbacks=[callback])
        >>> callback.history
        MonitorHistory(no record yet)
    """

    def __init__(
        self,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        closure: Closure | None = None,
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
        resume_from: str | os.PathLike[str] | None = None,
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
        super().__init__(self._run, state_file=STATE_FILE, what="the series of measurements", resume_from=resume_from)

    @property
    def monitor(self) -> Monitor | None:
        """The monitor, once training has started."""
        return self._run.monitor

    @property
    def history(self) -> MonitorHistory:
        """The records so far."""
        return self._run.history

    # -- the Trainer's events ----------------------------------------------------------------------------------------------
    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        self.load_saved(args, state)

        def log(values: dict[str, float]) -> None:
            self.log_values(state, values)

        self._run.start(model, optimizer, closure=self.trained_loss, log=log, main=state.is_world_process_zero)
        self.watch(model, args)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._watch is None:
            return
        if reason := self._watch.end():
            warnings.warn(f"sharpness is not measured in this training: {reason}", SharpkitWarning, stacklevel=2)
            self.close()
            return
        self._run.step(mean=self._watch.losses_are_means)
