"""Models of many classes, cross-entropies behind them, and a way to have their logits in chunks although they are small."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import labels
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.objective import logits

WIDTH, CLASSES = 3, 7


def cut_small_logits(monkeypatch: pytest.MonkeyPatch, tokens: int = 4) -> None:
    """From now on, compute cross-entropies from the logits of so many tokens at a time, however small they are."""
    for name, value in (("_LEAST_BYTES", 0), ("_LEAST_CLASSES", 0), ("_CHUNK_BYTES", {}), ("_ELSEWHERE", 1), ("_FEWEST", tokens)):
        monkeypatch.setattr(logits, name, value)


class Tagger(nn.Module):
    """Tokens to logits, (B, T, V), by an embedding, a hidden layer and a head; or one tied to the embedding."""

    def __init__(self, *, tied: bool = False, bias: bool = True, cap: float | None = None, classes: int = CLASSES) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(classes, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, classes, bias=bias)
        self.cap = cap
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        z = self.head(self.hidden(self.embedding(tokens)).tanh())
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap


HEADS: dict[str, Callable[[], nn.Module]] = {
    "bias": Tagger,
    "tied": lambda: Tagger(tied=True, bias=False),
    "soft cap": lambda: Tagger(cap=0.3),
}


def tokens() -> Tensor:
    return labels(2, 5, classes=CLASSES)


def marks() -> Tensor:
    given = labels(2, 5, classes=CLASSES, seed=1)
    given[1, 3:] = -100
    return given


def rows(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


Loss = Callable[[Tensor, Tensor], Tensor]
CLASS_WEIGHTS = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)
LOSSES: dict[str, Loss] = {
    "rows": rows,
    "shifted by one, summed": lambda z, y: F.cross_entropy(
        z[:, :-1].contiguous().view(-1, z.size(-1)), y[..., 1:].reshape(-1), reduction="sum"
    ),
    "transposed": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "permuted": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y, label_smoothing=0.1),
    "moved": lambda z, y: F.cross_entropy(z.movedim(-1, 1), y, weight=CLASS_WEIGHTS),
    "another ignored label": lambda z, y: F.cross_entropy(z.mT, y.where(y != -100, 3), ignore_index=3),
    "scaled": lambda z, y: rows(3 * z / 2.0, y),
    "picked": lambda z, y: F.cross_entropy(z[y != -100], y[y != -100]),
    "cut classes": lambda z, y: rows(z[..., : CLASSES - 1], y % (CLASSES - 1)),
    "one by one, squared": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").square().sum(),
    "as a module": lambda z, y: nn.CrossEntropyLoss()(z.mT, y),
    "looked at besides": lambda z, y: rows(z, y) + z.logsumexp(-1).square().mean() + 0 * z.detach().argmax(-1).sum(),
}
WHOLE: dict[str, Loss] = {  # that need the logits themselves
    "log_softmax": lambda z, y: F.nll_loss(z.log_softmax(-1).flatten(0, 1), y.flatten()),
    "class probabilities": lambda z, y: F.cross_entropy(z.flatten(0, 1), z.detach().softmax(-1).flatten(0, 1)),
    "an addend": lambda z, y: rows(z + CLASS_WEIGHTS, y),
    "one class": lambda z, y: z[..., 2].square().sum(),
}
