"""The law rate = r (1 + c / b)^-p through measured rates: all that fit, weighted by how well, and what they miss of the measurements.

`sharpkit.fits.power_law` through the same two to four rates is no substitute: on experiments/batch_heldout.py its median error was a factor
of 1.27 (this law's 1.20), its 95 % intervals 116 times wide (3.2 times), and three curves of 31 had too few rates for one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_FIRST_BEND = 0.1  # the law may bend anywhere from this batch size to N, every octave alike: by judgement, below 1 it is flat throughout
# Powers p as multiples of the simple rule's, and the standard deviation of their logarithm: near a minimum rates fall faster than the rule.
_POWERS, _POWER_SPREAD = (0.5, 2.0), 0.3  # by judgement: on the same tasks .15 to .5 did alike
# Of a log rate: how far real curves bend away from the law, so that 95 % of rates lay within the intervals in experiments/batch_sweep.py
# and on two tasks of experiments/batch_heldout.py (wine, diabetes).
_LAW_ERROR = 0.2
# Of one search's log rate, where too few searches say it themselves, and how many searches that is worth as evidence: by judgement, near
# what they showed there.
_SEARCH_SCATTER, _SEARCHES_OF_THAT = 0.25, 4
# The same where a run must lose nothing, which differs by a factor of 2 to 5 between two orders of the data: at .5, two thirds of the
# rates of experiments/batch_heldout.py lay inside.
_KEEPING_SCATTER = 1.0


@dataclass(frozen=True)
class RateLaw:
    """Laws on a grid of (c, p), the level fitted to each, and the part of the measured rates that they miss.

    Attributes:
        bends, powers, levels, weights: (laws,) c, p, log r, and how well each fits; the weights add up to 1.
        sizes: (anchors,) log B.
        missed: (anchors,) log rate measured less the laws' mean, as far as chance does not explain it; linear in log B between.
        misfit: root mean square of that over chance; 0 where chance explains it.
        error: standard error of the level, of the law and of the searches together.
    """

    bends: Floats
    powers: Floats
    levels: Floats
    weights: Floats
    sizes: Floats
    missed: Floats
    misfit: float
    error: float

    @classmethod
    def fit(cls, sizes: Floats, inverse: Floats, rates: Floats, errors: Floats, *, power: float, num_samples: int) -> RateLaw:
        """Fit to measured rates.

        Args:
            sizes: (anchors,) B.
            inverse: (anchors,) 1 / b.
            rates: (anchors,) log rate.
            errors: (anchors,) standard errors of those.
            power: of the simple rule.
            num_samples: N.
        """
        bends, factors = np.geomspace(_FIRST_BEND, num_samples, 120), np.geomspace(*_POWERS, 17)
        c, p = (grid.ravel() for grid in np.meshgrid(bends, power * factors))
        sigma = np.hypot(errors, _LAW_ERROR)
        precision = 1 / sigma**2
        shapes = -p[:, None] * np.log1p(c[:, None] * inverse)  # (laws, anchors)
        levels = ((rates - shapes) @ precision) / precision.sum()
        square = ((rates - shapes - levels[:, None]) ** 2) @ precision
        prior = (np.log(p / power) / _POWER_SPREAD) ** 2
        weights = np.exp(-(square - square.min() + prior) / 2)
        weights /= weights.sum()
        left = rates - weights @ (shapes + levels[:, None])
        # what chance leaves of the residuals has mean square of about 1 in units of sigma
        excess = max(0.0, 1 - len(rates) / max(float((left**2) @ precision), 1e-12))
        missed = excess * left
        misfit = float(np.sqrt(np.mean(missed**2)))
        return cls(c, p, levels, weights, np.log(sizes), missed, misfit, float(1 / np.sqrt(precision.sum())))

    def at(self, size: float, inverse: float) -> tuple[float, float]:
        """(mean, standard deviation) of the log rate at B, with 1 / b."""
        logs = self.levels - self.powers * np.log1p(self.bends * inverse)
        mean = float(self.weights @ logs)
        variance = float(self.weights @ (logs - mean) ** 2) + self.error**2 + _LAW_ERROR**2 + self.misfit**2
        return mean + float(np.interp(math.log(size), self.sizes, self.missed)), math.sqrt(variance)


def search_errors(scatters: Floats, repeats: Floats, *, keeping: bool) -> Floats:
    """(anchors,) standard errors of mean log rates: the scatter of one search, pooled with what is known beforehand, over root n.

    Args:
        scatters: (anchors,) standard deviations of the searches; NaN for one search.
        repeats: (anchors,) searches each.
        keeping: whether they were for a rate that loses nothing.
    """
    known = _KEEPING_SCATTER if keeping else _SEARCH_SCATTER
    freedom = np.where(np.isfinite(scatters), repeats - 1, 0.0)
    squares = float(freedom @ np.nan_to_num(scatters) ** 2) + _SEARCHES_OF_THAT * known**2
    return np.asarray(math.sqrt(squares / (float(freedom.sum()) + _SEARCHES_OF_THAT)) / np.sqrt(repeats))
