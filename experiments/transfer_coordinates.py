"""Coordinate checks of muP and the standard parametrisation side by side: MLP on digits and character-level transformer, Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments._common import Row, run_as_script, threads
from experiments._transfer_models import mlp_family, transformer_family
from sharpkit.plots.transfer import plot_coordinates
from sharpkit.transfer.coordinates import CoordinateCheck, check_of
from sharpkit.transfer.observing import observe
from sharpkit.transfer.setup import Family

NETWORKS: dict[str, tuple[Callable[..., Family], tuple[int, ...]]] = {
    "MLP on digits": (mlp_family, (64, 128, 256, 512, 1024)),
    "transformer on text": (transformer_family, (64, 128, 256, 512)),
}
PARAMETRISATIONS = {"mup": "muP", "sp": "standard"}


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with threads(1):
        for network, (make, sizes) in NETWORKS.items():
            for name in PARAMETRISATIONS:
                chosen = sizes[:3] if quick else sizes
                seen = observe(make(parametrisation=name), chosen, steps=4, seeds=2 if quick else 3, effects=False)
                check = check_of(seen)
                print(network, name, check, check.table(), sep="\n", flush=True)
                rows.append({"network": network, "parametrisation": name, **check.to_dict()})
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    figure.set_size_inches(9.5, 7)
    axes = figure.subplots(2, 2, sharey="row")
    for ax, row in zip(axes.flat, rows, strict=True):
        check = CoordinateCheck.from_dict(row)
        judged = [c for c in check.coordinates if c.verdict != "not judged" and not c.repeats_output]
        word = "passed" if check.passed else f"{sum(c in check.failed for c in judged)} of {len(judged)} fail"
        plot_coordinates(check, ax=ax, title=f"{row['network']}, {PARAMETRISATIONS[row['parametrisation']]}, Adam: {word}")
        ax.legend(fontsize=7, loc="upper left")
    for ax in axes[:, 1]:
        ax.set_ylabel("")
    for row_axes in axes:
        low, high = row_axes[0].get_ylim()
        row_axes[0].set_ylim(low, high * 8)  # room for the legends
    figure.suptitle("what is expected are level lines; python -m experiments.transfer_coordinates", fontsize=8)


if __name__ == "__main__":
    run_as_script("transfer_coordinates", measure, draw)
