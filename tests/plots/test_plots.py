"""Plots draw what the numbers say and leave matplotlib's global state alone."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

import sharpkit as sk
from sharpkit.plots.spectrum import plot_curvature, plot_density, plot_layers

OUTLIERS = [8.0, 14.0, 22.0]


@pytest.fixture(scope="module")
def density() -> sk.SpectralDensity:
    generator = torch.Generator().manual_seed(0)
    bulk = 0.3 * torch.randn(300, generator=generator, dtype=torch.float64)
    diagonal = torch.cat([bulk, torch.tensor(OUTLIERS, dtype=torch.float64)])
    return sk.spectral_density(sk.as_operator(torch.diag(diagonal)), num_probes=4, num_steps=60)


def history(**changes: object) -> sk.CurvatureHistory:
    fields = {"steps": (0, 50, 100), "loss": (2.0, 1.0, 0.5), "lambda_max": (5.0, 15.0, 21.0), "residual": (0.1, 0.1, 0.1)}
    return sk.CurvatureHistory(**{**fields, "limit": (20.0,) * 3, "lr": (0.1,) * 3, **changes})  # type: ignore[arg-type]


def layers(*values: float) -> sk.LayerSharpness:
    estimates = tuple(sk.Estimate(v, 0.01) for v in values)
    names = tuple(f"layer{i}" for i in range(len(values)))
    return sk.LayerSharpness(names, (10,) * len(values), estimates, estimates, num_matvecs=1)


def test_outliers_are_stems_at_their_values_and_the_bulk_ends_before_them(density: sk.SpectralDensity) -> None:
    ax = plot_density(density)
    stems = next(c for c in ax.collections if type(c).__name__ == "LineCollection")
    drawn = sorted(float(segment[0][0]) for segment in stems.get_segments())  # type: ignore[attr-defined]
    assert set(np.round(drawn, 6)) >= set(OUTLIERS)
    bulk = next(line for line in ax.get_lines() if line.get_label() == "bulk")
    assert float(np.max(np.asarray(bulk.get_xdata()))) < 8.0


def test_the_bulk_curve_holds_nearly_all_eigenvalues(density: sk.SpectralDensity) -> None:
    bulk = next(line for line in plot_density(density).get_lines() if line.get_label() == "bulk")
    share = trapezoid(np.asarray(bulk.get_ydata()), np.asarray(bulk.get_xdata()))
    assert share == pytest.approx(300 / 303, abs=0.02)  # the three outliers are drawn apart; 2 % is what smoothing cuts off


def test_the_limit_is_two_over_the_learning_rate(density: sk.SpectralDensity) -> None:
    ax = plot_density(density, lr=0.125)
    limit = next(line for line in ax.get_lines() if str(line.get_label()).startswith("stability limit"))
    assert np.asarray(limit.get_xdata())[0] == 16.0


def test_a_limit_far_beyond_the_spectrum_is_a_mark_at_the_edge_and_the_spectrum_keeps_the_picture(density: sk.SpectralDensity) -> None:
    ax = plot_density(density, limit=2000.0)
    assert ax.get_xlim()[1] < 60
    assert "stability limit 2e+03, 90.9 times as far" in ax.get_legend_handles_labels()[1]
    assert any(text.get_text() == "2e+03" for text in ax.texts)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"lr": -1.0}, {"limit": float("nan")}])
def test_a_limit_that_is_not_positive_is_refused(density: sk.SpectralDensity, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        plot_density(density, **wrong)  # type: ignore[arg-type]


def test_a_spectrum_of_one_value_can_be_drawn() -> None:
    operator = sk.as_operator(3 * torch.eye(5, dtype=torch.float64))
    ax = plot_density(sk.spectral_density(operator, num_probes=2, num_steps=3))
    low, high = ax.get_xlim()
    assert low < 3 < high


def test_curvature_has_error_bars_and_a_dashed_limit() -> None:
    ax = plot_curvature(history())
    dashed = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert [list(np.asarray(line.get_ydata())) for line in dashed] == [[20.0, 20.0, 20.0]]
    assert len(ax.containers) == 1


def test_curvature_over_many_decades_is_logarithmic() -> None:
    assert plot_curvature(history(lambda_max=(0.01, 1.0, 20.0))).get_yscale() == "log"
    assert plot_curvature(history(lambda_max=(-5.0, 1.0, 20.0))).get_yscale() == "linear"


@pytest.mark.parametrize(("values", "scale"), [((1.0, 2.0), "linear"), ((1.0, 1000.0), "log"), ((-1.0, 1000.0), "symlog")])
def test_layer_bars_choose_their_scale(values: tuple[float, ...], scale: str) -> None:
    ax = plot_layers(layers(*values))
    assert ax.get_xscale() == scale
    widths = [bar.get_width() for bar in ax.patches]  # type: ignore[attr-defined]
    assert widths == [*values, *values]


@pytest.mark.parametrize("kind", ["density", "history", "layers"])
def test_given_axes_are_used_and_no_global_state_changes(density: sk.SpectralDensity, kind: str) -> None:
    result = {"density": density, "history": history(), "layers": layers(1.0, 2.0)}[kind]
    before = dict(matplotlib.rcParams)
    _, ax = plt.subplots()
    count = len(plt.get_fignums())
    assert result.plot(ax=ax) is ax
    assert len(plt.get_fignums()) == count
    assert dict(matplotlib.rcParams) == before
    assert ax.get_xlabel()
    plt.close("all")
