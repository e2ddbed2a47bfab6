"""Coordinate check: exponents known in closed form, every output seen once a call, nothing left behind."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit._errors import ObjectiveError
from sharpkit._results import Progress, to_json
from sharpkit.plots.transfer import plot_coordinates
from sharpkit.transfer.coordinates import CoordinateCheck, coordinate_check
from sharpkit.transfer.observing import Stacks, forward, probe_batch, record
from sharpkit.transfer.setup import Family

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()
WIDTHS = (32, 64, 128, 256)
Pair = namedtuple("Pair", "first second")


def sgd(rate: float) -> Any:
    return lambda model, width: torch.optim.SGD(model.parameters(), lr=rate)


class Linear(nn.Module):
    """Deep linear network whose weights are normal with variances fan_in^-a, one a for each of its three layers."""

    def __init__(self, width: int, powers: tuple[float, float, float]) -> None:
        super().__init__()
        sizes = (6, width, width, 16)
        layers = [nn.Linear(sizes[i], sizes[i + 1], bias=False) for i in range(3)]
        self.first, self.hidden, self.last = layers
        for layer, power in zip(layers, powers, strict=True):
            nn.init.normal_(layer.weight, std=layer.in_features ** (-power / 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.first(x)))


def linear(*powers: float) -> Any:
    return lambda width: Linear(width, powers)  # type: ignore[arg-type]


def initial(powers: tuple[float, float, float]) -> CoordinateCheck:
    return coordinate_check(linear(*powers), WIDTHS, optimizer=sgd(1e-6), data=(X, Y), loss=F.cross_entropy, steps=1, seeds=4)


# -- exponents --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("powers", "hidden", "output"),
    [
        ((1, 1, 1), 0.0, 0.0),  # standard: variance 1/fan_in keeps every size
        ((1, 1, 2), 0.0, -0.5),  # muP: the readout of variance 1/fan_in^2
        ((1, 0, 1), 0.5, 0.5),  # constant variance in the hidden layer: a sum of width terms
        ((1, 2, 1), -0.5, -0.5),  # 1/fan_in^2 there
    ],
)
def test_sizes_at_initialisation_have_the_exponents_of_sums_of_independent_terms(
    powers: tuple[float, float, float], hidden: float, output: float
) -> None:
    check = initial(powers)
    for name, exponent in (("first", 0.0), ("hidden", hidden), ("output", output)):
        slope = check[name].initial
        assert slope.stderr < 0.1
        assert abs(slope.value - exponent) < 4 * slope.stderr


def test_updates_agree_with_the_formula_of_one_gradient_step() -> None:
    class Net(nn.Module):  # f(x) = sum_i v_i u_i x with u = 2, v = 1/n: loss f, so that one step of rate 0.1 is known exactly
        def __init__(self, width: int) -> None:
            super().__init__()
            self.hidden, self.last = nn.Linear(1, width, bias=False), nn.Linear(width, 1, bias=False)
            nn.init.constant_(self.hidden.weight, 2.0)
            nn.init.constant_(self.last.weight, 1 / width)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.hidden(x))

    data = (torch.ones(3, 1), torch.zeros(3, 1))
    check = coordinate_check(Net, [4, 8, 16], optimizer=sgd(0.1), data=data, loss=lambda out, _: out.mean(), steps=1, seeds=1)
    for n in (4, 8, 16):
        u, v = 2.0 - 0.1 / n, 1 / n - 0.1 * 2.0
        assert check["hidden"].rms[n][0] == pytest.approx([2.0, u], rel=1e-5)
        assert check["hidden"].updates[n][0] == pytest.approx([0.0, 0.1 / n], rel=1e-4, abs=1e-9)
        assert check["output"].rms[n][0] == pytest.approx([2.0, abs(n * u * v)], rel=1e-5)
        assert check["output"].updates[n][0] == pytest.approx([0.0, abs(n * u * v - 2.0)], rel=1e-4, abs=1e-9)
    assert check["hidden"].update.value == pytest.approx(-1.0, abs=1e-3)
    assert check["hidden"].verdict == "vanishes"
    assert check["hidden"].mean_abs.value == pytest.approx(check["hidden"].level.value, abs=1e-6)  # all entries alike


def test_one_rate_for_all_widths_under_adam_blows_up_and_rates_by_fan_in_do_not() -> None:
    def adam(power: float) -> Any:
        def make(model: Linear, width: int) -> torch.optim.Optimizer:
            rates = ((model.first, 1.0), (model.hidden, (32 / width) ** power), (model.last, (32 / width) ** power))
            return torch.optim.Adam([{"params": m.parameters(), "lr": 0.01 * r} for m, r in rates], eps=1e-12)

        return make

    build = linear(1, 1, 2)  # with the readout's multiplier inside its initialisation and rate
    common: dict[str, Any] = {"data": (X, Y), "loss": F.cross_entropy, "steps": 3}
    right = coordinate_check(build, WIDTHS, optimizer=adam(1.0), **common)
    wrong = coordinate_check(build, WIDTHS, optimizer=adam(0.0), **common)
    assert right.passed, str(right)
    assert "keep their size over widths 32 to 256" in right.findings()[0]
    assert wrong["hidden"].verdict == wrong["output"].verdict == "grows"
    assert wrong["first"].verdict == "stable"
    assert any(line.startswith("hidden: updates while training grow as width^+") for line in wrong.findings())


# -- what is seen -----------------------------------------------------------------------------------------------------------
def test_a_module_called_twice_is_recorded_for_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model = Twice()
    found = record(model, lambda: model(X))
    assert list(found) == ["layer", "layer (call 2)", "output"]
    torch.testing.assert_close(found["layer"].tensor, F.linear(X, model.layer.weight, model.layer.bias).detach())
    torch.testing.assert_close(found["layer (call 2)"].tensor, model.layer(torch.tanh(model.layer(X))).detach())
    assert found["layer"].kind == "module" and found["layer (call 2)"].kind == "output"  # the very tensor the model gives
    assert found["layer"].input_rms == pytest.approx(float(X.square().mean().sqrt()), rel=1e-5)


def test_tuples_named_tuples_and_dicts_are_taken_apart() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.pair = nn.LSTM(6, 4, batch_first=True), Pairs()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out, _ = self.lstm(x[:, None])
            return {"logits": self.pair(out).first, "tokens": torch.ones(3, dtype=torch.long), "loss": out.sum()}

    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Pair:
            return Pair(2 * x, [3 * x, None])

    model = Many()
    found = record(model, lambda: model(X))
    assert list(found) == ["lstm[0]", "lstm[1][0]", "lstm[1][1]", "pair.first", "pair.second[0]", "output.logits"]  # no integers, no loss
    assert found["pair.second[0]"].rms == pytest.approx(1.5 * found["pair.first"].rms)


class Attention(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.q, self.k, self.way = nn.Linear(6, 8), nn.Linear(6, 8), way

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k))
        if self.way == "kernel":
            return F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.3)
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * 0.3
        logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(logits.dtype).min)
        return logits.softmax(-1) @ k


@pytest.mark.parametrize("way", ["kernel", "by hand"])
def test_attention_logits_are_those_of_the_definition_without_the_masked_ones(way: str) -> None:
    model = Attention(way)
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    seen = record(model, lambda: model(x))["output: attention logits"]
    q, k = (f(x).view(3, 5, 2, 4) for f in (model.q, model.k))
    logits = 0.3 * (q[:, :, None] * k[:, None]).sum(-1)  # (batch, i, j, head)
    allowed = logits[:, torch.ones(5, 5).tril().bool()]
    assert seen.tensor.numel() == allowed.numel() == 3 * 15 * 2
    torch.testing.assert_close(seen.tensor.sort().values, allowed.flatten().sort().values)
    assert seen.inner == 4


def test_torchs_own_attention_is_seen_through_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))
    before = torch.backends.mha.get_fastpath_enabled()
    found = record(layer, lambda: layer(x))
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert found["self_attn: attention logits"].tensor.numel() == 2 * 2 * 3 * 3
    weights = layer.self_attn(x, x, x, average_attn_weights=False)[1]
    logits = found["self_attn: attention logits"].tensor.view(2, 2, 3, 3)
    torch.testing.assert_close(logits.softmax(-1), weights.detach())


def test_a_softmax_that_weights_nothing_is_no_attention() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Softmax(-1))
    x = torch.ones(2, 3, 6)
    assert list(record(model, lambda: model(x))) == ["0", "1", "output"]


def test_an_output_multiplied_afterwards_is_shown_but_not_judged() -> None:
    class Scaled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body, self.head, self.width = nn.Linear(6, width), nn.Linear(width, 2), width

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)) / self.width

    check = coordinate_check(Scaled, [8, 16], optimizer=sgd(0.1), data=(X, Y), loss=F.cross_entropy, steps=1, seeds=2)
    assert check["head"].kind == "before output" and check["head"].verdict == "not judged"
    assert check["output"].verdict != "not judged"


def test_depths_are_compared_by_their_first_and_last_block() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    def build(depth: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.Sequential(*[Residual() for _ in range(depth)]), nn.Linear(6, 2))

    stacks = Stacks.of({size: build(size) for size in (1, 3)})
    assert stacks.names == ("1",) and stacks.ends(3) == ("1.0", "1.2")
    check = coordinate_check(build, [1, 2, 4], optimizer=sgd(0.1), data=(X, Y), loss=F.cross_entropy, dimension="depth", steps=1, seeds=2)
    names = [c.name for c in check.coordinates]
    assert "1.first.inner" in names and "1.last" in names and not any(name.startswith("1.1") for name in names)
    assert check["1.first.inner"].verdict == "not judged" and check["1.last"].verdict != "not judged"
    assert check.findings()[0].count("depth")


# -- no trace ---------------------------------------------------------------------------------------------------------------
def test_hooks_are_removed_and_the_model_is_left_as_found_even_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)).train()
    model(X).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad for p in model.parameters()]
    copies = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def fail() -> None:
        model(X)
        raise RuntimeError("inside the forward pass")

    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside the forward pass"):
        record(model, fail)
    record(model, lambda: model(X))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g and torch.equal(g, c) for p, g, c in zip(model.parameters(), gradients, copies, strict=True))
    outer = X @ X.T  # no mode is left on
    assert type(outer) is Tensor and torch.is_grad_enabled()


def test_training_goes_as_without_the_check() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), nn.Dropout(0.3), nn.BatchNorm1d(width), nn.Linear(width, 2))

    family = Family(build, sgd(0.5), [(X[:24], Y[:24]), (X[24:], Y[24:])], loss=F.cross_entropy)
    plain, watched = family.start(8, seed=2), family.start(8, seed=2)
    for _ in range(4):
        plain.step()
        record(watched.model, lambda: forward(family, watched.model, probe_batch(family)))
        watched.step()
    assert watched.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), watched.model.state_dict().values(), strict=True))


def test_random_numbers_of_the_caller_are_untouched() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    initial((1, 1, 1))
    assert torch.equal(torch.rand(3), expected)


# -- forms of data, results, mistakes ---------------------------------------------------------------------------------------
def test_closures_and_models_with_their_own_loss_work() -> None:
    class Own(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, width), nn.Linear(width, 2)

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            logits = self.head(self.body(x))
            return namedtuple("Out", "loss logits")(F.cross_entropy(logits, labels), logits)

    own = coordinate_check(Own, [4, 8], optimizer=sgd(0.1), data={"x": X, "labels": Y}, steps=1, seeds=2)

    def closure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0], batch[1]).loss

    closed = coordinate_check(Own, [4, 8], optimizer=sgd(0.1), data=[(X, Y)], closure=closure, steps=1, seeds=2)
    assert [c.name for c in own.coordinates] == ["body", "head", "output.logits"]
    assert own["output.logits"].rms == closed["output.logits"].rms


def test_a_diverged_run_is_a_finding() -> None:
    build = linear(1, 1, 1)
    check = coordinate_check(build, [8, 16], optimizer=sgd(1e4), data=(X, Y), loss=lambda out, _: (out**4).sum(), steps=4, seeds=1)
    assert check.diverged and not check.passed
    assert "diverged within 4 steps" in check.findings()[0] and "lower the learning rate" in check.findings()[0]


def test_the_document_is_strict_json_and_reads_back() -> None:
    check = initial((1, 0, 1))
    text = to_json(check.to_dict())
    back = CoordinateCheck.from_dict(json.loads(text))
    assert json.loads(text)["kind"] == "coordinate_check" and json.loads(text)["version"] == 1
    assert to_json(back.to_dict()) == text
    assert str(back) == str(check) and str(check).startswith("coordinate check failed: widths 32, 64, 128, 256")
    assert check.table().count("\n") == len(check.coordinates)


def test_the_picture_shows_each_judged_coordinate_at_every_width() -> None:
    check = initial((1, 0, 1))
    ax = plot_coordinates(check, what="initial")
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == len(WIDTHS)]
    assert len(lines) == 3  # first, hidden, output: the last module's own line would repeat the output's
    assert ax.get_xlabel() == "width" and "x_" in ax.get_ylabel()
    with pytest.raises(ValueError, match="step must be one of 1 to 1"):
        plot_coordinates(check, step=2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"widths": [8]}, ValueError, "at least 2 different positive numbers"),
        ({"steps": 0}, ValueError, "steps must be a whole number of at least 1, got 0"),
        ({"seeds": True}, TypeError, "seeds must be a sequence of seeds or a whole number"),
        ({"seeds": 0}, ValueError, "seeds must be at least one"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be a positive number"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be a function"),
        ({"data": iter([(X, Y)])}, ObjectiveError, "only once"),
    ],
)
def test_wrong_arguments_are_named_with_the_remedy(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"widths": [4, 8], "optimizer": sgd(0.1), "data": (X, Y), "loss": F.cross_entropy} | changes
    widths = arguments.pop("widths")
    with pytest.raises(error, match=message):
        coordinate_check(linear(1, 1, 1), widths, **arguments)


def test_an_unknown_coordinate_lists_those_there_are() -> None:
    with pytest.raises(KeyError, match="there are first, hidden, last, output"):
        initial((1, 1, 1))["middle"]


def test_the_callback_hears_of_every_run() -> None:
    heard: list[Progress] = []
    build = linear(1, 1, 1)
    arguments: dict[str, Any] = {"optimizer": sgd(0.1), "data": (X, Y), "loss": F.cross_entropy}
    coordinate_check(build, [8, 4], steps=1, seeds=[0, 7], callback=heard.append, **arguments)
    assert [p.text for p in heard] == ["width 4, seed 0", "width 4, seed 7", "width 8, seed 0", "width 8, seed 7"]
    assert [(p.done, p.expected, p.unit) for p in heard] == [(n, 4, "runs") for n in (1, 2, 3, 4)]


def test_a_number_of_seeds_means_the_first_ones() -> None:
    arguments: dict[str, Any] = {"optimizer": sgd(0.1), "data": (X, Y), "loss": F.cross_entropy, "steps": 1}
    counted, listed, others = (coordinate_check(linear(1, 1, 1), [4, 8], seeds=seeds, **arguments) for seeds in (2, [0, 1], [5, 6]))
    assert counted == listed and counted.num_seeds == others.num_seeds == 2
    assert counted["hidden"].rms != others["hidden"].rms


def test_the_names_are_reachable_lazily() -> None:
    assert sk.transfer.coordinate_check is coordinate_check
    assert {"coordinate_check", "find_culprits", "log_slope"} <= set(dir(sk.transfer))
    with pytest.raises(AttributeError, match="no attribute 'cordinate_check'"):
        sk.transfer.cordinate_check  # noqa: B018
    assert math.isfinite(sk.transfer.log_slope({1: [1.0, 1.0], 2: [2.0, 2.0]}).value)
