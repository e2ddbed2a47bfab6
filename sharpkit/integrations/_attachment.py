"""A monitor inside somebody else's training loop: made when it starts, fed micro-batches, saved and closed with it."""

from __future__ import annotations

import copy
import os
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sharpkit._errors import SharpkitWarning
from sharpkit._run_schema import RUN
from sharpkit.integrations._gathering import Gathering, Log
from sharpkit.integrations.sinks import _scalars, as_sink
from sharpkit.training._arguments import check_settings
from sharpkit.training.monitor import Monitor
from sharpkit.training.records import MonitorHistory, Record

_KNOWN_TO_TRAINERS = ("loss", "lr")
_CONTAINERS = (list, dict, set, deque)
_SMALL = 1000  # entries of a dict that is copied in depth: running metrics, no vocabularies


class Attachment(Gathering):
    """What the sharpness callbacks of all trainers share.

    Args:
        settings: the arguments of :class:`sharpkit.Monitor`; sinks may also be paths.

    Raises:
        ValueError: settings that no training could go with.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        check_settings(*(settings[name] for name in ("every", "budget", "tol", "max_samples", "max_interval")))
        super().__init__(settings, callback="SharpnessCallback")
        self.monitor: Monitor | None = None

    @property
    def history(self) -> MonitorHistory:
        """The records so far; empty before training."""
        return self.monitor.history if self.monitor is not None else MonitorHistory()

    def start(self, model: nn.Module, optimizer: Any, *, closure: Callable[..., Tensor] | None, log: Log | None, main: bool = True) -> None:
        """Make the monitor; it goes on where a loaded state, or its own last training of the same model, stopped.

        Args:
            model: what is trained.
            optimizer: in use.
            closure: to measure with where the user gave neither loss nor closure.
            log: the trainer's logging.
            main: whether this process writes.
        """
        before = self.monitor
        settings = {**self.settings, "sinks": [*(self._sinks() if main else ()), *([LogSink(log)] if log is not None else [])]}
        if self.derives_loss:
            settings["closure"] = closure
        self.monitor = Monitor(model, optimizer, **settings)
        saved, self._saved = self._saved, None
        if saved is None and before is not None and before.model is self.monitor.model:
            saved = before.state_dict()
        if saved:
            self._load(self.monitor, saved)
        self.forget()

    def _sinks(self) -> list[Any]:
        given = self.settings["sinks"]
        one = callable(given) or hasattr(given, "write") or isinstance(given, (str, os.PathLike))
        return [as_sink(sink) for sink in ([given] if one else given)]

    def _load(self, monitor: Monitor, saved: Mapping[str, Any]) -> None:
        try:
            monitor.load_state_dict(saved)
        except Exception as error:
            warnings.warn(
                f"the saved series cannot be continued ({type(error).__name__}: {error}); a new one begins", SharpkitWarning, stacklevel=4
            )

    def step(self, *, scale: float = 1.0, mean: bool = False) -> Record | None:
        """An optimizer step is about to be made on the micro-batches noted.

        Args:
            scale: that takes the sum (or mean) of the noted losses to the loss of the whole batch.
            mean: whether their mean is meant.
        """
        batches, loss = self.take(scale=scale, mean=mean)
        if self.monitor is None or not batches:
            return None
        return self.monitor.step(batches, loss=loss)

    def _own_state(self) -> dict[str, Any]:
        return self.monitor.state_dict() if self.monitor is not None else {}

    def close(self) -> None:
        """Close the sinks; the history remains."""
        self.forget()
        if self.monitor is not None:
            self.monitor.close()


class LogSink:
    """The numbers of each record, as ``sharpkit/<name>``, to a trainer's own logging."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def open_run(self, header: dict[str, Any]) -> None:
        """Nothing in a header is a number to log."""

    def write(self, document: dict[str, Any]) -> None:
        if document.get("kind") != RUN:
            self._log(logged(document))

    def close(self) -> None:
        """The trainer's loggers are its own."""


def logged(document: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record that a trainer does not log itself, as ``sharpkit/<name>``."""
    return {f"sharpkit/{name}": value for name, value in _scalars(document).items() if name not in _KNOWN_TO_TRAINERS}


def own_containers(owner: Any) -> None:
    """Give a shallow copy of an object lists, dicts and sets of its own, so that code run on it appends to nothing of the original's.

    Args:
        owner: changed in place; what the containers hold is still shared, but for containers in small dicts.
    """
    vars(owner).update({name: _copied(value) for name, value in vars(owner).items() if isinstance(value, _CONTAINERS)})


def _copied(value: Any) -> Any:
    if not isinstance(value, _CONTAINERS):
        return value
    twin = copy.copy(value)
    if isinstance(twin, dict) and len(twin) <= _SMALL:
        twin.update({key: _copied(part) for key, part in twin.items()})
    return twin
