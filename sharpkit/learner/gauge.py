"""The curvature that a learner goes by: lambda_max of a batch, of each parameter group's block, and Polyak's momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch

from sharpkit._errors import ObjectiveError
from sharpkit._results import Parts
from sharpkit.learner.rate import COLD_MATVECS, WARM_MATVECS
from sharpkit.linalg.results import Estimate
from sharpkit.linalg.slq import spectral_density
from sharpkit.linalg.tracking import EigenvalueTracker
from sharpkit.objective.params import among
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import optimizer_curvature
from sharpkit.optimizers import UpdateRule, held_parameters

BULKS = ("median", "weighted median", "mean")


def polyak_pair(largest: float, smallest: float) -> tuple[float, float]:
    """eta = 4 / (sqrt L + sqrt mu)^2 and beta = ((sqrt L - sqrt mu) / (sqrt L + sqrt mu))^2.

    The best rate of heavy ball on a deterministic quadratic with curvature in [mu, L]; gradient noise makes it too bold.

    Args:
        largest: L > 0.
        smallest: mu; a negative one counts as 0.

    Raises:
        ValueError: L is not positive, or less than mu.

    Example:
        >>> polyak_pair(1.0, 1.0), [round(v, 3) for v in polyak_pair(100.0, 1.0)]
        ((1.0, 0.0), [0.033, 0.669])

    References:
        Polyak, "Some methods of speeding up the convergence of iteration methods" (1964).
    """
    if not 0 < largest < math.inf or smallest > largest:
        raise ValueError(f"the largest curvature must be positive and not below the smallest, got {largest} and {smallest}")
    a, b = math.sqrt(largest), math.sqrt(max(smallest, 0.0))
    return 4 / (a + b) ** 2, ((a - b) / (a + b)) ** 2


def bulk_curvature(nodes: Sequence[float], weights: Sequence[float], largest: float, reading: str | float) -> float | None:
    """mu, the lower end of the curvature that momentum is chosen for, from a quadrature of the spectral density.

    Args:
        nodes, weights: Ritz values of a random probe, and the share of directions that each stands for.
        largest: L, the largest eigenvalue.
        reading: ``"median"`` of the positive nodes; ``"weighted median"`` and ``"mean"`` of positive curvature by weight; or the condition
            number kappa: mu = L / kappa.

    Returns:
        mu in (0, L]; None without positive curvature.

    Example:
        >>> [bulk_curvature([-1.0, 0.1, 2.0, 9.0], [0.1, 0.7, 0.15, 0.05], 9.0, r) for r in ("median", "weighted median", 90.0)]
        [2.0, 0.1, 0.1]
    """
    # nodes without weight are spurious copies of converged Ritz values
    positive = sorted((node, weight) for node, weight in zip(nodes, weights, strict=True) if node > 0 and weight > 1e-12)
    if not positive or largest <= 0:
        return None
    if not isinstance(reading, str):
        return largest / reading
    total = sum(weight for _, weight in positive)
    if reading == "mean":
        lower = sum(node * weight for node, weight in positive) / total
    elif reading == "weighted median":
        passed = list(accumulate(weight for _, weight in positive))
        lower = next((node for (node, _), sofar in zip(positive, passed, strict=True) if sofar >= total / 2), positive[-1][0])
    else:
        lower = positive[(len(positive) - 1) // 2][0]
    return min(lower, largest)


_TOL = 0.2  # by judgement: the curvature of one batch is off by a factor of two either way, so that more products would buy nothing
_BULK_STEPS = 10  # Lanczos steps for the bulk of the curvature; those of experiments/learner_momentum.py
_FLAT = 1e-4  # of the sharpest block's curvature, by judgement: below, a tracker's few products cannot tell a block from a flat one
_MOST_RATIO = (
    10.0  # a group's rate leaves the given ratio by no more, by judgement: a flat block may turn sharp before it is measured again
)
_MOST_MOMENTUM = 0.98  # by judgement; in experiments/learner_momentum.py 0.96 already cost the digits 1.4 times the best test loss


class Gauge:
    """Measures batches one after another, each from where the last one's vectors were; an adaptive optimizer's state preconditions."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, adaptive: bool, seed: int) -> None:
        self._optimizer, self._adaptive, self._seed = optimizer, adaptive, seed
        settings: dict[str, Any] = {"max_matvecs": WARM_MATVECS, "cold_matvecs": COLD_MATVECS, "seed": seed}
        # every 8th update (by judgement) also looks for another eigenvalue that has risen above the one followed
        self._trackers = Parts(lambda _: EigenvalueTracker(tol=_TOL, check_every=8, **settings))

    def measure(self, hessian: HessianOperator, ratios: Sequence[float], *, step: int) -> tuple[Estimate, UpdateRule]:
        """lambda_max on a batch of the matrix of the optimizer's limit, groups in these ratios, and the rule that it goes with."""
        matrix, rule = optimizer_curvature(hessian, self._optimizer, ratios=ratios)
        return self._trackers["all"].update(matrix, step=step), rule

    def group_ratios(self, hessian: HessianOperator, given: Sequence[float]) -> list[float]:
        """Each group's rate relative to the reference's, inversely to its own block's curvature.

        A block without curvature says nothing about its rate: it keeps the given ratio to the others. So does a group at rate 0.

        Args:
            hessian: of a batch.
            given: the ratios that the optimizer came with.
        """
        equal = [1.0 if ratio else 0.0 for ratio in given]
        matrix, _ = optimizer_curvature(hessian, self._optimizer, ratios=equal)
        reached = {id(p) for p in hessian.layout.live}
        tops: dict[int, float] = {}
        for index, params in enumerate(held_parameters(self._optimizer)):
            own = {id(p) for p in params}
            if given[index] and own & reached:
                block: SymmetricOperator = matrix.block(among(own))  # type: ignore[attr-defined]
                with suppress(ObjectiveError):  # a group that the loss does not reach has no curvature either
                    tops[index] = self._trackers[f"group{index}"].update(block).value
        floor = _FLAT * max(tops.values(), default=0.0)
        # gains: by how much each group's rate would leave the given ratio
        gains = {index: 1 / (top * given[index]) for index, top in tops.items() if top > floor}
        if not gains:
            return list(given)
        usual = math.exp(sum(map(math.log, gains.values())) / len(gains))
        chosen = [ratio * min(max(gains.get(index, usual) / usual, 1 / _MOST_RATIO), _MOST_RATIO) for index, ratio in enumerate(given)]
        reference = next(ratio for ratio, before in zip(chosen, given, strict=True) if before == 1)
        return [ratio / reference for ratio in chosen]

    def polyak_momentum(self, hessian: HessianOperator, largest: float, reading: str | float, *, step: int) -> float | None:
        """Polyak's momentum, the lower end of the curvature read from one random probe or given; None without positive curvature."""
        nodes, weights = [largest], [1.0]
        if isinstance(reading, str):
            density = spectral_density(hessian, num_probes=1, num_steps=min(_BULK_STEPS, hessian.size), seed=self._seed + step)
            nodes, weights = density.nodes.flatten().tolist(), density.weights.flatten().tolist()
        smallest = bulk_curvature(nodes, weights, largest, reading)
        return None if smallest is None else min(polyak_pair(largest, smallest)[1], _MOST_MOMENTUM)

    def state_dict(self) -> dict[str, Any]:
        """The trackers by name."""
        return self._trackers.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved trackers."""
        self._trackers.load_state_dict(state)
