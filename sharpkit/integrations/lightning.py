"""Lightning: a callback that measures sharpness while the Trainer trains, and one that learns the learning rate."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from sharpkit._errors import ObjectiveError, UnsupportedError
from sharpkit.integrations.attachment import Attachment, Gathering, LearnerRun, LearnerSettings, MonitorSettings, logged, own_containers
from sharpkit.learner.history import LearnerHistory
from sharpkit.learner.learner import CurvatureLearner
from sharpkit.learner.schedules import GradientNorms
from sharpkit.monitor.monitor import Monitor
from sharpkit.monitor.records import MonitorHistory
from sharpkit.objective.batches import Batch
from sharpkit.optimizers import unwrap_optimizer

_MODULE_TABLES = frozenset(vars(nn.Module()))  # parameters, buffers, hooks: shared with the original
# Methods of a LightningModule that act on the world; they are replaced on the instance, which Python asks before the class.
_SILENCED = ("log", "log_dict", "print")


def training_step_loss(model: nn.Module, batch: Any, batch_idx: int) -> Tensor:
    """The loss of a batch by a LightningModule's own training_step, with logging, metrics and attributes left as they are.

    Raises:
        ObjectiveError: training_step returns no loss.
    """
    twin = stand_in(model)
    step = twin.training_step
    # batch_idx is optional to Lightning: training_step(self, batch) is asked for no more than it takes
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
    children = module._modules.items()
    # through vars: setattr would enter a child into _modules, the table that the original still shares
    vars(twin)["_modules"] = {name: stand_in(child) if child is not None and _keeps_state(child) else child for name, child in children}
    if _is_metric(module):
        for name, value in twin.metric_state.items():  # updated in place by torchmetrics, so the tensors themselves are copied
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
        if name == "logger":  # None stays None: modules ask "if self.logger" before they use it
            return _Sponge() if self._real.logger is not None else None
        if name == "loggers":
            return [_Sponge() for _ in self._real.loggers]
        return getattr(self._real, name)


class _Sponge:
    """Takes any call and any attribute: ``self.logger.experiment.add_image(...)`` of any logger."""

    def __call__(self, *_: Any, **__: Any) -> _Sponge:
        return self

    __getattr__ = __getitem__ = __call__


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _keeps_state(module: nn.Module) -> bool:
    return any(_is_metric(m) or _is_lightning(m) for m in module.modules())


# By name, along the classes it derives from: importing torchmetrics or either Lightning to ask isinstance would load what is not in use.
def _is_metric(module: nn.Module) -> bool:
    return any(c.__name__ == "Metric" and c.__module__.startswith("torchmetrics") for c in type(module).__mro__)


def _is_lightning(module: nn.Module) -> bool:
    return any(c.__name__ == "LightningModule" for c in type(module).__mro__)


def _callback_classes() -> tuple[type[Any], ...]:
    """Of both names under which Lightning is installed; each Trainer asks for its own."""
    classes: dict[type[Any], None] = {}  # the newer package may install the older name as an alias: one class, not two
    reason: ImportError | None = None
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            classes[importlib.import_module(name).Callback] = None
        except ImportError as error:
            reason = reason or error
    if not classes:
        raise ImportError(f"sharpkit.integrations.lightning needs Lightning: pip install lightning ({reason})") from reason
    return tuple(classes)


_Callback: Any = type("_Callback", _callback_classes(), {})


class BatchHooks(_Callback):  # type: ignore[misc]
    """Notes the micro-batches of each optimizer step and their losses; ``optimizer`` is the number of the one to watch among several."""

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
        # float16 multiplies the loss before this hook is called; scale() of 1 is the factor, and waits for no GPU as get_scale() does
        self._loss = loss if scaler is None else loss / scaler.scale(torch.ones_like(loss))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._batch is not None:
            # by hand a module may call backward on parts of its loss, in any number: no sum of them is known to be the loss
            self._gathering.note(self._batch, self._loss if pl_module.automatic_optimization else None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._gathering.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._batch = self._loss = None
        self._gathering.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on measuring or learning; the Trainer puts it into its checkpoints."""
        return self._gathering.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state when training starts."""
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
    # Lightning's own logs count batches that stepped, global_step counts every optimizer's steps: two optimizers would pull them apart
    step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)


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
        settings: every other argument of :class:`sharpkit.CurvatureLearner`: count, params, interval, budget, safety, warmup, decay,
            schedule, momentum, bulk, per_group, max_lr, peak, mode, autocast, process_group, seed.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: settings that make no sense; when training starts, a configured scheduler, a Trainer without an end, several
            optimizers or manual optimization without a word about them.
        UnsupportedError: when training starts, an optimizer whose stability limit is not known, or a fully sharded model.

    Example:
        >>> callback = LearnerCallback(safety=0.2)  # Trainer(callbacks=[callback], max_epochs=10)
        >>> callback.history
        LearnerHistory(no decision yet)
    """

    def __init__(self, *, total_steps: int | None = None, optimizer: int | None = None, **settings: Unpack[LearnerSettings]) -> None:
        self._run = LearnerRun(settings, total_steps=total_steps)
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
        optimizer = chosen_optimizer([unwrap_optimizer(o) for o in trainer.optimizers], self._which, callback="LearnerCallback")
        _refuse_scheduler(trainer, optimizer)

        def closure(model: nn.Module, batch: Batch) -> Tensor:
            return training_step_loss(model, batch, self._batch_idx)

        def log(values: dict[str, float]) -> None:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
            log_values(trainer, values)

        done, expected = trainer.global_step, math.inf
        # may set up data loaders, so asked only where needed; and it counts batches, which are not the steps of manual optimization
        if self._run.settings["total_steps"] is None and pl_module.automatic_optimization:
            expected = trainer.estimated_stepping_batches
        self._run.start(pl_module, optimizer, expected=expected, done=done, closure=closure, log=log)
        self._made = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.learner is None or unwrap_optimizer(optimizer) is not self.learner.optimizer:
            return
        if self._batch is not None:
            self._made = self._run.take(scale=float(trainer.accumulate_grad_batches), mean=True)  # each loss came divided by that number
        self._batch = None  # what is added to the gradient from here on belongs to other optimizers

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        made, self._made = self._made, None  # after the step, since the learner sets the rate of the next one
        if made is not None:
            self._run.step(made[0], loss=made[1])


def _refuse_scheduler(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    for config in trainer.lr_scheduler_configs:
        if unwrap_optimizer(config.scheduler.optimizer) is optimizer:
            raise ValueError(
                f"configure_optimizers returns the scheduler {type(config.scheduler).__name__}, which would overwrite the learned rate: "
                "leave it out, and pass LearnerCallback(schedule=lambda optimizer: ...) to multiply the learned rate by it, or decay=..."
            )


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
        settings: every other argument of :class:`sharpkit.Monitor`: count, params, metrics, every, budget, tol, probe, mode, autocast,
            max_samples, max_interval, top_k, sinks, process_group, seed. ``autocast`` is not taken over from the Trainer's precision:
            curvature is measured in the parameters' own precision unless asked otherwise. ``sinks`` are opened when training
            starts and closed when it ends.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: settings that make no sense; when training starts, several optimizers without ``optimizer=``, or manual
            optimization without ``loss`` or ``closure``.
        UnsupportedError: when training starts, a ``training_step`` that takes the iterator, or a fully sharded model.

    Example:
        >>> callback = SharpnessCallback(every=100, metrics=["lambda_max"])  # Trainer(callbacks=[callback])
        >>> callback.history
        MonitorHistory(no record yet)
    """

    def __init__(self, *, optimizer: int | None = None, **settings: Unpack[MonitorSettings]) -> None:
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
        optimizer = chosen_optimizer([unwrap_optimizer(o) for o in trainer.optimizers], self._which, callback="SharpnessCallback")

        def closure(model: nn.Module, batch: Batch) -> Tensor:
            return training_step_loss(model, batch, self._batch_idx)

        def log(values: dict[str, float]) -> None:
            log_values(trainer, values)

        self._run.start(pl_module, optimizer, closure=closure, log=log, main=trainer.is_global_zero)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.monitor is None or unwrap_optimizer(optimizer) is not self.monitor.optimizer:
            return
        record = self._run.step(scale=float(trainer.accumulate_grad_batches), mean=True)  # each loss came divided by that number
        if record is not None:  # on every process, for callbacks that decide by it
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in logged(record.to_dict()).items()})
        self._batch = None  # an optimizer that calls back once more for the same batch is not measured again


class GradientNormsCallback(_Callback):  # type: ignore[misc]
    """Records the gradient norm of every step of a Lightning run, before clipping, for the schedule that it calls for.

    Args:
        optimizer: number of the optimizer to watch, where the module has several.

    Example:
        >>> callback = GradientNormsCallback()  # Trainer(callbacks=[callback]).fit(...), then callback.norms.schedule()
        >>> callback.norms is None
        True

    References:
        Defazio, Cutkosky, Mehta and Mishchenko (2023), arXiv 2310.07831.
    """

    def __init__(self, *, optimizer: int | None = None) -> None:
        super().__init__()
        self.norms: GradientNorms | None = None
        self._which, self._saved = optimizer, dict[str, Any]()
        self._watched: torch.optim.Optimizer | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._watched = chosen_optimizer([unwrap_optimizer(o) for o in trainer.optimizers], self._which, callback="GradientNormsCallback")
        self.norms = GradientNorms(self._watched)
        if self._saved:
            self.norms.load_state_dict(self._saved)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.norms is not None and unwrap_optimizer(optimizer) is self._watched:
            self.norms.record()

    def state_dict(self) -> dict[str, Any]:
        """The norms so far; the Trainer puts them into its checkpoints."""
        return self.norms.state_dict() if self.norms is not None else self._saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from saved norms when training starts."""
        self._saved = dict(state_dict)
