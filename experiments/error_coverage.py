"""Do stated standard errors hold? Six spectra, every random estimate, 200 seeds each.

Dense rotated matrices of 100 rows, so the truth is known. ``share``: of the seeds, how many lie within two stated standard errors (93 % are
asked for). ``wide``: by how much the stated interval exceeds the one that 95 % of these seeds needed, 1 / (95 % quantile of |error| / 2
stderr); at most 1.5 is asked for. Errors below 1e-9 of the truth are exact and need no width. The mass below 0 is asked for of spectra that
are shifted so that they cross it.

    python -m experiments.error_coverage      # results/error_coverage.jsonl, figures/error_coverage.png
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

import sharpkit as sk
from experiments._common import Row, run_as_script, threads
from sharpkit.linalg.overview import spectral_overview

N = 100
LEAST_INEXACT = 0.1  # of the answers, below which nothing is said about a width
Answer = tuple[np.ndarray, np.ndarray, np.ndarray, int]  # values, stated errors, truths, products


def spectra() -> dict[str, np.ndarray]:
    """The six kinds."""
    r = np.random.default_rng(3)
    return {
        "flat": 1 + 0.1 * r.random(N),
        "outliers": np.concatenate([[50.0, 20, 10, 5, 3], 0.05 * (r.random(N - 5) - 0.3)]),
        "heavy tail": np.sort(r.pareto(1.0, N))[::-1].copy(),
        "one dominates": np.concatenate([[100.0], 0.1 * r.random(N - 1)]),
        "low rank": np.concatenate([np.arange(1.0, 9), np.zeros(N - 8)]),
        "both signs": np.concatenate([[8.0, 4, -6], r.standard_normal(N - 3) + 0.3]),
    }


@functools.cache
def rotated(name: str) -> torch.Tensor:
    """A dense matrix with this spectrum, one for all estimators, which share what they compute of it."""
    spectrum = spectra()[name]
    basis = np.linalg.qr(np.random.default_rng(7).standard_normal((N, N)))[0]
    matrix = (basis * spectrum) @ basis.T
    return torch.from_numpy((matrix + matrix.T) / 2)


def _one(estimate: sk.Estimate, truth: float) -> Answer:
    return np.array([estimate.value]), np.array([estimate.stderr]), np.array([truth]), estimate.num_matvecs


def trace_by(method: str, **options: Any) -> Callable[[torch.Tensor, np.ndarray, int], Answer]:
    """tr A by one method."""
    return lambda matrix, spectrum, seed: _one(sk.trace(matrix, method=method, seed=seed, **options), spectrum.sum())  # type: ignore[arg-type]


def positive_trace_by(method: str, **options: Any) -> Callable[[torch.Tensor, np.ndarray, int], Answer]:
    """tr A^2, of a positive matrix."""

    def estimate(matrix: torch.Tensor, spectrum: np.ndarray, seed: int) -> Answer:
        return _one(sk.trace(matrix @ matrix, method=method, seed=seed, **options), float((spectrum**2).sum()))  # type: ignore[arg-type]

    return estimate


def diagonal(matrix: torch.Tensor, spectrum: np.ndarray, seed: int) -> Answer:
    """Every entry counts as one answer."""
    made = sk.diagonal(matrix, num_probes=40, seed=seed)
    return made.value.numpy(), made.stderr.numpy(), matrix.diagonal().numpy(), made.num_matvecs


def frobenius(matrix: torch.Tensor, spectrum: np.ndarray, seed: int) -> Answer:
    return _one(sk.frobenius_norm(matrix, rtol=0.02, seed=seed), float(np.linalg.norm(spectrum)))


@functools.lru_cache(maxsize=256)
def _density(matrix: torch.Tensor, seed: int) -> sk.SpectralDensity:
    return sk.spectral_density(matrix, num_probes=10, num_steps=16, seed=seed)


@functools.lru_cache(maxsize=256)
def _overview(matrix: torch.Tensor, seed: int) -> Any:
    return spectral_overview(matrix, num_steps=16, seed=seed)


def negative_share(spectrum: np.ndarray) -> float:
    """What ``negative_mass`` estimates."""
    return float(np.mean(spectrum < -1e-3 * np.abs(spectrum).max()))


def negative_mass(matrix: torch.Tensor, spectrum: np.ndarray, seed: int) -> Answer:
    """Shifted by the median, so that half of the eigenvalues are below 0; beside far outliers the bulk is too close to 0 to count."""
    middle = float(np.median(spectrum))
    made = sk.spectral_density(matrix - middle * torch.eye(N).double(), num_probes=10, num_steps=16, seed=seed)
    return _one(made.negative_mass, negative_share(spectrum - middle))


ESTIMATORS: dict[str, Callable[[torch.Tensor, np.ndarray, int], Answer]] = {
    "hutchinson, 20 %": trace_by("hutchinson", rtol=0.2),
    "hutchinson, 40 products": trace_by("hutchinson", num_matvecs=40),
    "hutch++, 5 %": trace_by("hutch++", rtol=0.05),
    "hutch++, 40 products": trace_by("hutch++", num_matvecs=40),
    "xtrace, 5 %": trace_by("xtrace", rtol=0.05),
    "xtrace, 40 products": trace_by("xtrace", num_matvecs=40),
    "auto, 20 %": trace_by("auto", rtol=0.2),
    "auto, 5 %": trace_by("auto", rtol=0.05),
    "auto, 40 products": trace_by("auto", num_matvecs=40),
    "xnystrace of A^2, 5 %": positive_trace_by("xnystrace", rtol=0.05),
    "xnystrace of A^2, 40 products": positive_trace_by("xnystrace", num_matvecs=40),
    "diagonal": diagonal,
    "frobenius norm": frobenius,
    "SLQ trace": lambda a, s, seed: _one(_density(a, seed).trace, s.sum()),
    "SLQ norm": lambda a, s, seed: _one(_density(a, seed).frobenius_norm, float(np.linalg.norm(s))),
    "SLQ mean of exp(-x/4)": lambda a, s, seed: _one(_density(a, seed).expectation(lambda x: np.exp(-x / 4)), float(np.exp(-s / 4).mean())),
    "SLQ negative mass": negative_mass,
    "overview trace": lambda a, s, seed: _one(_overview(a, seed).trace, s.sum()),
    "overview norm": lambda a, s, seed: _one(_overview(a, seed).frobenius_norm, float(np.linalg.norm(s))),
    "overview |trace|": lambda a, s, seed: _one(_overview(a, seed).absolute_trace, float(np.abs(s).sum())),
    "overview negative mass": lambda a, s, seed: _one(_overview(a, seed).density.negative_mass, negative_share(s)),
}


def coverage(name: str, spectrum: np.ndarray, estimator: str, *, seeds: range) -> Row:
    """Share of seeds within two stated errors, and the width relative to what they needed."""
    matrix = rotated(name)
    ratios, products, exact = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.ConvergenceWarning)
        for seed in seeds:
            values, stderr, truth, cost = ESTIMATORS[estimator](matrix, spectrum, seed)
            off = np.abs(values - truth)
            right = off <= 1e-9 * max(np.abs(truth).max(), np.abs(spectrum).max())
            ratios.append(np.where(right, 0.0, off / np.maximum(2 * stderr, 1e-300)))
            exact.append(right.mean())
            products.append(cost)
    ratio = np.concatenate(ratios)
    needed = float(np.quantile(ratio[ratio > 0], 0.95)) if np.mean(ratio > 0) > LEAST_INEXACT else 0.0
    return {
        "spectrum": name,
        "estimator": estimator,
        "share": float(np.mean(ratio <= 1)),
        "wide": 1 / needed if needed > 0 else None,
        "exact": float(np.mean(exact)),
        "products": float(np.mean(products)),
        "seeds": len(seeds),
    }


def rows_of(name: str, seeds: range) -> list[Row]:
    """All estimators on one spectrum."""
    with threads(1):
        began, spectrum = time.perf_counter(), spectra()[name]
        rows = [coverage(name, spectrum, estimator, seeds=seeds) for estimator in ESTIMATORS]
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        return rows


def measure(quick: bool) -> list[Row]:
    """One process for each spectrum, as many at a time as there are processors."""
    with ProcessPoolExecutor() as pool:
        parts = pool.map(rows_of, spectra(), itertools.repeat(range(10 if quick else 200)))
        return [row for part in parts for row in part]


def draw(rows: list[Row], figure: Any) -> None:
    figure.set_size_inches(10, 5)
    left, right = figure.subplots(1, 2, sharey=True)
    names, kinds = list(ESTIMATORS), list(dict.fromkeys(row["spectrum"] for row in rows))
    for j, kind in enumerate(kinds):
        of_kind = [row for row in rows if row["spectrum"] == kind]
        places = [names.index(row["estimator"]) + 0.1 * (j - 2.5) for row in of_kind]
        left.plot([100 * row["share"] for row in of_kind], places, "o", ms=4, label=kind)
        right.plot([row["wide"] or np.nan for row in of_kind], places, "o", ms=4)
    left.axvline(93, color="0.5", lw=0.8, ls="--")
    right.axvline(1.5, color="0.5", lw=0.8, ls="--")
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set(xlabel="% of seeds within two stated standard errors", ylim=(len(names) - 0.4, -0.6))
    right.set(xlabel="stated interval / the one that 95 % of the seeds needed", xscale="log")
    left.legend(fontsize=7)


if __name__ == "__main__":
    run_as_script("error_coverage", measure, draw)
