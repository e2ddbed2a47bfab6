"""What the Lightning callbacks share: the batches of a step, as the Trainer's hooks show them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sharpkit._errors import UnsupportedError
from sharpkit.integrations._gathering import Gathering


def _callback_classes() -> tuple[type[Any], ...]:
    """Of both names under which Lightning is installed; each Trainer asks for its own."""
    found: dict[type[Any], None] = {}
    reason: ImportError | None = None
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found[importlib.import_module(name).Callback] = None
        except ImportError as error:
            reason = reason or error
    if not found:
        raise ImportError(f"sharpkit.integrations.lightning needs Lightning: pip install lightning ({reason})") from reason
    return tuple(found)


_Callback: Any = type("_Callback", _callback_classes(), {})


class BatchHooks(_Callback):  # type: ignore[misc]
    """Notes the micro-batches of each optimizer step and their losses.

    Args:
        run: that gets them.
        optimizer: number of the optimizer to watch, where the module has several.
    """

    def __init__(self, run: Gathering, *, optimizer: int | None) -> None:
        super().__init__()
        self._gathering, self._which = run, optimizer
        self._batch: Any = None
        self._batch_idx = 0
        self._loss: Tensor | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch, self._batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = loss.detach()
        self._loss = loss if scaler is None else loss / scaler.scale(torch.ones_like(loss))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._batch is not None:
            self._gathering.note(self._batch, self._loss if pl_module.automatic_optimization else None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._gathering.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._batch = self._loss = None
        self._gathering.close()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue a saved series when training starts."""
        self._gathering.load_state_dict(state_dict)


def check_training_step(module: Any, *, callback: str) -> None:
    """Refuse a training_step that cannot be run once more."""
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually: its training_step makes the optimizer steps, so its loss cannot be computed once "
            f"more. Pass {callback}(closure=...) with closure(module, batch) returning the loss, or loss=loss(output, target)"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UnsupportedError(
            f"{type(module).__name__}.training_step takes dataloader_iter, so the callback does not see its batches. Let it take (batch, "
            "batch_idx), or make the call inside it"
        )


def chosen_optimizer(optimizers: list[torch.optim.Optimizer], which: int | None, *, callback: str) -> torch.optim.Optimizer:
    """The one meant."""
    if which is None and len(optimizers) == 1:
        return optimizers[0]
    names = ", ".join(f"{number}: {type(o).__name__}" for number, o in enumerate(optimizers)) or "none"
    if which is None:
        raise ValueError(f"the module has {len(optimizers)} optimizers ({names}): name the one to watch, {callback}(optimizer=0)")
    if not 0 <= which < len(optimizers):
        raise ValueError(f"there is no optimizer {which}; there are {names}")
    return optimizers[which]


def log_values(trainer: Any, values: dict[str, float]) -> None:
    """Straight to the loggers, at the step of this batch's own logs: ``module.log`` would repeat them until the next record."""
    step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
