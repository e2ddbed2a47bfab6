"""Relative error of every operator against dense float64 matrices made from their definitions, on five kinds of network.

The references use none of sharpkit's operators: Hessians by a loop of double backwards, Gauss-Newton matrices from Jacobians taken row by
row and the loss's Hessian by torch.autograd.functional.hessian, Fisher matrices from gradients taken target by target (for the sampled
one at the labels that sharpkit drew, overheard through the loss). Error: ||A - reference||_F / ||reference||_F.

    python -m experiments.operator_accuracy      # results/operator_accuracy.jsonl, figures/operator_accuracy.png
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import GPT, conv_net, mlp, seeded

TARGET = 1e-9


class Encoder(nn.Module):
    """torch's TransformerEncoderLayer (LayerNorm, default attention) on sequences of vectors."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layer, self.head = (
            nn.TransformerEncoderLayer(width, 2, dim_feedforward=8, dropout=0.1, activation="gelu", batch_first=True),
            nn.Linear(width, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(dim=1))


class Logits(nn.Module):
    """A Hugging Face language model's logits as (batch, vocabulary, time)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits.transpose(1, 2)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return Logits(GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=5, n_embd=6, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)))


def problems() -> dict[str, tuple[nn.Module, list[tuple[Tensor, Tensor]]]]:
    """Float64 models in eval mode with batches of uneven size; language models with masked targets."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def cut(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x.tensor_split([4]), y.tensor_split([4]), strict=True))

    def language() -> list[tuple[Tensor, Tensor]]:
        y = whole(11, 6, 5)
        y[1, 3:], y[5, 1:] = -100, -100
        return cut(whole(11, 6, 5), y)

    found = {
        "MLP": (lambda: mlp((5, 7, 6, 3), nn.Tanh), cut(gaussian(7, 5), whole(3, 7))),
        "conv + BatchNorm (eval)": (lambda: conv_net(2, side=8), cut(gaussian(6, 1, 8, 8), whole(10, 6))),
        "LayerNorm transformer": (Encoder, cut(gaussian(6, 3, 6), whole(4, 6))),
        "tied-embedding LM": (lambda: GPT(vocabulary=11, time=5, width=4, layers=1, heads=2, tied=True), language()),
        "Hugging Face GPT-2": (gpt2, language()),
    }
    models = {name: (seeded(make).double().eval(), batches) for name, (make, batches) in found.items()}
    for module in models["conv + BatchNorm (eval)"][0].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(gaussian(module.num_features) / 3)
            module.running_var.copy_(1 + gaussian(module.num_features) ** 2)
    return models


class Reference:
    """Dense matrices of one problem, from their definitions."""

    def __init__(self, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.model, self.batches = model, batches
        self.params = list(model.parameters())
        self.size = sum(p.numel() for p in self.params)
        self.total = sum(int((y != -100).sum()) for _, y in batches)

    def gradient(self, value: Tensor, *, create: bool = False) -> Tensor:
        found = torch.autograd.grad(value, self.params, retain_graph=True, create_graph=create, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(found, self.params, strict=True)])

    def summed(self, z: Tensor, y: Tensor) -> Tensor:
        kept = y != -100
        rows = z.movedim(1, -1)[kept]
        return -rows.log_softmax(-1).gather(-1, y[kept][:, None]).sum()

    def hessian(self) -> Tensor:
        value = sum(self.summed(self.model(x), y) for x, y in self.batches) / self.total
        return torch.stack([self.gradient(entry) for entry in self.gradient(value, create=True)])

    def gauss_newton(self) -> Tensor:
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64)
        for x, y in self.batches:
            z = self.model(x)
            jacobian = torch.stack([self.gradient(entry) for entry in z.reshape(-1)])
            curvature = torch.autograd.functional.hessian(lambda u, y=y: self.summed(u, y), z.detach()).reshape(z.numel(), z.numel())
            matrix += jacobian.T @ curvature @ jacobian
        return matrix / self.total

    def fisher(self, drawn: list[Tensor]) -> Tensor:
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64)
        for (x, _), labels in zip(self.batches, drawn, strict=True):
            z = self.model(x)
            for place in (labels != -100).nonzero():
                one = torch.full_like(labels, -100)
                one[tuple(place)] = labels[tuple(place)]
                g = self.gradient(self.summed(z, one))
                matrix += torch.outer(g, g)
        return matrix / self.total

    def sample_gradients(self) -> Tensor:
        count = sum(len(x) for x, _ in self.batches)
        rows = [self.gradient(self.summed(self.model(x[i : i + 1]), y[i : i + 1])) for x, y in self.batches for i in range(len(x))]
        return torch.stack(rows) * count / self.total


class OverheardLoss:
    """Cross-entropy that remembers the targets it was given."""

    def __init__(self) -> None:
        self.targets: list[Tensor] = []

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        self.targets.append(y)
        return F.cross_entropy(z, y)


def sampled_fisher(reference: Reference) -> tuple[sk.SymmetricOperator, Tensor]:
    """sharpkit's operator and the dense matrix at the labels it drew: per batch one draw to use, one to check the likelihood."""
    loss = OverheardLoss()
    masked = any((y == -100).any() for _, y in reference.batches)
    objective = sk.Objective(
        reference.model,
        reference.batches,
        loss=loss,
        count=lambda batch: float((batch[1] != -100).sum()) if masked else float(len(batch[1])),
        reduction="mean",
    )
    operator = sk.FisherOperator(objective, likelihood="categorical", seed=3)
    loss.targets.clear()
    operator.to_dense()
    drawn = loss.targets[::2]
    drawn = [torch.where(y == -100, y, labels) for labels, (_, y) in zip(drawn, reference.batches, strict=True)]
    return operator, reference.fisher(drawn)


def pairs_of(reference: Reference) -> dict[str, Callable[[], tuple[sk.SymmetricOperator, Tensor]]]:
    model = reference.model
    objective = sk.Objective(model, reference.batches, loss=F.cross_entropy)
    H = sk.HessianOperator(objective)
    dense = reference.hessian()
    gradients = reference.sample_gradients()
    centred = gradients - gradients.mean(dim=0)
    w = torch.cat([p.detach().reshape(-1) for p in reference.params])

    def preconditioned() -> tuple[sk.SymmetricOperator, Tensor]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
        for x, y in reference.batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moments = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in reference.params])
        steps = len(reference.batches)
        # The denominator of Cohen et al., arXiv 2207.14484, without the bias correction of the first moment, which soon is 1.
        scale = ((moments / (1 - 0.999**steps)).sqrt() + 1e-8).rsqrt()
        return sk.PreconditionedOperator(H, optimizer), scale[:, None] * dense * scale

    return {
        "preconditioned (Adam)": preconditioned,  # first: the optimizer steps (at rate 0) before any graph is kept
        "Hessian": lambda: (H, dense),
        "Gauss-Newton": lambda: (sk.GaussNewtonOperator(objective), reference.gauss_newton()),
        "Fisher (sampled)": lambda: sampled_fisher(reference),
        "empirical Fisher": lambda: (sk.EmpiricalFisherOperator(objective), gradients.T @ gradients / len(gradients)),
        "gradient covariance": lambda: (sk.GradientCovarianceOperator(objective), centred.T @ centred / len(centred)),
        "adaptive |w|": lambda: (sk.AdaptiveOperator(H), w.abs()[:, None] * dense * w.abs()),
    }


def measure(quick: bool) -> list[Row]:
    rows = []
    for problem, (model, batches) in problems().items():
        if quick and problem not in ("MLP", "tied-embedding LM"):
            continue
        with sdpa_kernel(SDPBackend.MATH):
            reference = Reference(model, batches)
            pairs = pairs_of(reference)
            compared = {name: make() for name, make in pairs.items()}
        for name, (operator, expected) in compared.items():
            error = float((operator.to_dense() - expected).norm() / expected.norm())  # outside the context: attention at its default
            rows.append({"problem": problem, "operator": name, "n": operator.size, "relative_error": error, "norm": float(expected.norm())})
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    axes = figure.subplots()
    operators, names = list(dict.fromkeys(row["operator"] for row in rows)), list(dict.fromkeys(row["problem"] for row in rows))
    grid = np.array(
        [[next(r["relative_error"] for r in rows if r["operator"] == o and r["problem"] == p) for o in operators] for p in names]
    )
    shown = axes.imshow(np.log10(np.maximum(grid, 1e-17)), vmin=-17, vmax=-9, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        axes.text(j, i, f"{value:.0e}", ha="center", va="center", fontsize=7, color="white" if value < 1e-13 else "black")
    axes.set_xticks(range(len(operators)), operators, fontsize=7, rotation=15)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(shown, label="log10 relative error (target -9)")


if __name__ == "__main__":
    run_as_script("operator_accuracy", measure, draw)
