"""The learning-rate curve: exact where theory is exact, true to real training, and without a trace on the user's model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit._results import to_json
from sharpkit.batch_size.calibration import plans_for
from sharpkit.batch_size.curvature import BatchCurvature, DirectPoint, extreme_values, measure_batch_curvature
from sharpkit.batch_size.initialisation import may_redraw, redraw
from sharpkit.batch_size.learning_rate_curve import Anchor, LearningRateCurve
from sharpkit.batch_size.limits import short_form
from sharpkit.batch_size.pilot import Ledger, Trainer
from sharpkit.objective.samples import SamplePool
from sharpkit.operators.hessian import HessianOperator
from sharpkit.optimizers import UpdateRule
from sharpkit.plots.spectrum import plot_learning_rate_curve
from sharpkit.reporting.sections import _curve_section


def _regression(samples: int = 256, scale: float = 3.0) -> tuple[nn.Module, sk.Objective]:
    """Linear least squares with Gaussian inputs: curvature does not move, and the mean-square theory is exact up to sampling."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 5, generator=g, dtype=torch.float64) * torch.tensor([scale, 1.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False).double()
    return model, sk.Objective(model, (x, x @ torch.ones(5, 1, dtype=torch.float64)), loss=F.mse_loss)


def _classifier() -> tuple[nn.Module, sk.Objective]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(320, 8, generator=g)
    y = (x @ torch.randn(8, 3, generator=g)).argmax(dim=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    return model, sk.Objective(model, (x, y), loss=F.cross_entropy)


def test_the_noise_along_the_top_eigenvector_is_that_of_single_samples() -> None:
    _, objective = _regression()
    curvature = measure_batch_curvature(SamplePool(objective), sizes=[], seed=0, ledger=Ledger())
    x = next(iter(objective._source))[0]
    matrices = 2 * x[:, :, None] * x[:, None, :]
    mean = matrices.mean(dim=0)
    values, vectors = torch.linalg.eigh(mean)
    exact = float(((matrices - mean) @ vectors[:, -1]).square().sum(dim=1).mean())
    assert curvature.lambda_max == pytest.approx(float(values[-1]), rel=1e-3)
    assert abs(curvature.directional[0] - exact) < 4 * curvature.directional[1]


@pytest.mark.slow
def test_measured_batch_curvature_lies_between_its_neighbours() -> None:
    _, objective = _classifier()
    pool = SamplePool(objective)
    curvature = measure_batch_curvature(pool, sizes=[8, 32, 128], seed=0, ledger=Ledger(), repeats=8)
    generator = torch.Generator().manual_seed(77)
    for size in (16, 64):
        tops = [
            float(sk.eigenpairs(HessianOperator(b), k=1).values[0])
            for _, b in zip(range(12), pool.draws(size, generator=generator), strict=False)
        ]
        assert float(curvature.lambda_max_of(size)) == pytest.approx(np.mean(tops), rel=0.2)
    assert float(curvature.lambda_max_of(320)) == pytest.approx(curvature.lambda_max)
    assert float(curvature.lambda_min_of(8)) <= float(curvature.lambda_min_of(128)) <= curvature.lambda_min + 1e-9


def test_a_batch_whose_hessian_is_rounding_alone_counts_as_flat() -> None:
    """Products of fitted samples contradict each other in float32; where the matrix matters, that stays an error."""
    crooked = torch.diag(torch.ones(29, dtype=torch.float64), 1)

    def operator(size: float) -> sk.SymmetricOperator:
        return sk.as_operator(lambda v: size * crooked @ v, size=30, check=False)

    assert extreme_values(operator(1e-6), seed=0, ignorable=1e-3) == (0.0, 0.0)
    with pytest.raises(sk.NotSymmetricError):
        extreme_values(operator(1.0), seed=0, ignorable=1e-3)


def _curvature(**changes: object) -> BatchCurvature:
    settings: dict[str, object] = {
        "lambda_max": 2.0,
        "lambda_min": -0.1,
        "trace": 10.0,
        "nodes": (2.0,),
        "counts": (1.0,),
        "directional": (12.0, 1.0),
        "isotropic": 0.5,
        "block": np.array([[2.0]]),
        "mixing": np.zeros((4, 1, 1)),
        "leakage": 12.0,
        "direct": (),
        "num_samples": 1024,
    }
    settings.update(changes)
    return BatchCurvature(**settings)  # type: ignore[arg-type]


def test_the_estimators_have_their_closed_forms() -> None:
    curvature = _curvature()
    b = 16 / (1 - 16 / 1024)
    assert curvature.noise == 6.0
    assert curvature.directional_estimate(16) == pytest.approx(2 + 6 / b)
    assert curvature.isotropic_estimate(16) == pytest.approx(2 + 0.5 / b / 2)
    direct = tuple(DirectPoint(size, (2 + 8 / (size / (1 - size / 1024)),) * 3, (-0.1,) * 3) for size in (8, 32))
    assert _curvature(direct=direct).calibrated_estimate(16) == pytest.approx(2 + 8 / b)
    assert float(_curvature(direct=direct).lambda_max_of(16)) == pytest.approx(2 + 8 / b, rel=1e-6)


def test_nearly_equal_top_eigenvalues_are_perturbed_as_a_block() -> None:
    """Two equal eigenvalues and noise +-delta that mixes them: the largest is 2 + |delta|, which one eigenvector alone cannot see."""
    mixing = np.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, -1.0], [-1.0, 0.0]]])
    curvature = _curvature(block=2 * np.eye(2), mixing=mixing, leakage=0.0)
    b = curvature.effective(16)
    assert curvature.directional_estimate(16) == pytest.approx(2 + 1 / math.sqrt(b))


def test_a_smaller_measured_batch_bounds_the_estimates() -> None:
    curvature = _curvature(direct=(DirectPoint(2, (3.0, 3.0), (-0.2, -0.2)),))
    assert curvature.directional_estimate(4) == 3.0
    assert curvature.calibrated_estimate(4) <= 3.0


def test_the_choice_of_estimator_is_explained() -> None:
    point = DirectPoint(8, (3.0, 3.1), (-0.2, -0.1))
    assert _curvature().choose()[0] == "directional"
    assert _curvature(direct=(point,)).choose()[0] == "calibrated"
    name, why = _curvature(direct=(point, DirectPoint(32, (2.5, 2.4), (-0.1, -0.1)))).choose()
    assert name == "interpolated" and "8, 32" in why


def _rates(anchors: tuple[Anchor, ...] = ()) -> LearningRateCurve:
    curvature = _curvature()
    limits = tuple((float(b), short_form(2.0, 6.0, curvature.effective(b))) for b in np.geomspace(1, 1024, 40))
    return LearningRateCurve((1, 8, 64, 1024), "SGD", UpdateRule(name="SGD"), curvature, limits, anchors, (1.0, 2.0), 0.1, 1024, 100.0, 1.0)


def test_without_calibration_the_curve_is_the_mean_square_limit() -> None:
    curve = _rates()
    for b in (1, 5, 30, 1024):
        assert float(curve.max_lr(b)) == pytest.approx(short_form(2.0, 6.0, curve.curvature.effective(b)), rel=0.02)
    assert curve.max_lr(8).lower < curve.max_lr(8) < curve.max_lr(8).upper
    with pytest.raises(ValueError, match="1024 samples"):
        curve.max_lr(2048)


def test_the_crossover_is_where_the_rule_meets_the_plateau() -> None:
    curve = _rates()
    # the linear law through B = 1 and 8 lies below the small-batch slope 1/3 by the saturation at 8: meets the plateau 1 between 3 and 8
    assert 3 < curve.crossover < 8
    assert "linear scaling reaches the plateau" in str(curve)


def _anchors(sizes: tuple[int, ...], bend: float, factors: tuple[float, ...] = (1.0, 1.0, 1.0)) -> tuple[Anchor, ...]:
    """On the law rate = 1 / (1 + bend / b), but for the factors."""
    effective = _curvature().effective
    rates = [f / (1 + bend / effective(b)) for b, f in zip(sizes, factors, strict=True)]
    return tuple(Anchor(b, rate * 2**-0.25, rate * 2**0.25) for b, rate in zip(sizes, rates, strict=True))


@pytest.mark.parametrize("bend", [4.0, 40.0])
def test_calibration_finds_the_law_of_its_anchors(bend: float) -> None:
    """Other bends fit nearly as well within the scatter allowed for: 15 %, not rounding."""
    curve = _rates(_anchors((4, 32, 256), bend))
    for b in (4, 16, 32, 100, 256):
        assert float(curve.max_lr(b)) == pytest.approx(1 / (1 + bend / curve.curvature.effective(b)), rel=0.15)
    assert curve.max_lr(32).lower < 1 / (1 + bend / 33) < curve.max_lr(32).upper


def test_one_stray_anchor_moves_the_curve_less_than_itself() -> None:
    straight, stray = (_rates(_anchors((4, 32, 256), 40.0, (1.0, f, 1.0))) for f in (1.0, 2.0))
    assert 1.1 < float(stray.max_lr(32)) / float(straight.max_lr(32)) < 1.7


def test_beyond_the_last_anchor_where_the_law_bends_is_not_known_and_the_interval_says_so() -> None:
    """A search at the largest batch size settles it."""
    curve = _rates(_anchors((4, 32, 64), 1e4))  # linear throughout
    far, near = curve.max_lr(512), curve.max_lr(64)
    assert 1.5 * near < far < near * 512 / 64
    assert far.upper / far.lower > 1.3 * near.upper / near.lower
    known = _rates((*_anchors((4, 32, 64), 1e4), *_anchors((1024,), 0.0, (0.01,))))
    assert float(known.max_lr(1024)) == pytest.approx(0.01, rel=0.25)
    assert known.max_lr(512).upper / known.max_lr(512).lower < far.upper / far.lower
    flat = _rates(_anchors((4, 32, 64), 0.0))
    assert float(flat.max_lr(1024)) == pytest.approx(1.0, rel=0.15)


def test_searches_that_no_law_fits_are_followed_and_the_interval_is_wider() -> None:
    """A dip by a factor of 20 at B = 32, far beyond the scatter of the searches."""
    dip = _rates(_anchors((4, 32, 256, 1024), 0.0, (1.0, 0.05, 1.0, 1.0)))
    plain = _rates(_anchors((4, 32, 256, 1024), 0.0, (1.0, 1.0, 1.0, 1.0)))
    assert float(dip.max_lr(32)) < 0.1 < 0.5 < float(dip.max_lr(256))
    assert dip.misfit > 0.5 and plain.misfit == 0
    assert dip.max_lr(64).upper / dip.max_lr(64).lower > 3 * plain.max_lr(64).upper / plain.max_lr(64).lower
    assert "miss the law by a factor of" in str(dip) and "miss the law" not in str(plain)


def test_near_a_minimum_rates_fall_faster_than_the_simple_rule() -> None:
    """Rates as B^1.5, as from a trained point: the power is fitted."""
    rates = {b: 1e-3 * b**1.5 for b in (4, 32, 64)}
    curve = _rates(tuple(Anchor(b, r * 2**-0.25, r * 2**0.25, 4, 0.2) for b, r in rates.items()))
    for b, rate in rates.items():
        assert float(curve.max_lr(b)) == pytest.approx(rate, rel=0.25)


def test_the_scatter_of_the_searches_is_in_the_interval() -> None:
    quiet, loud = (
        _rates(tuple(Anchor(a.batch_size, a.trained, a.broke, 4, scatter) for a in _anchors((4, 32, 256), 40.0))) for scatter in (0.1, 1.0)
    )
    assert loud.max_lr(32).upper / loud.max_lr(32).lower > 1.4 * quiet.max_lr(32).upper / quiet.max_lr(32).lower


def test_the_default_batch_sizes_to_calibrate_at() -> None:
    def sizes(calibrate: object, asked: tuple[int, ...], available: int) -> tuple[list[int], int | None]:
        plans, largest = plans_for(calibrate, asked, available, steps=100)
        return [plan.batch_size for plan in plans], largest.batch_size if largest is not None else None

    assert sizes(True, (4, 8, 2000), 2000) == ([4, 32, 125], 2000)
    assert sizes(True, (4, 768), 768) == ([4, 48], 768)
    assert sizes(True, (4, 128), 128) == ([4, 32], 128)
    assert sizes(True, (64, 80), 80) == ([64, 80], None)
    assert sizes(True, (4, 64), 4096) == ([4, 64], None), "no larger than what was asked for"
    assert sizes([32, 8], (4, 768), 768) == ([8, 32], None) and sizes(False, (4, 8), 99) == sizes(0, (4, 8), 99) == ([], None)
    assert sizes(1, (4, 768), 768) == sizes(True, (4, 768), 768)
    assert [p.steps for p in plans_for(True, (4, 2000), 2000, steps=100)[0]] == [300, 141, 100]
    assert plans_for(True, (4, 2000), 2000, steps=100)[1].steps == 40  # type: ignore[union-attr]
    assert plans_for(True, (4, 400), 400, steps=100)[1].steps == 100  # type: ignore[union-attr]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_calibrating_runs_find_where_a_quadratic_really_breaks(momentum: float) -> None:
    model, objective = _regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    limit = 2 * (1 + momentum) / float(sk.eigenpairs(HessianOperator(objective), k=1).values[0])
    trainer = Trainer(SamplePool(objective), optimizer)
    anchor = trainer.largest_stable_rate(limit / 10, batch_size=256, steps=300)
    assert anchor.trained <= limit * 1.01 and anchor.broke >= limit * 0.99


def test_the_curve_agrees_with_training_on_least_squares_at_every_batch_size() -> None:
    """Curvature does not move here, so the limit by curvature alone must be right, not only the calibrated one."""
    model, objective = _regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    curve = sk.learning_rate_curve(objective, optimizer, batch_sizes=[2, 32, 256], pilot=40)
    trainer = Trainer(SamplePool(objective), optimizer, seed=5)
    for size in (2, 32, 256):
        measured = trainer.largest_stable_rate(0.02, batch_size=size, steps=250).rate
        assert measured / 1.5 < float(curve.max_lr(size)) < measured * 1.5
        assert measured / 2 < curve.by_curvature(size) < measured * 2


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_a_curve_of_a_network_is_complete_and_leaves_no_trace(kind: str) -> None:
    model, objective = _classifier()
    optimizer = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=0.1),
    }[kind]()
    weights = copy.deepcopy(model.state_dict())
    state, rng = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    said: list[sk.Progress] = []
    calibrate = True if kind == "momentum" else [8]  # the searches at every size once: they take most of the time
    settings = {"batch_sizes": [8, 64, 320], "pilot": 30, "steps": 15, "calibrate": calibrate}
    curve = sk.learning_rate_curve(objective, optimizer, **settings, callback=said.append)  # type: ignore[arg-type]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert optimizer.state_dict() == state and torch.equal(rng, torch.get_rng_state())
    assert "full-data gradients" in said[0].text and {p.unit for p in said} == {"gradients"}
    assert curve.gradients > 0 and all(math.isfinite(row["max_lr"]) and row["max_lr"] > 0 for row in curve.rows())
    assert json.loads(json.dumps(curve.to_dict()))["kind"] == "learning_rate_curve"
    assert str(curve.batch_sizes[0]) in curve.table()
    assert curve.exponent == (0.5 if kind == "adam" else 1.0)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_curve() -> None:
    rows = []
    for _ in range(2):
        model, objective = _classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows.append(sk.learning_rate_curve(objective, optimizer, batch_sizes=[16, 64], pilot=10, calibrate=[16], seed=3).rows())
    assert rows[0] == rows[1]


# -- the present point, trained points, batch norm, time --------------------------------------------------------------------------
def _trained() -> tuple[nn.Module, sk.Objective]:
    model, objective = _classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        x, y = next(iter(objective.batches()))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, objective


def test_without_a_pilot_lambda_max_of_batches_is_that_of_the_present_parameters() -> None:
    """Against fresh batches, at every size up to a quarter of the data; a pilot would train on and halve it."""
    model, objective = _trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    curve = sk.learning_rate_curve(objective, optimizer, batch_sizes=[16, 32, 80, 320], pilot=0, calibrate=False)
    draws, full = SamplePool(objective), float(sk.eigenpairs(HessianOperator(objective), k=1).values[0])
    generator = torch.Generator().manual_seed(99)
    for size in (16, 80):
        tops = [
            float(sk.power_iteration(HessianOperator(b), tol=1e-2).values[0])
            for _, b in zip(range(30), draws.draws(size, generator=generator), strict=False)
        ]
        assert float(curve.lambda_max(size)) == pytest.approx(np.mean(tops), rel=0.2)
    assert curve.sharpness_at_start == curve.sharpness_after_pilot == pytest.approx(full, rel=0.01)
    assert curve.pilot_steps == 0 and curve.point == "at the present parameters"
    assert "at the present parameters" in curve.table() and "at the present parameters" in str(curve)
    assert curve.to_dict()["point"] == curve.point


def test_from_a_trained_point_the_curve_is_that_of_rates_which_lose_nothing_and_says_so() -> None:
    """It refused there, after 24 runs that halved nothing."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(96, 4, generator=g), torch.randn(96, 1, generator=g)
    model = nn.Linear(4, 1)
    target = x.sum(1, keepdim=True) + 0.5 * noise
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(96, 1)], dim=1), target).solution[:, 0]
    with torch.no_grad():
        model.weight.copy_(solution[None, :4])
        model.bias.copy_(solution[4:])
    objective = sk.Objective(model, (x, target), loss=F.mse_loss)
    curve = sk.learning_rate_curve(objective, torch.optim.SGD(model.parameters(), lr=0.1), batch_sizes=[4, 32], pilot=0, steps=40)
    assert all(anchor.keeps for anchor in curve.anchors)
    assert "Little is left to improve from this trained point at B = 4, 32" in str(curve)
    assert "with other orders of the data alone, since" in str(curve) and "trained" in curve.one_start
    # at the minimum noise alone moves the loss: excess loss / loss is about lr tr(H) / (2 B) / 2, and a tenth is allowed
    trace = float(2 * (x.square().sum() / 96 + 1))
    assert 0.2 * 4 * 0.4 / trace < float(curve.max_lr(4)) < 6 * 4 * 0.4 / trace


def test_batch_norm_in_train_mode_has_a_curve_from_runs_alone() -> None:
    _, objective = _classifier()
    x, y = next(iter(objective.batches()))
    batch = (x[:128], y[:128])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    objective = sk.Objective(model, batch, loss=F.cross_entropy, mode="train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    curve = sk.learning_rate_curve(objective, optimizer, batch_sizes=[8, 64], pilot=10, steps=15)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "running statistics too"
    assert all(math.isfinite(row["max_lr"]) and math.isnan(row["by_curvature"]) for row in curve.rows())
    assert "Batch statistics tie the samples of a batch together: the rates come from runs alone, in train mode" in str(curve)
    document = json.loads(to_json(curve.to_dict()))
    assert document["rows"][0]["by_curvature"] is None and _curve_section(document).rows[0][2] == "-"
    plot_learning_rate_curve(document)
    with pytest.raises(sk.ObjectiveError, match="rates come from runs alone: leave calibrate=True, or make the Objective with mode='eval'"):
        sk.learning_rate_curve(objective, optimizer, calibrate=False)
    with pytest.raises(ValueError, match="no statistics of a batch of 1"):
        sk.learning_rate_curve(objective, optimizer, batch_sizes=[1, 8])


def test_when_the_time_is_up_what_there_is_comes_back_marked() -> None:
    model, objective = _regression(64)
    curve = sk.learning_rate_curve(objective, torch.optim.SGD(model.parameters(), lr=0.1), batch_sizes=[8, 64], max_seconds=1e-3)
    assert not curve.converged and curve.anchors == () and curve.pilot_steps == 0
    assert "max_seconds ended the calibrating runs early" in str(curve)


def test_weight_decay_is_in_the_limit_of_the_full_batch() -> None:
    model, objective = _regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=10.0)
    right = float(sk.measure(objective, optimizer=optimizer).stable_lr)  # type: ignore[arg-type]
    curve = sk.learning_rate_curve(objective, optimizer, batch_sizes=[8, 256], pilot=0, calibrate=False)
    assert float(curve.max_lr(256)) == pytest.approx(right, rel=0.05)


def test_outside_of_the_sizes_measured_it_is_said() -> None:
    curve = _rates()
    with pytest.warns(sk.SharpkitWarning, match="B = 512 lies outside of the batch sizes measured, 1 to 64"):
        dataclasses.replace(curve, batch_sizes=(1, 8, 64)).max_lr(512)


def test_the_column_of_an_adaptive_optimizer_names_its_matrix() -> None:
    curve = dataclasses.replace(_rates(), rule=UpdateRule(name="Adam", adaptive=True))
    assert "lambda_max(D^-1 H_B)" in curve.table() and curve.to_dict()["matrix"] == "D^-1 H_B"
    assert "lambda_max(H_B)" in _rates().table()


# -- other initialisations --------------------------------------------------------------------------------------------------------
def test_a_fresh_network_is_drawn_anew_a_trained_or_otherwise_made_one_is_not() -> None:
    model, objective = _classifier()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert may_redraw(objective, seed=1) == ""
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    redraw(model, seed=1, device=torch.device("cpu"))
    assert torch.equal(rng, torch.get_rng_state()) and not torch.equal(model[0].weight, before["0.weight"])  # type: ignore[index, arg-type]
    assert "trained" in may_redraw(_trained()[1], seed=1)
    with torch.no_grad():
        model[2].weight.zero_()  # type: ignore[index, union-attr, operator]
    assert "'2.weight' is not as its module draws it" in may_redraw(objective, seed=1)
    rooted = nn.Linear(8, 3)
    rooted.register_parameter("temperature", nn.Parameter(torch.ones(())))
    wrapped = nn.Sequential(rooted)
    wrapped.scale = nn.Parameter(torch.ones(()))
    batch = next(iter(objective.batches()))
    told = may_redraw(sk.Objective(wrapped, batch, closure=lambda m, b: F.cross_entropy(m(b[0]) * m.scale, b[1])), seed=1)
    assert told == "'scale' belongs to no module with reset_parameters"


def test_repeated_searches_from_a_fresh_network_begin_at_other_initialisations() -> None:
    model, objective = _classifier()
    trainer = Trainer(SamplePool(objective), torch.optim.SGD(model.parameters(), lr=0.1))
    starts = [trainer.start(8, draw=draw).model.state_dict()["0.weight"] for draw in (0, 1, 2, 1)]
    assert torch.equal(starts[0], model.state_dict()["0.weight"]) and torch.equal(starts[1], starts[3])
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        ({"calibrate": None}, TypeError, "calibrate must be a sequence of batch sizes or True or False, got None"),
        ({"calibrate": 2}, TypeError, "calibrate must be a sequence of batch sizes or True or False, got 2"),
        ({"calibrate": [2.5]}, TypeError, "each of calibrate must be a whole number"),
        ({"calibrate": [999]}, ValueError, "batch sizes from 1 to the 320 samples"),
        ({"calibrate": []}, ValueError, "batch sizes from 1 to the 320 samples"),
        ({"batch_sizes": [2.5, 8]}, TypeError, "each of batch_sizes must be a whole number"),
        ({"pilot": 5}, ValueError, "pilot must be 0 or at least 10 steps, got 5"),
        ({"pilot": 12.5}, TypeError, "pilot must be a whole number"),
        ({"steps": 0}, ValueError, "steps must be at least 10 steps, got 0"),
        ({"max_seconds": 0}, ValueError, "max_seconds must be a positive number"),
    ],
)
def test_arguments_are_refused_by_name(arguments: dict[str, Any], kind: type[Exception], match: str) -> None:
    model, objective = _classifier()
    with pytest.raises(kind, match=match):
        sk.learning_rate_curve(objective, torch.optim.SGD(model.parameters(), lr=0.1), **arguments)


def test_bad_arguments_are_refused() -> None:
    model, objective = _classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="320 samples"):
        sk.learning_rate_curve(objective, optimizer, batch_sizes=[8, 999])
    with pytest.raises(ValueError, match="two different"):
        sk.learning_rate_curve(objective, optimizer, batch_sizes=[8])
    with pytest.raises(ValueError, match="pilot"):
        sk.learning_rate_curve(objective, optimizer, pilot=2)
    with pytest.raises(sk.UnsupportedError, match="Rprop has no linear rule"):
        sk.learning_rate_curve(objective, torch.optim.Rprop(model.parameters()))
    with pytest.raises(sk.UnsupportedError, match=r"Adamax divides gradients by does not follow.*sharpkit\.measure"):
        sk.learning_rate_curve(objective, torch.optim.Adamax(model.parameters()))
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds none of the objective's parameters"):
        sk.learning_rate_curve(objective, other, batch_sizes=[8, 64], pilot=20)
