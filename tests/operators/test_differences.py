"""Products by differences of gradients: near the exact ones, with an error that covers the distance, and no use of second derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk


class Attends(nn.Module):
    """Attention whose fused kernel has no second derivative."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def objective(dtype: torch.dtype = torch.float64, autocast: torch.dtype | None = None) -> sk.Objective:
    torch.manual_seed(0)
    model, x, y = Attends(), torch.randn(16, 5, 8), torch.randint(3, (16,))
    return sk.Objective(model.to(dtype), (x.to(dtype), y), loss=F.cross_entropy, autocast=autocast)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float64, 1e-8), (torch.float32, 1e-2)])
def test_a_product_is_near_the_exact_one_for_vectors_of_any_length(dtype: torch.dtype, far: float) -> None:
    f = objective(dtype)
    exact, differences = sk.HessianOperator(f), sk.HessianOperator(f, product="differences")
    vector = exact.random_vectors(1, generator=torch.Generator().manual_seed(1))[:, 0]
    before = [p.clone() for p in f.model.parameters()]
    for length in (1e-3, 1.0, 1e3):
        expected = exact @ (length * vector)
        assert float((differences @ (length * vector) - expected).norm() / expected.norm()) < far
    assert all(torch.equal(a, b) for a, b in zip(before, f.model.parameters(), strict=True)), "the parameters are put back, not moved back"
    assert not (differences @ torch.zeros_like(vector)).any()


def test_the_second_step_measures_the_error_that_residuals_hold() -> None:
    f = objective(torch.float32)
    differences = sk.HessianOperator(f, product="differences")
    right = float(sk.eigenpairs(sk.HessianOperator(objective(torch.float64)), k=1, tol=1e-8).values[0])
    top = sk.eigenpairs(differences, k=1, tol=1e-2)
    assert abs(float(top.values[0]) - right) <= float(top.residuals[0])
    assert 1e-7 < differences.rounding < 1e-2
    assert "differences of gradients" in differences.choices()["products"]
    assert (2.0 * differences).rounding == differences.rounding


def test_no_kernel_is_asked_for_and_no_graph_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    f, seen = objective(), list[bool]()
    forward = f.model.forward

    def watched(x: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return forward(x)

    monkeypatch.setattr(f.model, "forward", watched)
    operator = sk.HessianOperator(f, product="differences")
    operator @ torch.ones(operator.size, dtype=torch.float64)
    assert all(seen), "fused kernels may run"
    assert not operator.all_kept


def test_in_half_precision_sums_are_refused_and_eigenvalues_state_their_error() -> None:
    f = objective(torch.float32, autocast=torch.bfloat16)
    operator = sk.HessianOperator(f, product="differences")
    for call in (sk.trace, sk.spectral_density, sk.diagonal, sk.frobenius_norm):
        with pytest.raises(sk.UnsupportedError, match="would be noise"):
            call(operator)
    with pytest.raises(sk.UnsupportedError, match="would be noise"):
        sk.measure(f, product="differences")
    with pytest.warns(sk.ConvergenceWarning):
        top = sk.eigenpairs(operator, k=1, tol=1e-3, max_matvecs=8)
    right = float(sk.eigenpairs(sk.HessianOperator(objective()), k=1).values[0])
    assert abs(float(top.values[0]) - right) <= float(top.residuals[0]) < math.inf


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="product must be one of 'exact', 'differences', got 'both'"):
        sk.HessianOperator(objective(), product="both")
