"""Learning-rate schedules and laws as their papers have them: to use, to draw, to fit to a run; calculators with their range."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sharpkit._arguments import choice, real, reals, shown, whole
from sharpkit._calls import public_call
from sharpkit._errors import SharpkitWarning
from sharpkit._results import Result
from sharpkit.learner.schedules import Schedule, cosine, linear

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "AnnealingLaw",
    "StepLaw",
    "cosine",
    "cosine_power",
    "critical_batch_size",
    "fit_annealing_law",
    "infinite",
    "linear",
    "plot_schedules",
    "rex",
    "scheduler",
    "step_law",
    "unified",
    "wsd",
]

Array = NDArray[np.float64]


# -- schedules: the share z of steps done, 0 to 1 -> a factor of the peak rate ------------------------------------------------------
def rex(z: float) -> float:
    """(1 - z) / (1/2 + (1 - z) / 2): slow to fall, then fast.

    Example:
        >>> rex(0.0), round(rex(0.5), 4), rex(1.0)
        (1.0, 0.6667, 0.0)

    References:
        Chen, Wolfe and Kyrillidis (2022), arXiv 2107.04197.
    """
    return (1 - z) / (0.5 + 0.5 * (1 - z))


def wsd(decay: float = 0.1, *, shape: str = "exponential") -> Schedule:
    """Warm-up, stable, decay, without the warm-up: constant, then a decay over the last share of the run.

    Args:
        decay: that share.
        shape: of the decay: ``"linear"`` to 0, ``"exponential"`` to a hundredth, or ``"inverse"``: 1 / rate grows linearly to hundredfold.

    Example:
        >>> schedule = wsd(0.2, shape="linear")
        >>> schedule(0.5), round(schedule(0.9), 12), schedule(1.0)
        (1.0, 0.5, 0.0)

    References:
        Hu et al. (2024), arXiv 2404.06395; Wen et al. (2024), arXiv 2410.05192, for the inverse one.
    """
    decay = real("decay", decay, above=0, below=1)
    choice("shape", shape, ("linear", "exponential", "inverse"))
    ends: dict[str, Schedule] = {"linear": lambda u: 1 - u, "exponential": lambda u: 0.01**u, "inverse": lambda u: 1 / (1 + 99 * u)}
    return lambda z: 1.0 if z <= 1 - decay else ends[shape](min((z - 1 + decay) / decay, 1.0))


def cosine_power(p: float = 10.0) -> Schedule:
    """(p^c - 1) / (p - 1) with c the cosine decay: a longer tail the larger p is; the cosine itself as p goes to 1.

    Example:
        >>> round(cosine_power(1.0001)(0.3) - cosine(0.3), 3)
        -0.0

    References:
        Hundt, Jain and Hager (2019), arXiv 1903.09900.
    """
    p = real("p", p, above=0)
    return lambda z: cosine(z) if p == 1.0 else (p ** cosine(z) - 1) / (p - 1)


def unified(phi: float = 1.0) -> Schedule:
    """2 c / (2 phi + (2 - phi) c) with c = 1 + cos(pi z): the budgeted schedule of many shapes, the cosine at phi = 2.

    Example:
        >>> round(unified(2.0)(0.3) - cosine(0.3), 12), unified(0.5)(0.0)
        (0.0, 1.0)
    """
    phi = real("phi", phi, above=0)

    def factor(z: float) -> float:
        c = 1 + math.cos(math.pi * z)
        return 2 * c / (2 * phi + (2 - phi) * c)

    return factor


def infinite(cool: float = 0.3, anneal: float = 0.1, *, level: float = 0.3) -> Schedule:
    """A cosine from the peak to a level over the first share of the run, constant there, and an exponential end.

    Training may go on from the level, whenever more data comes.

    Args:
        cool: share of the run of the cosine.
        anneal: share of the run of the end, to a hundredth of the level.
        level: over the peak.

    Raises:
        ValueError: the shares take more than the run.

    Example:
        >>> schedule = infinite(level=0.25)
        >>> schedule(0.0), schedule(0.5), schedule(1.0)
        (1.0, 0.25, 0.0025)

    References:
        Ibrahim et al. (2024), arXiv 2403.08763.
    """
    cool, anneal, level = (real(name, value, above=0, below=1) for name, value in (("cool", cool), ("anneal", anneal), ("level", level)))
    if cool + anneal > 1:
        raise ValueError(f"cool and anneal are shares of one run and must add up to 1 at most, got {cool} + {anneal}")

    def factor(z: float) -> float:
        if z < cool:
            return level + (1 - level) * cosine(z / cool)
        return level if z <= 1 - anneal else level * 0.01 ** min((z - 1 + anneal) / anneal, 1.0)

    return factor


def scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, *, total_steps: int, warmup: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """A torch scheduler that multiplies every group's present rate by a schedule; its ``state_dict`` and ``step`` are torch's own.

    Args:
        optimizer: with its peak rates set.
        schedule: of the share of steps done after the warm-up.
        total_steps: of the run; later steps keep the last factor.
        warmup: steps in which the factor grows linearly from 1 / warmup to 1.

    Raises:
        TypeError: schedule is no function.
        ValueError: a warm-up as long as the run.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        >>> steps = scheduler(optimizer, linear, total_steps=4)
        >>> for _ in range(2):
        ...     optimizer.step(); steps.step()
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """
    if not callable(schedule):
        raise TypeError(f"schedule must be a function of the share of steps done, such as sk.laws.cosine, got {shown(schedule)}")
    total, first = whole("total_steps", total_steps), whole("warmup", warmup, least=0)
    if first >= total:
        raise ValueError(f"warmup must be shorter than the {total} steps of the run, got {first}")

    def factor(step: int) -> float:
        return (step + 1) / first if step < first else float(schedule(min((step - first) / (total - first), 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def plot_schedules(schedules: Mapping[str, Schedule], *, peak: float = 1.0, limit: float | None = None, ax: Axes | None = None) -> Axes:
    """Schedules by name on one plot, with the largest stable rate as measured (:func:`sharpkit.stable_learning_rate`) drawn in.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> plot_schedules({"cosine": cosine, "REX": rex}, peak=0.1, limit=0.3).get_ylabel()
        'learning rate'
    """
    from sharpkit.plots.laws import draw_schedules

    peak = real("peak", peak, above=0)
    return draw_schedules(schedules, peak=peak, limit=None if limit is None else real("limit", limit, above=0), ax=ax)


# -- the loss that a schedule will end at ------------------------------------------------------------------------------------------
_MEMORY = 0.999  # of the annealed momentum, as in the paper
_HUBER = 1e-3  # of a residual in the logarithm, as in the paper


@dataclass(frozen=True)
class AnnealingLaw(Result, kind="annealing_law"):
    """L(s) = L0 + A S1^-alpha - C S2, S1 the sum of the rates and S2 the annealing momentum up to step s.

    Attributes:
        L0, A, alpha, C: of the law.
        error: root mean square of the relative residuals of the fit.
        steps: of the runs that it was fitted to, the longest.
    """

    L0: float
    A: float
    alpha: float
    C: float
    error: float
    steps: int

    def predict(self, rates: Sequence[float]) -> Array:
        """The loss after each step of a run with other rates, (T,). Warns where it is much longer than what the law was fitted to."""
        values = np.array(reals("rates", rates, least=0))
        if len(values) > 3 * self.steps:
            longer = f"the law was fitted to {self.steps} steps and is asked about {len(values)}"
            warnings.warn(f"{longer}: beyond three times as many it was never tested", SharpkitWarning, stacklevel=2)
        return _law(np.array([self.L0, self.A, self.alpha, self.C]), *_sums(values))


@public_call
def fit_annealing_law(
    losses: Sequence[float] | Sequence[Sequence[float]], rates: Sequence[float] | Sequence[Sequence[float]], *, name: str = ""
) -> AnnealingLaw:
    """Fit the law of learning-rate annealing to the losses of one run, or of a few under different schedules.

    One run whose rate falls says what annealing is worth; from a constant rate C cannot be known, and is refused.

    Args:
        losses: smoothed training or validation loss after each step (NaN where there is none), of one run or of several.
        rates: the rate of each step, in the same shape; warm-up steps are better left out of both.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: different lengths, fewer than 20 losses, or a rate that never falls.

    Example:
        >>> import numpy as np
        >>> rates = 0.01 * np.linspace(1, 0.01, 400)
        >>> truth = AnnealingLaw(2.0, 0.5, 0.5, 0.3, 0.0, 400)
        >>> law = fit_annealing_law(truth.predict(rates), rates)
        >>> other = rates * np.linspace(1, 0.1, 400)
        >>> bool(abs(law.predict(other)[-1] / truth.predict(other)[-1] - 1) < 0.01)
        True

    References:
        Tissue, Wang and Wang (2024), arXiv 2408.11029.
    """
    from scipy.optimize import least_squares

    runs = [(losses, rates)] if np.ndim(rates[0]) == 0 else list(zip(losses, rates, strict=True))  # type: ignore[arg-type]
    rows: list[tuple[Array, Array, Array]] = []
    falls, longest = False, 0
    for loss, rate in runs:
        observed, used = np.asarray(loss, dtype=float), np.array(reals("rates", rate, least=0))
        if observed.shape != used.shape:
            raise ValueError(f"losses and rates must be of one length, one of each step, got {observed.shape} and {used.shape}")
        S1, S2 = _sums(used)
        kept = np.isfinite(observed) & (observed > 0) & (S1 > 0)
        rows.append((observed[kept], S1[kept], S2[kept]))
        falls, longest = falls or bool(used[-1] < 0.9 * used.max()), max(longest, len(used))
    target, S1, S2 = (np.concatenate(column) for column in zip(*rows, strict=True))
    if len(target) < 20:
        raise ValueError(f"a law of four numbers needs at least 20 losses that are positive and finite, got {len(target)}")
    if not falls:
        raise ValueError("the rates never fall, so that nothing can be known of annealing: add a run whose rate decays")
    size, best = float(S2.max()) or 1.0, None

    def residuals(x: Array) -> Array:
        predicted = _law(np.exp(x), S1, S2)
        return np.asarray(np.log(np.maximum(predicted, 1e-12)) - np.log(target))

    spread = float(target.max() - target.min())
    for alpha in (0.2, 0.5, 1.0):  # several starts: the law is not convex in its numbers
        A = max(spread, 1e-6) * float(np.median(S1)) ** alpha
        start = np.log([max(0.8 * float(target.min()), 1e-9), A, alpha, max(0.1 * spread, 1e-9) / size])
        found = least_squares(residuals, start, loss="huber", f_scale=_HUBER, max_nfev=2000)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    L0, A, alpha, C = np.exp(best.x).tolist()
    return AnnealingLaw(L0, A, alpha, C, float(np.sqrt(np.mean(np.expm1(residuals(best.x)) ** 2))), longest)


def _sums(rates: Array) -> tuple[Array, Array]:
    """S1 and S2 after each step."""
    drops = -np.diff(rates, prepend=rates[:1])
    momentum, total, second = 0.0, 0.0, np.empty_like(rates)
    for i, drop in enumerate(drops.tolist()):
        momentum = _MEMORY * momentum + drop
        total += momentum
        second[i] = total
    return rates.cumsum(), second


def _law(x: Array, S1: Array, S2: Array) -> Array:
    L0, A, alpha, C = x
    return np.asarray(L0 + A * np.maximum(S1, 1e-30) ** -alpha - C * S2)


# -- calculators -------------------------------------------------------------------------------------------------------------------
class StepLaw(NamedTuple):
    """Peak rate of AdamW under a cosine or WSD, and batch size in tokens."""

    lr: float
    batch_tokens: float


def step_law(parameters: float, tokens: float) -> StepLaw:
    """Rate and batch size for pre-training a language model: 1.79 N^-0.713 D^0.307 and 0.58 D^0.571 tokens.

    Args:
        parameters: N, without embeddings. Fitted on 60 M to 1 B.
        tokens: D, to train on. Fitted on 2 B to 100 B.

    Warns where it is asked outside of these.

    Example:
        >>> law = step_law(1e9, 1e11)
        >>> round(law.lr, 5), round(law.batch_tokens, -4)
        (0.00163, 1110000.0)

    References:
        Li et al. (2025), arXiv 2503.04715.
    """
    N, D = real("parameters", parameters, above=0), real("tokens", tokens, above=0)
    outside = [f"{name} = {value:.3g}" for name, value, low, high in (("N", N, 6e7, 1e9), ("D", D, 2e9, 1e11)) if not low <= value <= high]
    if outside:
        warnings.warn(f"{' and '.join(outside)} lie outside the runs that Step Law was fitted to", SharpkitWarning, stacklevel=2)
    return StepLaw(1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571)


def critical_batch_size(loss: float) -> float:
    """Tokens in a batch beyond which more parallelism buys little, at a language model's test loss in nats a token: 2e8 L^(-1 / 0.21).

    Fitted on GPTs of 2020 at losses of about 2.4 to 6; the measured one of your own run is :func:`sharpkit.gradient_noise_scale`.

    Example:
        >>> round(critical_batch_size(3.0), -4)
        1070000.0

    References:
        Kaplan et al. (2020), arXiv 2001.08361; McCandlish et al. (2018), arXiv 1812.06162.
    """
    return float(2e8 * real("loss", loss, above=0) ** (-1 / 0.21))
