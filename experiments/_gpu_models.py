"""The networks of the GPU benchmark with their batches: an MLP, ResNet-18 for small images, GPT-2's smallest size; random data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments._models import GPT, mlp, seeded


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.first, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)) if stride == 2 else ()
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(inner + self.shortcut(x))


def resnet(width: int) -> nn.Module:
    """ResNet-18 for images of 32 x 32: no pooling at the beginning; 11.2 M parameters at width 64."""
    widths = [width, width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
    blocks = [Residual(a, b) for a, b in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


class LanguageModel(GPT):
    """GPT-2's shape and initialisation, output embedding tied; logits as (batch, time, vocabulary). 124.4 M parameters at full size."""

    def __init__(self, *, vocabulary: int, time: int, width: int, layers: int, heads: int) -> None:
        super().__init__(vocabulary=vocabulary, time=time, width=width, layers=layers, heads=heads, tied=True)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_residual = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).transpose(1, 2)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all tokens, on contiguous logits."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Subject:
    """A network with the batch it is measured on.

    Attributes:
        make: the model on the host.
        data: from a generator to (inputs, targets).
        weight: share of the time, relative to the others.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    weight: float


def subjects(quick: bool) -> list[Subject]:
    """Full size: batches of 1024 vectors, 128 images, 8 sequences of 256 tokens."""
    inputs, hidden, vectors = (32, 32, 64) if quick else (3072, 1024, 1024)
    width, images = (4, 16) if quick else (64, 128)
    shape = {"vocabulary": 50, "time": 16, "width": 16, "layers": 2, "heads": 2} if quick else {}
    shape = shape or {"vocabulary": 50257, "time": 1024, "width": 768, "layers": 12, "heads": 12}
    sequences, tokens = (4, 12) if quick else (8, 256)

    def flat(g: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(vectors, inputs, generator=g), torch.randint(10, (vectors,), generator=g)

    def pictures(g: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(images, 3, 32, 32, generator=g), torch.randint(10, (images,), generator=g)

    def text(g: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(shape["vocabulary"], (sequences, tokens + 1), generator=g)
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()

    return [
        Subject("MLP", lambda: mlp((inputs, hidden, hidden, 10), nn.GELU), flat, F.cross_entropy, 1),
        Subject("ResNet-18", lambda: resnet(width), pictures, F.cross_entropy, 2),
        Subject("GPT", lambda: LanguageModel(**shape), text, token_loss, 5),
    ]


def prepared(subject: Subject, device: torch.device, *, steps: int = 10) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model after a few steps of Adam, which part the large eigenvalues from the others, in eval mode on the device."""
    x, y = (t.to(device) for t in subject.data(torch.Generator().manual_seed(0)))
    model = seeded(subject.make).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        subject.loss(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval(), (x, y)
