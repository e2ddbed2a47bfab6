"""Are eigenvalues right wherever they are said to have converged? 42 spectra, each asked for in 18 ways.

Diagonal operators (a random start makes them as good as rotated ones), so the truth is known to the last digit. Three ends ("largest",
"smallest", "magnitude"), 1, 5 or 20 pairs, float32 and float64, at tol=1e-3. Errors are measured in tolerances of the wanted value itself:
|theta - lambda| / (tol |lambda|), where 8 roundings of the largest magnitude are forgiven. A lie is a value that is said to have converged
and is wrong by more than 3; a miss is one that is wrong and says so. Then what reaches deep into a bulk, where an eigenvalue is most easily
passed over, from six starts each ("bulk").

    python -m experiments.eigen_torture      # results/eigen_torture.jsonl, figures/eigen_torture.png
"""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch

import sharpkit as sk
from experiments._common import Row, run_as_script, threads

TOL = 1e-3
WRONG = 3.0  # tolerances of the wanted value
ROUNDINGS = 8  # of the largest magnitude
ENDS, PAIRS, TYPES = ("largest", "smallest", "magnitude"), (1, 5, 20), ("float32", "float64")
IN_BULK, BULK_SEEDS = (("largest", 20), ("smallest", 20), ("largest", 10)), range(6)
SETTINGS = list(itertools.product(ENDS, PAIRS, TYPES))


def wilkinson(n: int) -> np.ndarray:
    """W_n+: its largest eigenvalues come in pairs that agree to 14 digits and more."""
    return np.linalg.eigvalsh(np.diag(np.abs(np.arange(n) - n // 2).astype(float)) + np.eye(n, k=1) + np.eye(n, k=-1))


def spectra() -> dict[str, np.ndarray]:
    """What is prescribed, by name."""
    r = np.random.default_rng(0)
    bulk = np.linspace(0, 0.95, 193)
    i = np.arange(1.0, 301)
    normal, uniform = r.standard_normal(300), r.random(300)
    network = np.concatenate([0.75 ** np.arange(10), 0.05 / 3 * r.standard_normal(290)])
    far = np.concatenate([[100.0, 60, 30, 20, 10], np.linspace(0, 1, 286) ** 4 * 3, [-0.1, -0.05, -0.03, -0.02, -0.01]])
    gpt = np.concatenate([9791 * 0.8 ** np.arange(20), 3 * r.standard_normal(276) ** 3 / 27, [-8.7, -7.9, -6.1, -5.0]])
    gram = np.linalg.eigvalsh(np.cov(r.standard_normal((300, 600))))
    return {
        "even from 0": np.linspace(0, 1, 300),
        "even, both signs": np.linspace(-1, 1, 300),
        "even from 1": np.linspace(1, 2, 300),
        "even, all negative": -np.linspace(1, 2, 300),
        "identity": np.ones(60),
        "zero": np.zeros(60),
        "minus identity": -np.ones(60),
        "all equal but the largest": np.concatenate([[3.0], np.ones(99)]),
        "all equal but the smallest": np.concatenate([[-3.0], np.ones(99)]),
        "two values": np.repeat([2.0, 1.0], 50),
        "rank 1": np.concatenate([[4.0], np.zeros(199)]),
        "rank 3": np.concatenate([[5.0, 4, 3], np.zeros(197)]),
        "rank 10, both signs": np.concatenate([np.arange(1.0, 6), -np.arange(1.0, 6), np.zeros(190)]),
        "rank 10, cluster": np.concatenate([np.full(10, 2.0), np.zeros(190)]),
        "network-like": network,
        "network-like, negative": -network,
        "smallest -0.1 beside 100": far,
        "largest 1.5 beside -1000": np.concatenate([[-1000.0], np.linspace(0, 1.5, 299)]),
        "smallest -8.7 beside 9791": gpt,
        "seven of five": np.concatenate([np.ones(7), bulk]),
        "twenty alike": np.concatenate([np.ones(20), bulk]),
        "ten doubles": np.concatenate([np.repeat(np.arange(2.0, 12), 2), bulk]),
        "triples": np.concatenate([np.repeat([5.0, 4, 3, 2], 3), bulk]),
        "cluster of 1e-3": np.concatenate([1 + 1e-3 * np.arange(6), bulk]),
        "cluster of 1e-6": np.concatenate([1 + 1e-6 * np.arange(6), bulk]),
        "near doubles, 1e-10": np.concatenate([np.arange(2.0, 8), np.arange(2.0, 8) + 1e-10, bulk]),
        "plus and minus": np.concatenate([np.arange(2.0, 8), -np.arange(2.0, 8), bulk]),
        "nearly plus and minus": np.concatenate([np.arange(2.0, 8), -np.arange(2.0, 8) + 1e-4, bulk]),
        "Wilkinson 201": wilkinson(201),
        "Wilkinson 21": wilkinson(21),
        "0.9^i": 0.9**i,
        "0.5^i": 0.5 ** i[:60],
        "1/i": 1 / i,
        "1/i^2, both signs": np.where(i % 2 == 1, 1, -1) / i**2,
        "twelve decades": np.logspace(-12, 0, 200),
        "normal": normal,
        "Marchenko and Pastur": gram,
        "heavy tail": uniform**-1.0,
        "heavy tails, both signs": normal / r.standard_normal(300),
        "1e-30": 1e-30 * network,
        "1e30": 1e30 * network,
        "three rows": np.array([2.0, 1.0, -3.0]),
    }


def network_like(size: int, seed: int) -> np.ndarray:
    """Ten outliers over a Gaussian bulk."""
    return np.concatenate([0.75 ** np.arange(10), 0.05 / 3 * np.random.default_rng(seed).standard_normal(size - 10)])


def bulks() -> dict[str, np.ndarray]:
    """Spectra of which ten or twenty pairs reach into a bulk or into clusters."""
    names = "network-like", "normal", "Marchenko and Pastur", "heavy tails, both signs", "ten doubles", "triples", "Wilkinson 201"
    sizes = (300, 1), (300, 2), (300, 3), (1000, 4)
    drawn = {f"network-like, {size} rows, seed {seed}": network_like(size, seed) for size, seed in sizes}
    return {name: spectrum for name, spectrum in spectra().items() if name in names} | drawn


def wanted(spectrum: np.ndarray, k: int, which: str) -> np.ndarray:
    """The true answer in the documented order."""
    if which == "magnitude":
        return spectrum[np.argsort(-np.abs(spectrum), kind="stable")][:k]
    ascending = np.sort(spectrum)
    return ascending[::-1][:k] if which == "largest" else ascending[:k][::-1]


def torture(name: str, spectrum: np.ndarray, which: str, k: int, dtype: str, seed: int = 0, kind: str = "run") -> Row:
    """One spectrum asked for in one way."""
    diagonal = torch.from_numpy(spectrum).to(getattr(torch, dtype))
    operator = sk.as_operator(lambda v: diagonal * v, size=len(spectrum), dtype=diagonal.dtype, check=False)
    k = min(k, len(spectrum))
    row: Row = {"kind": kind, "spectrum": name, "which": which, "k": k, "dtype": dtype, "seed": seed, "crash": ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sk.ConvergenceWarning)
            pairs = sk.eigenpairs(operator, k, which=which, tol=TOL, seed=seed)  # type: ignore[arg-type]
    except Exception as error:
        return row | {"crash": f"{type(error).__name__}: {error}"[:120]}
    given = diagonal.double().numpy()  # what float32 has made of it
    truth, scale = wanted(given, k, which), float(np.abs(given).max())
    values, converged = pairs.values.numpy(), pairs.converged.numpy()
    if which == "magnitude":  # +x and -x may come in either order
        truth, values = np.abs(truth), np.abs(values)
    allowed = WRONG * TOL * np.abs(truth) + ROUNDINGS * float(torch.finfo(diagonal.dtype).eps) * scale
    off = np.abs(values - truth) > allowed
    return row | {
        "products": operator.num_matvecs,
        "converged": int(converged.sum()),
        "wrong": int(off.sum()),
        "lies": int((off & converged).sum()),
        "outcome": pairs.outcome,
    }


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with threads(1):
        for name, spectrum in list(spectra().items())[:: 6 if quick else 1]:
            began = time.perf_counter()
            rows += [torture(name, spectrum, *setting) for setting in SETTINGS]
            print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
        deep: list[Row] = []
        for name, spectrum in list(bulks().items())[:: 6 if quick else 1]:
            for (which, k), seed in itertools.product(IN_BULK, BULK_SEEDS):
                deep.append(torture(name, spectrum, which, k, "float64", seed, "bulk"))
    return [*rows, *deep, summarise(rows), summarise(deep) | {"kind": "bulk summary"}]


def summarise(rows: list[Row]) -> Row:
    ran = [row for row in rows if not row["crash"]]
    return {
        "kind": "summary",
        "runs": len(rows),
        "crashes": len(rows) - len(ran),
        "runs_with_lies": sum(row["lies"] > 0 for row in ran),
        "all_right": sum(row["wrong"] == 0 for row in ran),
        "all_converged": sum(row["converged"] == row["k"] for row in ran),
        "products": sum(row["products"] for row in ran),
    }


def draw(rows: list[Row], figure: Any) -> None:
    figure.set_size_inches(9, 7)
    axes = figure.subplots(1, 1)
    names = list(dict.fromkeys(row["spectrum"] for row in rows if row["kind"] == "run"))
    for end, marker, color in zip(ENDS, "^vo", ("C0", "C3", "C2"), strict=True):
        ran = [row for row in rows if row["kind"] == "run" and row["which"] == end and not row["crash"]]
        for filled in (True, False):
            shown = [row for row in ran if (row["converged"] == row["k"]) is filled]
            places = [names.index(row["spectrum"]) for row in shown]
            label = f"{end}{'' if filled else ', not all converged'}"
            axes.plot(
                [row["products"] for row in shown],
                places,
                marker,
                ms=4,
                color=color,
                mfc=color if filled else "none",
                label=label,
                alpha=0.6,
            )
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xscale="log", xlabel="products; three numbers of pairs, two types", ylim=(len(names), -1))
    axes.legend(fontsize=7)


if __name__ == "__main__":
    run_as_script("eigen_torture", measure, draw)
