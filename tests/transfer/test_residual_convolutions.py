"""Residual convolutional networks: the correct parametrisation passes, one rate for all widths fails by its convolutions' rate."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.transfer.coordinates import check_of
from sharpkit.transfer.culprits import culprits_in
from sharpkit.transfer.observing import observe
from sharpkit.transfer.setup import Family

WIDTHS, BASE, RATE = [16, 32, 64, 128], 16, 3e-3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.norm(x)))


class ResNet(nn.Module):
    def __init__(self, width: int, *, multiplier: float) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, width, 3, padding=1), nn.Sequential(Block(width), Block(width))
        self.head, self.multiplier = nn.Linear(width, 10, bias=False), multiplier
        nn.init.normal_(self.head.weight, std=BASE**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3))) * self.multiplier


def data() -> list[tuple[Tensor, Tensor]]:
    """Handwritten digits, eight batches of 64."""
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None]
    x, y = (x - x.mean()) / x.std(), torch.tensor(found.target)
    return [(x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)]


@pytest.mark.parametrize("correct", [pytest.param(True, marks=pytest.mark.slow), False], ids=["muP", "standard"])
def test_residual_convolutions_are_judged_and_the_broken_rule_is_named(correct: bool) -> None:
    def optimizer(model: nn.Module, width: int) -> torch.optim.Optimizer:
        hidden = [p for name, p in model.named_parameters() if "conv" in name]
        others = [p for name, p in model.named_parameters() if "conv" not in name]
        groups = [{"params": others, "lr": RATE}, {"params": hidden, "lr": RATE * (BASE / width if correct else 1.0)}]
        return torch.optim.Adam(groups, lr=RATE)

    # both answers from the same runs, as the verdict has them
    family = Family(lambda width: ResNet(width, multiplier=BASE / width), optimizer, data(), loss=F.cross_entropy)
    seen = observe(family, WIDTHS, steps=4, seeds=3, effects=True)
    check, found = check_of(seen), culprits_in(family, seen, seeds=3)
    assert check.passed == correct, check
    if correct:
        assert not found, found
    else:
        assert found[0].rule == "hidden learning rate"
        assert set(found[0].where) == {"blocks.0.conv.weight", "blocks.1.conv.weight"}
