"""Sharpness in other norms against brute force, closed forms and the real step on a quadratic."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit.measuring.geometry import Ball

NORMS = ("linf", "spectral", "blocks", "rows", "columns")


class Quadratic(nn.Module):
    """f(w) = w^T H w / 2 over parameters of given shapes."""

    def __init__(self, matrix: torch.Tensor, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = nn.ParameterList(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        self.matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = torch.cat([p.reshape(-1) for p in self.parts])
        return w @ self.matrix @ w / 2 * x.mean()


def objective(matrix: torch.Tensor, *shapes: tuple[int, ...]) -> sk.Objective:
    model = Quadratic(matrix, *(shapes or ((len(matrix),),)))
    return sk.Objective(model, torch.ones(1, 1, dtype=torch.float64), closure=lambda m, batch: m(batch))


def spectra(kind: int, n: int, rng: np.random.Generator) -> np.ndarray:
    bulk = rng.normal(size=n)
    return [np.abs(bulk), np.logspace(1, -3, n), np.r_[10.0, 5.0, 3.0, 0.3 * bulk[3:]], np.r_[10.0, np.linspace(1, -1, n - 1)]][kind]


def symmetric(spectrum: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    q = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))[0]
    return torch.from_numpy((q * spectrum) @ q.T + ((q * spectrum) @ q.T).T) / 2


def test_signs_come_within_a_hundredth_of_brute_force_in_nine_of_ten_problems() -> None:
    rng, within = np.random.default_rng(0), []
    for number in range(40):
        n = int(rng.integers(8, 15))
        matrix = symmetric(spectra(number % 4, n, rng), rng)
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
        best = float(((signs @ matrix) * signs).sum(dim=1).max())
        made = sk.generalized_sharpness(objective(matrix), "linf", seed=number)
        assert made.value <= best * (1 + 1e-9) and made.num_matvecs <= 15
        assert float(made.direction @ matrix @ made.direction) == pytest.approx(made.value) and float(made.direction.abs().max()) <= 1
        within.append(made.value >= 0.99 * best)
    assert sum(within) >= 36


@pytest.mark.parametrize("norm", NORMS[1:])
def test_other_norms_come_within_a_hundredth_of_many_random_starts(norm: str) -> None:
    rng, shapes, within = np.random.default_rng(1), ((4, 5), (6,), (3, 2, 2)), []
    for number in range(8):
        matrix = symmetric(spectra(number % 4, 38, rng), rng)
        f = objective(matrix, *shapes)
        ball = Ball(norm, f.layout)  # type: ignore[arg-type]
        shift = float(torch.linalg.eigvalsh(matrix)[0].clamp_max(0).abs())
        points = ball.furthest(torch.randn(38, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(number)))
        for _ in range(30):
            points = ball.furthest(matrix @ points + shift * points)
        best = float(((matrix @ points) * points).sum(dim=0).max())
        made = sk.generalized_sharpness(f, norm, seed=number, num_starts=8)  # type: ignore[arg-type]
        within.append(made.value >= 0.99 * best)
        assert made.num_matvecs <= 24
    assert sum(within) >= 7


def test_the_ball_is_left_nowhere_and_linear_functions_are_largest_there() -> None:
    f = objective(torch.eye(38, dtype=torch.float64), (4, 5), (6,), (3, 2, 2))
    v = torch.randn(38, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices = [v[:20, 0].reshape(4, 5), v[26:, 0].reshape(3, 4)]
    rest = float(v[20:26, 0].norm())
    dual = {
        "l2": float(v[:, 0].norm()),
        "linf": float(v[:, 0].abs().sum()),
        "spectral": sum(float(torch.linalg.svdvals(m).sum()) for m in matrices) + rest,
        "blocks": sum(float(m.norm()) for m in matrices) + rest,
        "rows": sum(float(m.norm(dim=1).sum()) for m in matrices) + rest,
        "columns": sum(float(m.norm(dim=0).sum()) for m in matrices) + rest,
    }
    for norm, size in dual.items():
        ball = Ball(norm, f.layout)  # type: ignore[arg-type]
        d = ball.furthest(v)
        assert float(v[:, 0] @ d[:, 0]) == pytest.approx(size)
        torch.testing.assert_close(ball.furthest(d), d)
        assert float(d.square().sum(dim=0).max()) <= ball.reach * (1 + 1e-9)
        assert not ball.furthest(torch.zeros(38, 1, dtype=torch.float64)).any()
    assert [Ball(n, f.layout).reach for n in ("linf", "spectral", "blocks", "rows", "columns")] == [38, 8, 3, 8, 10]  # type: ignore[arg-type]


def test_l2_is_the_largest_eigenvalue_and_bounds_the_others() -> None:
    rng = np.random.default_rng(2)
    matrix = symmetric(np.r_[10.0, np.linspace(1, -1, 37)], rng)
    f = objective(matrix, (4, 5), (6,), (3, 2, 2))
    top = sk.generalized_sharpness(f, "l2")
    assert top.value == pytest.approx(10.0, rel=1e-6) and top.stable_lr == pytest.approx(0.2)
    assert top.upper is None and top.dual_norm is None
    for norm in NORMS:
        made = sk.generalized_sharpness(f, norm, lambda_max=10.0)  # type: ignore[arg-type]
        assert made.upper == pytest.approx(10 * Ball(norm, f.layout).reach) and 0 < made.value <= made.upper  # type: ignore[arg-type]
        assert made.dual_norm is not None and made.dual_norm > 0
        assert str(made).startswith(f"{norm} sharpness at least {made.value:.4g}, at most {made.upper:.4g} (")
        again = sk.generalized_sharpness(f, norm, initial=made.direction, num_starts=1, max_matvecs=1)  # type: ignore[arg-type]
        assert again.value == pytest.approx(made.value) and again.num_matvecs == 1


@pytest.mark.parametrize("norm", ["linf", "spectral"])
def test_steepest_descent_diverges_above_two_over_the_sharpness_and_not_below(norm: str) -> None:
    """On a quadratic, w <- w - eta ||g||_* d*(g), from the sharpest direction."""
    matrix = symmetric(np.r_[10.0, 5.0, 3.0, np.linspace(1, 0.1, 29)], np.random.default_rng(3))
    f = objective(matrix, (4, 5), (12,))
    ball = Ball(norm, f.layout)  # type: ignore[arg-type]
    made = sk.generalized_sharpness(f, norm, num_starts=8)  # type: ignore[arg-type]
    grown = []
    for factor in (0.97, 1.03):
        w = made.direction.clone()
        losses = [float(w @ matrix @ w)]
        for _ in range(100):
            g = (matrix @ w)[:, None]
            d = ball.furthest(g)
            w = w - factor * made.stable_lr * float(g[:, 0] @ d[:, 0]) * d[:, 0]
            losses.append(float(w @ matrix @ w))
        grown.append(losses[-1] > losses[0])
    assert grown == [False, True]


def test_where_everything_curves_down_the_sharpness_is_none() -> None:
    made = sk.generalized_sharpness(objective(-torch.eye(6, dtype=torch.float64)), "linf")
    assert made.value == 0 and made.stable_lr == math.inf


def test_bad_arguments_are_refused() -> None:
    f = objective(torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="norm must be one of 'l2', 'linf', 'spectral'"):
        sk.generalized_sharpness(f, "nuclear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_starts must be a whole number of at least 1"):
        sk.generalized_sharpness(f, "linf", num_starts=0)
    with pytest.raises(ValueError, match=r"initial must have the shape \(6,\)"):
        sk.generalized_sharpness(f, "linf", initial=torch.ones(3))
