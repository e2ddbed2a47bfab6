"""Landscapes: exact against a dense evaluation, quadratics against closed forms, paths, limits, refusals, nothing left changed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import conv, mlp
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit import _checkpoint


def quadratic(curvatures: tuple[float, ...] = (4.0, 1.0, 0.25)) -> tuple[nn.Module, sk.Objective]:
    """f = sum c_i w_i^2 / 2 at w = 1."""
    model = nn.Linear(len(curvatures), 1, bias=False).double()
    nn.init.ones_(model.weight)
    scale = torch.tensor(curvatures, dtype=torch.float64)
    closure = lambda m, batch: 0.5 * (batch * m.weight.square()).sum()  # noqa: E731
    return model, sk.Objective(model, scale, closure=closure, count=lambda batch: 1.0)


def dense(objective: sk.Objective, vectors: torch.Tensor, axes: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Every point by a copy of the model with its parameters written anew."""
    before = objective.layout.current()
    losses = []
    for at in torch.cartesian_prod(*axes).view(-1, len(axes)):
        with torch.no_grad():
            for p, piece in zip(objective.layout.params, objective.layout.split(before + vectors @ at.to(before)), strict=True):
                p.copy_(piece)
        losses.append(objective.value())
    with torch.no_grad():
        for p, piece in zip(objective.layout.params, objective.layout.split(before), strict=True):
            p.copy_(piece)
    return torch.tensor(losses, dtype=torch.float64).view(*map(len, axes))


@pytest.mark.parametrize("make", [mlp, conv])
def test_every_point_is_that_of_a_dense_evaluation(make: Any) -> None:
    problem = make()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(objective.num_parameters, 2, generator=generator, dtype=torch.float64)
    shown = sk.landscape(objective, vectors, span=0.3, points=5)
    assert torch.allclose(shown.losses, dense(objective, vectors, shown.axes), rtol=1e-12, atol=0)  # sums of batches in float64
    assert shown.losses[2, 2] == pytest.approx(objective.value(), rel=1e-12)
    hessian = sk.HessianOperator(objective).to_dense()
    assert torch.allclose(shown.curvature, vectors.T @ hessian @ vectors, rtol=1e-9)  # two ways to the same products
    assert torch.allclose(shown.slope, vectors.T @ objective.gradient()[1], rtol=1e-9)
    assert shown.num_evaluations == 25


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("directions", ["eigenvectors", "gradient", "filter"])
def test_on_a_quadratic_the_model_is_the_loss(directions: str, dimensions: int) -> None:
    _, objective = quadratic()
    shown = sk.landscape(objective, directions, dimensions=dimensions, points=7)
    assert torch.allclose(shown.losses, shown.model(), rtol=1e-9)  # rounding, where a the sum cancels
    assert shown.holds_to == pytest.approx(float(shown.axes[0][-1] * shown.norms[0]))
    if directions == "eigenvectors":
        assert shown.curvature[0, 0] == pytest.approx(4.0, rel=1e-6)


def test_the_limit_is_the_curvature_at_which_the_real_optimizer_grows() -> None:
    model, objective = quadratic((2.0,))
    for lr, stable in ((0.99, True), (1.01, False)):
        shown = sk.landscape(objective, dimensions=1, optimizer=torch.optim.SGD(model.parameters(), lr=lr), points=3)
        assert shown.limits is not None
        assert (float(shown.curvature[0, 0]) < shown.limits[0]) == stable
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=lr)
        for _ in range(50):
            optimizer.zero_grad()
            twin.weight.square().sum().backward()
            optimizer.step()
        assert (float(twin.weight.detach().abs()) < 1) == stable


def test_adams_limit_along_a_direction_is_that_of_its_own_matrix() -> None:
    problem = mlp()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
    for _ in range(3):
        objective.layout.params[0].grad = None
        for p, piece in zip(objective.layout.params, objective.layout.split(objective.gradient()[1]), strict=True):
            p.grad = piece.clone()
        optimizer.step()
    shown = sk.landscape(objective, "gradient", dimensions=1, optimizer=optimizer, points=3)
    scaled = sk.PreconditionedOperator(sk.HessianOperator(objective), optimizer)
    direction = -objective.gradient()[1]
    direction /= direction.norm()
    turned = direction / scaled.scale
    share = float(turned @ (scaled @ turned) / (turned @ turned)) / (2 * 1.9 / 0.1 / 1e-3)
    assert shown.limits is not None
    assert float(shown.curvature[0, 0]) / shown.limits[0] == pytest.approx(share, rel=1e-9)


def test_filters_keep_the_norms_of_the_weights_and_leave_vectors_alone() -> None:
    problem = conv()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    shown = sk.landscape(objective, "filter", dimensions=1, points=3)
    whole = math.sqrt(sum(float(p.detach().square().sum()) for p in objective.layout.params if p.ndim > 1))
    assert float(shown.norms[0]) == pytest.approx(whole, rel=1e-6)
    assert float(shown.axes[0][-1]) == 1.0


def trained(steps: int = 6) -> tuple[nn.Module, sk.Objective, list[dict[str, Any]]]:
    problem = mlp()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    optimizer, path = torch.optim.SGD(problem.model.parameters(), lr=0.5), []
    for _ in range(steps):
        path.append(copy.deepcopy(problem.model.state_dict()))
        for p, piece in zip(objective.layout.params, objective.layout.split(objective.gradient()[1]), strict=True):
            p.grad = piece.clone()
        optimizer.step()
    return problem.model, objective, path


def test_a_path_is_projected_with_its_own_losses_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    model, objective, path = trained()
    shown = sk.landscape(objective, path, points=3)
    assert shown.path is not None and shown.path_losses is not None and shown.explained is not None
    here = objective.layout.current()
    differences = torch.stack([torch.cat([state[name].reshape(-1) for name in objective.layout.names]) - here for state in path])
    singular = torch.linalg.svdvals(differences)
    assert torch.allclose(
        shown.explained, singular[:2].square() / singular.square().sum(), rtol=1e-6
    )  # squared singular values from a Gram matrix
    assert shown.path.norm(dim=1).max() <= float(shown.axes[0][-1])
    model.load_state_dict(path[0])
    first = sk.Objective(model, list(mlp().batches), loss=mlp().loss).value()
    assert shown.path_losses[0] == pytest.approx(first, rel=1e-12)
    # files say the same, and so do checkpoints of a compiled or wrapped model
    model, objective, path = trained()
    torch.save({"state_dict": {f"module.{name}": value for name, value in path[0].items()}}, tmp_path / "0.pt")
    torch.save(path[1], tmp_path / "1.pt")
    again = sk.landscape(objective, [tmp_path / "0.pt", str(tmp_path / "1.pt"), *path[2:]], points=3)
    assert torch.equal(again.losses, shown.losses)
    line = sk.landscape(objective, path, dimensions=1, points=5)
    assert line.path is not None
    assert float(line.path[0, 0]) == pytest.approx(float(differences[0].norm()), rel=1e-6)


def test_nothing_of_the_model_changes_and_infinite_losses_are_infinite() -> None:
    problem = mlp()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    before = copy.deepcopy(problem.model.state_dict())
    pointers = [p.data_ptr() for p in problem.model.parameters()]
    random = torch.get_rng_state()
    shown = sk.landscape(objective, "filter", dimensions=1, span=1e308, points=3)
    assert not torch.isfinite(shown.losses[0]) and torch.isfinite(shown.losses[1])
    assert pointers == [p.data_ptr() for p in problem.model.parameters()]
    assert all(torch.equal(before[name], value) for name, value in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert "Infinity" not in str(shown.findings())


def test_a_call_that_runs_out_of_time_says_what_is_missing_and_its_forecast_is_near() -> None:
    problem = mlp()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    seen: list[sk.Progress] = []
    shown = sk.landscape(objective, dimensions=2, points=9, max_seconds=1e-9, callback=seen.append)
    assert bool(shown.losses.isnan().all())
    assert any("time ran out" in sentence for sentence in shown.findings())
    shown.plot().figure.clear()
    sk.landscape(objective, dimensions=2, points=21, callback=seen.append)
    third, last = seen[len(seen) // 3], seen[-1]
    assert (last.done, last.expected, last.unit) == (441, 441, "points")
    assert third.elapsed + third.remaining == pytest.approx(last.elapsed, rel=0.5)  # of wall time on a busy machine


def test_documents_come_back_and_pictures_can_be_drawn() -> None:
    model, objective, path = trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for directions, dimensions in (("eigenvectors", 1), ("gradient", 2), (path, 2), (path, 1)):
        shown = sk.landscape(objective, directions, dimensions=dimensions, optimizer=optimizer, points=5)
        again = sk.Landscape.from_dict(shown.to_dict())
        assert again.to_dict() == shown.to_dict()
        axes = again.plot()
        labels = axes.get_legend_handles_labels()[1]
        assert "present parameters" in labels and any("stable" in label for label in labels)
        axes.figure.clear()
    assert sk.landscape(objective, "filter", points=3).plot(surface=True).name == "3d"
    with pytest.raises(ValueError, match="a line has no surface"):
        sk.landscape(objective, "filter", dimensions=1, points=3).plot(surface=True)


def test_batch_norm_in_eval_mode_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().eval()
    batch = (torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,)))
    shown = sk.landscape(sk.Objective(model, batch, loss=F.cross_entropy), "filter", dimensions=1, points=3)
    assert any("running statistics of the present parameters" in sentence for sentence in shown.findings())


@pytest.mark.parametrize(
    ("directions", "settings", "error", "says"),
    [
        ("random", {}, ValueError, "one of 'eigenvectors', 'filter'"),
        ("update", {}, sk.UnsupportedError, "pass optimizer="),
        (torch.ones(2), {}, ValueError, r"of shape \(3, 2\) for dimensions=2"),
        (torch.zeros(3, 2), {}, ValueError, "finite and not zero"),
        ([], {}, ValueError, "do not differ from the present"),
        ([{"weight": torch.zeros(1, 3)}], {}, ValueError, "at least two checkpoints"),
        ([{"bias": torch.zeros(1)}], {}, ValueError, "checkpoint 0 has no parameter 'weight'"),
        ([{"weight": torch.zeros(3, 1)}], {}, ValueError, r"has shape \(3, 1\), the model's \(1, 3\)"),
        ([7], {}, TypeError, "checkpoint 0 must be a state dict"),
        (7, {}, TypeError, "directions must be one of"),
        ("filter", {"dimensions": 3}, ValueError, "dimensions must be 1 or 2"),
        ("filter", {"span": 0.0}, ValueError, "span"),
        ("filter", {"points": 2}, ValueError, "points"),
    ],
)
def test_what_makes_no_sense_is_refused(directions: Any, settings: dict[str, Any], error: type[Exception], says: str) -> None:
    _, objective = quadratic()
    with pytest.raises(error, match=says):
        sk.landscape(objective, directions, **settings)


def test_a_landscape_that_was_killed_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checkpoint, "_SHARE", 1e9)  # everything is written at once
    problem, evaluated, value = mlp(), 0, sk.Objective.value

    def counted(self: sk.Objective) -> float:
        nonlocal evaluated
        evaluated += 1
        return value(self)

    class Killed(BaseException):
        pass

    def kill(progress: sk.Progress) -> None:
        if progress.unit == "points" and progress.done == 10:
            raise Killed

    def call(**given: Any) -> sk.Landscape:
        objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
        return sk.landscape(objective, points=5, **given)

    plain = call()
    with pytest.raises(Killed):
        call(checkpoint=tmp_path / "kept", callback=kill)
    monkeypatch.setattr(sk.Objective, "value", counted)
    resumed = call(checkpoint=tmp_path / "kept")
    assert torch.allclose(resumed.losses, plain.losses, rtol=1e-14, atol=0)  # batches may be merged at another point
    assert torch.equal(resumed.curvature, plain.curvature)
    assert evaluated <= 25 - 10 + 1  # and the one that the call is known by
    problem = mlp()
    with torch.no_grad():
        next(problem.model.parameters()).add_(1e-3)
    with pytest.raises(sk.DocumentError, match="parameters"):
        call(checkpoint=tmp_path / "kept")
