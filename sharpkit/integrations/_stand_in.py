"""A stand-in for a LightningModule, on which training_step can be run once more without the training noticing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sharpkit._errors import ObjectiveError
from sharpkit.integrations._attachment import own_containers

_MODULE_TABLES = frozenset(vars(nn.Module()))  # parameters, buffers, hooks: shared with the original
_SILENCED = ("log", "log_dict", "print")


def training_step_loss(model: nn.Module, batch: Any, batch_idx: int) -> Tensor:
    """The loss of a batch by the module's own training_step, with logging, metrics and attributes left as they are.

    Args:
        model: a LightningModule.
        batch: as training_step gets it.
        batch_idx: passed on where it is asked for.

    Raises:
        ObjectiveError: training_step returns no loss.
    """
    twin = stand_in(model)
    step = twin.training_step
    several = len([p for p in inspect.signature(step).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) > 1
    output = step(batch, batch_idx) if several else step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ObjectiveError(f"training_step returned {type(output).__name__}, no loss: pass closure= or loss= to the callback")
    return loss


def stand_in(module: nn.Module) -> Any:
    """A shallow copy that shares parameters and buffers, but whose logging is silent and whose other state is its own.

    Metrics (torchmetrics) below it are copied with their state; so are Lightning modules. Other submodules are the very same.
    """
    twin: Any = copy.copy(module)
    vars(twin)["_modules"] = {
        name: stand_in(child) if child is not None and _keeps_state(child) else child for name, child in module._modules.items()
    }
    if _is_metric(module):
        for name, value in twin.metric_state.items():
            vars(twin)[name] = value.clone() if isinstance(value, Tensor) else list(value)
    tables = {name: table for name, table in vars(twin).items() if name in _MODULE_TABLES}
    own_containers(twin)
    vars(twin).update(tables)
    if _is_lightning(module):
        trainer = vars(module).get("_trainer")
        vars(twin).update(dict.fromkeys(_SILENCED, _nothing), _trainer=trainer and _QuietTrainer(trainer))
    return twin


class _QuietTrainer:
    """The trainer as seen from a stand-in: loggers that take everything and keep nothing."""

    def __init__(self, trainer: Any) -> None:
        self._real = trainer

    def __getattr__(self, name: str) -> Any:
        if name == "logger":
            return _Sponge() if self._real.logger is not None else None
        if name == "loggers":
            return [_Sponge() for _ in self._real.loggers]
        return getattr(self._real, name)


class _Sponge:
    """Takes any call and any attribute."""

    def __getattr__(self, _: str) -> _Sponge:
        return self

    def __getitem__(self, _: Any) -> _Sponge:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Sponge:
        return self


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _keeps_state(module: nn.Module) -> bool:
    return any(_is_metric(m) or _is_lightning(m) for m in module.modules())


def _is_metric(module: nn.Module) -> bool:
    return any(c.__name__ == "Metric" and c.__module__.startswith("torchmetrics") for c in type(module).__mro__)


def _is_lightning(module: nn.Module) -> bool:
    return any(c.__name__ == "LightningModule" for c in type(module).__mro__)
