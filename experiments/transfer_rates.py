"""Where the best learning rate lies at each width: muP and the standard parametrisation, an MLP on digits and a transformer on characters.

Loss: mean training loss of the last quarter of each run; every number comes from ``sk.transfer.learning_rate_transfer``.
Finished runs are kept in a temporary folder, so that an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments._common import Row, run_as_script
from experiments._transfer_models import mlp_family, text_batches, transformer_family
from sharpkit.transfer.learning_rates import learning_rate_transfer
from sharpkit.transfer.setup import Family

NAME = "transfer_rates"
STEPS = 100


def cases(quick: bool) -> list[tuple[str, Callable[[], Family], list[int], int]]:
    """(name, family, widths, seeds)."""
    wide, narrow = ([64, 128], [64, 128]) if quick else ([64, 128, 256, 512, 1024], [64, 128, 256, 512])
    few, many = (2, 2) if quick else (3, 6)  # the transformer has fewer widths
    words = text_batches(windows=16, count=64)
    return [
        ("MLP, muP, Adam", lambda: mlp_family(optimizer="adam"), wide, few),
        ("MLP, muP, SGD", lambda: mlp_family(optimizer="sgd"), wide, few),
        ("MLP, standard, Adam", lambda: mlp_family(parametrisation="sp", optimizer="adam"), wide, few),
        ("transformer, muP, Adam", lambda: transformer_family(optimizer="adam", batches=words), narrow, many),
        ("transformer, standard, Adam", lambda: transformer_family(parametrisation="sp", optimizer="adam", batches=words), narrow, few),
    ]


def measure(quick: bool) -> list[Row]:
    store = Path(tempfile.gettempdir()) / "sharpkit-experiments" / "transfer_rates_runs.jsonl"
    rows = []
    for name, make, widths, seeds in cases(quick):
        family = make()
        found = learning_rate_transfer(
            family.build,
            widths,
            optimizer=family.optimizer,
            data=family.batches,
            loss=family.loss,
            steps=40 if quick else STEPS,
            seeds=seeds,
            store=store,
            callback=lambda progress, name=name: print(f"{name}: {progress.text}", file=sys.stderr, flush=True),
        )
        rows.append({"case": name, **found.to_dict()})
        print(name, found, file=sys.stderr, flush=True)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    from sharpkit.plots.transfer import plot_learning_rate_transfer

    figure.set_size_inches(4.2 * len(rows), 3.9)
    for ax, row in zip(np.atleast_1d(figure.subplots(1, len(rows))), rows, strict=True):
        plot_learning_rate_transfer(row, ax=ax, title=row["case"])
    figure.suptitle("Loss against learning rate by width; python -m experiments.transfer_rates", fontsize=9)


if __name__ == "__main__":
    run_as_script(NAME, measure, draw)
