"""Lightning: a callback that measures sharpness while the Trainer trains."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._batches import Batch
from sharpkit._errors import UnsupportedError
from sharpkit._params import ParamSelector
from sharpkit.integrations._attachment import Attachment, logged
from sharpkit.integrations._stand_in import training_step_loss
from sharpkit.objective import Closure
from sharpkit.training._arguments import MetricLike, plain_optimizer
from sharpkit.training.monitor import Monitor
from sharpkit.training.records import MonitorHistory


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


class SharpnessCallback(_Callback):  # type: ignore[misc]
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
        super().__init__()
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
        self._which = optimizer
        self._batch: Any = None
        self._batch_idx = 0
        self._loss: Tensor | None = None

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
            _check_training_step(pl_module)
        optimizer = _chosen_optimizer([plain_optimizer(o) for o in trainer.optimizers], self._which)

        def closure(model: nn.Module, batch: Batch) -> Tensor:
            return training_step_loss(model, batch, self._batch_idx)

        def log(values: dict[str, float]) -> None:
            _log(trainer, values)

        self._run.start(pl_module, optimizer, closure=closure, log=log, main=trainer.is_global_zero)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch, self._batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = loss.detach()
        self._loss = loss if scaler is None else loss / scaler.scale(torch.ones_like(loss))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._batch is not None:
            self._run.note(self._batch, self._loss if pl_module.automatic_optimization else None)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.monitor is None or plain_optimizer(optimizer) is not self.monitor.optimizer:
            return
        record = self._run.step(scale=float(trainer.accumulate_grad_batches), mean=True)  # each loss came divided by that number
        if record is not None:  # on every process, for callbacks that decide by it
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in logged(record.to_dict()).items()})
        self._batch = None  # an optimizer that calls back once more for the same batch is not measured again

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._run.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._batch = self._loss = None
        self._run.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to continue the series; the Trainer puts it into its checkpoints."""
        return self._run.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue a saved series when training starts."""
        self._run.load_state_dict(state_dict)


def _check_training_step(module: Any) -> None:
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually: its training_step makes the optimizer steps, so its loss cannot be computed once "
            "more. Pass SharpnessCallback(closure=...) with closure(module, batch) returning the loss, or loss=loss(output, target)"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UnsupportedError(
            f"{type(module).__name__}.training_step takes dataloader_iter, so the callback does not see its batches. Let it take (batch, "
            "batch_idx), or call sk.Monitor inside it"
        )


def _chosen_optimizer(optimizers: list[torch.optim.Optimizer], which: int | None) -> torch.optim.Optimizer:
    if which is None and len(optimizers) == 1:
        return optimizers[0]
    names = ", ".join(f"{number}: {type(o).__name__}" for number, o in enumerate(optimizers)) or "none"
    if which is None:
        raise ValueError(f"the module has {len(optimizers)} optimizers ({names}): name the one to watch, SharpnessCallback(optimizer=0)")
    if not 0 <= which < len(optimizers):
        raise ValueError(f"there is no optimizer {which}; there are {names}")
    return optimizers[which]


def _log(trainer: Any, values: dict[str, float]) -> None:
    """Straight to the loggers, at the step of this batch's own logs: ``module.log`` would repeat them until the next record."""
    step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
