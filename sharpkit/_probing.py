"""How the survey of the data counts and evaluates an objective that is still being made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sharpkit._batches import Batch, to_device
from sharpkit._guard import random_fingerprint
from sharpkit._survey import Probe

if TYPE_CHECKING:
    from sharpkit.objective import Objective


def make_probe(objective: Objective, *, check: bool) -> Probe:
    """The probe of an objective that has its model, data and loss, but no weights yet."""
    device = objective._data_device

    def loss(batch: Batch, number: int) -> Tensor:
        with objective._guard(training=False):
            return objective._evaluate(to_device(batch, device), number).detach()

    def loss_in_mode(batch: Batch, number: int) -> tuple[Tensor, bool]:
        with objective.undisturbed():
            objective.seed_for(number)
            before = random_fingerprint(device)
            found = objective._evaluate(to_device(batch, device), number).detach()
            return found, before != random_fingerprint(device)

    several = objective.ranks.size > 1
    checksum = sum(float(p.detach().double().abs().sum()) for p in objective.layout.params) if several else 0.0
    return Probe(
        count=objective._candidate_counts,
        loss=loss,
        loss_in_mode=loss_in_mode,
        known=objective._known_loss,
        given_count=objective._count is not None,
        pair=objective.loss is not None,
        check=check,
        draws=objective.mode == "train",
        parameters=(objective.num_parameters, checksum),
    )
