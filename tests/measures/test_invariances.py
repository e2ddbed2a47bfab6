"""Each measure stays the same, exactly, under what it says; and changes under what it does not say."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit import measures

Change = Callable[[nn.Sequential], None]
Value = Callable[[sk.Objective], float]


def relu_net() -> nn.Sequential:
    """Two hidden layers without biases, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)
        ).double()


def norm_net() -> nn.Sequential:
    """A convolution before a batch norm with statistics of its own, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv1d(1, 4, 2, bias=False), nn.BatchNorm1d(4, eps=0.0), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
        norm = net[1]
        assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.data.uniform_(0.5, 1.5)
    return net


def rescale_layers(net: nn.Sequential) -> None:
    """A layer by 2.5, the next by 1 / 2.5: the same function of a ReLU network."""
    net[0].weight.data *= 2.5
    net[2].weight.data /= 2.5


def permute_neurons(net: nn.Sequential) -> None:
    """The neurons of the first hidden layer in another order."""
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    net[0].weight.data = net[0].weight.data[order]
    net[2].weight.data = net[2].weight.data[:, order]


def scale_filters(net: nn.Sequential) -> None:
    """Filters by factors of their own, and the statistics of the norm behind them with them."""
    norm, each = net[1], torch.tensor([0.3, 2.0, 1.5, 4.0], dtype=torch.float64)
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
    net[0].weight.data *= each[:, None, None]
    norm.running_mean *= each
    norm.running_var *= each**2


def scale_the_logits(net: nn.Sequential) -> None:
    """The last layer by 10: another function."""
    net[-1].weight.data *= 10.0


def _objective(net: nn.Module) -> sk.Objective:
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(16, 5, generator=g, dtype=torch.float64), torch.randint(3, (16,), generator=g)
    return sk.Objective(net, (x[:, None] if any(isinstance(m, nn.Conv1d) for m in net.modules()) else x, y), loss=F.cross_entropy)


def _rise(**settings: object) -> Value:
    return lambda o: measures.m_sharpness(o, m=16, rho=0.2, **settings).values[0].value  # type: ignore[arg-type]


def _foretold(by: str, *, per_channel: bool = False) -> Value:
    def value(o: sk.Objective) -> float:
        layers = measures.layer_sensitivity(
            o, bits=[3], per_channel=per_channel, trace_rtol=1e-9
        )  # asked so tightly that probes do not hide what is invariant
        table = {"trace": layers.predicted, "quadratic": layers.quadratic, "measured": layers.measured}[by]
        assert table is not None
        return table[0][0]

    return value


def _of_hessian(o: sk.Objective) -> sk.HessianOperator:
    return sk.HessianOperator(o)


# by measure: its value, and under which of layer rescaling, permutation, one factor for each filter it stays the same
MEASURES: dict[str, tuple[Value, bool, bool, bool]] = {
    "worst l2": (_rise(adaptive=False), False, True, False),
    "worst l2, adaptive": (_rise(), True, True, True),
    "worst l-inf": (_rise(adaptive=False, perturbation="linf"), False, True, False),
    "worst l-inf, adaptive": (_rise(perturbation="linf"), True, True, True),
    "worst l2, adaptive with a floor": (_rise(floor=0.1), False, True, False),
    "average, adaptive": (_rise(perturbation="gaussian"), True, False, True),  # its draws stay where they are
    "average": (_rise(perturbation="gaussian", adaptive=False), False, False, False),
    "SAM": (lambda o: measures.sam_sharpness(o).value, False, True, False),
    "ASAM": (lambda o: measures.sam_sharpness(o, adaptive=True).value, True, True, True),
    "logits": (lambda o: measures.logit_sharpness(o).value, True, True, True),
    "trace of a layer": (
        lambda o: measures.layer_sensitivity(o, bits=[4], check=False, trace_rtol=1e-9).trace[0].value,  # as above
        False,
        True,
        False,
    ),
    "rounding foretold": (_foretold("trace"), True, True, False),
    "rounding, quadratic form by channels": (_foretold("quadratic", per_channel=True), True, True, True),
    "rounding measured by channels": (_foretold("measured", per_channel=True), True, True, True),
    "effective dimension": (lambda o: measures.effective_dimension(_of_hessian(o), 0.1).value, False, False, False),
    "effective dimension of T H T": (
        lambda o: measures.effective_dimension(sk.AdaptiveOperator(_of_hessian(o)), 0.1).value,
        True,
        False,  # its probes stay where they are
        True,
    ),
    "Fisher-Rao norm": (lambda o: measures.fisher_rao_norm(o).value, True, True, True),
    "relative flatness": (lambda o: measures.relative_flatness(o, "0.weight", rtol=1e-9).value, True, True, True),  # as above
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_invariant_under_what_they_say_and_nothing_else(name: str) -> None:
    value, rescaling, permutation, filters = MEASURES[name]
    cases: list[tuple[nn.Sequential, Change, bool]] = [
        (relu_net(), rescale_layers, rescaling),
        (relu_net(), permute_neurons, permutation),
        (norm_net(), scale_filters, filters),
    ]
    for net, change, same in cases:
        other = copy.deepcopy(net)
        change(other)
        assert _objective(other).value() == pytest.approx(_objective(net).value(), rel=1e-12)
        before, after = value(_objective(net)), value(_objective(other))
        # effective dimensions come from quadrature nodes, which resolve a singular spectrum to fewer digits
        tight = 1e-6 if "dimension" in name else 1e-8
        assert (abs(after - before) <= tight * abs(before)) == same, (name, change.__name__, before, after)


def test_larger_logits_are_sharper_unless_they_are_normalised() -> None:
    net, other = relu_net(), relu_net()
    scale_the_logits(other)
    plain = [measures.logit_sharpness(_objective(each)).value for each in (net, other)]
    assert plain[0] != pytest.approx(plain[1], rel=0.1)
    taken_out = [_rise(logit_normalization=True)(_objective(each)) for each in (net, other)]
    assert taken_out[1] == pytest.approx(taken_out[0], rel=1e-8)


@pytest.mark.parametrize("name", ["m_sharpness", "effective_dimension"])
def test_random_measures_of_a_permuted_network_agree_within_their_error(name: str) -> None:
    def value(net: nn.Module) -> sk.Estimate:
        objective = _objective(net)
        if name == "effective_dimension":
            return measures.effective_dimension(_of_hessian(objective), 0.1)
        return measures.m_sharpness(objective, m=16, rho=0.2, perturbation="gaussian", num_steps=200).values[0]

    net, other = relu_net(), relu_net()
    permute_neurons(other)
    first, second = value(net), value(other)
    assert abs(first.value - second.value) <= 3 * (first.stderr**2 + second.stderr**2) ** 0.5
