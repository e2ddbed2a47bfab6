"""Sharpness in other norms against brute force, closed forms and the real step on a quadratic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from traces import untouched

import sharpkit as sk
from sharpkit.measuring import geometry
from sharpkit.measuring.geometry import Ball
from sharpkit.operators.preconditioned import optimizer_curvature

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


@pytest.mark.slow
def test_signs_come_within_a_hundredth_of_brute_force_in_nine_of_ten_problems() -> None:
    rng, within = np.random.default_rng(0), []
    for number in range(24):
        n = int(rng.integers(8, 14))
        matrix = symmetric(spectra(number % 4, n, rng), rng)
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
        best = float(((signs @ matrix) * signs).sum(dim=1).max())
        made = sk.generalized_sharpness(objective(matrix), "linf", seed=number)
        assert made.value <= best * (1 + 1e-9) and made.num_matvecs <= 15
        assert float(made.direction @ matrix @ made.direction) == pytest.approx(made.value) and float(made.direction.abs().max()) <= 1
        within.append(made.value >= 0.99 * best)
    assert sum(within) >= 22


@pytest.mark.parametrize("norm", [NORMS[1], *(pytest.param(norm, marks=pytest.mark.slow) for norm in NORMS[2:])])
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


class SignDescent(torch.optim.Optimizer):
    """w <- w - lr sign(g)."""

    def __init__(self, params: Any, lr: float, maximize: bool = False) -> None:
        super().__init__(params, {"lr": lr, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.sign(), alpha=-group["lr"])


class Lion(SignDescent):
    """Known by its name."""


@pytest.fixture
def registered(optimizers_as_known: None) -> None:
    sk.register_optimizer(SignDescent, geometry="linf")


SPECTRUM = np.r_[10.0, 5.0, 3.0, np.linspace(1, 0.1, 29)]


def test_of_gradient_descent_and_adam_it_is_the_eigenvalue_that_their_rules_are_about() -> None:
    f = objective(symmetric(SPECTRUM, np.random.default_rng(3)), (4, 5), (12,))
    first, second = f.model.parameters()
    sgd = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.02}], lr=0.1, momentum=0.9)
    adam = torch.optim.AdamW([first, second], lr=0.01)
    for _ in range(3):
        adam.zero_grad()
        f.model(torch.ones(1)).backward()
        adam.step()
    for optimizer in (sgd, adam):
        with untouched(f.model):
            made = sk.generalized_sharpness(f, optimizer)
        matrix, rule = optimizer_curvature(sk.HessianOperator(f), optimizer)
        top = float(torch.linalg.eigvalsh(matrix.to_dense())[-1])
        assert made.value == pytest.approx(top, rel=1e-4)
        assert made.limit == pytest.approx(rule.max_curvature(optimizer.param_groups[0]["lr"]))
        assert made.stable_lr == pytest.approx(rule.max_learning_rate(top), rel=1e-4)
        assert made.norm == rule.operator and made.optimizer == type(optimizer).__name__
        assert made.share == pytest.approx(made.value / made.limit)
        assert float(made.direction @ (sk.HessianOperator(f) @ made.direction)) == pytest.approx(top, rel=1e-4), "in the parameters' space"
        assert sk.generalized_sharpness(f, optimizer, initial=made.direction).num_matvecs <= made.num_matvecs
    assert str(made).startswith(f"sharpness of AdamW, lambda_max({made.norm}), {made.value:.4g}, limit {made.limit:.4g} (")
    assert made.finding == f"AdamW is at {made.share:.2f} of its limit: it is stable up to a rate of {made.stable_lr:.3g}."


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", [SignDescent, Lion])
def test_steps_of_signs_swing_where_their_directional_sharpness_is_the_limit(kind: type[SignDescent]) -> None:
    """On a quadratic: where the loss has settled, its mean change is 0, so the means of d^T H d and of the limit agree."""
    matrix, lr = symmetric(SPECTRUM, np.random.default_rng(3)), 0.01
    f = objective(matrix, (4, 5), (12,))
    optimizer, along, limits = kind(f.model.parameters(), lr=lr), list[float](), list[float]()
    for _ in range(3000):
        optimizer.zero_grad()
        f.model(torch.ones(1, dtype=torch.float64)).backward()
        g = torch.cat([p.grad.reshape(-1) for p in f.model.parameters()])  # type: ignore[union-attr]
        along.append(float(g.sign() @ matrix @ g.sign()))
        limits.append(2 * float(g.abs().sum()) / lr)
        optimizer.step()
    assert np.mean(along[-1000:]) == pytest.approx(np.mean(limits[-1000:]), rel=0.01)
    made = sk.generalized_sharpness(f, optimizer)
    assert made.dual_norm == pytest.approx(float(f.gradient()[1].abs().sum())) and made.limit == pytest.approx(2 * made.dual_norm / lr)
    assert made.value >= max(along) * (1 - 1e-9), "no step went along a sharper direction"
    assert made.norm == "linf" and made.share is not None
    assert made.stable_lr == pytest.approx(0.01 / made.share)


@pytest.mark.usefixtures("registered")
def test_every_parameter_moves_as_far_as_its_group_and_shape_say() -> None:
    f = objective(symmetric(SPECTRUM, np.random.default_rng(3)), (4, 5), (12,))
    first, second = f.model.parameters()
    parts = [{"params": [second], "lr": 0.1}, {"params": [first], "lr": 0.02}]
    made = sk.generalized_sharpness(f, SignDescent(parts, lr=1.0))
    assert made.direction[20:].abs().tolist() == [1.0] * 12
    assert made.direction[:20].abs().tolist() == pytest.approx([0.2] * 20)
    assert made.limit == pytest.approx(2 * made.dual_norm / 0.1)  # type: ignore[operator]
    resting = sk.generalized_sharpness(f, SignDescent([second], lr=0.1))
    assert not resting.direction[:20].any() and resting.direction[20:].all()
    rprop = torch.optim.Rprop(f.model.parameters(), lr=0.1)
    f.model(torch.ones(1)).backward()
    for _ in range(2):
        rprop.step()
    lengths = torch.cat([rprop.state[p]["step_size"].reshape(-1) for p in (first, second)])
    assert float(lengths.max()) > 0.1
    assert sk.generalized_sharpness(f, rprop).direction.abs().tolist() == pytest.approx((lengths / 0.1).tolist())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_of_muon_the_ball_is_the_matrices_own(adjust: str) -> None:
    f = objective(symmetric(np.linspace(10, 0.1, 40), np.random.default_rng(3)), (7, 4), (2, 3), (6,))
    matrices = [p for p in f.model.parameters() if p.ndim == 2]
    optimizer = torch.optim.Muon(matrices, lr=0.02, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn=adjust)
    made = sk.generalized_sharpness(f, optimizer)
    d = [part.reshape(p.shape) for part, p in zip(f.layout.split(made.direction), f.layout.params, strict=True)]
    lengths = [math.sqrt(7 / 4), 1.0] if adjust == "original" else [0.2 * math.sqrt(7), 0.2 * math.sqrt(3)]
    assert [float(torch.linalg.svdvals(m)[0]) for m in d[:2]] == pytest.approx(lengths)
    assert not d[2].any() and made.norm == "spectral"
    g = f.layout.split(f.gradient()[1])
    nuclear = [float(torch.linalg.svdvals(m.reshape(p.shape)).sum()) for m, p in zip(g[:2], matrices, strict=True)]
    dual = sum(length * size for length, size in zip(lengths, nuclear, strict=True))
    assert made.dual_norm == pytest.approx(dual) and made.limit == pytest.approx(2 * dual / 0.02)
    # the step that the real optimizer takes is as long, up to its rough orthogonalisation
    f.model(torch.ones(1, dtype=torch.float64)).backward()
    before = [p.detach().clone() for p in matrices]
    optimizer.step()
    moved = [float(torch.linalg.svdvals((p.detach() - w) / 0.02)[0]) for p, w in zip(matrices, before, strict=True)]
    assert moved == pytest.approx(lengths, rel=0.3)


def test_large_matrices_are_factored_few_times_between_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 x 300: each factor takes as long as many products of a small batch."""
    factored: list[int] = []
    orthogonal = geometry._orthogonal
    monkeypatch.setattr(geometry, "_orthogonal", lambda matrices: (factored.append(len(matrices)), orthogonal(matrices))[1])
    monkeypatch.setattr(geometry, "_WORK", 2.0**30)
    model = nn.Linear(300, 300)
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    made = sk.generalized_sharpness(sk.Objective(model, (x, x.tanh()), loss=nn.functional.mse_loss), "spectral", num_starts=2)
    assert made.num_matvecs <= 6 and sum(factored) <= 2 + 1 + 3 * (1 + made.num_matvecs)
    assert made.value > 0


def test_a_mapping_gives_each_parameter_the_norm_of_the_first_pattern_that_fits() -> None:
    f = objective(symmetric(np.linspace(10, 0.1, 38), np.random.default_rng(3)), (4, 5), (6,), (3, 4))
    made = sk.generalized_sharpness(f, {"parts.1": "linf", "*": "spectral"})
    d = [part.reshape(p.shape) for part, p in zip(f.layout.split(made.direction), f.layout.params, strict=True)]
    assert d[1].abs().tolist() == [1.0] * 6 and made.norm == "mixed"
    assert [float(torch.linalg.svdvals(m)[0]) for m in (d[0], d[2])] == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match=r"no norm for parts\.1: add a pattern such as '\*'"):
        sk.generalized_sharpness(f, {"parts.0": "rows", "parts.2": "rows"})
    with pytest.raises(ValueError, match=r"the norm of '\*' must be one of 'linf'"):
        sk.generalized_sharpness(f, {"*": "l2"})


@pytest.mark.usefixtures("registered")
def test_optimizers_that_have_no_geometry_are_refused_with_the_call_that_gives_them_one() -> None:
    f = objective(torch.eye(6, dtype=torch.float64))

    class Unheard(SignDescent):
        def step(self, closure: Any = None) -> None:
            pass

    with pytest.raises(sk.UnsupportedError, match=r"sharpkit.register_optimizer\(Unheard, geometry=...\)"):
        sk.generalized_sharpness(f, Unheard(f.model.parameters(), lr=0.1))
    with pytest.raises(sk.UnsupportedError, match="the SignDescent maximizes"):
        sk.generalized_sharpness(f, SignDescent(f.model.parameters(), lr=0.1, maximize=True))
    with pytest.raises(ValueError, match="holds none of the"):
        sk.generalized_sharpness(f, SignDescent([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got float"):
        sk.generalized_sharpness(f, 3.0)  # type: ignore[arg-type]
    for length, match in ((torch.ones(2), "lengths of shape"), (-1.0, "the length -1")):
        sk.register_optimizer(Unheard, geometry=lambda state, settings, p, length=length: ("linf", length))
        with pytest.raises(ValueError, match=match):
            sk.generalized_sharpness(f, Unheard(f.model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="geometry must be a function or one of 'linf'"):
        sk.register_optimizer(Unheard, geometry="l2")
    resting = sk.generalized_sharpness(f, SignDescent(f.model.parameters(), lr=0.0))
    assert resting.limit is None and resting.share is None and math.isfinite(resting.stable_lr)


def test_bad_arguments_are_refused() -> None:
    f = objective(torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="geometry must be"):
        sk.generalized_sharpness(f, "nuclear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_starts must be a whole number of at least 1"):
        sk.generalized_sharpness(f, "linf", num_starts=0)
    with pytest.raises(ValueError, match=r"initial must have the shape \(6,\)"):
        sk.generalized_sharpness(f, "linf", initial=torch.ones(3))
