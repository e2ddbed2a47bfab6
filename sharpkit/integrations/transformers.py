"""Hugging Face transformers: a callback that measures sharpness while the Trainer trains, and one that learns the learning rate."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from sharpkit._errors import SharpkitWarning, UnsupportedError
from sharpkit.integrations.attachment import Attachment, Gathering, LearnerRun, LearnerSettings, MonitorSettings, own_containers
from sharpkit.learner.history import LearnerHistory
from sharpkit.learner.learner import CurvatureLearner
from sharpkit.monitor.monitor import Monitor
from sharpkit.monitor.records import MonitorHistory
from sharpkit.objective.batches import Batch
from sharpkit.objective.loss import own_loss
from sharpkit.optimizers import learning_rates, unwrap_optimizer

_SCALING = "num_items_in_batch"  # tells the model to divide its loss by the tokens of the whole accumulated batch
_SCALE = "sharpkit_scale"  # beside a batch's tensors: the trained loss over the mean over counted tokens


class ForwardWatch:
    """Notes the keyword inputs of training forwards, from the begin of a step to its end, by a hook that is on the model only then.

    Args:
        model, run: the unwrapped model, and what gets its micro-batches.
        pair: give them as (inputs, labels).
        most: forwards in one step; with more the watch ends by itself, as after a training that broke off.
        alone: one process trains on one device.
    """

    def __init__(self, model: nn.Module, run: Gathering, *, pair: bool, most: int, alone: bool) -> None:
        self._alone, self._num_items = alone, None
        self._model, self._run, self._pair, self._most = model, run, pair, most
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._unchecked = run.derives_loss  # whether the trained loss is made from the model's own
        self._used = False
        self.losses_are_means = True

    def begin(self) -> None:
        """A step begins."""
        self.remove()  # a step that broke off has left its hook
        self._hook = self._model.register_forward_hook(self._saw, with_kwargs=True)

    def end(self) -> str:
        """The step's gradient is complete: why these batches cannot be measured; empty if they can."""
        self.remove()  # before anything is measured: a measurement's own forwards are none of training
        reason = ""
        if not self._run.batches:
            reason = "no training forward model(**inputs) with keyword inputs was seen"
        elif self._unchecked and not self._used:
            reason = "the model's own loss, model(**inputs).loss, took no part in the gradient"
        self._unchecked = False
        # over several devices num_items_in_batch counts the tokens of all, and this process sees only its own
        if self._alone and self._run.derives_loss:
            note_scale(self._model, self._run.batches, self._num_items)
        return f"{reason}; use {self._run.callback}(...).attach(trainer), or pass closure=" if reason else ""

    def remove(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _saw(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # evaluation, generation and gradient checkpointing run forwards too: without training mode, or without gradients
        if args or not kwargs or not module.training or not torch.is_grad_enabled():
            return
        if len(self._run.batches) >= self._most:
            self.remove()
            self._run.forget()
            return
        loss = getattr(output, "loss", None)
        if self._unchecked and isinstance(loss, Tensor) and loss.requires_grad:
            # called only if backward reaches the model's own loss: a Trainer with its own compute_loss would leave it aside
            loss.register_hook(self._was_used)  # type: ignore[no-untyped-call]
        self._num_items = kwargs.get(_SCALING)
        self.losses_are_means = self._num_items is None
        batch = {name: value for name, value in kwargs.items() if name != _SCALING}
        self._run.note(as_pair(batch) if self._pair else batch, loss if isinstance(loss, Tensor) else None)

    def _was_used(self, _: Tensor) -> None:
        self._used = True


class StepWatch:
    """Notes what a Trainer's training_step is given and the loss that it returns, by wrapping it until removed; arguments as above.
    Calls beyond ``most`` in one step are not noted.
    """

    losses_are_means = False  # training_step returns each one's part of the whole

    def __init__(self, trainer: Any, run: Gathering, *, pair: bool, most: int, alone: bool) -> None:
        self._num_items: Any = None
        # a Trainer whose class has its own compute_loss weighs tokens as it likes: nothing to correct
        self._scales = alone and run.derives_loss and getattr(type(trainer).compute_loss, "__module__", "") == "transformers.trainer"
        self._trainer, self._run, self._pair, self._most = trainer, run, pair, most
        self._own = vars(trainer).get("training_step")  # somebody may have put a function of theirs on this very trainer
        self._wrapped = trainer.training_step
        trainer.training_step = self._training_step

    def begin(self) -> None:
        """A step begins."""

    def end(self) -> str:
        """The step's gradient is complete; always to be measured."""
        if self._scales and getattr(self._trainer, "model_accepts_loss_kwargs", False):
            note_scale(self._trainer.model, self._run.batches, self._num_items)
        return ""

    def remove(self) -> None:
        """Give the Trainer its training_step back."""
        if vars(self._trainer).get("training_step") != self._training_step:  # wrapped again since: taking ours out would take theirs
            return
        if self._own is None:
            del self._trainer.training_step
        else:
            self._trainer.training_step = self._own

    def _training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._num_items = args[0] if args else kwargs.get(_SCALING)
        kept = dict(inputs) if isinstance(inputs, Mapping) else inputs  # compute_loss may take labels out
        try:
            loss = self._wrapped(model, inputs, *args, **kwargs)
        except BaseException:
            self.remove()
            self._run.close()
            raise
        if len(self._run.batches) < self._most:
            self._run.note(as_pair(kept) if self._pair else kept, loss if isinstance(loss, Tensor) else None)
        return loss


def note_scale(model: Any, batches: list[Any], num_items: Any) -> None:
    """Put what the trained loss is times the mean over counted tokens beside each batch.

    The Trainer divides by a number of items of its own counting. For a model whose loss shifts the labels but whose class the Trainer does
    not know to do so (GPT2LMHeadModel), it counts the first token of each sequence as well.

    Args:
        model, batches: what is trained, and the dicts of one optimizer step; they are changed in place.
        num_items: the Trainer's count over all of them, if it gave one.
    """
    shifts = getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
    if num_items is None or not shifts or not all(isinstance(b, dict) and isinstance(b.get("labels"), Tensor) for b in batches):
        return
    counted = sum((b["shift_labels"] if "shift_labels" in b else b["labels"][..., 1:]).ne(-100).sum() for b in batches)
    for batch in batches:
        batch[_SCALE] = counted / num_items


def without_scale(batch: Any) -> tuple[Any, Tensor | float]:
    """The batch as the model takes it, and its scale."""
    if not isinstance(batch, Mapping) or _SCALE not in batch:
        return batch, 1.0
    return {name: value for name, value in batch.items() if name != _SCALE}, batch[_SCALE]


def as_pair(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """(inputs without labels, labels)."""
    return {name: value for name, value in batch.items() if name != "labels"}, batch.get("labels")


try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f"sharpkit.integrations.transformers needs transformers: pip install 'transformers[torch]' ({error})") from error


class TrainerHooks(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Notes the micro-batches of each optimizer step for ``run`` and saves its state, ``what`` it is in words, with each checkpoint."""

    def __init__(self, run: Gathering, *, state_file: str, what: str, resume_from: str | os.PathLike[str] | None) -> None:
        super().__init__()
        self._gathering, self._state_file, self._what, self._resume_from = run, state_file, what, resume_from
        self._trainer: Any = None
        self._watch: ForwardWatch | StepWatch | None = None

    def attach(self, trainer: Any) -> Self:
        """Measure the Trainer's own loss and log through it: adds the callback, wraps ``training_step`` while it trains, returns itself.

        Raises:
            TypeError: no Trainer.
        """
        if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "compute_loss"):
            raise TypeError(f"attach expects a transformers.Trainer, got {type(trainer).__name__}")
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def close(self) -> None:
        """Take off what watches the training; done when training ends, and to be called where it broke off."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None
        self._gathering.close()

    # -- for the callbacks -------------------------------------------------------------------------------------------------
    def load_saved(self, args: Any, state: Any) -> None:
        """Before training: what the trainer cannot do unattached, and the state of the checkpoint that it resumes from."""
        self.close()
        if self._trainer is None:
            _check_unattached(args, derives_loss=self._gathering.derives_loss, callback=self._gathering.callback)
        if state.global_step:
            self._gathering.load_state_dict(self._saved(args, state))

    def log_values(self, state: Any, values: dict[str, float]) -> None:
        """To the Trainer's log where attached, else to its history."""
        if self._trainer is None:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
        else:
            _log_through(self._trainer, values)

    def trained_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of one micro-batch, as it is trained."""
        inputs, scale = without_scale(batch)
        return (own_loss(model, inputs) if self._trainer is None else trained_loss(self._trainer, model, inputs)) * scale

    def watch(self, model: nn.Module, args: Any) -> None:
        """Begin to note batches."""
        pair = self._gathering.settings["loss"] is not None
        # 8: by judgement, forwards that one micro-batch may take (several views, a teacher); beyond it the step's end was never told
        most, alone = 8 * max(args.gradient_accumulation_steps, 1), args.world_size == 1 and args.n_gpu <= 1
        watch, seen = (ForwardWatch, model) if self._trainer is None else (StepWatch, self._trainer)
        self._watch = watch(seen, self._gathering, pair=pair, most=most, alone=alone)

    # -- the Trainer's events ----------------------------------------------------------------------------------------------
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._gathering.forget()
        if self._watch is not None:
            self._watch.begin()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = self._gathering.state_dict()
        folder = _checkpoint(args, state)
        if not saved or not state.is_world_process_zero:
            return
        if not folder.is_dir():
            warnings.warn(f"{folder} is not there: {self._what} is not saved with this checkpoint", SharpkitWarning, stacklevel=2)
            return
        try:
            torch.save(saved, folder / f"{self._state_file}.part")  # a job killed while it saves leaves the last whole state
            os.replace(folder / f"{self._state_file}.part", folder / self._state_file)
        except (OSError, RuntimeError) as error:
            warnings.warn(f"{self._what} could not be saved in {folder}: {error}", SharpkitWarning, stacklevel=2)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def _saved(self, args: Any, state: Any) -> dict[str, Any]:
        """Of the checkpoint that training resumes from; empty where there is none."""
        # the Trainer does not tell its callbacks what train(resume_from_checkpoint=...) was given: look where it usually is
        places = [Path(place) for place in (self._resume_from, args.resume_from_checkpoint) if isinstance(place, (str, os.PathLike))]
        places.append(_checkpoint(args, state))
        file = next((place / self._state_file for place in places if (place / self._state_file).is_file()), None)
        if file is None:
            text = (
                f"training resumes at step {state.global_step}, but there is no {self._state_file} in {places[-1]}: {self._what} begins "
                f"anew. Pass {self._gathering.callback}(resume_from=<checkpoint folder>) to go on from one elsewhere"
            )
            warnings.warn(text, SharpkitWarning, stacklevel=3)
            return {}
        try:
            loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)  # a checkpoint may come from anywhere
        except Exception as error:
            warnings.warn(f"{file} cannot be read ({error}): {self._what} begins anew", SharpkitWarning, stacklevel=3)
            return {}
        return loaded


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check_unattached(args: Any, *, derives_loss: bool, callback: str) -> None:
    """Refuse what a hook on the model would measure wrongly or not see."""
    smooths = "label_smoothing_factor makes the Trainer compute another loss than the model's own"
    compiles = "with torch_compile=True a hook on the model would be compiled into it"
    if reason := smooths if args.label_smoothing_factor and derives_loss else compiles if args.torch_compile else "":
        raise ValueError(f"{reason}: use {callback}(...).attach(trainer) instead of Trainer(callbacks=[...])")


def trained_loss(trainer: Any, model: nn.Module, batch: Batch) -> Tensor:
    """By the Trainer's compute_loss, run on a shallow copy that logs nothing and has lists and dicts of its own."""
    twin = copy.copy(trainer)
    own_containers(twin)
    twin.log = _nothing
    # a dict of its own: compute_loss pops the labels where the label smoother or compute_loss_func wants them
    loss: Tensor = twin.compute_loss(model, dict(batch) if isinstance(batch, Mapping) else batch)
    return loss


def _log_through(trainer: Any, values: dict[str, float]) -> None:
    """To all reporters, without using up the Trainer's own turn to log."""
    due = trainer.control.should_log
    try:
        trainer.log(dict(values))
    finally:
        trainer.control.should_log = due  # on_log clears it, and the Trainer's own losses of this step would never be logged


def _nothing(*_: Any, **__: Any) -> None:
    return None


LEARNER_FILE = "sharpkit_learner.pt"
_BY_METRICS = ("reduce_lr_on_plateau", "greedy")  # names that the Trainer gives to schedulers that wait for an evaluation


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
        resume_from: folder of the checkpoint whose learner to continue, where it is not ``output_dir/checkpoint-<step>``.
        settings: every other argument of :class:`sharpkit.CurvatureLearner`: loss, closure, count, params, interval, budget, safety,
            warmup, decay, schedule, momentum, bulk, per_group, max_lr, peak, mode, autocast, process_group, seed. Without loss and
            closure, the loss is the trained one.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: settings that make no sense; when training starts, a Trainer that must be attached to, or a scheduler by metrics.
        UnsupportedError: when training starts, an optimizer whose stability limit is not known; at the first step, batches not seen.

    Example:
        >>> callback = LearnerCallback(safety=0.2)  # Trainer(..., callbacks=[callback])
        >>> callback.history
        LearnerHistory(no decision yet)
    """

    def __init__(
        self, *, total_steps: int | None = None, resume_from: str | os.PathLike[str] | None = None, **settings: Unpack[LearnerSettings]
    ) -> None:
        self._run = LearnerRun(settings, total_steps=total_steps)
        super().__init__(self._run, state_file=LEARNER_FILE, what="the learner", resume_from=resume_from)
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

        plain = unwrap_optimizer(optimizer)
        self._run.start(model, plain, expected=state.max_steps, done=state.global_step, closure=self.trained_loss, log=log)
        self._made = None
        self.watch(model, args)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._watch is None:
            return
        if (reason := self._watch.end()) and not self.history:  # later on it was seen once: a strange step is only left out
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
                # what get_last_lr() and so the Trainer's log shows; the rate itself is in the optimizer's groups
                scheduler._last_lr = learning_rates(self.learner.optimizer)


def _refuse_metrics(args: Any, scheduler: Any) -> None:
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if kind in _BY_METRICS or isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            f"the scheduler {kind} changes the rate after evaluations, against the learner: use another lr_scheduler_type; the learner "
            "takes the rate over from it"
        )


MONITOR_FILE = "sharpkit_monitor.pt"


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
        settings: every other argument of :class:`sharpkit.Monitor`: count, params, metrics, every, budget, tol, probe, mode, autocast,
            max_samples, max_interval, top_k, sinks, process_group, seed. With ``bf16=True`` the model's forward pass is under autocast
            also when it is measured.
        resume_from: folder of the checkpoint whose series to continue, where it is not ``output_dir/checkpoint-<step>``.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: settings that make no sense; when training starts, a Trainer that must be attached to.

    Example:
        >>> callback = SharpnessCallback(every=100, metrics=["lambda_max"])  # Trainer(..., callbacks=[callback])
        >>> callback.history
        MonitorHistory(no record yet)
    """

    def __init__(self, *, resume_from: str | os.PathLike[str] | None = None, **settings: Unpack[MonitorSettings]) -> None:
        self._run = Attachment(settings)
        super().__init__(self._run, state_file=MONITOR_FILE, what="the series of measurements", resume_from=resume_from)

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
