"""Correct parametrisations, which must never be called broken, and faults that hide, the planted one to be named first.

Checks first: coordinates and culprits, two trials each; then the verdict of ``diagnose`` on every correct parametrisation.
Each row is written when it is done, into a temporary folder; a run that was interrupted goes on after its last row.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments._common import Row, rounded, run_as_script, threads
from experiments._transfer_models import depth_family, digit_batches, mlp_family
from experiments._transfer_unusual import (
    CORRECT,
    ConvNet,
    NormMLP,
    RootUnitMLP,
    adam,
    conv_groups,
    family,
    linear_groups,
    unit_groups,
    words,
)
from sharpkit.transfer.coordinates import check_of
from sharpkit.transfer.culprits import culprits_in
from sharpkit.transfer.observing import observe
from sharpkit.transfer.setup import Family
from sharpkit.transfer.verdict import diagnose

NAME = "transfer_correct"
TWIN = "conv net, (in, out) readout"  # the same function as with Conv1d: one verdict, of some minutes, is enough
# Whose seeds 6000 to 6102 a rule has seen (one half-certain test joins a certain one; the depth's rate at the stack's end): others since.
SEEN = ("Conv1d readout without multiplier", "depth rate constant")
TRIALS = 2  # of each correct parametrisation and fault, each of its own seeds


def _digits(build: Any, groups: Any, **options: Any) -> Family:
    return family(build, adam(groups, **options), digit_batches())


FAULTS: dict[str, tuple[str, Callable[[], Family]]] = {
    "coupled decay .01, layer norm": ("weight decay", lambda: _digits(NormMLP, linear_groups(), weight_decay=1e-2)),
    "coupled decay .001, layer norm": ("weight decay", lambda: _digits(NormMLP, linear_groups(), weight_decay=1e-3)),
    "coupled decay .001, times m in hidden": ("weight decay", lambda: mlp_family(weight_decay=1e-3)),
    "Conv1d readout without multiplier": (
        "readout multiplier",
        lambda: _digits(lambda w: ConvNet(w, readout="conv1d", multiplier=False), conv_groups()),
    ),
    "Conv1d readout, rate 1/m": (
        "readout learning rate",
        lambda: _digits(lambda w: ConvNet(w, readout="conv1d"), conv_groups(readout=-1.0)),
    ),
    "(in, out) readout, rate 1/m": (
        "readout learning rate",
        lambda: _digits(lambda w: ConvNet(w, readout="transposed"), conv_groups(readout=-1.0)),
    ),
    "unit-scaled, hidden multiplier missing": (
        "hidden multiplier",
        lambda: _digits(lambda w: RootUnitMLP(w, hidden_power=0.0), unit_groups()),
    ),
    "unit-scaled, readout multiplier n^-1/2": (
        "readout multiplier",
        lambda: _digits(lambda w: RootUnitMLP(w, readout_power=0.5), unit_groups()),
    ),
    "unit-scaled, hidden rate constant": ("hidden learning rate", lambda: _digits(RootUnitMLP, unit_groups(0.0))),
    "readout rate 1/m at .03": ("readout learning rate", lambda: mlp_family(fault="readout_lr", lr=0.03)),
    "readout rate 1/m at .1": ("readout learning rate", lambda: mlp_family(fault="readout_lr", lr=0.1)),
    "readout rate m at .1": ("readout learning rate", lambda: _digits(NormMLP, linear_groups(readout=1.0), lr=0.1)),
    "readout without multiplier at .3, SGD": (
        "readout multiplier",
        lambda: mlp_family(optimizer="sgd", fault="readout_multiplier", lr=0.3),
    ),
    "readout rate constant at .3, SGD": ("readout learning rate", lambda: mlp_family(optimizer="sgd", fault="readout_lr", lr=0.3)),
    "depth multiplier missing": ("depth multiplier", lambda: depth_family(fault="depth_multiplier")),
    "depth rate constant": ("depth learning rate", lambda: depth_family(fault="depth_lr", batches=words())),
}


def sizes_of(name: str) -> tuple[int, ...]:
    if name.startswith("depth"):
        return 1, 2, 4, 8
    if name.startswith("conv net"):
        return 32, 64, 128  # as wide as a verdict has time for
    return (64, 128, 256) if "transformer" in name or "Conv1d" in name or "(in, out)" in name else (64, 128, 256, 512)


def trial(name: str, planted: str | None, make: Callable[[], Family], number: int) -> Row:
    """One check of its own seeds; of a correct parametrisation's first trial the whole verdict too."""
    began = time.process_time()
    made, sizes = make(), sizes_of(name)
    first = (7000 if name in SEEN else 6000) + 100 * number
    seeds = range(first, first + 3)
    seen = observe(made, sizes, steps=4, seeds=seeds, effects=True)
    named = [culprit.rule for culprit in culprits_in(made, seen, seeds=seeds)]
    row: Row = {"name": name, "planted": planted, "trial": number, "first_seed": first, "sizes": list(sizes), "named": named}
    row["right"] = named[:1] == [planted] if planted else not named
    row["check"] = [c.name for c in check_of(seen).failed]
    row["cpu_seconds"] = time.process_time() - began
    return row


def verdict(name: str, make: Callable[[], Family]) -> Row:
    """The whole answer, quick mode, of seeds 0 to 2 (to 5 where three do not decide)."""
    began, made, sizes = time.process_time(), make(), sizes_of(name)
    said = diagnose(made.build, widths=sizes, optimizer=made.optimizer, data=made.batches, loss=made.loss)
    row: Row = {"name": name, "planted": None, "trial": "verdict", "sizes": list(sizes), "right": said.passed is not False}
    row |= {"passed": said.passed, "headline": said.headline, "ended": said.ended, "penalty": [list(r.penalty) for r in said.rates]}
    row |= {"drift": [str(rates.drift) for rates in said.rates], "check": [c.name for check in said.checks for c in check.failed]}
    return row | {"named": [c.rule for c in said.culprits], "seconds": said.seconds, "cpu_seconds": time.process_time() - began}


def measure(quick: bool) -> list[Row]:
    kept = Path(tempfile.gettempdir()) / "sharpkit-experiments" / f"{NAME}{'-quick' if quick else ''}.rows.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["name"], row["trial"]) for row in rows}
    cases = [(name, None, make) for name, make in CORRECT.items()] + [(name, rule, make) for name, (rule, make) in FAULTS.items()]
    work: list[tuple[str, Any, Callable[[], Row]]] = []
    for number in range(1 if quick else TRIALS):
        work += [(name, number, partial(trial, name, planted, make, number)) for name, planted, make in cases[: 2 if quick else None]]
    work += [
        (name, "verdict", partial(verdict, name, make)) for name, make in list(CORRECT.items())[: 1 if quick else None] if name != TWIN
    ]
    with threads(1):
        for name, number, make_row in work:
            if (name, number) not in done:
                rows.append(make_row())
                with kept.open("a") as stream:
                    stream.write(json.dumps(rounded(rows[-1])) + "\n")
                print(rows[-1], flush=True)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """For each case, in how many trials the answer was right."""
    figure.set_size_inches(8, 6)
    ax = figure.subplots()
    names = list(dict.fromkeys(row["name"] for row in rows))
    for i, name in enumerate(names):
        mine = [row["right"] for row in rows if row["name"] == name]
        ax.barh(i, sum(mine) / len(mine), color="C0" if name in CORRECT else "C1")
    ax.set_yticks(range(len(names)), labels=names, fontsize=7)
    ax.set_xlabel("share of trials: nothing named (blue, correct), the planted rule named first (orange)", fontsize=8)
    ax.invert_yaxis()


if __name__ == "__main__":
    run_as_script(NAME, measure, draw)
