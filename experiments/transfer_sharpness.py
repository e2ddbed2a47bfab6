"""Sharpness along training at all widths, in muP, in the standard and in the NTK parametrisation: super consistency.

Gradient descent on 512 digits used whole, three-layer ReLU MLP, so that the limit 2 / lr is exact. The NTK parametrisation is the standard
one's initialisation with the rate of hidden weights and readout divided by the width.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from experiments._common import Row, run_as_script
from experiments._transfer_models import MLP, Rules, digit_batches, mlp_family, role_of
from sharpkit.transfer.setup import Family
from sharpkit.transfer.sharpness import sharpness_transfer

NAME = "transfer_sharpness"
LR, BASE = 0.2, 64
CASES = ("muP, SGD", "standard, SGD", "NTK, SGD", "muP, Adam", "standard, Adam")
ADAM_LR = 2e-3


def ntk_family(batches: Any) -> Family:
    """Changes of all layers' outputs by gradient steps shrink with the width, as in the NTK parametrisation."""
    rules = Rules(parametrisation="sp", optimizer="sgd")

    def optimizer(model: torch.nn.Module, width: int) -> torch.optim.Optimizer:
        by_role = {"hidden": BASE / width, "readout": BASE / width}
        groups = [{"params": [p], "lr": LR * by_role.get(role_of(n, p), 1.0)} for n, p in model.named_parameters()]
        return torch.optim.SGD(groups, lr=LR)

    return Family(build=lambda width: MLP(width, rules), optimizer=optimizer, data=batches, loss=F.cross_entropy)


def family_of(case: str, batches: Any) -> Family:
    if case.startswith("NTK"):
        return ntk_family(batches)
    adam = case.endswith("Adam")
    return mlp_family(
        parametrisation="mup" if case.startswith("muP") else "sp",
        optimizer="adam" if adam else "sgd",
        lr=ADAM_LR if adam else LR,
        batches=batches,
    )


def measure(quick: bool) -> list[Row]:
    whole = digit_batches(batch_size=128 if quick else 512)[:1]
    widths = [64, 128] if quick else [64, 128, 256, 512, 1024]
    rows = []
    for case in CASES:
        family = family_of(case, whole)
        found = sharpness_transfer(
            family.build,
            widths,
            optimizer=family.optimizer,
            data=family.batches,
            loss=family.loss,
            steps=20 if quick else 200,
            every=5,
            seeds=1,
            callback=lambda progress, case=case: print(f"{case}: {progress.text}", file=sys.stderr, flush=True),
        )
        print(case, found, file=sys.stderr, flush=True)
        rows.append({"case": case, **found.to_dict()})
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    from sharpkit.plots.transfer import plot_sharpness_transfer

    figure.set_size_inches(3.9 * len(rows), 5.2)
    for ax, row in zip(np.atleast_1d(figure.subplots(1, len(rows))), rows, strict=True):
        plot_sharpness_transfer(row, ax=ax, title=f"{row['case']}: spread {row['spread_after']:.0%}")
    figure.suptitle("Sharpness as a share of its stability limit, by width; python -m experiments.transfer_sharpness", fontsize=9)


if __name__ == "__main__":
    run_as_script(NAME, measure, draw)
