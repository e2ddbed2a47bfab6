"""The same numbers on a CUDA device as on the host, and nothing left behind there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _problem(kind: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)), (
            torch.randn(40, 6, generator=g),
            torch.randint(4, (40,), generator=g),
        )
    if kind == "conv":
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 4))
        return net, (torch.randn(20, 1, 8, 8, generator=g), torch.randint(4, (20,), generator=g))
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return layer, (torch.randn(6, 5, 8, generator=g), torch.randn(6, 5, 8, generator=g))


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("operator", ["HessianOperator", "GaussNewtonOperator", "EmpiricalFisherOperator", "GradientCovarianceOperator"])
def test_products_on_the_device_equal_those_on_the_host(kind: str, operator: str) -> None:
    model, data = _problem(kind)
    model, data = model.double(), tuple(t.double() if t.is_floating_point() else t for t in data)
    loss = F.mse_loss if kind == "attention" else F.cross_entropy
    host = getattr(sk, operator)(sk.Objective(model, data, loss=loss))
    device = getattr(sk, operator)(sk.Objective(copy.deepcopy(model).cuda(), data, loss=loss))
    v = host.random_vectors(2, generator=torch.Generator().manual_seed(1))
    expected = host @ v
    assert device.device.type == "cuda"
    assert float((((device @ v.cuda()).cpu()) - expected).norm() / expected.norm()) < 1e-9


def test_measure_on_the_device_agrees_and_leaves_the_random_state() -> None:
    model, data = _problem("mlp")
    host = sk.measure(sk.Objective(model, data, loss=F.cross_entropy))
    state = torch.cuda.get_rng_state()
    device = sk.measure(sk.Objective(copy.deepcopy(model).cuda(), data, loss=F.cross_entropy))
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert device.lambda_max.value == pytest.approx(host.lambda_max.value, rel=1e-3)
    assert device.trace.value == pytest.approx(host.trace.value, rel=1e-3)


def test_the_basis_can_be_offloaded_to_the_host() -> None:
    model, data = _problem("mlp")
    operator = sk.HessianOperator(sk.Objective(model.cuda(), data, loss=F.cross_entropy))
    here, there = sk.eigenpairs(operator, k=3), sk.eigenpairs(operator, k=3, offload=True)
    assert torch.allclose(here.values, there.values, rtol=1e-3)


def test_a_batch_that_does_not_fit_is_cut_until_it_does() -> None:
    """Capped memory: the whole batch runs out, pieces of it do not."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    model = nn.Sequential(nn.Linear(64, 2048), nn.Tanh(), nn.Linear(2048, 2048), nn.Tanh(), nn.Linear(2048, 10)).cuda()
    data = (torch.randn(16384, 64), torch.randint(10, (16384,)))
    expected = sk.HessianOperator(sk.Objective(model, data, loss=F.cross_entropy, micro_batch_size=512), retain=False)
    v = torch.ones(expected.size, device="cuda") / expected.size**0.5
    reference = expected @ v
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + 600 * 2**20) / total))
        product = sk.HessianOperator(sk.Objective(model, data, loss=F.cross_entropy)) @ v
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert float((product - reference).norm() / reference.norm()) < 1e-4
