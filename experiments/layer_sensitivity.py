"""Which layers bear few bits? Foretold from curvature, and measured by rounding each layer alone, on a small ViT and a small GPT.

    python -m experiments.layer_sensitivity          # results/layer_sensitivity.jsonl, figures/layer_sensitivity.png

Both are trained by Adam, two seeds each, and measured in float64 on part of the training data. Every weight tensor with two axes or
more is a layer: 15 of the ViT (patches, positions, three blocks of four, head) and of the GPT (tokens, positions, blocks, head). Rounding
is symmetric and uniform, with one step for a tensor or one for each output channel. Spearman's rank correlation over the layers with the
measured rise of the loss, for five predictions: the squared rounding error alone, that times the mean trace over 2 (HAWQ-V2), the same
with the slope g . d added, the diagonal of the Hessian in place of its mean, and the quadratic form g . d + d^T H d / 2.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import GPT, Case, ViT, images, seeded, text, train
from sharpkit import measures

BITS, SEEDS = (2, 3, 4, 6, 8), (0, 1)
FORMS = {
    "error": "squared rounding error",
    "trace": "mean trace",
    "diagonal": "diagonal",
    "slope_trace": "slope and mean trace",
    "quadratic": "quadratic form",
}


def case(name: str, seed: int, quick: bool) -> Case:
    """A trained network in float64, and the part of its training data that it is measured on."""
    if name == "ViT":
        x, y, data = images(1000 if quick else 3000)
        make = lambda: ViT(width=16 if quick else 32, layers=2 if quick else 3)  # noqa: E731
        samples = 64 if quick else 192
    else:
        x, y, data = text(300 if quick else 2000, 32, seed=1)
        make = lambda: GPT(time=32, width=16 if quick else 32, layers=2 if quick else 3)  # noqa: E731
        samples = 16 if quick else 48
    model = train(seeded(make, seed), x, y, steps=60 if quick else 1500, batch=64 if name == "ViT" else 32, lr=2e-3, seed=seed)
    return Case(name, model, x[:samples], y[:samples], f"{data}; first {samples}").double()


def by_diagonal(objective: sk.Objective, name: str, *, seed: int) -> torch.Tensor:
    """The diagonal of a layer's block, estimated, in the shape of the flat layer."""
    block = sk.HessianOperator(objective.with_params(lambda each, _: each == name))
    return sk.diagonal(block, num_probes=40, seed=seed).value


def run(name: str, seed: int, *, quick: bool) -> list[Row]:
    """Of both ways of rounding a row for each bit width, and one for each layer and bit width."""
    subject = case(name, seed, quick)
    objective = sk.Objective(subject.model, (subject.x, subject.y), loss=F.cross_entropy)
    layers = measures.layer_sensitivity(objective, bits=BITS, trace_rtol=0.1, tol=0.05, seed=seed)
    # eigenvalues and traces are those of the first call, and not measured well a second time
    by_channel = measures.layer_sensitivity(objective, bits=BITS, per_channel=True, trace_rtol=1.0, tol=0.5, seed=seed)
    diagonals = [by_diagonal(objective, layer, seed=seed) for layer in layers.names]
    rows = rows_of(subject, objective, layers, layers.mean_trace, diagonals, seed=seed, per_channel=False)
    rows[0] |= {"num_matvecs": layers.num_matvecs, "num_evaluations": layers.num_evaluations, "measure_seconds": layers.seconds}
    return rows + rows_of(subject, objective, by_channel, layers.mean_trace, diagonals, seed=seed, per_channel=True)


def rows_of(
    subject: Case,
    objective: sk.Objective,
    layers: measures.LayerSensitivity,
    mean_trace: tuple[float, ...],
    diagonals: list[torch.Tensor],
    *,
    seed: int,
    per_channel: bool,
) -> list[Row]:
    """Predictions and measured rises of one way of rounding."""
    assert layers.measured is not None
    _, gradient = objective.gradient()
    named = dict(subject.model.named_parameters())
    common = {"model": subject.name, "seed": seed, "per_channel": per_channel, "loss": layers.loss, "data": subject.data}
    rows: list[Row] = []
    for j, bits in enumerate(BITS):
        told: dict[str, list[float]] = {"error": [], "trace": [], "diagonal": [], "quadratic": [], "slope": [], "slope_trace": []}
        for i, layer in enumerate(layers.names):
            weights = named[layer].detach()
            d = (measures.round_weights(weights, bits, per_channel=per_channel) - weights).reshape(-1)
            own = gradient[objective.layout.indices([layer])]
            told["error"].append(layers.rounding_error[i][j])
            told["trace"].append(mean_trace[i] * layers.rounding_error[i][j] / 2)
            told["diagonal"].append(float(diagonals[i] @ d.square()) / 2)
            told["quadratic"].append(layers.quadratic[i][j])
            told["slope"].append(float(own @ d))
            told["slope_trace"].append(told["slope"][-1] + told["trace"][-1])
        measured = [row[j] for row in layers.measured]
        ranks = {f"spearman_{form}": float(spearmanr(told[form], measured).statistic) for form in FORMS}
        # how much of the quadratic form is slope, and how much of d^T H d the diagonal misses
        second = [q - s for q, s in zip(told["quadratic"], told["slope"], strict=True)]
        ranks["spearman_second"] = float(spearmanr(second, measured).statistic)
        ranks["spearman_trace_of_second"] = float(spearmanr(told["trace"], second).statistic)
        share = float(np.median(np.abs(told["slope"]) / np.maximum(np.abs(second), 1e-300)))
        rows.append({**common, "bits": bits, **ranks, "slope_over_second": share, "num_layers": len(layers.names)})
        rows += [
            {**common, "bits": bits, "layer": layer, "measured": measured[i], **{form: values[i] for form, values in told.items()}}
            for i, layer in enumerate(layers.names)
        ]
    return rows


def measure(quick: bool) -> list[Row]:
    """Both networks, seeds and ways of rounding."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", sk.SharpkitWarning)
    rows = []
    for name in ("ViT", "GPT"):
        for seed in SEEDS[: 1 if quick else None]:
            rows += run(name, seed, quick=quick)
    return rows


def draw(rows: list[Row], canvas: Any) -> None:
    """Rank correlations by bit width, and foretold against measured rises of the first seed."""
    canvas.set_size_inches(12, 6.2)
    axes = canvas.subplots(2, 4)
    colours = {"error": "#8b919b", "trace": "#2563a8", "diagonal": "#3f9c6b", "slope_trace": "#8f6fc4", "quadratic": "#d1662b"}
    for line, name in zip(axes, ("ViT", "GPT"), strict=True):
        for ax, per_channel in zip(line[:2], (False, True), strict=True):
            mine = [row for row in rows if row["model"] == name and row["per_channel"] == per_channel and "num_layers" in row]
            for form, label in FORMS.items():
                values = [[row[f"spearman_{form}"] for row in mine if row["bits"] == bits] for bits in BITS]
                ax.plot(BITS, [float(np.mean(v)) for v in values], color=colours[form], marker="o", markersize=4, label=label)
                ax.fill_between(BITS, [min(v) for v in values], [max(v) for v in values], color=colours[form], alpha=0.12, linewidth=0)
            ax.axhline(0.8, color="grey", linestyle=":", linewidth=1)
            ax.set_title(f"{name}, a step for each {'channel' if per_channel else 'tensor'}", fontsize=10)
            ax.set(ylim=(-0.75, 1.05), xticks=BITS, xlabel="bits", ylabel="Spearman")
        for ax, bits in zip(line[2:], (4, 8), strict=True):
            mine = [
                r for r in rows if r["model"] == name and r["seed"] == 0 and not r["per_channel"] and r["bits"] == bits and "layer" in r
            ]
            for form in ("trace", "quadratic"):
                ax.plot(
                    [r[form] for r in mine], [r["measured"] for r in mine], color=colours[form], marker="o", markersize=4,
                    linestyle="none", label=FORMS[form],
                )  # fmt: skip
            most = max(abs(r[key]) for r in mine for key in ("trace", "quadratic", "measured"))
            least = 10.0 ** np.floor(np.log10(most) - 2)  # two decades and more on each side of a linear middle
            top = 10.0 ** np.ceil(np.log10(most))
            ax.plot([-most, most], [-most, most], color="grey", linewidth=0.8, linestyle="--", zorder=0)
            for set_scale, set_ticks in ((ax.set_xscale, ax.set_xticks), (ax.set_yscale, ax.set_yticks)):
                set_scale("symlog", linthresh=least)
                set_ticks([-top, 0, top], [f"{-top:g}", "0", f"{top:g}"])
            ax.set(xlim=(-top, top), ylim=(-top, top), xlabel=f"foretold rise, log beyond {least:g}", ylabel="measured, likewise")
            ax.set_title(f"{name}, {bits} bits, a step for each tensor", fontsize=10)
            ax.tick_params(labelsize=7)
            ax.minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=len(labels))


if __name__ == "__main__":
    run_as_script("layer_sensitivity", measure, draw)
