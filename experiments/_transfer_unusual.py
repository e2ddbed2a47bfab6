"""Correct parametrisations written in unusual ways: unit scaling, multipliers anywhere, tied embeddings, convolutions, Conv1d readouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments._transfer_models import Attention, Rules, digit_batches, microsoft_family, mlp_family, text_batches, transformer_family
from sharpkit.transfer.setup import Family

BASE = 64
LR = 4e-3


def adam(groups: Callable[[nn.Module, float], list[tuple[Sequence[Tensor], float]]], *, lr: float = LR, **options: Any) -> Any:
    """(model, width) -> Adam with the groups' factors at m = width / base width."""

    def make(model: nn.Module, width: int) -> torch.optim.Optimizer:
        chosen = [{"params": list(params), "lr": lr * factor} for params, factor in groups(model, width / BASE)]
        return torch.optim.Adam(chosen, lr=lr, eps=1e-12, **options)

    return make


# -- unit scaling -----------------------------------------------------------------------------------------------------------
class RootUnitMLP(nn.Module):
    """All weights of unit variance, held by the model itself; the multipliers stand in its forward pass."""

    def __init__(self, width: int, *, hidden_power: float = 0.5, readout_power: float = 1.0) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.randn(s)) for s in ((width, 64), (width, width), (10, width)))
        self.b1 = nn.Parameter(torch.zeros(width))
        self.scales = 64**-0.5, width**-hidden_power * BASE ** (hidden_power - 0.5), 0.03 * (BASE / width) ** readout_power

    def forward(self, x: Tensor) -> Tensor:
        s1, s2, s3 = self.scales
        h = F.relu(F.linear(x.flatten(1), self.w1) * s1 + self.b1)
        h = F.relu(h @ self.w2.T * s2)
        return F.linear(h, self.w3) * s3


class OutsideUnitMLP(nn.Module):
    """The same by modules, with multipliers beside them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(i, o, bias=False) for i, o in ((64, width), (width, width), (width, 10)))
        for layer in (self.first, self.second, self.head):
            nn.init.normal_(layer.weight)
        self.scales = 64**-0.5, width**-0.5, 0.03 * BASE / width

    def forward(self, x: Tensor) -> Tensor:
        s1, s2, s3 = self.scales
        h = F.relu(self.first(x.flatten(1)) * s1)
        return self.head(F.relu(s2 * self.second(h)) * s3)


def unit_groups(hidden: float = -0.5) -> Callable[[nn.Module, float], list[tuple[Sequence[Tensor], float]]]:
    """Adam's rates of unit scaling: m^-1/2 for the hidden matrix."""

    def groups(model: nn.Module, m: float) -> list[tuple[Sequence[Tensor], float]]:
        middle = model.w2 if isinstance(model, RootUnitMLP) else model.second.weight  # type: ignore[union-attr]
        return [([middle], 25 * m**hidden), ([p for p in model.parameters() if p is not middle], 5.0)]

    return groups


class UnitTransformer(nn.Module):
    """One block of unit-variance weights with their multipliers on the residual stream's branches; one head whose logits are q.k/d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(96, width)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.out, self.up, self.down = (
            nn.Linear(i, o, bias=False) for i, o in (*[(width, width)] * 4, (width, 2 * width), (2 * width, width))
        )
        self.head = nn.Linear(width, 96, bias=False)
        for layer in (self.q, self.k, self.v, self.out, self.up, self.down, self.head):
            nn.init.normal_(layer.weight)
        self.width = width

    def forward(self, tokens: Tensor) -> Tensor:
        s, n = self.width**-0.5, self.width
        x = self.token(tokens)
        h = self.norm1(x)
        mixed = F.scaled_dot_product_attention(self.q(h) * s, self.k(h) * s, self.v(h) * s, is_causal=True, scale=8 / n)
        x = x + self.out(mixed) * s
        x = x + s * 2**-0.5 * self.down(F.gelu(self.up(self.norm2(x)) * s))
        return (self.head(self.norm(x)) * (2 / n)).transpose(1, 2)


# -- tied embeddings ----------------------------------------------------------------------------------------------------------
class TiedTransformer(nn.Module):
    """One block; the readout is the token table, its logits over the width."""

    def __init__(self, width: int, rules: Rules, *, functional: bool) -> None:
        super().__init__()
        self.token, self.norm, self.attention = nn.Embedding(96, width), nn.LayerNorm(width), Attention(width, 2, rules)
        self.last = nn.LayerNorm(width)
        if not functional:
            self.head = nn.Linear(width, 96, bias=False)
            self.head.weight = self.token.weight
        for layer in self.attention.children():
            nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.token.weight, std=0.5)
        self.functional, self.multiplier = functional, BASE**0.5 / width

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        x = self.multiplier * self.last(x + self.attention(self.norm(x)))
        return (F.linear(x, self.token.weight) if self.functional else self.head(x)).transpose(1, 2)


# -- convolutions -------------------------------------------------------------------------------------------------------------
class ConvNet(nn.Module):
    """Two convolutions with group norm; the readout is a 1 x 1 convolution over the averaged features, or a matrix laid out (in, out)."""

    def __init__(self, width: int, *, readout: str = "linear", multiplier: bool = True) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, width)
        std, self.multiplier = (0.25 * BASE**-0.5, BASE / width) if multiplier else (0.25 * width**-0.5, 1.0)
        if readout == "conv1d":
            self.head: nn.Module = nn.Conv1d(width, 10, 1)
        elif readout == "transposed":
            self.head = Transposed(width, 10)
        else:
            self.head = nn.Linear(width, 10)
        nn.init.normal_(self.head.weight, std=std)  # type: ignore[arg-type]
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.readout = readout

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x[:, None]))
        h = (h + self.conv(F.relu(self.norm(h)))).mean((2, 3)) * self.multiplier
        return self.head(h[..., None]).squeeze(-1) if self.readout == "conv1d" else self.head(h)


class Transposed(nn.Module):
    """Linear with its weight laid out (in, out), as GPT-2's Conv1D."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(fan_in, fan_out)), nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def conv_groups(hidden: float = -1.0, readout: float = 0.0) -> Callable[[nn.Module, float], list[tuple[Sequence[Tensor], float]]]:
    def groups(model: nn.Module, m: float) -> list[tuple[Sequence[Tensor], float]]:
        assert isinstance(model, ConvNet)
        own, out = model.conv.weight, model.head.weight
        return [([own], m**hidden), ([out], m**readout), ([p for p in model.parameters() if p is not own and p is not out], 1.0)]  # type: ignore[list-item]

    return groups


# -- norms, fitted data ----------------------------------------------------------------------------------------------------------
class NormMLP(nn.Module):
    """MLP with layer norm before each hidden matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.hidden, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        nn.init.normal_(self.head.weight, std=0.25 * BASE**-0.5)
        self.multiplier = BASE / width

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.input(x.flatten(1)))
        return self.head(self.norm2(h + F.relu(self.hidden(h))) * self.multiplier)


def words() -> list[tuple[Tensor, Tensor]]:
    """Characters, in batches of 16 windows."""
    return text_batches(windows=16, count=64)


def fitted_batches() -> list[tuple[Tensor, Tensor]]:
    """256 samples of five classes by a random teacher: fitted within a few dozen steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    y = (x @ torch.randn(64, 5, generator=generator)).argmax(1)
    return [(x, y)]


def tied_groups(model: nn.Module, m: float) -> list[tuple[Sequence[Tensor], float]]:
    hidden = [p for name, p in model.named_parameters() if "attention" in name and p.ndim > 1]
    return [(hidden, 1 / m), ([p for p in model.parameters() if all(p is not h for h in hidden)], 1.0)]


def linear_groups(hidden: float = -1.0, readout: float = 0.0) -> Callable[[nn.Module, float], list[tuple[Sequence[Tensor], float]]]:
    def groups(model: nn.Module, m: float) -> list[tuple[Sequence[Tensor], float]]:
        own, out = model.hidden.weight, model.head.weight  # type: ignore[union-attr]
        return [([own], m**hidden), ([out], m**readout), ([p for p in model.parameters() if p is not own and p is not out], 1.0)]  # type: ignore[list-item]

    return groups


def unit_transformer_groups(model: nn.Module, m: float) -> list[tuple[Sequence[Tensor], float]]:
    names = {"q", "k", "v", "out", "up", "down"}
    hidden = [p for name, p in model.named_parameters() if name.partition(".")[0] in names]
    return [(hidden, 8 * m**-0.5), ([p for p in model.parameters() if all(p is not h for h in hidden)], 1.0)]


def family(build: Any, optimizer: Any, batches: Any) -> Family:
    """A family trained by cross entropy."""
    return Family(build, optimizer, batches, loss=F.cross_entropy)


def _tied(*, functional: bool) -> Family:
    return family(lambda w: TiedTransformer(w, Rules(), functional=functional), adam(tied_groups), words())


def microsofts() -> Family:
    """The same MLP in microsoft's mup package."""
    return microsoft_family(optimizer="adam")


CORRECT: dict[str, Callable[[], Family]] = {
    "MLP, muP table": mlp_family,
    "MLP, microsoft's mup": microsofts,
    "MLP, layer norm": lambda: family(NormMLP, adam(linear_groups()), digit_batches()),
    "MLP, unit-scaled, weights at the root": lambda: family(RootUnitMLP, adam(unit_groups()), digit_batches()),
    "MLP, unit-scaled, multipliers outside": lambda: family(OutsideUnitMLP, adam(unit_groups()), digit_batches()),
    "MLP, fitted data": lambda: family(NormMLP, adam(linear_groups()), fitted_batches()),
    "conv net, Conv1d readout": lambda: family(lambda w: ConvNet(w, readout="conv1d"), adam(conv_groups()), digit_batches()),
    "conv net, (in, out) readout": lambda: family(lambda w: ConvNet(w, readout="transposed"), adam(conv_groups()), digit_batches()),
    "transformer, muP table": lambda: transformer_family(optimizer="adam", batches=words()),
    "transformer, unit-scaled": lambda: family(UnitTransformer, adam(unit_transformer_groups), words()),
    "transformer, tied": lambda: _tied(functional=False),
    "transformer, tied by F.linear": lambda: _tied(functional=True),
}
