"""Branching against losses in closed form and a plain loop in PyTorch; the warm-up plan against a law that is known."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import built, gaussian
from torch import Tensor, nn
from torch.nn import functional as F
from traces import untouched

import sharpkit as sk
from sharpkit._results import to_json
from sharpkit.batch_size.branching import _critical

CURVATURE, START = 1.5, 2.0
TOLD = (2.0, 0.01, "linear", 8, 0.1, 1024)


def quadratic(samples: int = 64, *, noise: float = 0.0) -> tuple[sk.Objective, nn.Module]:
    """Loss 0.5 h w^2 + a_i w of one parameter w, the a_i of mean 0."""
    model = built(lambda: nn.Linear(1, 1, bias=False))
    nn.init.constant_(model.weight, START)  # type: ignore[arg-type]
    a = gaussian(samples, 1, seed=5)
    a = noise * (a - a.mean())

    def closure(m: nn.Module, batch: Any) -> Tensor:
        w = m.weight.sum()  # type: ignore[operator,union-attr]
        return 0.5 * CURVATURE * w * w + (batch * w).mean()

    return sk.Objective(model, a, closure=closure, count=len), model


def branching(critical: float, seen: int, *, rule: str = "linear", bound: bool = False) -> sk.BatchBranching:
    """One that came out so, all else made up."""
    rows = ((1.0, 1.0), (1.0, 1.0)) if bound else ((1.0, 1.0), (2.0, 2.0))
    told = (2.0, 0.01, rule, 8, 0.1, 1024, seen, (0, 1), 1.0, 1.0)
    return sk.BatchBranching(sk.Bounded(critical, critical, critical), 16 if bound else 8, (8, 16), (0.1, 0.2), rows, *told)


# -- losses and the critical size ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", ["linear", "sqrt"])
def test_without_noise_losses_and_critical_size_are_those_of_the_closed_form(rule: str) -> None:
    objective, model = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    sizes, samples, power = (2, 4, 8, 16, 32, 64), 128, 1.0 if rule == "linear" else 0.5
    found = sk.branch_batch_sizes(objective, optimizer, batch_size=2, samples=samples, batch_sizes=sizes, rule=rule, seeds=2)
    rates = [0.03 * (size / 2) ** power for size in sizes]
    expected = [
        0.5 * CURVATURE * (START * (1 - CURVATURE * rate) ** (samples // size)) ** 2 for size, rate in zip(sizes, rates, strict=True)
    ]
    assert found.rates == pytest.approx(rates)
    assert found.means == pytest.approx(expected, rel=1e-9)
    assert found.initial == pytest.approx(0.5 * CURVATURE * START**2)
    allowed, best = min(expected) + 0.01, int(np.argmin(expected))
    last = next(i for i in range(best, len(sizes) - 1) if expected[i + 1] > allowed)
    share = (allowed - expected[last]) / (expected[last + 1] - expected[last])
    assert found.largest == sizes[last]
    assert found.critical.value == pytest.approx(sizes[last] * 2**share, rel=1e-9)
    assert found.critical.lower == pytest.approx(found.critical.upper) == pytest.approx(found.critical.value), "all seeds are alike"


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_runs_with_noise_are_those_of_a_plain_loop_over_the_same_samples_with_the_optimizers_own_state(kind: str) -> None:
    objective, model = quadratic(noise=1.0)
    made = {"momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), "adam": lambda p: torch.optim.AdamW(p, lr=0.01)}[kind]
    optimizer, data = made(model.parameters()), next(iter(objective.batches()))
    for _ in range(3):  # so that there is a state to go on from
        optimizer.zero_grad()
        (CURVATURE * model.weight.square().sum()).backward()  # type: ignore[operator,union-attr]
        optimizer.step()
    found = sk.branch_batch_sizes(objective, optimizer, batch_size=8, samples=256, batch_sizes=[4, 16], seeds=[3, 4])
    for size, factor, row in zip((4, 16), (0.5, 2.0) if kind == "momentum" else (0.5**0.5, 2**0.5), found.losses, strict=True):
        for order, loss in zip((3, 4), row, strict=True):
            twin = copy.deepcopy(model)
            other = made(twin.parameters())
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            other.param_groups[0]["lr"] = 0.01 * factor
            generator = torch.Generator().manual_seed(order)
            chosen = torch.cat([torch.randperm(64, generator=generator) for _ in range(4)])  # 256 samples, whatever the batch size
            for part in chosen.split(size):
                w = twin.weight.sum()  # type: ignore[operator,union-attr]
                other.zero_grad()
                (0.5 * CURVATURE * w * w + (data[part] * w).mean()).backward()
                other.step()
            w = float(twin.weight.detach())  # type: ignore[arg-type,operator]
            assert loss == pytest.approx(0.5 * CURVATURE * w * w, rel=1e-9)


def test_the_default_rule_and_rate_are_the_optimizers() -> None:
    objective, model = quadratic()
    for optimizer, rule in (
        (torch.optim.SGD(model.parameters(), lr=0.03), "linear"),
        (torch.optim.Adam(model.parameters(), lr=0.03), "sqrt"),
    ):
        found = sk.branch_batch_sizes(objective, optimizer, batch_size=2, samples=64, seeds=2)
        assert (found.rule, found.lr, found.batch_sizes) == (rule, 0.03, (2, 4, 8))


def test_a_diverging_size_is_too_large_and_the_critical_one_is_the_last_before_it() -> None:
    objective, model = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)  # 2 / h = 1.33 at B = 2: stable, at B = 16 far beyond
    found = sk.branch_batch_sizes(objective, optimizer, batch_size=2, samples=1024, batch_sizes=[2, 64], seeds=2)
    assert math.isinf(found.means[1])
    assert (found.largest, found.critical.value) == (2, 2.0)
    assert "B = 2" in found.findings()[0]
    with pytest.raises(sk.ObjectiveError, match="diverged at every batch size"):
        sk.branch_batch_sizes(objective, optimizer, batch_size=2, lr=50.0, samples=1024, batch_sizes=[2, 4], seeds=2)


def test_held_out_data_judge_where_they_are_given() -> None:
    objective, model = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    shifted = torch.full((5, 1), 3.0, dtype=torch.float64)
    own, held = (
        sk.branch_batch_sizes(objective, optimizer, batch_size=2, samples=64, seeds=2, validation=data) for data in (None, shifted)
    )
    w = START * (1 - CURVATURE * 0.02) ** 32
    assert held.means[0] - own.means[0] == pytest.approx(3.0 * w)


def test_the_cost_counts_each_runs_samples_and_a_third_for_each_judged() -> None:
    objective, model = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    found = sk.branch_batch_sizes(objective, optimizer, batch_size=2, samples=64, batch_sizes=[2, 4], seeds=3)
    # six runs; judged: each run, the loss before, and the two yardsticks of divergence (before training and a constant output)
    assert found.cost == pytest.approx(6 * 64 + (6 + 1 + 2) * 64 / 3)


def test_nothing_of_the_users_is_changed() -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
    data = (torch.randn(32, 3), torch.randint(2, (32,)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()
    objective = sk.Objective(model, data, loss=F.cross_entropy, mode="train")
    state = copy.deepcopy(optimizer.state_dict())
    with untouched(model):
        first = sk.branch_batch_sizes(objective, optimizer, batch_size=4, samples=64, seeds=2)
    again = sk.branch_batch_sizes(objective, optimizer, batch_size=4, samples=64, seeds=2)
    assert first.losses == again.losses
    assert str(state) == str(optimizer.state_dict())


def test_a_call_goes_on_from_its_checkpoint_and_refuses_other_held_out_data(tmp_path: Path) -> None:
    objective, model = quadratic(noise=1.0)
    optimizer, ends = torch.optim.SGD(model.parameters(), lr=0.02), []

    def stop(progress: sk.Progress) -> None:
        ends.append(progress.done)
        if progress.done == 3:
            raise KeyboardInterrupt

    def call(**given: Any) -> sk.BatchBranching:
        return sk.branch_batch_sizes(objective, optimizer, batch_size=2, samples=64, seeds=2, **given)

    with pytest.raises(KeyboardInterrupt):
        call(checkpoint=str(tmp_path), callback=stop)
    assert call(checkpoint=str(tmp_path)).losses == call().losses
    with pytest.raises(sk.DocumentError):
        call(checkpoint=str(tmp_path), validation=torch.ones(4, 1, dtype=torch.float64))


def test_the_interval_ends_where_sizes_were_not_tried() -> None:
    rng = np.random.default_rng(0)
    alike = 1.0 + 0.001 * rng.standard_normal((4, 5))
    value, largest = _critical(alike, (4, 8, 16, 32), 0.01, seed=0)
    assert (value.value, value.upper, largest) == (pytest.approx(32.0), math.inf, 32)
    rising = np.array([0.0, 0.0, 0.5, 1.0])[:, None] + 0.01 * rng.standard_normal((4, 5))
    value, largest = _critical(rising, (4, 8, 16, 32), 0.02, seed=0)
    assert largest == 8
    assert 4 <= value.lower <= value.value <= value.upper < 16


def test_intervals_cover_the_critical_size_of_many_seeds() -> None:
    # losses 1, 1, 1 + 0.05 and a seed's own 0.2 that all sizes share, with 0.004 of each run: the crossing of the means is known
    rng, sizes = np.random.default_rng(1), (8, 16, 32)
    means, truth = np.array([1.0, 1.0, 1.05]), 16 * 2 ** (0.02 / 0.05)
    hits = 0
    for _ in range(100):
        losses = means[:, None] + 0.2 * rng.standard_normal((1, 6)) + 0.004 * rng.standard_normal((3, 6))
        value, _ = _critical(losses, sizes, 0.02, seed=0)
        hits += value.lower <= truth <= value.upper
    assert hits >= 83, "of 95, less three standard errors and the bias of the lower of two"


def test_a_noise_scale_is_compared_with_the_errors_of_both() -> None:
    found = branching(10.0, 100)
    ratio = found.disagreement(sk.Estimate(40.0, 4.0))
    assert ratio.value == pytest.approx(4.0)
    assert (ratio.lower, ratio.upper) == pytest.approx((4 * math.exp(-0.196), 4 * math.exp(0.196)))
    assert math.isnan(found.disagreement(sk.Estimate(math.inf, math.inf)).value)


def test_findings_name_bounds_poor_small_sizes_and_scatter() -> None:
    assert "at least 16" in branching(16.0, 100, bound=True).findings()[0]
    rows = ((1.5, 1.5), (1.0, 1.0), (1.2, 1.0))
    poor = sk.BatchBranching(sk.Bounded(9.0, 8.0, 16.0), 8, (4, 8, 16), (0.05, 0.1, 0.2), rows, *TOLD, 0, (0, 1), 1.0, 1.0)
    said = " ".join(poor.findings())
    assert "B = 4 ends above the best" in said and "more seeds" in said


def test_results_come_back_from_their_documents_and_are_drawn() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    found = branching(8.1, 100)
    back = sk.BatchBranching.from_dict(json.loads(to_json(found.to_dict())))
    assert back == found and back.critical.upper == found.critical.upper
    assert found.plot().get_xlabel() == "batch size" and "above the best" in str(found)
    plan = sk.batch_size_warmup({1e3: 32.0, 4e3: 64.0, 16e3: 128.0}, batch_size=16, lr=0.1, samples=32_000)
    assert sk.BatchSizeWarmup.from_dict(json.loads(to_json(plan.to_dict()))).stages == plan.stages
    assert plan.plot().get_ylabel() == "batch size" and "doubles 3 times" in str(plan)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch_sizes": [4]}, "at least two different batch sizes"),
        ({"batch_sizes": [4, 128]}, "larger than the objective's 64 samples"),
        ({"batch_sizes": [4, 24]}, "choose a multiple of 24"),
        ({"seeds": 1}, "at least two"),
        ({"rule": "cubic"}, "rule"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"samples": 8}, "give more samples"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(given: dict[str, Any], says: str) -> None:
    objective, model = quadratic()
    arguments: dict[str, Any] = {"batch_size": 4, "samples": 64, **given}
    with pytest.raises(ValueError, match=says):
        sk.branch_batch_sizes(objective, torch.optim.SGD(model.parameters(), lr=0.1), **arguments)


# -- the plan -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rule", "factor"), [("linear", 2.0), ("sqrt", 2**0.5)])
def test_the_batch_doubles_where_a_known_law_allows_twice_as_much(rule: str, factor: float) -> None:
    law = lambda n: 0.5 * n**0.6  # noqa: E731
    found = [branching(law(seen), seen, rule=rule) for seen in (1_000, 5_000, 20_000, 80_000)]
    plan = sk.batch_size_warmup(found, batch_size=32, lr=0.1, samples=200_000)
    assert plan.law.exponent.value == pytest.approx(0.6)
    for before, after in zip(plan.stages, plan.stages[1:], strict=False):
        exact = (after.batch_size / 0.5) ** (1 / 0.6)
        assert after.batch_size == 2 * before.batch_size
        assert -1e-6 < after.start - exact < before.batch_size, "at the next whole step"
        assert after.lr == pytest.approx(factor * before.lr)
        assert before.start + before.steps * before.batch_size == after.start
    assert law(plan.samples) < 2 * plan.stages[-1].batch_size
    last = plan.stages[-1]
    assert last.start + (last.steps - 1) * last.batch_size < plan.samples <= last.start + last.steps * last.batch_size
    assert plan.steps + plan.steps_saved == math.ceil(200_000 / 32)
    assert any("extrapolated" in line for line in plan.findings())


def test_a_plan_ends_at_the_largest_batch_size_that_is_allowed_and_says_where_measurements_are_bounds() -> None:
    found = [branching(float(seen) ** 0.5, seen, bound=seen > 5000) for seen in (400, 1600, 6400)]
    plan = sk.batch_size_warmup([*found, branching(3.0, 0)], batch_size=8, lr=0.1, samples=10**6, max_batch_size=32)
    assert [stage.batch_size for stage in plan.stages] == [8, 16, 32]
    assert plan.bounds == (6400.0,)


def test_a_critical_size_that_does_not_grow_gives_no_doubling() -> None:
    plan = sk.batch_size_warmup({1e3: 64.0, 4e3: 32.0, 16e3: 16.0}, batch_size=8, lr=0.1, samples=10**5)
    assert [stage.batch_size for stage in plan.stages] == [8]
    assert any("contains 0" in line for line in plan.findings())


def test_plans_refuse_too_few_points_mixed_rules_and_other_things() -> None:
    with pytest.raises(ValueError, match="at least 3 points"):
        sk.batch_size_warmup([branching(8.0, 0), branching(9.0, 10), branching(9.0, 20)], batch_size=8, lr=0.1, samples=100)
    mixed = [branching(8.0, 10), branching(9.0, 20, rule="sqrt"), branching(9.0, 30)]
    with pytest.raises(ValueError, match="different rules"):
        sk.batch_size_warmup(mixed, batch_size=8, lr=0.1, samples=100)
    with pytest.raises(TypeError, match="branch_batch_sizes"):
        sk.batch_size_warmup([1.0, 2.0], batch_size=8, lr=0.1, samples=100)  # type: ignore[list-item]


def test_a_page_shows_the_branches_and_the_plan_also_from_their_documents(tmp_path: Path) -> None:
    found = [branching(0.5 * seen**0.6, seen) for seen in (1_000, 5_000, 20_000)]
    plan = sk.batch_size_warmup(found, batch_size=32, lr=0.1, samples=50_000)
    pages = [sk.report(tmp_path / "page.html", results).read_text() for results in ([found[0], plan], [found[0].to_dict(), plan.to_dict()])]
    for page in pages:
        assert "Critical batch size by branching" in page and "above the best" in page
        assert "Batch-size warm-up" in page and f"<td>{plan.stages[1].start}</td>" in page
