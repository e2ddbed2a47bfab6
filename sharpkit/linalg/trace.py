"""The trace of a symmetric operator to an asked standard error: Hutchinson, Hutch++, XTrace and the cheapest mixture of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_seed, choice, real, whole
from sharpkit._calls import public_call
from sharpkit._checkpoint import counted_step, resumable
from sharpkit._errors import NonFiniteError
from sharpkit._results import ProgressCallback
from sharpkit.linalg.krylov import BasisRows, KrylovSpace, Products, affordable_rows, lanczos_run
from sharpkit.linalg.results import HALF, Array, Budget, Estimate, probe_error, warn_unconverged
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.operators.base import SymmetricOperator, as_operator, operator_call

Method = Literal["auto", "hutchinson", "hutch++", "xtrace", "xnystrace"]

DEFAULT_MATVECS = 2000  # by judgement: a trace to 1 % takes 8 to 330 products where outliers dominate, 2000 where none do

# XTrace's leave-one-out estimates share most of their basis, so their spread understates the error: by 1.0 to 1.3 over reference spectra.
SHARED_BASIS = 1.25  # by judgement within that range
# XNysTrace's leave-one-out estimates share more: their spread understates the error 1.3 to 2.3 times on six spectra, most where the vectors
# are more than half the rows. From seven tenths on, the rest of the rows makes the trace exact. Both by judgement within what was measured.
_NYSTROM_SHARED, _NYSTROM_REST, _NYSTROM_TESTS = 1.9, 0.7, 8
_SHIFT = 8.0  # roundings of a product by which XNysTrace shifts the matrix: one for each of the paper's columns, up to 64 of them
_LITTLE = 1e-3  # of a product, by judgement: what is left outside the basis is orthogonal to it to four digits in float32, or done again
_LEAST_TESTS = 5  # by judgement: leave-one-out estimates below which their spread says nothing

# With these the stated error is right in 94 to 96 of 100 cases, and the mean cost 0.7 to 0.8 times that of the cheaper of plain and
# deflated probes on three matrices of networks (experiments/trace_calibration.py); each by itself is by judgement.
_BLOCK = 32  # vectors multiplied at once at most: curvature operators gain little beyond (experiments/speed_products.py)
_PILOT = {False: 6, True: 10}  # probes to begin with, for the trace and for the skewed squares: by judgement
_FRESH = 9  # probes at least after a sketch that may have left one large eigenvalue outside: by judgement, six hold in 90 of 100 cases
_CONTRADICTED = 4.0  # standard deviations of chance by which samples must agree too well for their images' lengths: by judgement
_SAFETY = 1.05  # of such an error, by judgement: two of it hold 96 % of a normal distribution
_RESOLVED = 100.0  # roundings of an image's squared length below which a difference of such squares is not believed: by judgement
_WORKING = 4  # vectors beside basis and kept probes: a probe, its product and what they are made of; by judgement
_BESIDE = 4  # vectors copied side by side for their inner products, by judgement: few, and few sums over processes
_KEPT = 16  # probes that are kept for a larger basis: by judgement, two vectors of memory each
_PATIENCE = 3  # products spent on the leading subspace without the forecast falling (by judgement),
_SHARE = 0.04  # or this share of it: by judgement
_NOTICED = 0.995  # a lower score counts only if it falls by half a percent: by judgement
_WORTH = 0.75  # the fall in the forecast that is taken for real, by judgement: spreads of six probes are off by a third
# steps in a row with enough probes; squares are more skewed: a few samples look better than they are (by judgement)
_PERSISTENCE = {False: 4, True: 6}
_SURPRISE = 1.5  # probes needed, relative to the forecast, that reopen the choice: by judgement
_HOPELESS = 4.0  # give up if the forecast exceeds the budget this many times (by judgement),
_HOPELESS_AFTER = 100  # and so many probes have been drawn, whose spread is known to 7 %: by judgement


@public_call
@keeps_memory_limit
@resumable(operator_call)
def trace(
    operator: Any,
    *,
    rtol: float = 0.01,
    atol: float = 0.0,
    method: Method = "auto",
    seed: int = 0,
    num_matvecs: int | None = None,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> Estimate:
    """tr A from random products, until its standard error is at most ``rtol`` |tr A| (or ``atol``).

    ``"auto"`` draws a few plain probes z^T A z and forecasts from their images' lengths what the plain estimator would cost. If that is
    much, it computes the leading subspace exactly with a Krylov basis Q, one product per vector, as long as a product spent there saves
    more than one probe; the probes already made are reused on the complement, tr A = tr Q^T A Q + E z^T P A P z with P = 1 - Q Q^T. If n
    products are cheaper than either, the trace is exact. ``"xnystrace"`` approximates a positive semi-definite matrix (Gauss-Newton,
    Fisher, gradient covariance) from its products with the probes themselves, one each.

    The variance of a plain probe is at most 2 ||A - c||_F^2 for any number c, which the lengths of the images tell. The standard error is
    that bound's, or where the probes agree far better their own, widened for their number: the truth lies within two of them in about 95
    of 100 cases. A matrix whose trace nearly cancels has no reachable relative error: set ``atol``. Without ``max_matvecs``, a computation
    that the forecast puts beyond reach ends early and is flagged.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        rtol: asked standard error relative to the estimate.
        atol: asked absolute standard error; the looser of the two counts.
        method: ``"auto"``, ``"hutchinson"``, ``"hutch++"``, ``"xtrace"`` or, for positive semi-definite matrices, ``"xnystrace"``.
        seed: seeds the probes.
        num_matvecs: spend this many products instead of stopping at a tolerance.
        max_matvecs, max_seconds: most products, by default 2000, and seconds.
        memory_limit: bytes that may be taken where the vectors live; by default the basis takes half of what is free at most.
        checkpoint: a folder from which the call goes on if it is killed and made again (docs/guide.md); until it ends it takes
            a vector of disk for each product of the pilot and the basis.
        callback: called with a :class:`~sharpkit.Progress` after each product, or several made at once.
        name: of the result, which pages and comparisons show.

    Returns:
        the estimate; its ``stderr`` is 0 where it is exact to rounding.

    Raises:
        ValueError: an argument out of range, or ``"xnystrace"`` for a matrix that is not positive semi-definite.
        NonFiniteError: a product is not finite.

    References:
        Meyer, Musco, Musco and Woodruff, "Hutch++", arXiv 2010.09649; Persson, Cortinovis and Kressner, "Improved variants of the Hutch++
        algorithm", arXiv 2109.10659; Epperly, Tropp and Webber, "XTrace", arXiv 2301.07825.

    Example:
        >>> import torch, sharpkit as sk
        >>> estimate = sk.trace(torch.diag(torch.arange(1.0, 101.0)))
        >>> abs(estimate.value - 5050) <= 3 * estimate.stderr + 0.01
        True
    """
    operator = as_operator(operator)
    operator.check_alike("trace", locals())  # before an argument is refused on one process alone
    choice("method", method, get_args(Method))
    rtol, atol = real("rtol", rtol, least=0), real("atol", atol, least=0)
    if not rtol + atol > 0:
        raise ValueError(f"rtol and atol must not be negative and not both 0, got rtol={rtol}, atol={atol}")
    num_matvecs = None if num_matvecs is None else whole("num_matvecs", num_matvecs, least=2)
    limit = num_matvecs or (DEFAULT_MATVECS if max_matvecs is None else whole("max_matvecs", max_matvecs))
    budget = Budget(operator, max_matvecs=limit, max_seconds=max_seconds, callback=callback)
    run = AdaptiveEstimate(operator, Tolerance(rtol, atol), budget, seed=as_seed(seed), limit=limit, fixed=num_matvecs is not None)
    run.may_give_up = num_matvecs is None and max_matvecs is None  # a budget that was asked for is spent
    value, stderr, how = run.estimate(method)
    target = run.target(value)
    estimate = Estimate(value, stderr, budget.num_matvecs, budget.seconds, how).rounded(operator.rounding)
    stderr, converged = estimate.stderr, estimate.stderr <= target
    if not converged and num_matvecs is None:
        warn_unconverged(
            f"the trace {value:.4g} has a standard error of {stderr:.2g} after {budget.num_matvecs} products, {target:.2g} was "
            "asked: raise max_matvecs or rtol, or set atol where positive and negative eigenvalues nearly cancel; in half precision no "
            "more than twice its rounding is to be had."
        )
    return replace(estimate, converged=converged)


@dataclass(frozen=True)
class Tolerance:
    """The asked standard error: the looser of ``rtol`` times the estimate and ``atol``."""

    rtol: float
    atol: float = 0.0

    def __call__(self, value: float) -> float:
        return max(self.atol, self.rtol * abs(value))


class AdaptiveEstimate:
    """tr A, or ||A||_F^2, to a tolerance.

    Args:
        operator: A.
        target: the asked standard error, given the estimate.
        budget: stops the estimate when exhausted.
        seed: seeds the probes.
        limit: the product budget as a number.
        fixed: spend the whole budget instead of stopping at the tolerance.
        squared: ||A||_F^2 instead of tr A.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        target: Tolerance,
        budget: Budget,
        *,
        seed: int,
        limit: int,
        fixed: bool = False,
        squared: bool = False,
    ) -> None:
        self.operator, self.target, self.budget, self.limit, self.fixed = operator, target, budget, limit, fixed
        self.may_give_up = False
        self.pilot = _PILOT[squared]
        self._affordable: int | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self.probes = DeflatedProbes(operator, self.generator, squared=squared)

    def estimate(self, method: str) -> tuple[float, float, str]:
        """Value, standard error and the way it was made."""
        n = self.operator.size
        if n <= self.limit and (n <= self.pilot or self.fixed):
            return self._exact()
        if method == "xtrace":
            return xtrace(self.operator, self.target, self.budget, self.generator, fixed=self.fixed)
        if method == "xnystrace":
            if (made := self._nystrom()) is None:
                raise ValueError(
                    'method="xnystrace" needs a positive semi-definite matrix whose products are not in half precision, and memory for two '
                    f'vectors a product; {self.operator!r} is not, or there is less: use method="auto" or "xtrace"'
                )
            return made
        if method == "hutch++":
            self._sketch()
            if not self.fixed:
                if self._forecast() > n - len(self.probes.space.expanded) and self._can_complete():
                    return self._exact()
                self.probes.forget()
                self.pilot = max(self.pilot, _FRESH)
            return self._probe("Hutch++", adapt=False)
        while len(self.probes) < self.pilot and self.budget.allows():
            count = block_size(self.operator, self.budget, self.pilot - len(self.probes))
            self.probes.draw(count, keep=method == "auto")
            self._report(self.pilot, "pilot probes")
        return self._probe("Hutchinson", adapt=method == "auto")

    def _nystrom(self) -> tuple[float, float, str] | None:
        """XNysTrace; None where it cannot be had."""
        rows, n, sketch = affordable_rows(self.operator), self.operator.size, Nystrom(self.operator)
        passes, value, stderr = 0, math.nan, math.inf
        while True:
            if self.operator.rounding > HALF or 2 * len(sketch) > rows:
                return None
            if len(sketch) >= _NYSTROM_TESTS:
                if (answer := sketch.estimate()) is None:
                    return None
                value, stderr = answer
                passes = passes + 1 if stderr <= self.target(value) else 0
                if passes >= 2 and not self.fixed and len(sketch) <= _NYSTROM_REST * n:
                    break
            if len(sketch) >= n or not self.budget.allows():
                break
            most = self.limit if self.fixed else max(1, len(sketch) // 8) if passes == 0 else 1
            tests = rademacher(self.operator, self.generator, block_size(self.operator, self.budget, min(most, n - len(sketch))))
            products = self.operator.multiply(tests)
            for test, product in zip(tests.T, products.T, strict=True):
                sketch.add(test, product)
            self._report(min(self.limit, len(sketch) + 2), "trace, XNysTrace")
        return value, stderr, "XNysTrace"

    def _exact(self) -> tuple[float, float, str]:
        """The trace over a complete basis, if the budget allows it."""
        space, progress = self.probes.space, lambda: (self.operator.size, "all basis vectors")
        complete = lanczos_run(space, self.budget, lambda: False, progress, refill=partial(space.add_random, self.generator))
        return self.probes.known, 0.0 if complete else math.inf, "exact" if complete else "incomplete"

    def _forecast(self) -> float:
        """Probes the tolerance will need in all with the present basis."""
        value, spread = self.probes.value(), self.probes.spread()
        target = self.target(value)
        if spread == 0.0:  # two probes that agree exactly: nothing more to learn
            return 2.0
        return (spread / target) ** 2 + 2.0 if target > 0 else math.inf

    def _can_complete(self) -> bool:
        # n products are more than the budget, but may still be fewer than the probes needed: up to 4 times, as for a hopeless case
        return self.operator.size <= min(_HOPELESS * self.limit, self._most_rows())

    def _most_rows(self) -> int:
        if self._affordable is None and self.probes.space.size:  # asked once: the system is slow to tell
            self._affordable = max(1, affordable_rows(self.operator) - _WORKING)
        return self.operator.size if self._affordable is None else self._affordable

    def _deflate(self) -> None:
        """Grow the basis while that lowers the forecast: of the cost, or of the error where the cost is fixed."""
        probes, space, n = self.probes, self.probes.space, self.operator.size
        made, first, enough = probes.num_kept, len(space.expanded), 0
        spreads: list[float] = []  # with each size of the basis
        while self.budget.allows(1 + self.pilot) and (space.pending or space.add_random(self.generator)):
            steps, needed = len(space.expanded), self._forecast()
            spreads.append(probes.spread())
            # all by the present estimate of the trace, whose own changes are no change in what a basis is worth
            sizes, squares = first + np.arange(len(spreads)), np.array(spreads) ** 2
            with np.errstate(divide="ignore", invalid="ignore"):
                scores = squares / np.maximum(1, self.limit - sizes) if self.fixed else sizes + squares / self.target(probes.value()) ** 2
            good = np.flatnonzero(scores <= scores.min() / _NOTICED)
            best_at = first + int(good[0]) if scores.min() < _WORTH * scores[0] else first
            best = float(scores[best_at - first])
            patience = max(_PATIENCE, _SHARE * (self.limit if self.fixed else best))
            enough = enough + 1 if needed <= made and not self.fixed else 0
            finish = needed >= n - steps and self._can_complete()
            if enough >= _PERSISTENCE[probes.squared] or (not finish and steps - best_at >= patience) or space.size >= self._most_rows():
                return
            probes.deflate_one()
            self._report(int(min(steps + needed, self.limit)), "leading subspace")

    def _sketch(self) -> None:
        """A third of the products sketch the range, a third multiply it, a third probe the complement."""
        probes = self.probes
        while self.budget.num_matvecs < self.limit * 2 // 3 and self.budget.allows(4):
            sketched = len(probes.space.expanded)
            if not self.fixed and sketched >= 4 and sketched % 2 == 0:
                while len(probes) < min(_KEPT, max(4, sketched // 2)) and self.budget.allows():
                    probes.draw(keep=True)
                if self._forecast() <= max(4, sketched):
                    return
            if not probes.sketch_one():
                return
            self._report(min(self.limit, 3 * sketched + 12), "range sketch")

    def _probe(self, how: str, *, adapt: bool) -> tuple[float, float, str]:
        """Probes until the tolerance is reached; where they disappoint the forecast, the basis is looked at again."""
        probes, space = self.probes, self.probes.space
        # a probe is kept with its product, beside a basis of as many vectors
        most_kept = min(_KEPT, affordable_rows(self.operator) // 3) if adapt else 0
        expected = 2.0 * self.pilot if not self.fixed else 0.0
        while True:
            sunk = probes.num_late
            if adapt and (needed := self._forecast()) > expected and needed - len(probes) > 2 * sunk:
                self._deflate()
                expected = max(_SURPRISE * self._forecast(), needed if not space.expanded else 0.0) + self.pilot
                adapt = not self.fixed
            if space.is_complete and not space.pending and space.expanded:
                return probes.known, 0.0, "exact"
            value, stderr = probes.estimate()
            settled = not self.fixed and len(probes) >= self.pilot and stderr <= self.target(value)
            hopeless = self.may_give_up and len(probes) >= _HOPELESS_AFTER and self._forecast() > _HOPELESS * self.limit
            if settled or hopeless or not self.budget.allows():
                return value, stderr, f"{how}, deflated" if space.expanded and how == "Hutchinson" else how
            keep = adapt and probes.num_kept < most_kept
            # half of what is forecast at once: the spread that forecasts it is uncertain itself
            ahead = self.limit if self.fixed else (min(self._forecast(), self.limit) - len(probes)) / 2
            most = min(ahead, most_kept - probes.num_kept) if keep else ahead
            probes.draw(block_size(self.operator, self.budget, int(most)), keep=keep)
            done = self.budget.num_matvecs
            self._report(int(min(self.limit, max(done, done + self._forecast() - len(probes)))), "probes")

    def _report(self, expected: int, text: str) -> None:
        self.budget.vectors = self.probes.num_vectors
        self.budget.report(expected, text)


def block_size(operator: SymmetricOperator, budget: Budget, most: int) -> int:
    """How many vectors to multiply at once: as many as memory and the products left allow; one if time is limited: all end together."""
    most = 1 if budget.is_timed else int(min(most, _BLOCK, budget.matvecs_left))
    return max(1, min(most, affordable_rows(operator) // 4)) if most > 1 else 1  # the system is slow to tell


def rademacher(operator: SymmetricOperator, generator: torch.Generator, count: int) -> Tensor:
    """Probes of +-1, (n, count), each in one piece of memory: the same as drawn one by one."""
    probes = [operator.random_vectors(1, generator=generator, distribution="rademacher")[:, 0] for _ in range(count)]
    return torch.stack(probes).T if count > 1 else probes[0][:, None]


class DeflatedProbes:
    """Samples of the part of tr A, or of ||A||_F^2, that a growing basis Q does not hold; one product each.

    A kept probe z stores c = Q^T z and d = Q^T A z, so that a larger basis needs no new product. With A Q_E = Q H,

        tr A      = tr Q^T A Q + E z^T P A P z,   z^T P A P z = z^T A z - 2 c.d + c^T (Q^T A Q) c,
        ||A||_F^2 = ||H||_F^2  + E ||A P z||^2,   ||A P z||^2 = ||A z||^2 - 2 d.H c + ||H c||^2.

    Probes that are not kept are projected before they are multiplied; they belong to the basis they were drawn with.

    Args:
        squared: estimate ||A||_F^2 = tr A^2 instead of tr A.
    """

    def __init__(self, operator: SymmetricOperator, generator: torch.Generator, *, squared: bool = False) -> None:
        self.operator, self.generator, self.squared = operator, generator, squared
        self.space = KrylovSpace(operator)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._plain: list[float] = []
        self._drawn = 0  # at once, the last time
        self._inner = np.zeros((0, 0, 2))  # (basis row, kept probe, c and d)
        self._late: list[float] = []
        self._energy: list[float] = []  # ||A z||^2 of kept probes, ||A P z||^2 of late ones
        self._late_energy: list[float] = []
        self.has_bound = not squared  # whether the images' lengths tell the spread

    def __len__(self) -> int:
        return len(self._plain) + len(self._late)

    @property
    def num_kept(self) -> int:
        """Probes that a growing basis can still use."""
        return len(self._kept)

    @property
    def num_vectors(self) -> int:
        """Vectors held: the basis, kept probes with their products, and those of the last ones drawn at once."""
        return self.space.size + 2 * len(self._kept) + 2 * self._drawn

    @property
    def num_late(self) -> int:
        """Probes drawn for the present basis alone."""
        return len(self._late)

    @property
    def known(self) -> float:
        """What the basis holds exactly."""
        if not self.space.expanded:
            return 0.0
        return float((self.space.outward() ** 2).sum()) if self.squared else float(np.trace(self.space.projected()))

    def draw(self, count: int = 1, *, keep: bool) -> None:
        """More probes, a product each.

        Args:
            count: how many, multiplied at once.
            keep: hold on to the probes, because the basis may still grow.
        """
        self._drawn = count
        if keep:
            for probe, product in self._multiplied(rademacher(self.operator, self.generator, count).to(self.space.dtype)):
                self._keep(probe, product)
            return
        # of probes that are not kept, numbers alone are needed, and the generator after them
        made = counted_step(
            self.operator, f"{count} probes beside the basis", lambda: (self._draw_late(count), self.generator.get_state()), whole=True
        )
        samples, state = made
        self.generator.set_state(state)
        for value, energy in samples:
            self._late.append(value)
            self._late_energy.append(energy)

    def _draw_late(self, count: int) -> list[tuple[float, float]]:
        """Value and squared length of the image of each probe of the complement."""
        probes = rademacher(self.operator, self.generator, count).to(self.space.dtype)
        if self.space.expanded:
            coefficients = self.space.rows.coefficients(probes)
            inside = torch.zeros_like(coefficients)
            inside[self.space.expanded] = coefficients[self.space.expanded]
            self.space.rows.subtract_(probes, inside)
        return [self._sample(probe, product) for probe, product in self._multiplied(probes)]

    def _multiplied(self, probes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each probe with its product."""
        products = self.operator.multiply(probes.to(self.operator.dtype))
        for probe, product in zip(probes.T, products.T, strict=True):
            yield probe, self.space.products.in_units(product)

    def _sample(self, probe: Tensor, product: Tensor) -> tuple[float, float]:
        unit = self.space.products.unit
        energy = float(self.operator.dot(product, product)) * unit**2
        value = energy if self.squared else float(self.operator.dot(probe, product)) * unit
        if not math.isfinite(value):
            raise NonFiniteError(f"a product with {self.operator!r} contains NaN or infinity; check the loss on this data")
        return value, energy

    def _keep(self, probe: Tensor, product: Tensor) -> None:
        value, energy = self._sample(probe, product)
        self._plain.append(value)
        self._energy.append(energy)
        self._kept.append((probe, product.clone()))
        inner = self.space.rows.coefficients(torch.stack([probe, product], dim=1)).cpu().double().numpy()
        inner[:, 1] *= self.space.products.unit
        self._inner = np.concatenate([self._inner, inner[:, None, :]], axis=1)

    def forget(self) -> None:
        """Drop all samples, where their spread has decided how large the basis is: those that stay would be the ones that agree by luck."""
        self._kept, self._plain, self._late, self._energy, self._late_energy = [], [], [], [], []
        self._inner = np.zeros((self.space.size, 0, 2))

    def deflate_one(self) -> None:
        """Expand the pending Krylov vector: the basis grows by one. Late probes, made for the smaller basis, are dropped."""
        self.space.expand(self.space.pending[0])
        self._record()

    def sketch_one(self) -> bool:
        """Add the direction A s of a random s, and expand it: two products; False where the space is exhausted."""
        sketch = self.operator.random_vectors(1, generator=self.generator, distribution="normal")[:, 0]
        image = self.space.products(sketch)
        known, self.has_bound = self.space.size, False  # a sketched basis does not know where its images lead
        if not self.space.add_start(image):
            return False
        self.space.expand(known)
        self.space.forget_pending()
        self._record()
        return True

    def _record(self) -> None:
        """Inner products of the kept probes with the basis vectors that are new."""
        self._late, self._late_energy = [], []
        kept = len(self._kept)
        if not kept:
            self._inner = np.zeros((self.space.size, 0, 2))
            return
        vectors, new = [vector for pair in self._kept for vector in pair], []
        for row in map(self.space.rows.row, range(len(self._inner), self.space.size)):
            # a few side by side at a time: all would be a second set of them
            parts = [self.operator.dot(row, torch.stack(vectors[i : i + _BESIDE], dim=1)) for i in range(0, len(vectors), _BESIDE)]
            new.append(torch.cat(parts).cpu().double().numpy().reshape(1, kept, 2))
        self._inner = np.concatenate([self._inner, *new])
        self._inner[len(self._inner) - len(new) :, :, 1] *= self.space.products.unit

    def samples(self) -> Array:
        """The samples of every probe, for the present basis."""
        early = np.array(self._plain)
        expanded = self.space.expanded
        if expanded and len(early):
            c, d = self._inner[expanded, :, 0], self._inner[..., 1]
            if self.squared:
                # a start added after a breakdown has no row in d yet, and nothing leads to it
                image = self.space.outward()[: len(d)] @ c
                early = early - 2 * (d * image).sum(axis=0) + (image**2).sum(axis=0)
            else:
                early = early - 2 * (c * d[expanded]).sum(axis=0) + (c * (self.space.projected() @ c)).sum(axis=0)
        return np.concatenate([early, self._late])

    def _energies(self, samples: Array) -> Array | None:
        """||(P A P - c) z||^2 of every probe with the c that makes it least, for the present Krylov basis; None where rounding hides it."""
        energies, expanded = np.array(self._energy), self.space.expanded
        if expanded and len(energies):
            d = self._inner[..., 1]
            image = self.space.outward()[: len(d)] @ self._inner[expanded, :, 0]
            energies = energies - 2 * (d * image).sum(axis=0) + (image**2).sum(axis=0) - ((d - image)[expanded] ** 2).sum(axis=0)
        # of late probes ||A P z||^2, larger by what leads back into the basis
        energies = np.concatenate([energies, self._late_energy]) - samples**2 / self.operator.size
        least = _RESOLVED * max(self.space.eps, self.operator.rounding) * np.mean(self._energy + self._late_energy)
        return energies if energies.mean() > least else None

    def value(self) -> float:
        """The trace."""
        samples = self.samples()
        return self.known + float(samples.mean() if len(samples) > 1 else samples.sum())

    def spread(self) -> float:
        """The standard deviation of one probe."""
        return self._spread_and_error()[0]

    def estimate(self) -> tuple[float, float]:
        """The trace and its standard error."""
        return self.value(), self._spread_and_error()[1]

    def _spread_and_error(self) -> tuple[float, float]:
        """Standard deviation of one probe and standard error of the mean.

        The variance of z^T P A P z is twice the sum of the squares off the diagonal of P A P: at most 2 ||P A P - c||_F^2 for any number c.
        E ||(P A P - c) z||^2 is that norm, of which one probe tells more than many samples do of their variance: luck makes no error small,
        and none has to be widened for it. Only where the samples agree far better, as on a diagonal matrix, does their own spread count.
        """
        samples = self.samples()
        if len(samples) < 2:
            return math.inf, math.inf
        spread, m = float(samples.std(ddof=1)), len(samples)
        energies = self._energies(samples) if self.has_bound else None
        if energies is not None:
            mean, uncertain = float(energies.mean()), float(energies.std(ddof=1)) / m**0.5
            part = 2 / (9 * (m - 1))  # Wilson and Hilferty's approximation of a chi-square quantile
            if spread**2 > 2 * mean * max(0.0, 1 - part - _CONTRADICTED * part**0.5) ** 3:
                return (2 * mean) ** 0.5, _SAFETY * (2 * (mean + uncertain) / m) ** 0.5
        return spread, probe_error(samples)


def xtrace(
    operator: SymmetricOperator, target: Callable[[float], float], budget: Budget, generator: torch.Generator, *, fixed: bool
) -> tuple[float, float, str]:
    """The exchangeable trace estimate, grown two products (one test vector) at a time.

    Args:
        operator: A.
        target: the asked standard error, given the estimate.
        budget: stops the estimate when exhausted.
        generator: draws the Gaussian test vectors.
        fixed: spend the whole product budget.

    References:
        Epperly, Tropp and Webber, arXiv 2301.07825, section 2.2 (with its scaling for Gaussian test vectors).
    """
    space = KrylovSpace(operator)
    tests: list[Tensor] = []
    images: list[Array] = []  # R: A omega_i in the basis
    value, stderr, passes = math.nan, math.inf, 0
    while budget.allows(2) and not space.is_complete:
        test = operator.random_vectors(1, generator=generator)[:, 0].to(space.dtype)
        image = space.products(test)
        known = space.size
        grew = space.add_start(image)
        images.append(space.rows.coefficients(image).cpu().double().numpy() * space.products.unit)
        tests.append(test)
        if not grew:  # the range of A is exhausted: its trace is known
            return float(np.trace(space.projected())) if space.expanded else 0.0, 0.0, "XTrace, exact"
        space.expand(known)
        space.forget_pending()
        if len(tests) >= _LEAST_TESTS:
            value, stderr = _leave_one_out(space, tests, images)
        budget.report(2 * len(tests) + 2, "trace, XTrace")
        passes = passes + 1 if stderr <= target(value) else 0
        if not fixed and passes >= 2:
            break
    if space.is_complete and not space.pending:
        return float(np.trace(space.projected())), 0.0, "XTrace, exact"
    return value, stderr, "XTrace"


def _leave_one_out(space: KrylovSpace, tests: list[Tensor], images: list[Array]) -> tuple[float, float]:
    """Mean of the estimates that leave test vector i out of the basis, and its standard error."""
    m, n = len(tests), space.operator.size
    inner = space.projected()  # Q^T A Q
    triangle = np.zeros((m, m))
    for i, image in enumerate(images):
        triangle[: min(len(image), m), i] = image[:m]
    coordinates = space.rows.coefficients(torch.stack(tests, dim=1)).cpu().double().numpy()  # Q^T Omega
    norms = np.array([float(space.operator.dot(test, test)) for test in tests])
    dual = np.linalg.inv(triangle).T  # column i: orthogonal to every image but the i-th
    dual = dual / np.linalg.norm(dual, axis=0)
    reduced = coordinates - dual * (dual * coordinates).sum(axis=0)
    rest = (coordinates * triangle).sum(axis=0) - 2 * (reduced * triangle).sum(axis=0) + (reduced * (inner @ reduced)).sum(axis=0)
    scaling = (n - m + 1) / np.maximum(norms - (reduced**2).sum(axis=0), np.finfo(float).tiny)
    estimates = np.trace(inner) - (dual * (inner @ dual)).sum(axis=0) + scaling * rest
    return float(estimates.mean()), SHARED_BASIS * probe_error(estimates)


class Nystrom:
    """XNysTrace: tr A of a positive semi-definite A from the products Y = A Omega with m vectors of +-1 and nothing else.

    The Nystrom approximation Y H^-1 Y^T with H = Omega^T Y holds the leading eigenvalues. Without test vector i it is smaller by
    y y^T / (H^-1)_ii with y = Y H^-1 e_i, and what it then leaves of omega_i^T A omega_i is 1 / (H^-1)_ii, so that

        t_i = tr Y H^-1 Y^T - (||y||^2 - 1) / (H^-1)_ii

    are m exchangeable unbiased estimates. With Y = Q R and H = L L^T the matrix is A + shift I, so that H is positive beyond rounding; the
    shift is subtracted from the trace again.

    Args:
        operator: A.

    References:
        Epperly, Tropp and Webber, arXiv 2301.07825, section 2.3.
    """

    def __init__(self, operator: SymmetricOperator) -> None:
        self.operator, self.products = operator, Products(operator)
        self.basis, self.tests = BasisRows(operator), BasisRows(operator)  # Q, Omega
        self._triangle, self._gram = np.zeros((0, 0)), np.zeros((0, 0))  # R, H
        self.shift = 0.0

    def __len__(self) -> int:
        return self.tests.size

    def add(self, test: Tensor, product: Tensor) -> None:
        """One more test vector and its product, (n,) each."""
        m, test, product = len(self), test.to(self.basis.dtype), self.products.in_units(product)
        if not self.shift:
            size = float(self.operator.dot(product, product)) ** 0.5
            if not math.isfinite(size):
                raise NonFiniteError(f"a product with {self.operator!r} contains NaN or infinity; check the loss on this data")
            self.shift = _SHIFT * float(torch.finfo(self.basis.dtype).eps) * (size or 1.0) / self.operator.size**0.5
        shifted = product + self.shift * test
        self.tests.append(test)
        rest, inside = self.basis.orthogonalise(shifted)
        beyond = self.operator.dot(rest, rest).sqrt()
        host = torch.cat([inside, beyond[None], self.tests.coefficients(shifted)]).cpu().double().numpy()
        rest = rest / beyond.clamp_min(torch.finfo(rest.dtype).tiny)
        if host[m] < _LITTLE * np.linalg.norm(host[:m]):  # what was left is small, and its rounding large
            rest, _ = self.basis.orthogonalise(rest)
            rest = rest / self.operator.dot(rest, rest).sqrt().clamp_min(torch.finfo(rest.dtype).tiny)
        self.basis.append(rest)
        self._triangle, self._gram = np.pad(self._triangle, (0, 1)), np.pad(self._gram, (0, 1))
        self._triangle[:, m], self._gram[:, m], self._gram[m, :] = host[: m + 1], host[m + 1 :], host[m + 1 :]

    def estimate(self) -> tuple[float, float] | None:
        """The trace and its standard error; None if A is not positive."""
        try:
            factor = np.linalg.cholesky(self._gram)  # L
        except np.linalg.LinAlgError:
            return None
        back = np.linalg.inv(factor)  # L^-1
        half = self._triangle @ back.T
        held = (back**2).sum(axis=0)  # (H^-1)_ii
        leave = ((half @ back) ** 2).sum(axis=0)
        whole, unit = (half**2).sum() - self.shift * self.operator.size, self.products.unit
        if len(self) == self.operator.size:  # nothing is left out
            return float(whole) * unit, 0.0
        estimates = whole - (leave - 1) / held
        return float(estimates.mean()) * unit, _NYSTROM_SHARED * probe_error(estimates) * unit
