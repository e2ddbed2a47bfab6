"""The three networks, their data and the three optimizers of the batch-size experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments._models import GPT, conv_net, images, mlp, seeded, text

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "Adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
}
SIZES = (4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Problem:
    """A network to train from scratch; the loss is cross-entropy.

    Attributes:
        name: short.
        make: seed -> freshly initialised network.
        x, y: all the data.
        data: where it comes from.
        title: in words.
    """

    name: str
    make: Callable[[int], nn.Module]
    x: Tensor
    y: Tensor
    data: str
    title: str

    @property
    def size(self) -> int:
        return len(self.x)


def digits() -> tuple[Tensor, Tensor, str]:
    """(1797, 1, 8, 8) standardised images of scikit-learn's digits and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None]
    return (x - x.mean()) / x.std(), torch.tensor(found.target), "scikit-learn digits, 1797 images of 8 x 8"


def mlp_problem() -> Problem:
    x, y, data = digits()
    return Problem("mlp", lambda seed: seeded(lambda: mlp((64, 64, 64, 10)), seed), x, y, data, "MLP 64-64-64-10, digits")


def conv_problem() -> Problem:
    x, y, data = images(2000, side=8)
    return Problem(
        "conv", lambda seed: seeded(lambda: conv_net(8, side=8, batch_norm=False), seed), x, y, data, "conv net, Fashion-MNIST 8 x 8"
    )


def transformer_problem() -> Problem:
    x, y, data = text(768, 16, seed=1)
    return Problem(
        "transformer",
        lambda seed: seeded(lambda: GPT(time=16, width=32, layers=1, heads=2), seed),
        x,
        y,
        data,
        "transformer, width 32, characters",
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {"mlp": mlp_problem, "conv": conv_problem, "transformer": transformer_problem}
