"""Per-layer numbers are those of the diagonal blocks of the dense Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit.measuring.layers import layer_of


@pytest.fixture(scope="module")
def objective() -> sk.Objective:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        data = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))
    return sk.Objective(model, data, loss=nn.functional.cross_entropy)


@pytest.fixture(scope="module")
def dense(objective: sk.Objective) -> torch.Tensor:
    """The whole Hessian by torch.autograd.functional, without sharpkit's operators."""
    model, (x, y) = objective.model, next(iter(objective.pieces())).batch
    params = dict(model.named_parameters())

    def loss(vector: torch.Tensor) -> torch.Tensor:
        pieces = torch.split(vector, [p.numel() for p in params.values()])
        named = {n: v.view(p.shape) for (n, p), v in zip(params.items(), pieces, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    return torch.autograd.functional.hessian(loss, flat)  # type: ignore[return-value, no-untyped-call]


def test_each_layer_has_its_blocks_lambda_max_and_trace(objective: sk.Objective, dense: torch.Tensor) -> None:
    layers = sk.per_layer(objective, tol=1e-6, trace_rtol=0.02)
    assert layers.names == ("0", "2", "4")
    assert layers.num_parameters == (24, 20, 15)
    start = 0
    for size, top, total in zip(layers.num_parameters, layers.lambda_max, layers.trace, strict=True):
        block = dense[start : start + size, start : start + size]
        start += size
        assert abs(top.value - float(torch.linalg.eigvalsh(block)[-1])) <= top.stderr + 1e-9
        assert abs(total.value - float(block.trace())) <= 5 * total.stderr + 1e-9 * float(block.trace().abs())
    assert layers.converged
    assert layers.num_matvecs > 0


def test_findings_name_the_sharpest_layer(objective: sk.Objective, dense: torch.Tensor) -> None:
    layers = sk.per_layer(objective, name="net")
    tops = [float(torch.linalg.eigvalsh(dense[a:b, a:b])[-1]) for a, b in ((0, 24), (24, 44), (44, 59))]
    sharpest = ("0", "2", "4")[tops.index(max(tops))]
    assert layers.findings()[0].startswith(f"net: the sharpest layer is {sharpest} ")


def test_layers_without_convergence_say_so() -> None:
    good, bad = sk.Estimate(2.0, 0.1), sk.Estimate(1.0, 0.5, converged=False)
    layers = sk.LayerSharpness(("a",), (3,), (good,), (bad,), num_matvecs=1)
    assert not layers.converged
    assert "did not reach its tolerance" in layers.findings()[-1]


@pytest.mark.parametrize(("parameter", "layer"), [("blocks.0.attn.weight", "blocks.0.attn"), ("head.bias", "head"), ("scale", "scale")])
def test_a_parameter_belongs_to_the_module_that_holds_it(parameter: str, layer: str) -> None:
    assert layer_of(parameter) == layer


def test_progress_counts_over_all_layers(objective: sk.Objective) -> None:
    seen: list[sk.Progress] = []
    layers = sk.per_layer(objective, callback=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen) and seen[-1].done == layers.num_matvecs
    assert all(p.done <= p.expected and p.unit == "products" for p in seen)
    assert [name for name in layers.names if any(p.text.startswith(f"{name} (layer ") for p in seen)] == list(layers.names)
