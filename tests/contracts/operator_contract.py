"""The one contract that every operator keeps, whatever it stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from traces import untouched

from sharpkit.operators.base import SymmetricOperator


def check_operator(operator: SymmetricOperator, expected: Tensor, *, model: nn.Module | None = None, rtol: float = 1e-9) -> None:
    """Equal to the dense float64 reference, symmetric, linear, the same by columns, counted, and without a trace in the model.

    The tolerance is relative to the Frobenius norm: 1e-9 leaves four digits over what a sum of some hundred float64 products may lose.
    """
    with untouched(model if model is not None else nn.Module()):
        n = len(expected)
        scale = float(expected.norm())
        assert operator.shape == (n, n)
        before = operator.num_matvecs
        dense = operator.to_dense()
        assert operator.num_matvecs == before + n, "one product for each column"
        assert dense.dtype == operator.dtype
        assert not dense.requires_grad
        error = float((dense.double() - expected).norm())
        assert error <= rtol * scale, f"off by {error / scale:.2e}"
        assert float((dense - dense.T).norm()) <= rtol * scale, "symmetric"
        generator = torch.Generator().manual_seed(7)
        u, v = torch.randn(2, n, generator=generator, dtype=torch.float64).to(operator.dtype)
        kept = v.clone()
        together = operator @ torch.stack([u, v], dim=1)
        assert torch.equal(v, kept), "the vector is not written to"
        single = operator @ v
        assert single.shape == (n,)
        assert single.data_ptr() != v.data_ptr()
        span = scale * float(u.norm() + v.norm())
        assert float((together[:, 1] - single).norm()) <= rtol * span, "(n, k) is the columns one by one"
        assert float((operator @ (2 * u - 3 * v) - 2 * together[:, 0] + 3 * single).norm()) <= 5 * rtol * span, "linear"
        assert float((operator @ (1000 * v) - 1000 * single).norm()) <= 1000 * rtol * span, "a long vector is no other direction"
        assert torch.equal(operator @ v, single), "the same product twice is the same bits"
        assert operator.num_matvecs == before + n + 6
