"""A monitor or a learner inside somebody else's training loop: made when it starts, fed micro-batches, saved and closed with it."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from sharpkit._arguments import flag, real
from sharpkit._errors import SharpkitWarning
from sharpkit.learner.history import Decision, LearnerHistory
from sharpkit.learner.learner import CurvatureLearner, check_learner_settings, check_momentum
from sharpkit.learner.schedules import Schedule
from sharpkit.monitor.metrics import MetricLike, check_monitor_settings
from sharpkit.monitor.monitor import Monitor
from sharpkit.monitor.records import MonitorHistory, Record
from sharpkit.monitor.schema import RUN
from sharpkit.monitor.sinks import SinkPlace, as_sinks, scalars_of
from sharpkit.objective.batches import Batch
from sharpkit.objective.distributed import find_ranks
from sharpkit.objective.objective import Closure, check_settings
from sharpkit.objective.params import ParamSelector
from sharpkit.optimizers import restore_initial_rates

Log = Callable[[dict[str, float]], None]


class ObjectiveSettings(TypedDict, total=False):
    """What a monitor and a learner measure, as in :class:`sharpkit.Objective`; every key may be left out."""

    loss: Callable[[Any, Any], Tensor] | None
    closure: Closure | None
    count: Callable[[Batch], float] | None
    params: ParamSelector
    mode: str
    autocast: torch.dtype | None
    process_group: Any
    seed: int


class MonitorSettings(ObjectiveSettings, total=False):
    """The keyword arguments of :class:`sharpkit.Monitor`, which says what each means."""

    metrics: Sequence[MetricLike] | None
    every: int | str
    budget: float
    tol: float
    probe: Any
    max_samples: int | None
    max_interval: int
    top_k: int
    sinks: SinkPlace | Iterable[SinkPlace] | None


class LearnerSettings(ObjectiveSettings, total=False):
    """The keyword arguments of :class:`sharpkit.CurvatureLearner`, which says what each means; ``total_steps`` is the callback's own."""

    interval: int | str
    budget: float
    safety: float
    warmup: float
    decay: str | Schedule
    schedule: Callable[[torch.optim.Optimizer], Any] | None
    momentum: str
    bulk: str | float
    per_group: bool
    max_lr: float
    peak: float | None
    validation: Any


def complete(settings: Mapping[str, Any], made: type, *, callback: str) -> dict[str, Any]:
    """A callback's settings with the defaults of the class that is ``made`` of them, so that a mistake is named when the callback is made.

    Raises:
        TypeError: a setting that ``made`` does not have.
    """
    # read from the signature, since the class itself can only be made when training starts, hours after the mistake perhaps
    known = {name: p.default for name, p in inspect.signature(made).parameters.items() if p.kind is p.KEYWORD_ONLY and name != "model"}
    if unknown := [name for name in settings if name not in known]:
        raise TypeError(f"{callback} has no argument {', '.join(unknown)}; its settings are {', '.join(known)}")
    return {**{name: default for name, default in known.items() if default is not inspect.Parameter.empty}, **settings}


class Gathering:
    """What the callbacks of all trainers and purposes share: the settings of what is made when training starts, and batches noted for it.

    Raises:
        ValueError: both loss and closure.
    """

    def __init__(self, settings: dict[str, Any], *, callback: str) -> None:
        check_settings(**{name: settings[name] for name in ("loss", "closure", "count", "mode", "autocast", "seed")})
        find_ranks(settings["process_group"])
        self.settings, self.callback = settings, callback
        self.made: Monitor | CurvatureLearner | None = None
        self.batches: list[Any] = []  # since the last optimizer step
        self._losses: list[Tensor] = []
        self._saved: Mapping[str, Any] | None = None

    @property
    def derives_loss(self) -> bool:
        """Whether neither loss nor closure was given."""
        return self.settings["loss"] is None and self.settings["closure"] is None

    def note(self, batch: Any, loss: Tensor | None = None) -> None:
        """One micro-batch whose gradient was added, and its loss."""
        # by identity, since == of two batches compares tensors; a batch that is trained on twice before a step is one batch of data
        if not any(batch is known for known in self.batches):
            self.batches.append(batch)
        if loss is not None:
            self._losses.append(loss.detach())  # kept on its device: a number here would wait for the GPU at each micro-batch

    def forget(self) -> None:
        """Drop the micro-batches since the last optimizer step."""
        self.batches, self._losses = [], []

    def take(self, *, scale: float = 1.0, mean: bool = False) -> tuple[list[Any], Tensor | None]:
        """The micro-batches noted, which are then forgotten, and ``scale`` times the sum (or mean) of their losses where any came."""
        batches, losses = self.batches, self._losses
        self.forget()
        if not losses:
            return batches, None
        total = losses[0]
        for loss in losses[1:]:  # not sum(), which starts from a 0 on the CPU
            total = total + loss
        return batches, total * (scale / (len(losses) if mean else 1))

    def state_dict(self) -> dict[str, Any]:
        """Of what was made; what was loaded if training has not begun; empty before."""
        if self._saved is not None:
            return dict(self._saved)
        return self.made.state_dict() if self.made is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a saved state for the start of training."""
        self._saved = state or None

    def close(self) -> None:
        """Training is over."""
        self.forget()


_KNOWN_TO_TRAINERS = ("loss", "lr")  # every trainer logs these itself, under the names its users look for
_CONTAINERS = (list, dict, set, deque)
# By judgement: a dict of up to so many entries holds running metrics, whose lists must not grow while measuring; a larger one is a
# vocabulary or an index, which nobody changes in a training step and which would be slow to copy at each measurement.
_SMALL = 1000


class Attachment(Gathering):
    """What the sharpness callbacks of all trainers share.

    Raises:
        TypeError: a setting that the monitor does not have.
        ValueError: settings that no training could go with.
    """

    def __init__(self, given: MonitorSettings) -> None:
        settings = complete(given, Monitor, callback="SharpnessCallback")
        check_monitor_settings(*(settings[name] for name in ("every", "budget", "tol", "max_samples", "max_interval", "top_k")))
        super().__init__(settings, callback="SharpnessCallback")

    @property
    def monitor(self) -> Monitor | None:
        """The monitor, once training has started."""
        return self.made if isinstance(self.made, Monitor) else None

    @property
    def history(self) -> MonitorHistory:
        """The records so far; empty before training."""
        return self.monitor.history if self.monitor is not None else MonitorHistory()

    def start(self, model: nn.Module, optimizer: Any, *, closure: Callable[..., Tensor] | None, log: Log | None, main: bool = True) -> None:
        """Make the monitor; it goes on where a loaded state, or its own last training of the same model, stopped.

        Args:
            model, optimizer: what is trained, and how.
            closure: to measure with where the user gave neither loss nor closure.
            log: the trainer's logging.
            main: whether this process writes.
        """
        before = self.monitor  # trainer.fit() called again for the same model goes on with its series
        settings = {
            **self.settings,
            "sinks": [*(as_sinks(self.settings["sinks"]) if main else ()), *([LogSink(log)] if log is not None else [])],
        }
        if self.derives_loss:
            settings["closure"] = closure
        self.made = monitor = Monitor(model, optimizer, **settings)
        saved, self._saved = self._saved, None
        if saved is None and before is not None and before.model is monitor.model:  # the monitor's, which is unwrapped
            saved = before.state_dict()
        if saved:
            self._load(monitor, saved)
        self.forget()

    def _load(self, monitor: Monitor, saved: Mapping[str, Any]) -> None:
        try:
            monitor.load_state_dict(saved)
        except Exception as error:  # measuring is an extra: a checkpoint from another version must not keep the training from resuming
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"the saved series cannot be continued ({reason}); a new one begins", SharpkitWarning, stacklevel=4)

    def step(self, *, scale: float = 1.0, mean: bool = False) -> Record | None:
        """An optimizer step is about to be made on the micro-batches noted; ``scale`` and ``mean`` as in :meth:`take`."""
        batches, loss = self.take(scale=scale, mean=mean)
        if self.monitor is None or not batches:
            return None
        return self.monitor.step(batches, loss=loss)

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
    return {f"sharpkit/{name}": value for name, value in scalars_of(document).items() if name not in _KNOWN_TO_TRAINERS}


def own_containers(owner: Any) -> None:
    """Give a shallow copy of an object lists, dicts and sets of its own, so that code run on it appends to nothing of the original's.

    What the containers hold is still shared, but for containers in small dicts.
    """
    vars(owner).update({name: _copied(value) for name, value in vars(owner).items() if isinstance(value, _CONTAINERS)})


def _copied(value: Any) -> Any:
    if not isinstance(value, _CONTAINERS):
        return value
    twin = copy.copy(value)  # keeps the class: a defaultdict stays one, a deque its length
    if isinstance(twin, dict) and len(twin) <= _SMALL:
        twin.update({key: _copied(part) for key, part in twin.items()})
    return twin


# By the learner's own definition: check_learner_settings refuses fewer. Stands in for the trainer's number of steps until that is known,
# and for the steps left where a training without a saved learner resumes near its end.
_LEAST_STEPS = 20


class LearnerRun(Gathering):
    """What the learner callbacks of all trainers share; without ``total_steps`` (of the whole training) the trainer is asked.

    Raises:
        TypeError: a setting that the learner does not have.
        ValueError: settings that no training could go with.
    """

    def __init__(self, given: LearnerSettings, *, total_steps: int | None) -> None:
        settings = {**complete(given, CurvatureLearner, callback="LearnerCallback"), "total_steps": total_steps}
        checked = {name: settings[name] for name in ("interval", "budget", "safety", "warmup", "decay")}
        check_learner_settings(_LEAST_STEPS if total_steps is None else total_steps, **checked)
        check_momentum(settings["momentum"], settings["bulk"], accelerates=True)
        real("max_lr", settings["max_lr"], above=0, infinite=True)
        if settings["peak"] is not None:
            real("peak", settings["peak"], above=0)
        flag("per_group", settings["per_group"])
        super().__init__(settings, callback="LearnerCallback")
        self._log: Log | None = None
        self._warned = False

    @property
    def learner(self) -> CurvatureLearner | None:
        """The learner, once training has started."""
        return self.made if isinstance(self.made, CurvatureLearner) else None

    @property
    def history(self) -> LearnerHistory:
        """The decisions so far; empty before training."""
        return self.learner.history if self.learner is not None else LearnerHistory()

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, expected: float, done: int, closure: Callable[..., Tensor], log: Log
    ) -> None:
        """Make the learner; it goes on where a loaded state, or its own last training of the same model, stopped.

        Args:
            model, optimizer: what is trained, and how, unwrapped.
            expected, done: optimizer steps of the whole training as the trainer knows it, and those made before it resumed.
            closure: to measure with where the user gave neither loss nor closure.
            log: the trainer's logging.

        Raises:
            ValueError: the trainer does not know its number of steps and none was given.
        """
        before, saved = self.learner, self._saved
        self._saved, self._log, self._warned = None, log, False
        settings = {**self.settings, "total_steps": self._total_steps(expected)}
        if self.derives_loss:
            settings["closure"] = closure
        if saved is None and done and before is not None and before.model is model:
            saved = before.state_dict()
        if done and not saved:
            settings["total_steps"] = max(settings["total_steps"] - done, _LEAST_STEPS)
            what = f"it begins anew, for the remaining {settings['total_steps']} steps"
            text = f"training goes on at step {done}, but no state of a learner was saved: {what}"
            warnings.warn(text, SharpkitWarning, stacklevel=3)
        restore_initial_rates(optimizer)  # a scheduler may have begun at 0, which says nothing about the groups' ratios
        self.made = learner = CurvatureLearner(optimizer, model=model, **settings)
        if saved:
            learner.load_state_dict(saved)  # unlike the monitor's it must not fail silently: another rate would train the model
        self.forget()

    def _total_steps(self, expected: float) -> int:
        given = self.settings["total_steps"]
        if given is not None:
            return int(given)
        if not 0 < expected < float("inf"):  # max_steps=-1, streamed data: trainers say -1 or infinity
            raise ValueError("the Trainer does not know how many optimizer steps it will make: pass LearnerCallback(total_steps=...)")
        return int(expected)

    def step(self, batches: list[Any], *, loss: Tensor | None) -> Decision | None:
        """An optimizer step was made on these micro-batches; a decision is logged."""
        if self.learner is None:
            return None
        if not batches:
            if not self._warned:  # once: where one step's batches are not seen, none are
                self._warned = True
                warnings.warn("a step's batches were not seen: the learned rate stays as it is", SharpkitWarning, stacklevel=3)
            return None
        decision = self.learner.step(batches, loss=loss)
        if decision is not None and self._log is not None:
            self._log({"sharpkit/learned_lr": decision.lr})
        return decision
