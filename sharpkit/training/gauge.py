"""The curvature that a learner goes by: lambda_max of a batch, of each parameter group's block, and Polyak's momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sharpkit.analysis.sharpness import preconditioned_hessian
from sharpkit.linalg.results import Estimate
from sharpkit.linalg.slq import spectral_density
from sharpkit.linalg.tracking import EigenvalueTracker
from sharpkit.objective import Objective
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.hessian import HessianOperator
from sharpkit.training.pace import COLD_MATVECS, WARM_MATVECS
from sharpkit.training.polyak import bulk_curvature, polyak_pair
from sharpkit.training.situation import among

_TOL = 0.2  # one batch's curvature says no more
_BULK_STEPS = 10  # Lanczos steps that show the bulk of the curvature
_MOST_MOMENTUM = 0.98


class Gauge:
    """Measures batches one after another, each from where the last one's vectors were.

    Args:
        optimizer: whose state preconditions, if it is adaptive.
        adaptive: whether it is.
        seed: of the probes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, adaptive: bool, seed: int) -> None:
        self._optimizer, self._adaptive, self._seed = optimizer, adaptive, seed
        self._matrix: SymmetricOperator | None = None
        self._trackers: dict[str, EigenvalueTracker] = {}

    def measure(self, hessian: HessianOperator, *, step: int) -> Estimate:
        """lambda_max of a batch's Hessian, or of D^-1 H."""
        self._matrix = preconditioned_hessian(hessian, self._optimizer) if self._adaptive else hessian
        return self._tracker("all").update(self._matrix, step=step)

    def group_ratios(self, objective: Objective, ratios: list[float]) -> list[float]:
        """Each group's rate relative to the first's: inversely to its own block's curvature in the matrix just measured.

        Args:
            objective: that was measured.
            ratios: kept for groups without parameters in it.
        """
        tops: list[float] = []
        for index, group in enumerate(self._optimizer.param_groups):
            own = {id(p) for p in group["params"]}
            if self._matrix is None or not any(id(p) in own for p in objective.layout.params):
                tops.append(math.nan)
                continue
            block: SymmetricOperator = self._matrix.block(among(own))  # type: ignore[attr-defined]
            tops.append(max(self._tracker(f"group{index}").update(block).value, 1e-30))
        if not math.isfinite(tops[0]):
            return ratios
        return [tops[0] / top if math.isfinite(top) else old for top, old in zip(tops, ratios, strict=True)]

    def polyak_momentum(self, hessian: HessianOperator, largest: float, reading: str | float, *, step: int) -> float | None:
        """Polyak's momentum, the lower end of the curvature read from one random probe or given; None without positive curvature.

        Args:
            hessian: of the batch.
            largest: lambda_max.
            reading: as in :func:`bulk_curvature`.
            step: makes the probe.
        """
        nodes, weights = [largest], [1.0]
        if isinstance(reading, str):
            density = spectral_density(hessian, num_probes=1, num_steps=min(_BULK_STEPS, hessian.size), seed=self._seed + step)
            nodes, weights = density.nodes.flatten().tolist(), density.weights.flatten().tolist()
        smallest = bulk_curvature(nodes, weights, largest, reading)
        return None if smallest is None else min(polyak_pair(largest, smallest)[1], _MOST_MOMENTUM)

    def _tracker(self, name: str) -> EigenvalueTracker:
        new = EigenvalueTracker(tol=_TOL, max_matvecs=WARM_MATVECS, cold_matvecs=COLD_MATVECS, check_every=8, seed=self._seed)
        return self._trackers.setdefault(name, new)

    def state_dict(self) -> dict[str, Any]:
        """Of the trackers."""
        return {name: tracker.state_dict() for name, tracker in self._trackers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved trackers."""
        self._trackers.clear()
        for name, saved in state.items():
            self._tracker(name).load_state_dict(saved)
