"""Right or refused: 2,500 seeded inputs over the whole public API, as users bring them and as they mistake it.

Half are arguments (every argument of every public function with values of the wrong kind or size, and unusual ones that mean something),
half models, batches, losses and closures put to nine uses. Each is "right" (the value agrees with plain torch or a dense matrix, where the
input means one), "refused" (an error that sharpkit raised on purpose), "told" (a warning), "own error" (the user's own, unchanged), "raw
error" (any other: torch's, Python's, an AttributeError of ours), or "silent wrong" (another value, or nonsense accepted without a word).
Raw errors and silent wrongs must be 0.

    python -m experiments.fuzz_inputs      # results/fuzz_inputs.jsonl, figures/fuzz_inputs.png; 2 minutes
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import torch

from experiments._common import Row, run_as_script
from experiments._fuzz import OUTCOMES, Input, Judged, counts, judge
from experiments._fuzz_arguments import subjects
from experiments._fuzz_seams import inputs

_EACH = 1250  # of arguments, and of seams
_QUICK = 200
_SEED = 0
FAULTS = ("raw error", "silent wrong")


def sample(each: int, seed: int = _SEED, *, without: tuple[str, ...] = ()) -> list[Input]:
    """So many inputs of either half, drawn without replacement, of all functions but those whose name begins so."""
    chosen = [subject for subject in subjects() if not subject.name.startswith(without)]
    halves = [[given for subject in chosen for given in subject.inputs()], list(inputs())]
    rng = random.Random(seed)
    return [given for half in halves for given in rng.sample(half, min(each, len(half)))]


def measure(quick: bool) -> list[Row]:
    """One row for each public function, and one for each fault."""
    torch.set_num_threads(1)
    by: dict[str, list[Judged]] = defaultdict(list)
    for given in sample(_QUICK if quick else _EACH):
        by[given.function].append(judge(given))
    everything = [judged for each in by.values() for judged in each]
    rows: list[Row] = [{"function": "all", "inputs": len(everything), **counts(everything)}]
    rows += [{"function": name, "inputs": len(each), **counts(each)} for name, each in sorted(by.items())]
    return rows + [{"fault": j.outcome, "function": j.function, "input": j.what, "said": j.said} for j in everything if j.outcome in FAULTS]


def draw(rows: list[Row], figure: Any) -> None:
    """Bars of outcomes by function."""
    rows = [row for row in rows if "fault" not in row and row["function"] != "all"][::-1]
    figure.set_size_inches(9, 0.16 * len(rows) + 1)
    ax = figure.subplots()
    left = [0] * len(rows)
    for outcome, colour in zip(OUTCOMES, ("#4c9f70", "#4878a8", "#9bc1e0", "#bbbbbb", "#c1272d", "#e07b00"), strict=True):
        ax.barh([row["function"] for row in rows], [row[outcome] for row in rows], left=left, color=colour, label=outcome)
        left = [have + row[outcome] for have, row in zip(left, rows, strict=True)]
    ax.tick_params(axis="y", labelsize=6)
    ax.set_xlabel("inputs")
    ax.margins(y=0.01)
    ax.legend(fontsize=7)


if __name__ == "__main__":
    run_as_script("fuzz_inputs", measure, draw)
