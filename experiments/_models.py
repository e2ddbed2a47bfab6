"""Networks and data of the experiments, and their Hessians by a road that does not touch sharpkit."""

from __future__ import annotations

import gzip
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
_TEXT_FILES = ("argparse.py", "ast.py", "inspect.py", "typing.py", "subprocess.py", "tarfile.py")


@dataclass
class Case:
    """A trained network and the batch its curvature is measured on; the loss is cross-entropy everywhere.

    Attributes:
        x, y: the batch; for the language model tokens (batch, time) and the next tokens.
        name: for tables and figures.
        data: where the batch comes from.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    data: str

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def double(self) -> Case:
        """A float64 copy."""
        import copy

        x = self.x.double() if self.x.is_floating_point() else self.x
        return Case(self.name, copy.deepcopy(self.model).double(), x, self.y, self.data)


class RetainedProduct:
    """H v by double backward over a retained graph and nothing else: the bare road that costs and answers are compared with."""

    def __init__(self, case: Case) -> None:
        self.params = case.params
        with sdpa_kernel(SDPBackend.MATH):
            self.gradients = torch.autograd.grad(case.loss(), self.params, create_graph=True)
        self.num_matvecs = 0

    def pieces(self, vectors: list[Tensor]) -> tuple[Tensor, ...]:
        self.num_matvecs += 1
        return torch.autograd.grad(self.gradients, self.params, grad_outputs=vectors, retain_graph=True)

    def __call__(self, flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in self.params])
        found = self.pieces([part.view_as(p) for part, p in zip(parts, self.params, strict=True)])
        return torch.cat([f.reshape(-1) for f in found])


def dense_hessian(case: Case) -> Tensor:
    """(n, n), column by column, made symmetric."""
    product = RetainedProduct(case)
    identity = torch.eye(case.size, dtype=case.params[0].dtype)
    matrix = torch.stack([product(row) for row in identity])
    return (matrix + matrix.T) / 2


def reference_eigenvalues(case: Case, k: int) -> np.ndarray:
    """The k largest eigenvalues, descending, by ARPACK in float64 to rounding."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    product = RetainedProduct(case.double())
    operator = LinearOperator(
        (case.size, case.size), matvec=lambda v: product(torch.from_numpy(np.ascontiguousarray(v).reshape(-1))).numpy(), dtype=np.float64
    )
    start = np.random.default_rng(12345).standard_normal(case.size)
    return np.sort(eigsh(operator, k=k, which="LA", ncv=4 * k + 10, tol=1e-10, v0=start, return_eigenvectors=False))[::-1].copy()


# -- data -----------------------------------------------------------------------------------------------------------------
def images(count: int, *, side: int = 28) -> tuple[Tensor, Tensor, str]:
    """(count, 1, side, side) standardised images with labels: Fashion-MNIST where installed, else scikit-learn's digits resized."""
    if FASHION_MNIST.is_dir():
        with gzip.open(FASHION_MNIST / "train-images-idx3-ubyte.gz") as stream:
            stream.read(16)
            pixels = np.frombuffer(stream.read(count * 784), dtype=np.uint8).reshape(count, 1, 28, 28)
        with gzip.open(FASHION_MNIST / "train-labels-idx1-ubyte.gz") as stream:
            stream.read(8)
            labels = np.frombuffer(stream.read(count), dtype=np.uint8)
        x, y, name = torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64), "Fashion-MNIST"
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = torch.tensor(digits.images[:count], dtype=torch.float32)[:, None], torch.tensor(digits.target[:count])
        name = "scikit-learn digits"
    if x.shape[-1] != side:
        x = F.adaptive_avg_pool2d(x, side) if side < x.shape[-1] else F.interpolate(x, size=side, mode="bilinear")
    return (x - x.mean()) / x.std(), y, f"{name}, {len(x)} images of {side} x {side}"


def text(batch: int, time: int, *, vocabulary: int = 96, seed: int = 0) -> tuple[Tensor, Tensor, str]:
    """Windows of Python's own standard library, a token per printable character, and the characters that follow."""
    folder = Path(os.__file__).parent
    raw = "".join((folder / name).read_text(encoding="utf-8") for name in _TEXT_FILES).encode("ascii", "replace")
    tokens = torch.tensor(list(raw)).sub(31).clamp(0, 95) % vocabulary
    starts = torch.randint(len(tokens) - time - 1, (batch,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([tokens[s : s + time + 1] for s in starts.tolist()])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), f"Python's standard library, {batch} windows of {time} characters"


# -- networks -------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Pre-norm transformer block on F.scaled_dot_product_attention with its default backend."""

    def __init__(self, width: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A small character-level GPT; logits as (batch, vocabulary, time), which is what cross_entropy takes."""

    def __init__(
        self, *, vocabulary: int = 96, time: int = 64, width: int = 64, layers: int = 2, heads: int = 4, tied: bool = False
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.1)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2)


class ViT(nn.Module):
    """A small vision transformer: patches by one convolution, learned positions, the mean over patches read out."""

    def __init__(self, *, side: int = 28, patch: int = 7, width: int = 48, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(0.1 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def mlp(sizes: tuple[int, ...], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def conv_net(channels: int, *, side: int, batch_norm: bool = True) -> nn.Module:
    norm = nn.BatchNorm2d if batch_norm else lambda _: nn.Identity()
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        norm(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        norm(2 * channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * (side // 4) ** 2, 10),
    )


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model of seeded parameters, the global generator left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def train(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, batch: int = 64, lr: float = 1e-3, seed: int = 0) -> nn.Module:
    """Some steps of Adam, then eval mode."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


# -- cases ----------------------------------------------------------------------------------------------------------------
def large_mlp(*, samples: int = 256, steps: int = 60, hidden: int = 512) -> Case:
    """MLP 784-512-512-10, its name with the number of training steps."""
    x, y, data = images(2048)
    model = train(seeded(lambda: mlp((784, hidden, hidden, 10))), x, y, steps=steps)
    return Case(f"MLP 784-{hidden}-{hidden}-10, {steps} steps", model, x[:samples], y[:samples], f"{data}; first {samples}")


def small_gpt(*, batch: int = 8, time: int = 32, width: int = 64, steps: int = 150) -> Case:
    """GPT of two layers."""
    x, y, _ = text(512, time, seed=1)
    model = train(seeded(lambda: GPT(time=time, width=width)), x, y, steps=steps, batch=16, lr=2e-3)
    x, y, data = text(batch, time, seed=2)
    return Case(f"GPT, 2 layers, width {width}", model, x, y, data)


def medium_conv(*, samples: int = 128, steps: int = 50) -> Case:
    """Two convolutions with BatchNorm in eval mode."""
    x, y, data = images(1024)
    model = train(seeded(lambda: conv_net(16, side=28)), x, y, steps=steps)
    return Case("conv net + BatchNorm", model, x[:samples], y[:samples], f"{data}; first {samples}")


def dense_cases(*, quick: bool = False) -> list[Case]:
    """Three trained networks small enough for dense Hessians in float64 (n about 1000 to 2000; a few hundred if quick)."""
    x, y, data = images(1024, side=8)
    mlp_hidden, channels, width = (8, 2, 4) if quick else (20, 6, 8)
    tokens, following, corpus = text(256, 16, vocabulary=32, seed=1)
    flat = train(seeded(lambda: mlp((64, mlp_hidden, 10), nn.Tanh)), x, y, steps=200, lr=3e-3)
    conv = train(seeded(lambda: conv_net(channels, side=8)), x, y, steps=200, lr=3e-3)
    gpt = train(
        seeded(lambda: GPT(vocabulary=32, time=16, width=width, layers=1, heads=2)), tokens, following, steps=200, batch=32, lr=3e-3
    )
    return [
        Case(f"MLP 64-{mlp_hidden}-10", flat, x[:256], y[:256], f"{data}; first 256").double(),
        Case(f"GPT, 1 layer, width {width}", gpt, tokens[:32], following[:32], f"{corpus}; first 32").double(),
        Case(f"conv net, {channels} channels", conv, x[:256], y[:256], f"{data}; first 256").double(),
    ]
