"""Planted faults: muP with one rule broken at a time, the broken rule to be named; and correct muP, where nothing may be found."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from experiments._common import Row, run_as_script, threads
from experiments._transfer_models import depth_family, mlp_family, transformer_family
from sharpkit.transfer.coordinates import check_of
from sharpkit.transfer.culprits import MINIMAL_ERRORS, MINIMAL_EXPONENT, culprits_of, gather
from sharpkit.transfer.observing import observe
from sharpkit.transfer.setup import Family

NAMES = {  # planted fault -> the rule that must be named
    "hidden_lr": "hidden learning rate",
    "readout_multiplier": "readout multiplier",
    "readout_lr": "readout learning rate",
    "input_lr": "input learning rate",
    "attention_scale": "attention scale",
    "hidden_init": "hidden initialisation",
    "weight_decay": "weight decay",
    "vector_lr": "vector learning rate",
    "depth_multiplier": "depth multiplier",
}
NETWORKS: dict[str, tuple[Callable[..., Family], dict[str, Any], tuple[int, ...]]] = {
    "MLP, SGD": (mlp_family, {"optimizer": "sgd"}, (64, 128, 256, 512)),
    "MLP, Adam": (mlp_family, {"optimizer": "adam"}, (64, 128, 256, 512)),
    "transformer, AdamW": (transformer_family, {"optimizer": "adamw", "weight_decay": 0.1}, (64, 128, 256)),
    "transformer by depth, Adam": (depth_family, {"optimizer": "adam"}, (1, 2, 4, 8)),
}
FAULTS_OF = {
    "MLP, SGD": ("hidden_lr", "readout_multiplier", "readout_lr", "input_lr", "hidden_init", "vector_lr"),
    "MLP, Adam": ("hidden_lr", "readout_multiplier", "readout_lr", "input_lr", "hidden_init", "vector_lr"),
    "transformer, AdamW": tuple(name for name in NAMES if name != "depth_multiplier"),
    "transformer by depth, Adam": ("depth_multiplier",),
}
INNER_SEEDS = 3  # runs at each width in one check
TRIALS, CORRECT_TRIALS = 3, 10


def trial(network: str, fault: str | None, trial_seed: int, *, sizes: tuple[int, ...]) -> Row:
    """One check of its own initialisations and orders of data."""
    make, settings, _ = NETWORKS[network]
    family = make(fault=fault, **settings)
    began, cpu = time.perf_counter(), time.process_time()
    first_seed = 5000 + 100 * (trial_seed + 1)  # the thresholds were set on other seeds
    seen = observe(family, sizes, steps=4, seeds=range(first_seed, first_seed + INNER_SEEDS), effects=True)
    culprits = culprits_of(seen)
    named = [culprit.rule for culprit in culprits]
    expected = [] if fault is None else [NAMES[fault]]
    return {
        "network": network,
        "fault": fault,
        "trial": trial_seed,
        "first_seed": first_seed,
        "sizes": list(sizes),
        "named": named,
        "right": expected == named[: len(expected)] and (fault is not None or not named),
        "alone": expected == named,
        "evidence": [{"rule": c.rule, "slope": c.slope.value, "stderr": c.slope.stderr, "confidence": c.confidence} for c in culprits],
        "tested": [{"rule": e.rule, "excess": e.excess, "stderr": e.slope.stderr, "broken": e.broken} for e in gather(seen)],
        "check": [c.name for c in check_of(seen).failed],
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with threads(1):
        for network, (_, _, sizes) in NETWORKS.items():
            if quick and not network.startswith("MLP"):
                continue
            for fault in (None, *FAULTS_OF[network]):
                for number in range(1 if quick else CORRECT_TRIALS if fault is None else TRIALS):
                    rows.append(trial(network, fault, number, sizes=sizes))
                    last = rows[-1]
                    print(
                        network,
                        fault,
                        number,
                        last["named"],
                        last["check"],
                        "right" if last["right"] else "WRONG",
                        round(last["seconds"]),
                        flush=True,
                    )
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Measured departure of the planted rule's exponent, and every departure in correct networks, with the threshold."""
    figure.set_size_inches(9, 4.2)
    ax = figure.subplots()
    colours = dict(zip(NETWORKS, ("C0", "C1", "C2", "C3"), strict=True))
    labels = ["none planted", *NAMES]
    for row in rows:
        planted = row["fault"]
        place = labels.index(planted or "none planted") + 0.16 * (list(NETWORKS).index(row["network"]) - 1.5)
        tests = [
            t for t in row["tested"] if planted is None or t["rule"].startswith(NAMES[planted].replace("readout multiplier", "readout l"))
        ]
        worst = max(tests, key=lambda t: abs(t["excess"]))
        mark = "o" if row["right"] else "x"
        ax.errorbar(
            [place], [abs(worst["excess"])], yerr=[worst["stderr"]], fmt=mark, color=colours[row["network"]], ms=4, lw=0.8, capsize=1.5
        )
    for network, colour in colours.items():
        ax.plot([], [], "o", color=colour, label=network)
    ax.plot([], [], "kx", label="not named, or falsely")
    ax.axhline(MINIMAL_EXPONENT, color="grey", ls="--", lw=1)
    ax.text(len(labels) - 0.5, MINIMAL_EXPONENT, "least exponent\nthat counts", fontsize=7, va="bottom", ha="right", color="grey")
    ax.set_xticks(range(len(labels)), labels=[f"{name}".replace("_", "\n") for name in labels], fontsize=8)
    ax.set_ylabel("|measured - expected exponent|\nof the planted rule (none: the largest of all)")
    ax.set_title(
        f"one rule of muP broken at a time; counted as broken above the line and beyond {MINIMAL_ERRORS:g} standard errors", fontsize=9
    )
    ax.legend(fontsize=7, ncols=2, loc="upper right")
    ax.set_ylim(bottom=0)


if __name__ == "__main__":
    run_as_script("transfer_faults", measure, draw)
