"""Rates by layer: each rule by its formula, joint limits just below and above with the real optimizer, groups that train."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit._results import to_json
from sharpkit.layerwise import RULES, LayerRates, layer_rates


class Split(nn.Module):
    """A linear model, so that its square loss is a quadratic, in three groups of parameters of different curvature."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.third = (nn.Parameter(torch.randn(n, 1, generator=generator, dtype=torch.float64)) for n in (3, 4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.cat([self.first, self.second, self.third])


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 9, generator=generator, dtype=torch.float64) * torch.tensor([3.0] * 3 + [1.0] * 4 + [0.2] * 2).double()
    return x, torch.zeros(40, 1, dtype=torch.float64)


def objective_of(model: nn.Module) -> sk.Objective:
    return sk.Objective(model, data(), loss=F.mse_loss)


def final_loss(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 800) -> float:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        if not loss < 1e6:
            return math.inf
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.8, "nesterov": True}])
def test_training_by_the_groups_is_stable_just_below_the_joint_limit_and_diverges_above(rule: str, settings: dict[str, Any]) -> None:
    model = Split()
    rates = layer_rates(objective_of(model), torch.optim.SGD(model.parameters(), lr=0.01, **settings), tol=1e-8)
    limit = rates.together[rule]
    assert limit.lower <= limit <= limit.upper
    for factor, stable in ((0.98, True), (1.02, False)):
        trained = copy.deepcopy(model)
        before = float(F.mse_loss(trained(data()[0]), data()[1]).detach())
        optimizer = torch.optim.SGD(rates.param_groups(trained, lr=factor * limit, rule=rule), lr=1.0, **settings)
        assert (final_loss(optimizer, trained) < before) is stable, (rule, settings, factor)


def test_each_layer_alone_is_stable_up_to_its_own_limit() -> None:
    model = Split()
    x, _ = data()
    rates = layer_rates(objective_of(model), tol=1e-10)
    for limit, columns in zip(rates.alone, (slice(0, 3), slice(3, 7), slice(7, 9)), strict=True):
        part = x[:, columns]
        assert limit == pytest.approx(2 / float(torch.linalg.eigvalsh(2 * part.T @ part / 40)[-1]), rel=1e-7)
    assert rates.one_rate == pytest.approx(2 / float(torch.linalg.eigvalsh(2 * x.T @ x / 40)[-1]), rel=1e-7)
    assert rates.names == ("first", "second", "third") and rates.num_parameters == (3, 4, 2)


def test_trust_ratios_signal_to_noise_and_channels_are_those_of_the_papers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(3, (20,))
    rates = layer_rates(sk.Objective(model, (x, y), loss=F.cross_entropy))
    F.cross_entropy(model(x), y).backward()
    for i, layer in enumerate((model[0], model[2])):
        weight, grad = (
            torch.cat([t.flatten() for t in ts])
            for ts in ((layer.weight.detach(), layer.bias.detach()), (layer.weight.grad, layer.bias.grad))
        )
        update = grad / (grad.abs() + 1e-8)
        assert rates.lars[i] == pytest.approx(float(weight.norm() / grad.norm()), rel=1e-9)
        assert rates.lamb[i] == pytest.approx(float(weight.norm() / update.norm()), rel=1e-9)
        assert rates.apollo[i] == pytest.approx(float(update.norm() / grad.norm()), rel=1e-9)
        assert rates.snr[i] == pytest.approx(
            max(float(g.norm() / (g.std() + 1e-8)) for g in (layer.weight.grad, layer.bias.grad)), rel=1e-9
        )
        g = layer.weight.grad
        dim = 0 if g.shape[1] >= g.shape[0] else 1
        channels = (g / (g.abs() + 1e-8)).norm(dim=dim) / g.norm(dim=dim)
        assert rates.channels[i] == pytest.approx((float(channels.min()), float(channels.median()), float(channels.max())), rel=1e-9)


def test_an_adaptive_optimizers_own_update_and_preconditioner_are_used() -> None:
    model = Split()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="has no state yet"):
        layer_rates(objective_of(model), optimizer)
    final_loss(optimizer, model, steps=5)
    before = copy.deepcopy(optimizer.state_dict())
    objective = objective_of(model)
    rates = layer_rates(objective, optimizer, tol=1e-8)
    assert rates.one_rate == pytest.approx(sk.measure(objective, optimizer=optimizer, tol=1e-8).stable_lr, rel=1e-6)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert all(torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items())
    ratios = list(rates.ratios("curvature").values())
    grouped = torch.optim.Adam([{"params": [p], "lr": 0.01 * r} for p, r in zip(model.parameters(), ratios, strict=True)])
    for p in model.parameters():
        grouped.state[p] = optimizer.state[p]
    first = sk.measure(objective, optimizer=grouped, tol=1e-8).stable_lr / ratios[0]
    assert rates.together["curvature"] == pytest.approx(first, rel=1e-6)


def test_parameters_are_grouped_as_asked_and_the_rest_gets_the_base_rate() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    objective = sk.Objective(model, (torch.eye(3).double(), torch.ones(3, 1).double()), loss=F.mse_loss, params="*weight")
    assert layer_rates(objective, group="tensor").names == ("0.weight", "1.weight")
    both = layer_rates(objective, group=lambda name: "all")
    assert both.names == ("all",) and both.ratios() == {"all": 1.0}
    groups = layer_rates(objective).param_groups(model, lr=0.3)
    assert [g["name"] for g in groups] == ["0", "1", "not measured"]
    assert groups[-1]["lr"] == 0.3 and len(groups[-1]["params"]) == 2
    assert groups[0]["lr"] * groups[1]["lr"] == pytest.approx(0.09)


def test_ratios_stay_within_ten_times_the_base_rate_and_a_flat_layer_takes_the_end() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    nn.init.zeros_(model[1].weight)  # the first layer then has neither gradient nor curvature of its own
    rates = layer_rates(sk.Objective(model, (torch.eye(2).double(), torch.ones(2, 1).double()), loss=F.mse_loss))
    assert math.isinf(rates.alone[0]) and rates.ratios()["0"] == 10.0
    assert math.isinf(rates.lars[0]) and rates.lars[1] == 0.0 and rates.ratios("lars") == {"0": 10.0, "1": 0.1}


def test_the_result_is_saved_read_back_and_says_what_came_out(tmp_path: Path) -> None:
    rates = layer_rates(objective_of(Split()))
    again = LayerRates.from_dict(json.loads(to_json(rates.to_dict())))
    assert again.together["lars"].upper == rates.together["lars"].upper
    assert again.alone[0].lower == rates.alone[0].lower and again.ratios("snr") == rates.ratios("snr")
    assert rates.findings()[0].startswith("Alone, first would be stable up to a rate of")
    assert repr(rates).startswith("LayerRates(alone first:")
    page = sk.report(tmp_path / "page.html", [rates]).read_text(encoding="utf-8")
    assert "Rates by layer, SGD" in page and "largest stable base rate" in page


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: layer_rates(objective_of(m), group="block"), ValueError, "group must be"),
        (lambda m: layer_rates(objective_of(m), group=lambda name: 3), TypeError, r"group\(name\)"),
        (lambda m: layer_rates(objective_of(m)).ratios("adam"), ValueError, "rule must be"),
        (lambda m: layer_rates(objective_of(m)).param_groups(nn.Linear(2, 2), lr=1.0), ValueError, "has no parameter 'first'"),
        (lambda m: layer_rates(objective_of(m), torch.optim.SGD(nn.Linear(2, 2).parameters())), ValueError, "holds none"),
        (lambda m: layer_rates(objective_of(m), torch.optim.Rprop(m.parameters())), sk.UnsupportedError, "Rprop"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(Split())


def test_a_call_that_was_stopped_goes_on_from_its_checkpoint_and_ends_the_same(tmp_path: Path) -> None:
    objective, asked = objective_of(Split()), 0

    def stop(progress: sk.Progress) -> None:
        nonlocal asked
        asked += 1
        if asked == 12:
            raise KeyboardInterrupt

    whole = layer_rates(objective)
    with pytest.raises(KeyboardInterrupt):
        layer_rates(objective, checkpoint=tmp_path / "kept", callback=stop)
    again = layer_rates(objective, checkpoint=tmp_path / "kept")
    assert [float(limit) for limit in again.alone] == [float(limit) for limit in whole.alone]
    assert {rule: float(limit) for rule, limit in again.together.items()} == {rule: float(v) for rule, v in whole.together.items()}
