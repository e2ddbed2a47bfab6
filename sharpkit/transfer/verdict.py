"""Do hyperparameters transfer? Coordinate check, culprits, sharpness and learning rates, as far as needed for a verdict."""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from sharpkit._results import json_ready
from sharpkit.transfer.coordinates import CoordinateCheck, check_of
from sharpkit.transfer.culprits import Culprit, culprits_of
from sharpkit.transfer.learning_rates import LearningRateTransfer, RunStore, duration, learning_rate_transfer, step_seconds
from sharpkit.transfer.observing import observe
from sharpkit.transfer.setup import Family, check_sizes
from sharpkit.transfer.sharpness import SharpnessTransfer, sharpness_transfer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PROXY_STEPS = 4  # by judgement: as many as a coordinate check shows


@dataclass(frozen=True)
class Amounts:
    """How much of everything a mode does."""

    sharpness_steps: int
    sharpness_every: int
    rate_steps: int
    until_certain: bool


AMOUNTS = {"quick": Amounts(40, 4, 60, True), "full": Amounts(200, 10, 150, False)}


def forecast(family: Family, sizes: Sequence[int], amounts: Amounts, seeds: int) -> str:
    """At most: learning rates at every size, no early end."""
    each = step_seconds(family, sizes)
    short = sum(each) * seeds * PROXY_STEPS * 3  # putting back every tensor takes about as long as two more steps
    products = 3 * amounts.sharpness_steps / amounts.sharpness_every
    sharp = sum(each) * (amounts.sharpness_steps + 2 * products)
    rates = sum(each) * amounts.rate_steps * (8 + 7 * (seeds - 1))
    return (
        f"cost over {family.dimension}s, from a timed step: coordinates {duration(short)}, sharpness {duration(sharp)}, "
        f"learning rates at most {duration(rates)}"
    )


def by_depth(build: Any, optimizer: Any, width: int, rest: tuple[Any, Any, Any]) -> Family:
    """Networks of one width by depth.

    Args:
        build: called as build(width, depth=...).
        optimizer: called with ``depth=`` where it takes that.
        width: of all.
        rest: data, loss and closure.

    Raises:
        TypeError: build takes no depth.
    """
    if not _takes_depth(build):
        raise TypeError("with depths, build must take the depth too: build(width, depth=...)")
    knows = _takes_depth(optimizer)
    return Family(
        lambda depth: build(width, depth=depth),
        lambda model, depth: optimizer(model, width, depth=depth) if knows else optimizer(model, width),
        *rest,
        dimension="depth",
    )


def _takes_depth(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "depth" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


MOST = 8  # times the largest size measured: nothing is claimed beyond
OCTAVES = 0.5  # by judgement: a drift up to here costs little (PENALTY says how much)
WIDEST = 1.0  # octaves: the parabola is not trusted further
PENALTY = 0.02  # by judgement: a loss 2 % above the best is within the scatter of seeds


@dataclass(frozen=True)
class Reach:
    """The range of sizes in which one learning rate does.

    Attributes:
        proxy: the size whose optimum it is.
        octaves: shift of the optimum that is allowed: half an octave, or what costs ``penalty`` of the loss if that is more.
        penalty: relative loss.
        value: largest size by the drift itself.
        lower: by the end of its 95 % interval that is furthest from zero: up to there with 97.5 % confidence.
        upper: by the end nearest to zero.
        measured: largest size measured.
        cap: the size beyond which nothing is claimed; values stop there.
    """

    proxy: int
    octaves: float
    penalty: float
    value: float
    lower: float
    upper: float
    measured: int
    cap: float

    def sentence(self, dimension: str) -> str:
        """In words, with the interval."""

        def shown(size: float) -> str:
            return f"at least {self.cap:.0f}" if size >= self.cap else f"{size:.0f}"

        head = f"The best rate of {dimension} {self.proxy} is predicted to stay within {self.octaves:.2g} octaves of the best one"
        below = " - less than was measured" if self.lower < self.measured else ""
        interval = f"95 % interval {shown(self.lower)} to {shown(self.upper)}{below}"
        if self.lower >= self.cap:
            interval = "the whole 95 % interval lies beyond"
        return f"{head} up to {dimension} {shown(self.value)} ({interval}); past {self.cap:.0f} nothing is claimed."

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("proxy", "octaves", "penalty", "value", "lower", "upper", "measured", "cap")
        return {name: getattr(self, name) for name in names}


def reach(rates: LearningRateTransfer, *, octaves: float = OCTAVES, penalty: float = PENALTY) -> Reach | None:
    """The drift d says: at size w the optimum has moved by d log2(w / proxy) octaves.

    Args:
        rates: measured at two sizes or more.
        octaves, penalty: a shift up to the larger of ``octaves`` and what costs ``penalty`` of the loss at the largest size, at most one
            octave, is allowed.

    Returns:
        the range; None where the drift or its interval is not known.
    """
    drift = rates.drift
    if not math.isfinite(drift.value) or not math.isfinite(drift.half_width):
        return None
    curvature = rates.optima[-1].curvature
    flat = math.sqrt(math.log1p(penalty) / curvature) if curvature > 0 else 0.0
    allowed = max(octaves, min(flat, WIDEST))
    first, last = rates.sizes[0], rates.sizes[-1]
    cap = float(MOST * last)
    low, high = drift.interval
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))

    def size(slope: float) -> float:
        doublings = allowed / abs(slope) if slope else math.inf
        return min(first * math.exp2(min(doublings, 64.0)), cap)

    return Reach(first, allowed, penalty, size(drift.value), size(max(abs(low), abs(high))), size(least), last, cap)


Mode = Literal["quick", "full"]
Say = Callable[[str], None]

RULE = (
    "does not transfer: a rule of the parametrisation is broken beyond doubt, or the best learning rate surely drifts; "
    "transfers: the coordinate check passes and the drift is known to be small; anything else is undecided"
)


@dataclass(frozen=True)
class Verdict:
    """What :func:`diagnose` found.

    Attributes:
        widths, depths: asked for.
        mode: ``"quick"`` or ``"full"``.
        checks: coordinate checks, over widths and, where asked, depths.
        culprits: broken rules, the strongest first of each dimension.
        sharpness: over widths; None where the verdict was certain before.
        rates: over widths, and depths in full mode; empty where the verdict was certain before.
        reach: the range in which the smallest width's learning rate does; None where the drift is not known.
        ended: why it ended before everything was measured; empty otherwise.
        seconds: wall time.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    mode: str
    checks: tuple[CoordinateCheck, ...]
    culprits: tuple[Culprit, ...]
    sharpness: SharpnessTransfer | None
    rates: tuple[LearningRateTransfer, ...]
    reach: Reach | None
    ended: str
    seconds: float

    @property
    def passed(self) -> bool | None:
        """True: transfers; False: does not; None: what was measured cannot tell. The rule is ``sharpkit.transfer.verdict.RULE``."""
        drifts = [found.passed for found in self.rates]
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
            return f"UNDECIDED whether hyperparameters transfer {over}."
        if self.passed:
            return f"Hyperparameters TRANSFER {over}."
        why = "; ".join(dict.fromkeys(culprit.rule for culprit in self.culprits)) or "the best learning rate drifts"
        return f"Hyperparameters DO NOT TRANSFER {over}: {why}."

    @property
    def conclusions(self) -> list[str]:
        """The verdict, the culprits and how far it reaches: what no single measurement says."""
        found = [self.headline, *(f"Culprit: {culprit}." for culprit in self.culprits)]
        if self.passed is None and any(rates.passed for rates in self.rates):
            found.append(
                "The best learning rate holds so far, yet the coordinate check does not pass: what grows will show at larger sizes."
            )
        if self.reach is not None:
            found.append(self.reach.sentence("width"))
        else:
            found.append("No range of widths is claimed: the drift of the best learning rate was not measured.")
        return [*found, self.ended] if self.ended else found

    @property
    def findings(self) -> list[str]:
        """The conclusions, then what each measurement says."""
        found = self.conclusions
        for check in self.checks:
            found += [f"Coordinates over {check.dimension}s: {_sentence(s)}" for s in check.findings()]
        if self.sharpness is not None:
            found += self.sharpness.findings()
        return found + [sentence for rates in self.rates for sentence in rates.findings()]

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"* {sentence}" for sentence in self.findings[1:])])

    def parts(self) -> list[dict[str, Any]]:
        """The documents of all measurements, in the order they were made."""
        results: list[Any] = [*self.checks, *([self.sharpness] if self.sharpness is not None else []), *self.rates]
        return [json_ready(result.to_dict()) for result in results]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the documents of all measurements, each with its own findings, under ``"parts"``."""
        document = {
            "kind": "transfer_verdict",
            "version": 1,
            "passed": self.passed,
            "headline": self.headline,
            "rule": RULE,
            "mode": self.mode,
            "widths": list(self.widths),
            "depths": list(self.depths),
            "culprits": [culprit.to_dict() for culprit in self.culprits],
            "reach": self.reach.to_dict() if self.reach is not None else None,
            "findings": self.conclusions,
            "ended": self.ended,
            "seconds": self.seconds,
            "parts": self.parts(),
        }
        ready: dict[str, Any] = json_ready(document)
        return ready

    def plot(self, ax: Axes | None = None) -> Axes:
        """All that was measured side by side: coordinates, sharpness, learning rates."""
        from sharpkit.plots.transfer import plot_transfer_verdict

        return plot_transfer_verdict(self.to_dict(), ax=ax)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def diagnose(
    build: Callable[..., torch.nn.Module],
    *,
    widths: Sequence[int],
    optimizer: Callable[..., torch.optim.Optimizer],
    data: Any,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    closure: Callable[..., torch.Tensor] | None = None,
    depths: Sequence[int] | None = None,
    mode: Mode = "quick",
    seeds: int = 3,
    store: str | os.PathLike[str] | None = None,
    callback: Say | None = None,
) -> Verdict:
    """Say whether hyperparameters tuned on a small network will do for a large one, and if not, why not.

    First the cheap coordinate check and the search for broken rules, a few steps at each size. Quick mode ends there if a rule is broken.
    Then sharpness along training; then learning rates: quick mode measures the smallest and the largest width and the others only until
    the drift is certain; full mode measures all, longer, whatever was found before. A drift that is not known well enough is measured once
    more with twice the seeds.

    Args:
        build: width -> freshly initialised model; with ``depths``, also ``build(width, depth=...)``.
        widths: at least three.
        optimizer: (model, width) -> its optimizer; with ``depths``, it may take ``depth=`` too.
        data, loss, closure: as of :func:`sharpkit.transfer.learning_rate_transfer`.
        depths: at least three, each at the smallest width.
        mode: ``"quick"`` or ``"full"``.
        seeds: of the coordinate check and of the learning rates; sharpness has one.
        store: file for finished runs of the learning rates, to go on after a kill.
        callback: called with words; a forecast of the cost first.

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
    if mode not in AMOUNTS:
        raise ValueError(f"mode must be 'quick' or 'full', got {mode!r}")
    started, amounts = time.perf_counter(), AMOUNTS[mode]
    across = check_sizes(widths, least=3)
    deep = check_sizes(depths, dimension="depth", least=3) if depths is not None else ()
    families = [(Family(build, optimizer, data, loss, closure), across)]
    if deep:
        families.append((by_depth(build, optimizer, across[0], (data, loss, closure)), deep))
    say: Say = callback if callback is not None else lambda line: None
    for family, sizes in families:
        say(forecast(family, sizes, amounts, seeds))

    checks, culprits = _inspect(families, seeds, say)
    sharpness, rates, ended = None, [], ""
    if culprits and mode == "quick":
        ended = "Quick mode ended here, as a broken rule is certain: sharpness and learning rates were not measured."
    else:
        sharpness = _sharpness(*families[0], amounts, say)
        rates = _rates(families if mode == "full" else families[:1], amounts, seeds, RunStore(store), say)
        if len(rates[0].sizes) < len(across):
            ended = f"Learning rates were measured at widths {', '.join(map(str, rates[0].sizes))} only: the drift was certain by then."
    range_ = reach(rates[0]) if rates else None
    return Verdict(across, deep, mode, checks, culprits, sharpness, tuple(rates), range_, ended, time.perf_counter() - started)


Families = Sequence[tuple[Family, tuple[int, ...]]]


def _inspect(families: Families, seeds: int, say: Say) -> tuple[tuple[CoordinateCheck, ...], tuple[Culprit, ...]]:
    """Coordinate check and broken rules from the same short runs."""
    checks: list[CoordinateCheck] = []
    culprits: list[Culprit] = []
    for family, sizes in families:
        seen = observe(family, sizes, steps=PROXY_STEPS, seeds=seeds, effects=True)
        checks.append(check_of(seen))
        named = culprits_of(seen)
        culprits += named
        say(f"coordinates over {family.dimension}s: {'pass' if checks[-1].passed else 'do not pass'}; broken rules: {_names(named)}")
    return tuple(checks), tuple(culprits)


def _names(culprits: Sequence[Culprit]) -> str:
    return ", ".join(culprit.rule for culprit in culprits) or "none"


def _sharpness(family: Family, sizes: Sequence[int], amounts: Amounts, say: Say) -> SharpnessTransfer:
    return sharpness_transfer(
        family.build,
        sizes,
        optimizer=family.optimizer,
        data=family.batches,
        loss=family.loss,
        closure=family.closure,
        steps=amounts.sharpness_steps,
        every=amounts.sharpness_every,
        callback=say,
    )


def _rates(families: Families, amounts: Amounts, seeds: int, store: RunStore, say: Say) -> list[LearningRateTransfer]:
    """Of each family; where the drift is not known well enough, again with twice the seeds, half of which are there already."""
    found = []
    for family, sizes in families:
        for count in (seeds, 2 * seeds):
            if count > seeds:
                say(f"the drift over {family.dimension}s is not known well enough: {count} seeds")
            rates = learning_rate_transfer(
                family.build,
                sizes,
                optimizer=family.optimizer,
                data=family.batches,
                loss=family.loss,
                closure=family.closure,
                steps=amounts.rate_steps,
                seeds=count,
                store=store,
                dimension=family.dimension,
                until_certain=amounts.until_certain,
                callback=say,
            )
            if rates.passed is not None:
                break
        found.append(rates)
    return found
