"""Reference matrices with a prescribed spectrum: what the spectral algorithms must find is known in closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sharpkit.operators.base import MatrixOperator, SymmetricOperator


def rotated(spectrum: np.ndarray, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A dense symmetric matrix with exactly this spectrum (to rounding), in a random orthonormal eigenbasis."""
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.standard_normal((len(spectrum), len(spectrum))))
    matrix = (basis * spectrum) @ basis.T
    return torch.from_numpy((matrix + matrix.T) / 2).to(dtype)


def operator_with(spectrum: np.ndarray, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> SymmetricOperator:
    """The same as an operator whose products are counted."""
    return MatrixOperator(rotated(np.asarray(spectrum, dtype=np.float64), seed=seed, dtype=dtype))


def network_like(n: int = 600, *, outliers: int = 10, ratio: float = 0.75, bulk: float = 0.05, seed: int = 0) -> np.ndarray:
    """Outliers 1, ratio, ratio^2, ... over a Gaussian bulk that reaches to about +-``bulk``: what Hessians of networks look like."""
    generator = np.random.default_rng(seed)
    return np.concatenate([ratio ** np.arange(outliers), bulk / 3 * generator.standard_normal(n - outliers)])


def true_residuals(operator: SymmetricOperator, vectors: Tensor, values: Tensor) -> np.ndarray:
    """||A v - value v||, recomputed in float64."""
    matrix = operator.matrix.double()  # type: ignore[attr-defined]
    vectors = vectors.double()
    return (matrix @ vectors - vectors * values).norm(dim=0).numpy()
