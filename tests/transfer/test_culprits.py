"""Culprits: each broken rule is named, a correct parametrisation has none, and the effect of a tensor is what the definition says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit._results import to_json
from sharpkit.fits import Slope
from sharpkit.transfer.culprits import RULES, Evidence, culprits_of, find_culprits, role_of
from sharpkit.transfer.observing import Observations, Stacks, TensorTrack, _Observer, observe
from sharpkit.transfer.setup import Family

BASE, WIDTHS = 32, (32, 64, 128, 256)
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long() + 2 * (X[:, 2] > 0).long()
DATA = [(X[:32], Y[:32]), (X[32:], Y[32:])]


class Net(nn.Module):
    """Three layers with a muP readout; ``fault`` breaks one rule, under Adam or SGD."""

    def __init__(self, width: int, fault: str | None) -> None:
        super().__init__()
        self.input, self.hidden, self.head = nn.Linear(12, width), nn.Linear(width, width), nn.Linear(width, 4, bias=False)
        m = width / BASE
        self.multiplier = 1.0 if fault == "readout multiplier" else 1 / m
        nn.init.normal_(self.hidden.weight, std=(2 / width) ** 0.5 * (m**-0.5 if fault == "hidden initialisation" else 1.0))
        nn.init.normal_(self.head.weight, std=0.2 * (width if fault == "readout multiplier" else BASE) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.multiplier * F.relu(self.hidden(F.relu(self.input(x)))))


def make_optimizer(kind: str, fault: str | None) -> Any:
    def make(model: Net, width: int) -> torch.optim.Optimizer:
        m = width / BASE
        groups = {
            "input": [model.input.weight],
            "hidden": [model.hidden.weight],
            "readout": [model.head.weight],
            "vector": [model.input.bias, model.hidden.bias],
        }
        right = {"input": 1.0, "hidden": 1 / m, "readout": 1.0, "vector": 1.0}
        wrong = {"input": 1 / m, "hidden": 1.0, "readout": 1 / m, "vector": 1 / m}
        if kind == "sgd":
            right, wrong = {k: v * m for k, v in right.items()}, {k: v * (1 / m if k == "hidden" else m) for k, v in wrong.items()}
        rates = {k: wrong[k] if fault == f"{k} learning rate" else right[k] for k in right}
        if kind == "sgd":
            return torch.optim.SGD([{"params": p, "lr": 0.05 * rates[k]} for k, p in groups.items()])
        decay = {k: 0.1 * (1.0 if fault == "weight decay" else 1 / rates[k]) for k in rates}
        chosen = [{"params": p, "lr": 0.004 * rates[k], "weight_decay": decay[k]} for k, p in groups.items()]
        return torch.optim.AdamW(chosen, eps=1e-12)

    return make


def named(kind: str, fault: str | None, **changes: Any) -> tuple[str, ...]:
    arguments: dict[str, Any] = {"optimizer": make_optimizer(kind, fault), "data": DATA, "loss": F.cross_entropy, "steps": 3} | changes
    return tuple(c.rule for c in find_culprits(lambda width: Net(width, fault), WIDTHS, **arguments))


RATES = [f"{role} learning rate" for role in ("input", "hidden", "readout", "vector")]


@pytest.mark.parametrize("fault", [*RATES, "hidden initialisation", "readout multiplier", "weight decay"])
def test_the_broken_rule_is_named_and_no_other_under_adam(fault: str) -> None:
    assert named("adam", fault) == (fault,)


@pytest.mark.parametrize("fault", [*RATES, "hidden initialisation"])
def test_the_broken_rule_is_named_and_no_other_under_sgd(fault: str) -> None:
    assert named("sgd", fault) == (fault,)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_correct_parametrisation_has_no_culprit(kind: str) -> None:
    assert named(kind, None) == ()


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_microsofts_package_has_no_culprit(kind: str) -> None:
    mup = pytest.importorskip("mup")

    def plain(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), mup.MuReadout(width, 4))

    def build(width: int) -> nn.Module:
        model = plain(width)
        mup.set_base_shapes(model, plain(BASE), delta=plain(2 * BASE))
        return model

    def optimizer(model: nn.Module, width: int) -> torch.optim.Optimizer:
        return mup.MuAdam(model.parameters(), lr=0.004) if kind == "adam" else mup.MuSGD(model.parameters(), lr=0.05)

    assert find_culprits(build, WIDTHS, optimizer=optimizer, data=DATA, loss=F.cross_entropy, steps=3) == ()


class Unit(nn.Module):
    """Weights of unit variance with their multipliers in the forward pass, which stand at one of several places."""

    def __init__(self, width: int, place: str, hidden: float) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.randn(s)) for s in ((width, 12), (width, width), (4, width)))
        self.bias = nn.Parameter(torch.zeros(width))
        self.place, self.scales = place, (12**-0.5, hidden * width**-0.5, 0.2 * BASE**0.5 / width)
        if place == "module":
            self.layer = nn.Linear(width, width)
            del self.w2

    def product(self, x: Tensor, w: Tensor, scale: float) -> Tensor:
        if self.place == "weight":
            return F.linear(x, scale * w)
        return x @ w.T * scale if self.place == "after" else F.linear(scale * x, w)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.product(x, self.w1, self.scales[0]) + self.bias)
        if self.place == "module":
            h = F.relu(self.scales[1] * self.layer(h))
        else:
            h = F.relu(self.product(h, self.w2, self.scales[1]))
        return self.product(h, self.w3, self.scales[2])


@pytest.mark.parametrize("place", ["weight", "after", "before", "module"])
def test_a_multiplier_is_judged_by_what_it_does_wherever_it_is_written(place: str) -> None:
    def build(right: bool) -> Any:
        def make(width: int) -> nn.Module:
            model = Unit(width, place, 1.0 if right else (width / BASE) ** 0.5)
            if place == "module":
                nn.init.normal_(model.layer.weight)
            return model

        return make

    def adam(model: Unit, width: int) -> torch.optim.Optimizer:
        hidden = model.layer.weight if place == "module" else model.w2
        others = [p for p in model.parameters() if p is not hidden]
        return torch.optim.Adam([{"params": hidden, "lr": 0.1 * (BASE / width) ** 0.5}, {"params": others, "lr": 0.02}], eps=1e-12)

    arguments: dict[str, Any] = {"optimizer": adam, "data": DATA, "loss": F.cross_entropy, "steps": 3}
    assert find_culprits(build(True), WIDTHS, **arguments) == ()
    assert [c.rule for c in find_culprits(build(False), WIDTHS, **arguments)] == ["hidden multiplier"]


class Attentive(nn.Module):
    """Attention alone, over a head dimension that is the width; keys have a bias, whose gradient is rounding noise."""

    def __init__(self, width: int, power: float) -> None:
        super().__init__()
        self.embed, self.q, self.k = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, width)
        self.head, self.width, self.power = nn.Linear(width, 2, bias=False), width, power
        nn.init.normal_(self.head.weight, std=0.2 * BASE**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        scale = BASE**-0.5 * (self.width / BASE) ** -self.power
        mixed = F.scaled_dot_product_attention(self.q(h), self.k(h), h, scale=scale)
        return self.head(mixed.mean(1) * BASE / self.width)


@pytest.mark.parametrize(("power", "expected"), [(1.0, ()), (0.5, ("attention scale",))])
def test_attention_divided_by_the_root_of_d_is_named(power: float, expected: tuple[str, ...]) -> None:
    x = torch.randn(32, 6, 4, generator=torch.Generator().manual_seed(1))

    def adam(model: Attentive, width: int) -> torch.optim.Optimizer:
        hidden = [model.q.weight, model.k.weight]
        others = [p for p in model.parameters() if all(p is not h for h in hidden)]
        return torch.optim.Adam([{"params": hidden, "lr": 0.004 * BASE / width}, {"params": others, "lr": 0.004}], eps=1e-12)

    data = (x, (x[:, 0, 0] > 0).long())
    found = find_culprits(lambda width: Attentive(width, power), WIDTHS, optimizer=adam, data=data, loss=F.cross_entropy, steps=3)
    assert tuple(c.rule for c in found) == expected
    if found:
        assert "q.k/d, not q.k/sqrt(d)" in found[0].evidence and found[0].slope.value - found[0].expected == pytest.approx(0.5, abs=0.15)


class Residual(nn.Module):
    def __init__(self, depth: int, multiplied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(Branch(depth**-0.5 if multiplied else 1.0) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.layer_norm(x, x.shape[-1:]))


class Branch(nn.Module):
    def __init__(self, multiplier: float) -> None:
        super().__init__()
        self.norm, self.inner, self.multiplier = nn.LayerNorm(32), nn.Linear(32, 32), multiplier

    def forward(self, x: Tensor) -> Tensor:
        return x + self.multiplier * torch.tanh(self.inner(self.norm(x)))


@pytest.mark.parametrize(
    ("multiplied", "power", "expected"),
    [(True, -0.5, ()), (False, -0.5, ("depth multiplier",)), pytest.param(True, 0.0, ("depth learning rate",), marks=pytest.mark.slow)],
    ids=["correct", "no multiplier", "one rate"],
)
def test_residual_branches_without_their_multiplier_or_rate_are_named(multiplied: bool, power: float, expected: tuple[str, ...]) -> None:
    def adam(model: Residual, depth: int) -> torch.optim.Optimizer:
        outside = [*model.embed.parameters(), *model.head.parameters()]
        return torch.optim.Adam([{"params": model.blocks.parameters(), "lr": 0.004 * depth**power}, {"params": outside, "lr": 0.004}])

    found = find_culprits(
        lambda depth: Residual(depth, multiplied),
        (2, 4, 8, 16),
        optimizer=adam,
        data=DATA,
        loss=F.cross_entropy,
        steps=3,
        seeds=2,
        dimension="depth",
    )
    assert tuple(c.rule for c in found) == expected


# -- the measurements behind them -------------------------------------------------------------------------------------------
def test_a_tensors_effect_is_the_change_that_putting_it_back_makes() -> None:
    family = Family(lambda width: Net(width, None), make_optimizer("adam", None), DATA, loss=F.cross_entropy)
    seen = observe(family, (32, 64), steps=2, seeds=1, effects=True)
    run = family.start(64, seed=0)
    start = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.step(), run.step()
    now = {n: p.detach() for n, p in run.model.named_parameters()}
    h = F.relu(X[:32] @ now["input.weight"].T + now["input.bias"])  # the fixed batch is the first one
    expected = (h @ (now["hidden.weight"] - start["hidden.weight"]).T).square().mean().sqrt()
    track = seen.tensors["hidden.weight"]
    assert track.effect[64][0] == pytest.approx(float(expected), rel=1e-4)
    assert track.input_rms[64][0] == pytest.approx(float(h.square().mean().sqrt()), rel=1e-4)
    assert track.shown_in == "hidden" and track.shapes == {32: (32, 32), 64: (64, 64)}
    assert track.lr[64] == pytest.approx(0.002) and track.weight_decay[64] == pytest.approx(0.2)


def test_observing_leaves_the_trained_parameters_in_place() -> None:
    family = Family(lambda width: Net(width, None), make_optimizer("sgd", None), DATA, loss=F.cross_entropy)
    run, plain = family.start(16), family.start(16)
    parameters = list(run.model.parameters())
    _Observer(Observations((16,), 1, 2, "width"), run, Stacks()).observe(effects=True)
    plain.step(), plain.step()
    assert all(a is b for a, b in zip(run.model.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True))


def test_a_tied_tensor_is_put_back_in_one_place_at_a_time() -> None:
    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.token, self.head = nn.Embedding(10, width), nn.Linear(width, 10, bias=False)
            self.head.weight = self.token.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.token(tokens))

    tokens = torch.arange(10)
    optimizer = lambda model, width: torch.optim.SGD(model.parameters(), lr=0.1)  # noqa: E731
    seen = observe(Family(Tied, optimizer, (tokens, tokens), loss=F.cross_entropy), (8, 16), steps=1, seeds=1, effects=True)
    assert {name: (role_of(t), t.shown_in) for name, t in seen.tensors.items()} == {
        "token.weight": ("input", "token"),
        "head.weight": ("readout", "head"),
    }


@pytest.mark.parametrize(
    ("shapes", "entries", "table", "role"),
    [
        ({8: (8, 5), 16: (16, 5)}, {8: 80, 16: 160}, False, "input"),
        ({8: (8, 8), 16: (16, 16)}, {8: 80, 16: 160}, False, "hidden"),
        ({8: (8, 8, 3, 3), 16: (16, 16, 3, 3)}, {8: 80, 16: 160}, False, "hidden"),
        ({8: (5, 8), 16: (5, 16)}, {8: 50, 16: 50}, False, "readout"),
        ({8: (5, 8), 16: (5, 16)}, {8: 80, 16: 160}, True, "input"),
        ({8: (1, 5, 8), 16: (1, 5, 16)}, {8: 80, 16: 160}, False, "input"),  # positions, added to the stream
        ({8: (8,), 16: (16,)}, {8: 80, 16: 160}, False, "vector"),
        ({8: (5,), 16: (5,)}, {8: 50, 16: 50}, False, "fixed"),
    ],
)
def test_roles_come_from_the_dimensions_that_grow(shapes: dict, entries: dict, table: bool, role: str) -> None:
    assert role_of(TensorTrack("x", shapes=shapes, entries=entries, table=table)) == role


def test_broken_means_off_by_an_exponent_that_counts_and_by_many_errors() -> None:
    def evidence(value: float, stderr: float, **changes: Any) -> Evidence:
        return Evidence("hidden learning rate", ("w",), Slope(value, stderr, 2 * stderr, 12), **changes)

    assert evidence(0.3, 0.05).broken and evidence(-0.3, 0.05).broken
    assert not evidence(0.2, 0.001).broken  # too little
    assert not evidence(0.5, 0.2).broken  # too uncertain
    assert not evidence(-1.0, 0.01, above_only=True).broken
    assert not evidence(float("nan"), float("inf")).broken
    assert evidence(1.0, 0.01).confidence > 0.99 > 0.6 > evidence(0.1, 0.1).confidence


def test_a_culprit_says_what_where_and_how_to_mend_it() -> None:
    family = Family(
        lambda width: Net(width, "hidden learning rate"), make_optimizer("adam", "hidden learning rate"), DATA, loss=F.cross_entropy
    )
    (culprit,) = culprits_of(observe(family, WIDTHS, steps=3, seeds=3, effects=True))
    assert culprit.where == ("hidden.weight",)
    assert culprit.strength == abs(culprit.slope.value) > 0.5
    assert str(culprit).startswith("hidden learning rate: the changes that updates of hidden weights (hidden.weight) make")
    assert "too large at large widths" in culprit.evidence and RULES["hidden learning rate"] in culprit.evidence
    document = json.loads(to_json(culprit.to_dict()))
    assert document["kind"] == "culprit" and document["rule"] == "hidden learning rate"


def coupled(power: float) -> Any:
    """Adam with its decay in the gradient, times the power that keeps the decay's share where gradients fall as 1/width."""

    def make(model: Net, width: int) -> torch.optim.Optimizer:
        m = width / BASE
        groups = [(model.hidden.weight, 1 / m, m**-0.5), (model.input.weight, 1.0, 1 / m), (model.head.weight, 1.0, 1 / m)]
        chosen = [{"params": p, "lr": 0.004 * rate, "weight_decay": 0.01 * right**power} for p, rate, right in groups]
        biases = [p for p in model.parameters() if p.ndim == 1]
        return torch.optim.Adam([*chosen, {"params": biases, "lr": 0.004, "weight_decay": 0.0}], eps=1e-12)

    return make


def test_decay_in_adams_gradient_must_keep_its_share() -> None:
    assert named("adam", None, optimizer=coupled(1.0)) == ()
    found = find_culprits(lambda width: Net(width, None), WIDTHS, optimizer=coupled(0.0), data=DATA, loss=F.cross_entropy, steps=3)
    assert found[0].rule == "weight decay" and {c.rule for c in found} == {"weight decay"}
    slopes = {name: c.slope.value for c in found for name in c.where}
    # weights of size 1 and fan_in^-1/2 beside gradients that fall as 1/width
    assert slopes["input.weight"] == pytest.approx(1.0, abs=0.2) and slopes["hidden.weight"] == pytest.approx(0.5, abs=0.2)
    assert "share of coupled weight decay" in found[0].evidence


def test_an_eps_that_gradients_fall_below_is_named() -> None:
    adam = make_optimizer("adam", None)

    def with_eps(scaled: bool) -> Any:
        def make(model: Net, width: int) -> torch.optim.Optimizer:
            made = adam(model, width)
            for group in made.param_groups:
                group["eps"] = 1e-3 * (BASE / width if scaled else 1.0)
            return made

        return make

    assert named("adam", None, optimizer=with_eps(True)) == ()
    assert "epsilon" in named("adam", None, optimizer=with_eps(False))


@pytest.mark.parametrize("fault", [None, "readout learning rate", "readout multiplier"])
def test_a_readout_laid_out_by_input_and_output_is_a_readout(fault: str | None) -> None:
    class Transposed(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.T.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    def build(width: int) -> nn.Module:
        model = Net(width, fault)
        model.head = Transposed(model.head.weight)  # type: ignore[assignment]
        return model

    found = find_culprits(build, WIDTHS, optimizer=make_optimizer("adam", fault), data=DATA, loss=F.cross_entropy, steps=3)
    assert [c.rule for c in found] == ([fault] if fault else [])


def test_a_readout_without_its_multiplier_is_named_at_a_rate_that_saturates_the_network_too() -> None:
    def fast(model: Net, width: int) -> torch.optim.Optimizer:
        made = make_optimizer("sgd", None)(model, width)
        for group in made.param_groups:
            group["lr"] *= 40
        return made

    assert named("sgd", "readout multiplier", optimizer=fast)[0] == "readout multiplier"


def test_two_widths_are_too_few_to_name_anything() -> None:
    with pytest.raises(ValueError, match="at least 3 different positive numbers"):
        find_culprits(lambda width: Net(width, None), (32, 64), optimizer=make_optimizer("sgd", None), data=DATA, loss=F.cross_entropy)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_readout_multiplier_outside_of_the_module_is_part_of_the_readout(place: str) -> None:
    class Outside(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.hidden(F.relu(self.input(x))))
            return self.head(h * self.multiplier) if place == "before" else self.head(h) * self.multiplier

    common: dict[str, Any] = {"data": DATA, "loss": F.cross_entropy, "steps": 3}
    for fault, expected in ((None, ()), ("readout multiplier", ("readout multiplier",))):
        found = find_culprits(lambda width, f=fault: Outside(width, f), WIDTHS, optimizer=make_optimizer("adam", None), **common)
        assert tuple(c.rule for c in found) == expected
