"""Linear and logistic regression with their losses, gradients and Hessians in closed form, without sharpkit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk

KINDS = ("quadratic", "logistic")


class Regression:
    """Linear regression, which is a quadratic, or logistic regression, on one random data set; no bias."""

    def __init__(self, kind: str, *, seed: int = 0, n: int = 24, size: int = 5) -> None:
        g = torch.Generator().manual_seed(seed)
        self.kind, self.x = kind, torch.randn(n, size, generator=g, dtype=torch.float64) * torch.linspace(0.3, 2.0, size).double()
        self.y = torch.randn(n, 1, generator=g, dtype=torch.float64)
        if kind == "logistic":
            self.y = (self.y > 0).double()
        self.model = nn.Linear(size, 1, bias=False).double()
        self.model.weight.data = torch.randn(1, size, generator=g, dtype=torch.float64)
        loss = F.mse_loss if kind == "quadratic" else F.binary_cross_entropy_with_logits
        self.objective = sk.Objective(self.model, (self.x, self.y), loss=loss)

    @property
    def w(self) -> Tensor:
        return self.model.weight.detach()[0]

    def losses(self, w: Tensor) -> Tensor:
        """Of each sample, (N,)."""
        z, y = self.x @ w, self.y[:, 0]
        return (z - y) ** 2 if self.kind == "quadratic" else torch.log1p(torch.exp(-(2 * y - 1) * z))

    def slopes(self) -> Tensor:
        """d l_i / d z_i, (N,)."""
        z, y = self.x @ self.w, self.y[:, 0]
        return 2 * (z - y) if self.kind == "quadratic" else torch.sigmoid(z) - y

    def gradient(self) -> Tensor:
        return self.x.T @ self.slopes() / len(self.x)

    def hessian(self) -> Tensor:
        p = torch.sigmoid(self.x @ self.w)
        curvature = torch.full_like(p, 2.0) if self.kind == "quadratic" else p * (1 - p)
        return self.x.T @ (self.x * curvature[:, None]) / len(self.x)
