"""Learn the learning rate, and on request the momentum, from curvature while training."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._arguments import choice, flag, real, whole
from sharpkit._calls import no_bars
from sharpkit._errors import SharpkitWarning, UnsupportedError
from sharpkit._results import State
from sharpkit.learner.gauge import BULKS, Gauge
from sharpkit.learner.history import Decision, LearnerHistory
from sharpkit.learner.rate import LearnedRate, Pace
from sharpkit.learner.rollback import GoodPoints, LossWatch
from sharpkit.learner.schedules import DECAYS, Multiplier, Schedule
from sharpkit.learner.validation import Validation
from sharpkit.linalg.results import Estimate
from sharpkit.objective.batches import Batch
from sharpkit.objective.distributed import find_ranks
from sharpkit.objective.guard import unwrap
from sharpkit.objective.loss import checked_reading
from sharpkit.objective.objective import Closure, Objective, ObjectiveMaker, check_model, check_settings
from sharpkit.objective.params import ParamSelector, select_params
from sharpkit.operators.hessian import HessianOperator
from sharpkit.optimizers import (
    check_trains,
    current_momentum,
    has_heavy_ball,
    held_parameters,
    learning_rate,
    limit_rule,
    relative_rates,
    set_learning_rates,
    set_momentum,
    unwrap_optimizer,
)

logger = logging.getLogger(__name__)

_CHECK_EVERY = 8  # steps between looks at the losses, each of which waits for the device; by judgement
_MAX_ROLLBACKS = 8  # by judgement: a run that is lost more often has another cause than the rate
_STATE_VERSION = 5  # of the layout, counted by convention; 5 since the held-out loss is looked at
_TURNED = 0.25  # of the rate, from where the held-out loss has turned; by judgement
_MOST_FAILURES = 3  # first measurements that may fail before training goes on with the rate given; by judgement


# Also used by the trainers' callbacks, whose learner is made later than they are, when the number of steps is known.
def check_learner_settings(total_steps: int, interval: int | str, budget: float, safety: float, warmup: float, decay: Any) -> None:
    """Raise ValueError if a setting of the learner makes no sense."""
    whole("total_steps", total_steps, least=20, hint="it counts the optimizer steps of the whole run")
    if not isinstance(interval, str) or interval != "auto":
        whole("interval", interval, other="'auto'")
    for name, value in (("budget", budget), ("safety", safety), ("warmup", warmup)):
        real(name, value, above=0, below=1)
    if not callable(decay):
        choice("decay", decay, DECAYS, other="a function of the share of steps done")


def check_momentum(momentum: str, bulk: str | float, *, accelerates: bool) -> None:
    """Raise ValueError if a learner's choice of momentum makes no sense."""
    choice("momentum", momentum, ("keep", "polyak"))
    if momentum == "polyak" and not accelerates:
        raise ValueError("momentum='polyak' is for SGD: Adam's beta1 and a schedule-free momentum average, they do not accelerate")
    if isinstance(bulk, str):
        choice("bulk", bulk, BULKS, other="a number")
    else:
        real("bulk", bulk, above=1, other="a text", hint="it is the ratio of lambda_max to the bulk")


_SAVED = (
    "step=_step", "rate=_rate", "ratios=_ratios", "given_ratios=_first_ratios", "batch_size=_batch_size", "last_size=_last_size",
    "rollbacks=_rollbacks",
)  # fmt: skip
_PARTS = (
    "recent=_recent", "losses=_losses", "multiplier=_multiplier", "gauge=_gauge", "points=_points", "blamed=_blamed",
    "validation=_validation", "history",
)  # fmt: skip


class CurvatureLearner(State, version=_STATE_VERSION, saved=(*_SAVED, *_PARTS)):
    """Sets the learning rate of SGD or Adam(W) from the curvature of the batches it trains on; the rate given does not matter.

    The first step is made with rate 0, to see a batch. From 2 % of ``safety`` times the stability limit, the rate grows by a constant
    factor a step; at a few points on the way lambda_max of the batch's Hessian (of D^-1 H for Adam) is measured, by a handful of
    products. When the rate meets ``safety`` times the limit at the current rate (training at a higher rate changes the sharpness), it
    stops growing: it is set by the mean curvature of that batch and a few more, and decays to 0 at the end. Later measurements only lower
    it, unless the batch size changes: then the limit is measured at once and the rate grows anew, by the ratio of the batch sizes at most.
    If half of the progress is lost or the loss is not finite, parameters and optimizer state go back to the last good point, some 16 to 32
    steps before, with half the rate; with the same rate where a loss that was good became NaN or infinite at once, as by a broken batch.

    Call :meth:`step` after ``optimizer.step()``. Every decision is in :attr:`history`, with its reason.

    Args:
        optimizer: one whose limit is known: most of torch.optim's, Prodigy, or a schedule-free one (in train mode, with
            ``decay="constant"``). Groups keep the ratio of their rates to the first group's.
        model: the model that it trains.
        loss, closure, count, params, mode, autocast, process_group: as in :class:`sharpkit.Monitor`.
        total_steps: T, optimizer steps of the whole run.
        interval: steps between measurements once the rate has settled; with ``"auto"``, as ``budget`` allows.
        budget: share of the training cost that measurements may take, both counted in gradients.
        safety: share of the stability limit to settle at.
        warmup: share of T in which the rate grows 50-fold.
        decay: ``"linear"``, ``"cosine"``, ``"constant"``, or a function of the share z of steps done, such as
            :func:`sharpkit.refined_schedule` gives.
        schedule: optimizer -> a torch learning-rate scheduler, called twice; its rate, relative to its peak in total_steps, multiplies the
            learned one. Not ReduceLROnPlateau, whose step needs a metric, nor several lambdas.
        momentum: ``"keep"`` or ``"polyak"``: Polyak's momentum from lambda_max and the bulk curvature, at most 0.98, from where the rate
            settles on (SGD only).
        bulk: what counts as the lower end of the curvature: the ratio of lambda_max to it, or ``"median"``, ``"weighted median"`` or
            ``"mean"`` of a quadrature, at 20 gradients each time.
        per_group: measure each group's own block and give it its own rate.
        max_lr: upper bound of the rate.
        peak: a rate to grow to instead of a share of the limit, such as :func:`sharpkit.suggest_learning_rate` gives for this schedule: the
            curvature of a few batches cannot tell where over-fitting begins, nor Adam's limit before its moments have formed. The stability
            limit (but for adaptive optimizers) and lost runs still lower it.
        seed: seeds the random probes and dropout masks.

    Raises:
        TypeError, ValueError, UnsupportedError: arguments that make no sense. Later on nothing is raised.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
        >>> learner = sk.CurvatureLearner(optimizer, model=model, loss=torch.nn.functional.mse_loss, total_steps=100)
        >>> batch = (torch.eye(2), torch.ones(2, 1))
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        ...     optimizer.step()
        ...     decision = learner.step(batch)
        >>> round(learner.lr, 2), bool((model.weight - 1).abs().max() < 0.01)
        (0.5, True)

    References:
        Granziol, Zohren and Roberts (2022), arXiv 2006.09092, for learning rates from batch Hessians; the rule here is sharpkit's own.
    """

    _recent: list[tuple[int, Tensor | float]]  # (step, loss) not looked at yet
    _ratios: list[float]
    _first_ratios: list[float]
    history: LearnerHistory

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: nn.Module,
        total_steps: int,
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
        peak: float | None = None,
        validation: Any = None,
        mode: str = "train",
        autocast: torch.dtype | None = None,
        process_group: Any = None,
        seed: int = 0,
    ) -> None:
        check_model(model)
        check_settings(loss=loss, closure=closure, count=count, mode=mode, autocast=autocast, seed=seed)
        max_lr, per_group = real("max_lr", max_lr, above=0, infinite=True), flag("per_group", per_group)
        peak = None if peak is None else real("peak", peak, above=0)
        find_ranks(process_group)
        self.optimizer, self.model, self._multiplier = unwrap_optimizer(optimizer), unwrap(model), Multiplier(schedule)
        select_params(self.model, params, may_be_sharded=True)
        check_trains(self.optimizer, self.model)
        adaptive = limit_rule(self.optimizer).adaptive
        check_learner_settings(total_steps, interval, budget, safety, warmup, decay)
        check_momentum(momentum, bulk, accelerates=has_heavy_ball(self.optimizer))
        total_steps, budget, safety, warmup = int(total_steps), float(budget), float(safety), float(warmup)  # of NumPy or a tensor, perhaps
        self._multiplier.rehearse(total_steps)
        self.total_steps, self.safety, self.seed = total_steps, safety, seed
        self._decay: Schedule = DECAYS[decay] if isinstance(decay, str) else decay
        self._polyak, self._bulk, self._per_group = momentum == "polyak", bulk, per_group
        settings: dict[str, Any] = {"loss": loss, "closure": closure, "count": count, "mode": mode}
        settings |= {"autocast": autocast, "process_group": process_group, "seed": seed}
        self._validation: Validation | None = None
        if validation is not None:
            held_out = Objective(self.model, validation, params=params, **{**settings, "mode": "eval"})
            self._validation = Validation(held_out, total_steps=total_steps, budget=budget, seed=seed)
        held = partial(held_parameters, self.optimizer)
        self._maker = ObjectiveMaker(self.model, held, params=params, probe=None, max_samples=None, settings=settings)
        self._given, self._ratios = learning_rate(self.optimizer), relative_rates(self.optimizer)
        self._first_ratios = self._ratios
        self._pace = Pace(total_steps, start=LearnedRate.start_share, warmup=warmup, budget=budget, interval=interval, adaptive=adaptive)
        self._gauge = Gauge(self.optimizer, adaptive=adaptive, seed=seed)
        self._losses = LossWatch()
        self._points, self._recent = GoodPoints(), []
        self._blamed = -1  # step of the point gone back to last: what is lost from there again is the rate's fault
        self._step, self._batch_size, self._last_size, self._rollbacks = 0, 0, 0, 0
        self._rate = LearnedRate(self._pace, safety=safety, max_lr=max_lr, peak=peak, keeps_limit=not adaptive)
        self._warned: set[str] = set()
        self.history = LearnerHistory()
        self._apply()

    # -- the one call in the loop -------------------------------------------------------------------------------------------------
    def step(self, batch: Batch, *, loss: Tensor | float | None = None) -> Decision | None:
        """Note one optimizer step, and set the rate of the next.

        Args:
            batch: the batch that the step was made on; a list of micro-batches if gradients were accumulated.
            loss: loss of the batch if at hand; without it, a lost run is only noticed at measurements.

        Returns:
            the decision if one was made.
        """
        loss = checked_reading(loss)
        self._step += 1
        self._multiplier.advance()  # after optimizer.step(), as torch asks of a scheduler
        if loss is not None:
            self._recent.append((self._step, loss))
        decision, looks, heard = None, self._step % _CHECK_EVERY == 0, bool(self._recent)
        if looks and self._is_lost():
            decision = self._go_back()
        elif self._is_time(self._maker.samples_of(batch)):
            with no_bars():  # the training loop has its own
                decision = self._measure(batch)
        else:
            self._rate.grow()
        if looks and heard and decision is None:
            self._advance_point()
        decision = self._validate() or decision
        self._apply()
        return decision

    def _is_time(self, samples: int) -> bool:
        """Whether to measure on this batch: at once if its size is a new one, but not on the odd last batch of an epoch."""
        usual, repeated = 0 in (samples, self._batch_size) or samples == self._batch_size, samples == self._last_size
        self._last_size = samples
        return self._pace.is_due(self._step) if usual else repeated  # two batches in a row of another size are a new size

    @property
    def lr(self) -> float:
        """The learned peak rate of the first group, before decay."""
        return self._rate.value

    # -- measuring and deciding ---------------------------------------------------------------------------------------------------
    def _measure(self, batch: Batch) -> Decision:
        samples = self._maker.samples_of(batch)
        changed = 0 not in (samples, self._batch_size) and samples != self._batch_size
        if changed:
            # losses of another batch size have another level and scatter
            self._rate.grow_anew(samples / self._batch_size, step=self._step)
            self._losses.restart()
            self._recent.clear()
        self._batch_size = samples or self._batch_size  # 0 where they cannot be counted: the measurement will say why
        try:
            objective, _ = self._maker.over(batch, part=1.0, seed=self.seed + self._step)
            if not self._recent:  # no loss= was given to step: without one, nothing could tell a good point
                self._recent.append((self._step, objective.value()))
            hessian = HessianOperator(objective)
            if self._per_group:  # first: the limit is that of the ratios which are then used
                self._ratios = self._gauge.group_ratios(hessian, self._first_ratios)
            measured, rule = self._gauge.measure(hessian, self._ratios, step=self._step)
            if not rule.gain:
                raise UnsupportedError(f"the {rule.name} takes no steps yet, so nothing bounds its rate")
        except Exception as error:  # whatever it was, training goes on
            cause = f"{type(error).__name__}: {error}"
            reason = f"not measured ({cause}); the rate stays"
            if self._rate.value == 0 and len(self.history) >= _MOST_FAILURES - 1:
                self._rate.settle_at(self._given)
                reason = f"not measured {_MOST_FAILURES} times ({cause}); goes on with the rate given, {self._given:.3g}"
            self._warn(reason)
            self._pace.plan(self._step, settled=self._rate.settled, growing=self._rate.growing)
            return self._record(None, math.nan, reason)
        # without positive curvature nothing bounds the rate but its growth; beyond the ceiling it would change no step
        limit = min(rule.max_learning_rate(max(measured.value, 1e-30)), rule.ceiling)
        decay = self._decay(self._step / self.total_steps)
        loss = float(self._recent[-1][1])
        reason = self._rate.decide(limit, step=self._step, decay=decay, losses=self._losses, batch_size=samples, changed=changed, loss=loss)
        if self._polyak and self._rate.settled:
            reason += self._set_momentum(hessian, measured.value)
        self._remember_if_good()
        self._pace.plan(self._step, settled=self._rate.settled, growing=self._rate.growing)
        return self._record(measured, limit, reason)

    def _limit_at(self, curvature: float) -> float:
        """Largest stable rate, with the optimizer's present momentum and weight decay."""
        return limit_rule(self.optimizer, ratios=self._ratios).max_learning_rate(curvature)

    def _set_momentum(self, hessian: HessianOperator, largest: float) -> str:
        """Set Polyak's momentum, keeping the rate's share of the limit, which changes with it; returns what was done, in words."""
        try:
            momentum = self._gauge.polyak_momentum(hessian, largest, self._bulk, step=self._step)
        except Exception as error:
            return f"; momentum not measured ({type(error).__name__}: {error})"
        if momentum is None:
            return "; no positive curvature to read a momentum from"
        before = self._limit_at(largest)
        set_momentum(self.optimizer, momentum)
        self._rate.scale(self._limit_at(largest) / before)
        return f"; momentum {momentum:.3g}, with the rate at the same share of its limit, {self._rate.value:.3g}"

    # -- going back ------------------------------------------------------------------------------------------------------------------
    def _is_lost(self) -> bool:
        self._look_at_losses()
        # agreed on, as a process with other batches may see it earlier
        return self._rollbacks < _MAX_ROLLBACKS and bool(self._maker.agree(float(self._losses.is_lost)))

    def _go_back(self) -> Decision:
        losses, points = self._losses, self._points
        reason = f"the loss rose to {losses.mean:.3g} (best {losses.best:.3g})"
        if losses.broken is not None:
            reason = f"the loss was {losses.broken[1]} at step {losses.broken[0]} (mean before {losses.mean:.3g})"
        # agreed on: one process's broken batch breaks all
        faulty = self._maker.agree(float(losses.is_lost and not (losses.broken is not None and losses.was_good)))
        faultless = not faulty and points.step > self._blamed
        if not faultless:
            self._rollbacks += 1
            self._rate.back_off()
        rate = "the same rate" if faultless else "half the rate"
        self._blamed = points.step
        back = points.restore(self.model, self.optimizer)
        reason += f": back to step {points.step}, the last good point, with {rate}" if back else f": no point to go back to yet; {rate}"
        losses.come_back()
        self._warn(reason)
        return self._record(None, math.nan, reason)

    def _look_at_losses(self) -> None:
        for step, loss in self._recent:
            self._losses.add(float(loss), step=step)
        self._recent.clear()

    def _remember_if_good(self) -> None:
        self._look_at_losses()
        if not self._maker.agree(float(not self._losses.is_good)):  # on every process, so that all go back to the same point
            self._points.keep(self.model, self.optimizer, step=self._step, rate=self._rate.value)
            self._rate.remember()

    def _advance_point(self) -> None:
        good = not self._maker.agree(float(not self._losses.is_good))
        self._points.advance(self.model, self.optimizer, step=self._step, rate=self._rate.value, good=good)
        self._rate.remember(self._points.rate)

    def _validate(self) -> Decision | None:
        """Look at the held-out loss, if it is time, and go back where it has turned."""
        held_out = self._validation
        if held_out is None or not self._batch_size or not held_out.is_due(self._step, self._batch_size):
            return None
        self._look_at_losses()
        turned = held_out.look(self.model, self.optimizer, step=self._step, trained=self._losses.mean)
        if not self._maker.agree(float(turned)):
            return None
        last = self._step == self.total_steps
        reason = f"the held-out loss rose to {held_out.last_loss:.3g} (best {held_out.best_loss:.3g}): back to step {held_out.best_step}"
        if not last:
            self._rate.settle_at(self._rate.value * _TURNED)
            reason += ", with a quarter of the rate"
        held_out.go_back(self.model, self.optimizer)
        self._points.keep(self.model, self.optimizer, step=held_out.best_step, rate=self._rate.value)
        self._losses.come_back()
        return self._record(None, math.nan, reason)

    # -- small parts -----------------------------------------------------------------------------------------------------------------
    def _apply(self) -> None:
        factor = self._decay(min(self._step / self.total_steps, 1.0)) * self._multiplier.value
        set_learning_rates(self.optimizer, [self._rate.value * ratio * factor for ratio in self._ratios])

    def _record(self, measured: Estimate | None, limit: float, reason: str) -> Decision:
        self._apply()
        decision = Decision(
            step=self._step,
            lr=self._rate.value,
            lr_in_use=learning_rate(self.optimizer),
            momentum=current_momentum(self.optimizer),
            lambda_max=math.nan if measured is None else measured.value,
            stderr=math.nan if measured is None else measured.stderr,
            max_lr=limit,
            batch_size=self._batch_size,
            num_matvecs=0 if measured is None else measured.num_matvecs,
            loss=self._losses.mean,
            reason=reason,
        )
        self.history.append(decision)  # failures too: every change of the rate, and every reason why it stayed, is in the history
        logger.info("%s", decision)
        return decision

    def _warn(self, reason: str) -> None:
        kind = reason.split(":", maxsplit=1)[0].split("(")[0][:20]  # once a kind: the numbers in a reason differ each time
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"the learner at step {self._step}: {reason}", SharpkitWarning, stacklevel=4)

    # -- saving ----------------------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that the next decision depends on, with the point to go back to: plain containers and tensors."""
        self._recent = [(step, float(loss)) for step, loss in self._recent]  # tensors would keep their device
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved learner stopped; the model and the optimizer are loaded by the user.

        Raises:
            DocumentError: a state of another version, or one that lacks something; a ValueError.
        """
        super().load_state_dict(state)
        self._apply()

    def __repr__(self) -> str:
        return (
            f"CurvatureLearner({type(self.optimizer).__name__}, step {self._step} of {self.total_steps}, lr {self.lr:.3g}, "
            f"{'settled' if self._rate.settled else 'growing'}, {len(self.history)} decisions)"
        )
