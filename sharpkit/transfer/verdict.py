"""Do hyperparameters transfer? Coordinate check, culprits, sharpness and learning rates, as far as needed for a verdict."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from sharpkit._arguments import choice
from sharpkit._calls import public_call
from sharpkit._checkpoint import resumable, step
from sharpkit._results import ProgressCallback, Result
from sharpkit.training_run import as_seeds
from sharpkit.transfer.coordinates import CoordinateCheck, check_of
from sharpkit.transfer.culprits import MINIMAL_ERRORS, MINIMAL_EXPONENT, Culprit, culprits_in
from sharpkit.transfer.learning_rates import PRECISION, TOLERANCE, LearningRateTransfer, RunStore, expected_runs, learning_rate_transfer
from sharpkit.transfer.observing import observe
from sharpkit.transfer.setup import Family, RunProgress, check_sizes, duration, family_call
from sharpkit.transfer.sharpness import SharpnessTransfer, sharpness_transfer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of the coordinate check and the culprits, as in experiments/transfer_faults.py, which named every planted rule after so many.
PROXY_STEPS = 4
MOST = 8  # times the largest size measured, by judgement: three doublings beyond, over which a slope of logarithms may be extrapolated
OCTAVES = 0.5  # shift of the optimum that is allowed, by judgement: the grid of rates that were run is no finer
PENALTY = 0.02  # of the loss, by judgement: where the bowl is so flat that a larger shift costs less than this, it is allowed too
WIDEST = 1.0  # octaves, by judgement: the parabola is fitted to points up to 1.5 octaves off, and is not trusted at its rim
_OBSERVING = 3  # times the cost of the training steps, by judgement: putting back every tensor takes about as long as two more steps each
_PRODUCTS = 3  # for each sharpness: from the last vector it needs two to three (docs/transfer_rates.md), each about as long as two steps


class _Amounts(NamedTuple):
    """How much of everything a mode does."""

    sharpness_steps: int
    sharpness_every: int
    rate_steps: int
    until_certain: bool


# By judgement: quick mode gives an MLP's verdict within three minutes on one core (seconds in docs/transfer_rates.md); full mode takes the
# steps of the experiments behind that page and more.
_AMOUNTS = {"quick": _Amounts(40, 4, 60, True), "full": _Amounts(200, 10, 150, False)}

_COST = "carrying the smallest size's best rate to the largest"
RULE = (
    f"does not transfer: a rule of the parametrisation is broken (its exponent is off by more than {MINIMAL_EXPONENT} and by more than "
    f"{MINIMAL_ERRORS:g} standard errors), or {_COST} costs more than {TOLERANCE:.0%} of the loss there by its whole 95 % interval, and "
    f"the best rate drifts over three sizes or more; transfers: the coordinate check passes and {_COST} costs at most {TOLERANCE:.0%}, by "
    f"its interval at most {PRECISION:.0%}; anything else is undecided, as are data that the networks fit"
)


# -- how far it reaches -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reach(Result):
    """The range of sizes in which one learning rate does."""

    proxy: int  # the size whose optimum it is
    octaves: float  # shift of the optimum that is allowed: half an octave, or what costs penalty of the loss if that is more
    penalty: float  # relative loss
    value: float  # largest size by the drift itself
    lower: float  # largest size by the end of the drift's 95 % interval that is furthest from zero: with 97.5 % confidence
    upper: float  # largest size by the end nearest to zero
    measured: int  # largest size measured
    cap: float  # the size beyond which nothing is claimed; values stop there

    def sentence(self, dimension: str) -> str:
        """In words, with the interval."""

        def shown(size: float) -> str:
            return f"at least {self.cap:.0f}" if size >= self.cap else f"{size:.0f}"

        below = ", less than was measured" if self.lower < self.measured else ""
        interval = f"95 % interval {shown(self.lower)} to {shown(self.upper)}{below}"
        if self.lower >= self.cap:
            interval = "the whole 95 % interval lies beyond"
        return (
            f"The best rate of {dimension} {self.proxy} is predicted to stay within {self.octaves:.2g} octaves of the best one "
            f"up to {dimension} {shown(self.value)} ({interval}); past {self.cap:.0f} nothing is claimed."
        )


def reach(rates: LearningRateTransfer, *, octaves: float = OCTAVES, penalty: float = PENALTY) -> Reach | None:
    """By a drift d the optimum at size w has moved by d log2(w / proxy) octaves: up to which size that is allowed; None if d is not known.

    Allowed is a shift up to the larger of ``octaves`` and what costs ``penalty`` of the loss at the largest size, at most one octave.
    """
    if not rates.drift.known:
        return None
    curvature = rates.optima[-1].curvature  # of log loss: (1 + penalty) is reached where curvature x^2 = log(1 + penalty)
    flat = math.sqrt(math.log1p(penalty) / curvature) if curvature > 0 else 0.0
    allowed = max(octaves, min(flat, WIDEST))
    first, last = rates.sizes[0], rates.sizes[-1]
    cap = float(MOST * last)
    low, high = rates.drift.interval
    # an interval that holds 0 has no end nearest to it: up to any size the optimum may stay
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))

    def size(slope: float) -> float:
        doublings = allowed / abs(slope) if slope else math.inf
        return min(first * math.exp2(min(doublings, 64.0)), cap)  # 2^64 is beyond any cap, and not yet infinite

    return Reach(first, allowed, penalty, size(rates.drift.value), size(max(abs(low), abs(high))), size(least), last, cap)


# -- the verdict --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Verdict(
    Result,
    kind="transfer_verdict",
    strict=True,
    saved=(
        *("passed", "headline", "rule", "mode", "widths", "depths", "culprits", "reach", "findings=conclusions", "ended", "seconds"),
        "parts",
    ),
):
    """The answer of :func:`diagnose`; its document holds those of all measurements, each with its own findings, under ``"parts"``."""

    rule: ClassVar[str] = RULE
    widths: tuple[int, ...]  # asked for
    depths: tuple[int, ...]
    mode: str  # "quick" or "full"
    checks: tuple[CoordinateCheck, ...]  # coordinate checks, over widths and, if asked, depths
    culprits: tuple[Culprit, ...]  # broken rules, the strongest first of each dimension
    sharpness: SharpnessTransfer | None  # over widths; None if a broken rule decided before
    rates: tuple[LearningRateTransfer, ...]  # over widths, and depths in full mode; empty if a broken rule decided before
    reach: Reach | None  # the range in which the smallest width's learning rate does; None if the drift is not known
    ended: str  # why it ended before everything was measured; empty otherwise
    seconds: float  # wall time

    @property
    def passed(self) -> bool | None:
        """True: transfers; False: does not; None: what was measured cannot tell. :attr:`rule` says when."""
        # sharpness decides nothing: at the edge of stability it agrees at all widths in any parametrisation (docs/transfer_rates.md)
        drifts = [rates.passed for rates in self.rates]
        if self.culprits or False in drifts:
            return False
        return True if drifts and all(drifts) and all(check.passed for check in self.checks) else None

    @property
    def headline(self) -> str:
        """The verdict in one sentence."""
        over = f"from width {self.widths[0]} to {self.widths[-1]}"
        if self.depths:
            over += f" and depth {self.depths[0]} to {self.depths[-1]}"
        if self.passed is None:
            undetermined = any(rates.undetermined for rates in self.rates)
            why = ": this task does not determine a best rate" if undetermined and not self.culprits else ""
            return f"UNDECIDED whether hyperparameters transfer {over}{why}."
        if self.passed:
            return f"Hyperparameters TRANSFER {over}."
        why = "; ".join(dict.fromkeys(culprit.rule for culprit in self.culprits)) or "the best learning rate drifts"
        return f"Hyperparameters DO NOT TRANSFER {over}: {why}."

    @property
    def conclusions(self) -> list[str]:
        """The verdict, the culprits and how far it reaches: what no single measurement says."""
        sentences = [self.headline, *(f"Culprit: {culprit}." for culprit in self.culprits)]
        if self.passed is None and any(rates.passed for rates in self.rates):
            sentences.append(
                "The best learning rate transfers over the sizes measured, but the coordinate check does not pass: "
                "at larger sizes the best rate may move."
            )
        if self.reach is not None:
            sentences.append(self.reach.sentence("width"))
        else:
            sentences.append("No range of widths is claimed: the drift of the best learning rate was not measured.")
        return [*sentences, self.ended] if self.ended else sentences

    @property
    def findings(self) -> list[str]:
        """The conclusions, then what each measurement says."""
        sentences = self.conclusions
        for check in self.checks:
            sentences += [f"Coordinates over {check.dimension}s: {text.removesuffix('.')}." for text in check.findings()]
        if self.sharpness is not None:
            sentences += self.sharpness.findings()
        return sentences + [text for rates in self.rates for text in rates.findings()]

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"* {sentence}" for sentence in self.findings[1:])])

    def parts(self) -> list[dict[str, Any]]:
        """The documents of all measurements, in the order they were made."""
        sharpness = () if self.sharpness is None else (self.sharpness,)
        return [result.to_dict() for result in (*self.checks, *sharpness, *self.rates)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """All that was measured side by side: coordinates, sharpness, learning rates."""
        from sharpkit.plots.transfer import plot_transfer_verdict

        return plot_transfer_verdict(self.to_dict(), ax=ax)


@public_call
@resumable(family_call)
def diagnose(
    build: Callable[..., torch.nn.Module],
    *,
    widths: Sequence[int],
    optimizer: Callable[..., torch.optim.Optimizer],
    data: Any,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    closure: Callable[..., torch.Tensor] | None = None,
    depths: Sequence[int] | None = None,
    mode: Literal["quick", "full"] = "quick",
    seeds: int | Sequence[int] = 3,
    store: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> Verdict:
    """Say whether hyperparameters tuned on a small network will do for a large one, and if not, why not.

    First the cheap coordinate check and the search for broken rules, a few steps at each size. Quick mode ends there if a rule is broken.
    Then sharpness along training; then learning rates: quick mode measures the smallest and the largest width and the others only until
    it is decided what carrying the best rate over costs; full mode measures all, longer, whatever came before. If that interval is too wide
    to decide, it is measured once more with twice the seeds; where the data are fitted there is nothing to decide.

    Args:
        build: width -> freshly initialised model; with ``depths``, also ``build(width, depth=...)``.
        widths: at least three.
        optimizer: (model, width) -> its optimizer; with ``depths``, it may take ``depth=`` too.
        data, loss, closure: as for :func:`sharpkit.transfer.learning_rate_transfer`.
        depths: at least three, each at the smallest width.
        mode: ``"quick"`` or ``"full"``.
        seeds: how many runs, or their seeds, for the coordinate check and the learning rates; sharpness has one run.
        store: file for finished runs of the learning rates, so that a killed diagnosis continues where it stopped.
        checkpoint: a folder from which the whole diagnosis goes on if it is killed and made again, after the last run that ended.
        callback: called with a :class:`sharpkit.Progress`: a forecast of the cost first, then a sentence for each measurement.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: too few sizes, or another mode.
        TypeError: depths, and ``build`` takes no ``depth``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> verdict = diagnose(  # PyTorch's own initialisation and one rate for all widths
        ...     lambda n: nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2)),
        ...     widths=[64, 128, 256], optimizer=lambda model, n: torch.optim.Adam(model.parameters(), lr=1e-3),
        ...     data=(x, (x[:, 0] > 0).long()), loss=nn.functional.cross_entropy)
        >>> verdict.passed
        False
    """
    choice("mode", mode, _AMOUNTS)
    amounts, chosen = _AMOUNTS[mode], as_seeds(seeds)
    across = check_sizes(widths, least=3)
    deep = check_sizes(depths, dimension="depth", least=3) if depths is not None else ()
    families = [(Family(build, optimizer, data, loss, closure), across)]
    if deep:
        families.append((_by_depth(build, optimizer, across[0], data, loss, closure), deep))
    swept = families if mode == "full" else families[:1]
    sweeps = sum(sum(expected_runs(len(sizes), len(chosen))) for _, sizes in swept)
    progress = RunProgress(callback, sum(len(sizes) for _, sizes in families) * len(chosen) + len(across) + sweeps)
    for family, sizes in families:
        progress.tell(_forecast(family, sizes, amounts, len(chosen)))

    checks: list[CoordinateCheck] = []
    culprits: list[Culprit] = []
    for family, sizes in families:

        def short(family: Family = family, sizes: tuple[int, ...] = sizes) -> tuple[CoordinateCheck, tuple[Culprit, ...]]:
            seen = observe(family, sizes, steps=PROXY_STEPS, seeds=chosen, effects=True)  # both from the same short runs
            return check_of(seen), culprits_in(family, seen, seeds=chosen)

        check, named = step(f"coordinates over {family.dimension}s", short, whole=True)
        checks.append(check)
        culprits += named
        passes = "pass" if checks[-1].passed else "do not pass"
        text = f"coordinates over {family.dimension}s: {passes}; broken rules: {', '.join(c.rule for c in named) or 'none'}"
        progress.tell(text, runs=len(sizes) * len(chosen))

    # cheapest first: a broken rule takes seconds to name, and no measurement of rates could overrule it
    sharpness, rates, ended = None, [], ""
    if culprits and mode == "quick":
        ended = "Quick mode ended here, since a rule is broken: sharpness and learning rates were not measured."
    else:
        family = families[0][0]
        sharpness = sharpness_transfer(
            family.build,
            across,
            optimizer=family.optimizer,
            data=family.batches,
            loss=loss,
            closure=closure,
            steps=amounts.sharpness_steps,
            every=amounts.sharpness_every,
            callback=progress.part(),
        )
        runs = RunStore(store)
        rates = [_rates(family, sizes, amounts, chosen, runs, progress) for family, sizes in swept]
        if len(rates[0].sizes) < len(across):
            what = "no further one determines a best rate" if rates[0].undetermined else "those between would not change the verdict"
            ended = f"Learning rates were measured at width {', '.join(map(str, rates[0].sizes))} only: {what}."
    # over depths nothing is claimed: no experiment has followed a drift that far
    reaches = reach(rates[0]) if rates else None
    return Verdict(across, deep, mode, tuple(checks), tuple(culprits), sharpness, tuple(rates), reaches, ended, progress.seconds)


def _rates(
    family: Family, sizes: tuple[int, ...], amounts: _Amounts, seeds: tuple[int, ...], store: RunStore, progress: RunProgress
) -> LearningRateTransfer:
    """If the interval of the cost is too wide to decide, again with twice the seeds, whose first half is in the store."""
    # numbers that were not given, so that no run is counted twice
    more = tuple(range(max(seeds) + 1, max(seeds) + 1 + len(seeds)))
    for chosen in (seeds, seeds + more):
        if chosen is not seeds:
            progress.expected += sum(expected_runs(len(sizes), len(chosen)))
            progress.tell(f"the interval of the cost over {family.dimension}s is too wide: {len(chosen)} seeds")
        rates = learning_rate_transfer(
            family.build,
            sizes,
            optimizer=family.optimizer,
            data=family.batches,
            loss=family.loss,
            closure=family.closure,
            steps=amounts.rate_steps,
            seeds=chosen,
            store=store,
            dimension=family.dimension,
            until_certain=amounts.until_certain,
            callback=progress.part(),
        )
        # once is enough: an interval that twice the seeds leave too wide needs longer runs or further sizes instead
        if rates.passed is not None or rates.undetermined:
            break
    return rates


def _forecast(family: Family, sizes: Sequence[int], amounts: _Amounts, seeds: int) -> str:
    """At most: learning rates at every size, no early end."""
    each = family.step_seconds(sizes)
    short = sum(each) * seeds * PROXY_STEPS * _OBSERVING
    sharp = sum(each) * amounts.sharpness_steps * (1 + 2 * _PRODUCTS / amounts.sharpness_every)
    rates = sum(t * n for t, n in zip(each, expected_runs(len(sizes), seeds), strict=True)) * amounts.rate_steps
    return (
        f"cost over {family.dimension}s, from a timed step: coordinates {duration(short)}, sharpness {duration(sharp)}, "
        f"learning rates at most {duration(rates)}"
    )


def _by_depth(build: Any, optimizer: Any, width: int, data: Any, loss: Any, closure: Any) -> Family:
    """Networks of one width by depth."""
    if not _takes_depth(build):
        raise TypeError("with depths, build must take the depth too: build(width, depth=...)")
    knows = _takes_depth(optimizer)  # not every parametrisation changes its rates with the depth

    def optimizer_of(model: torch.nn.Module, depth: int) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = optimizer(model, width, depth=depth) if knows else optimizer(model, width)
        return made

    return Family(lambda depth: build(width, depth=depth), optimizer_of, data, loss, closure, dimension="depth")


def _takes_depth(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False
    return "depth" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
