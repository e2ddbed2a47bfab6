"""A learner inside somebody else's training loop: made when it starts, given the batches of each step, saved with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._errors import SharpkitWarning
from sharpkit.integrations._gathering import Gathering, Log
from sharpkit.training._arguments import check_learner_settings, check_momentum
from sharpkit.training.decisions import Decision, LearnerHistory
from sharpkit.training.learner import CurvatureLearner

_LEAST_STEPS = 20  # that a learner takes


class LearnerRun(Gathering):
    """What the learner callbacks of all trainers share.

    Args:
        settings: the arguments of :class:`sharpkit.CurvatureLearner`; ``total_steps`` may be None.

    Raises:
        ValueError: settings that no training could go with.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        checked = {name: settings[name] for name in ("interval", "budget", "safety", "warmup", "decay")}
        check_learner_settings(_LEAST_STEPS if settings["total_steps"] is None else settings["total_steps"], **checked)
        check_momentum(settings["momentum"], settings["bulk"], adaptive=False)
        super().__init__(settings, callback="LearnerCallback")
        self.learner: CurvatureLearner | None = None
        self._log: Log | None = None
        self._warned = False

    @property
    def history(self) -> LearnerHistory:
        """The decisions so far; empty before training."""
        return self.learner.history if self.learner is not None else LearnerHistory()

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, expected: float, done: int, closure: Callable[..., Tensor], log: Log
    ) -> None:
        """Make the learner; it goes on where a loaded state, or its own last training of the same model, stopped.

        Args:
            model: what is trained.
            optimizer: in use, unwrapped.
            expected: optimizer steps of the whole training as the trainer knows it.
            done: of them.
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
            warnings.warn(
                f"training goes on at step {done}, but no state of a learner was saved: it begins anew, for the remaining "
                f"{settings['total_steps']} steps",
                SharpkitWarning,
                stacklevel=3,
            )
        for group in optimizer.param_groups:  # a scheduler may have begun at 0, which says nothing about the groups' ratios
            if "initial_lr" in group and not isinstance(group["lr"], Tensor):
                group["lr"] = group["initial_lr"]
        self.learner = CurvatureLearner(optimizer, model=model, **settings)
        if saved:
            self.learner.load_state_dict(saved)
        self.forget()

    def _total_steps(self, expected: float) -> int:
        given = self.settings["total_steps"]
        if given is not None:
            return int(given)
        if not 0 < expected < float("inf"):
            raise ValueError("the Trainer does not know how many optimizer steps it will make: pass LearnerCallback(total_steps=...)")
        return int(expected)

    def step(self, batches: list[Any], *, loss: Tensor | None) -> Decision | None:
        """An optimizer step was made on these micro-batches; a decision is logged."""
        if self.learner is None:
            return None
        if not batches:
            if not self._warned:
                self._warned = True
                warnings.warn("a step's batches were not seen: the learned rate stays as it is", SharpkitWarning, stacklevel=3)
            return None
        decision = self.learner.step(batches, loss=loss)
        if decision is not None and self._log is not None:
            self._log({"sharpkit/learned_lr": decision.lr})
        return decision

    def _own_state(self) -> dict[str, Any]:
        return self.learner.state_dict() if self.learner is not None else {}


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The learner's arguments among a callback's."""
    own = ("self", "optimizer", "resume_from", "__class__")
    return {name: value for name, value in arguments.items() if name not in own}
