"""Families of networks by width or depth: muP, the standard parametrisation, microsoft's mup, and muP with one rule broken.

The correct rules, with m = width / base width (Adam; SGD in brackets):

    tensor                 init std         multiplier   lr
    input, embedding       1/sqrt(fan_in)   1            1    (m)
    hidden                 1/sqrt(fan_in)   1            1/m  (1)
    readout                constant         1/m          1    (m)
    biases, gains          0, 1             1            1    (m; the bias of the readout: 1)

attention logits q.k sqrt(d_base) / d; decoupled weight decay times m where the rate was divided by m; over depths, residual branches and
Adam's rates inside them times sqrt(base depth / depth).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments._models import text
from sharpkit.transfer.setup import Family

FAULTS = (
    "hidden_lr",
    "readout_multiplier",
    "readout_lr",
    "input_lr",
    "attention_scale",
    "hidden_init",
    "weight_decay",
    "vector_lr",
    "depth_multiplier",
    "depth_lr",
)
READOUT = 0.25  # initial logits this small at the base width: there they are the part that depends on width
DEFAULT_LR = {"sgd": 0.05, "adam": 4e-3, "adamw": 4e-3}


@dataclass(frozen=True)
class Rules:
    """How everything depends on width and depth.

    Attributes:
        parametrisation: ``"mup"`` or ``"sp"`` (PyTorch's own initialisation, one rate for all).
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        fault: the one rule to break, from FAULTS; None for none.
        lr: at the base width.
        weight_decay: at the base width, decoupled (adamw).
        base_width, base_depth: where every factor is one.
    """

    parametrisation: str = "mup"
    optimizer: str = "adam"
    fault: str | None = None
    lr: float | None = None
    weight_decay: float = 0.0
    base_width: int = 64
    base_depth: int = 1

    def __post_init__(self) -> None:
        if self.parametrisation not in ("mup", "sp") or self.optimizer not in DEFAULT_LR:
            raise ValueError(f"unknown parametrisation or optimizer: {self}")
        if self.fault is not None and self.fault not in FAULTS:
            raise ValueError(f"fault must be one of {FAULTS}, got {self.fault!r}")

    @property
    def mup(self) -> bool:
        return self.parametrisation == "mup"

    def broken(self, rule: str) -> bool:
        return self.fault == rule

    def hidden_std(self, fan_in: int, width: int) -> float:
        """1/sqrt(fan_in); broken, 1/fan_in with the same value at the base width."""
        return fan_in**-0.5 * ((width / self.base_width) ** -0.5 if self.broken("hidden_init") else 1.0)

    def readout(self, width: int) -> tuple[float, float]:
        """(init std, multiplier)."""
        if self.broken("readout_multiplier"):
            return READOUT * width**-0.5, 1.0
        return READOUT * self.base_width**-0.5, self.base_width / width

    def attention_scale(self, d: int, base_d: int) -> float:
        return d**-0.5 if not self.mup or self.broken("attention_scale") else base_d**0.5 / d

    def branch(self, depth: int) -> float:
        """Multiplier of residual branches."""
        return 1.0 if not self.mup or self.broken("depth_multiplier") else (self.base_depth / depth) ** 0.5

    def lr_factor(self, role: str, m: float) -> float:
        """Of the learning rate, for a width m times the base width."""
        if not self.mup:
            return 1.0
        if self.optimizer == "sgd":
            right = {"input": m, "hidden": 1.0, "readout": m, "vector": m, "readout_bias": 1.0}[role]
            wrong = {"input": 1.0, "hidden": 1 / m, "readout": 1.0, "vector": 1.0, "readout_bias": 1.0}[role]
        else:
            right = 1 / m if role == "hidden" else 1.0
            wrong = {"input": 1 / m, "hidden": 1.0, "readout": 1 / m, "vector": 1 / m, "readout_bias": 1.0}[role]
        return wrong if self.broken(f"{role}_lr") else right

    def make_optimizer(self, model: nn.Module, width: int, depth: int) -> torch.optim.Optimizer:
        """One parameter group for each role, inside and outside residual branches."""
        m, rate = width / self.base_width, self.lr or DEFAULT_LR[self.optimizer]
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, p in model.named_parameters():
            role, inside = role_of(name, p), name.startswith("blocks.")
            factor = self.lr_factor(role, m)
            decay = self.weight_decay * (1.0 if self.broken("weight_decay") or not self.mup else 1 / factor)
            if inside and self.mup and self.optimizer != "sgd" and not self.broken("depth_lr"):
                factor *= (self.base_depth / depth) ** 0.5
                decay *= (depth / self.base_depth) ** 0.5
            group = groups.setdefault((role, inside), {"params": [], "lr": rate * factor, "weight_decay": decay})
            group["params"].append(p)
        if self.optimizer == "sgd":
            return torch.optim.SGD(list(groups.values()), lr=rate)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        # gradients shrink with width: a large eps would enter at the widest
        return kind(list(groups.values()), lr=rate, betas=(0.9, 0.95), eps=1e-12)


def role_of(name: str, p: Tensor) -> str:
    """input, hidden, readout, vector or readout_bias, by the names of the two networks below."""
    if name.startswith("head."):
        return "readout" if p.ndim > 1 else "readout_bias"
    if p.ndim < 2:
        return "vector"
    return "input" if name.startswith(("input.", "token.", "position.")) else "hidden"


class Readout(nn.Linear):
    """Linear with a multiplier on its input, so that the bias has none."""

    multiplier: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.multiplier * x)


# -- networks -------------------------------------------------------------------------------------------------------------
class MLP(nn.Module):
    """Three layers of weights with ReLU, for 8 x 8 images."""

    def __init__(self, width: int, rules: Rules) -> None:
        super().__init__()
        self.input, self.hidden, self.head = nn.Linear(64, width), nn.Linear(width, width), Readout(width, 10)
        if rules.mup:
            nn.init.normal_(self.input.weight, std=64**-0.5)
            nn.init.normal_(self.hidden.weight, std=math.sqrt(2) * rules.hidden_std(width, width))
            std, self.head.multiplier = rules.readout(width)
            nn.init.normal_(self.head.weight, std=std)
            for layer in (self.input, self.hidden, self.head):
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.input(x.flatten(1))))))


class Attention(nn.Module):
    """Causal attention with its own scale; the number of heads is fixed, so that their dimension grows with the width."""

    def __init__(self, width: int, heads: int, rules: Rules) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.scale = rules.attention_scale(width // heads, rules.base_width // heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block with a multiplier on both branches."""

    def __init__(self, width: int, heads: int, rules: Rules, depth: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads, rules), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.branch = rules.branch(depth)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch * self.attention(self.norm1(x))
        return x + self.branch * self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Character-level; logits as (batch, vocabulary, time), which is what cross_entropy takes."""

    def __init__(self, width: int, rules: Rules, *, depth: int = 1, heads: int = 2, time: int = 16, vocabulary: int = 96) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.blocks = nn.ModuleList(Block(width, heads, rules, depth) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), Readout(width, vocabulary, bias=False)
        if rules.mup:
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=rules.hidden_std(layer.in_features, width))
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
            for table in (self.token, self.position):
                nn.init.normal_(table.weight, std=0.5)
            std, self.head.multiplier = rules.readout(width)
            nn.init.normal_(self.head.weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2)


# -- families -------------------------------------------------------------------------------------------------------------
def digit_batches(*, batch_size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """All of scikit-learn's digits, standardised, in batches; the incomplete last one is left out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(found.images, dtype=torch.float32)[order], torch.tensor(found.target)[order]
    x = (x - x.mean()) / x.std()
    return [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(x) - batch_size + 1, batch_size)]


def text_batches(*, windows: int = 64, time: int = 16, count: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Windows of Python's standard library and the characters that follow."""
    x, y, _ = text(windows * count, time, seed=1)
    return list(zip(x.split(windows), y.split(windows), strict=True))


def mlp_family(rules: Rules | None = None, *, batches: Any = None, **changes: Any) -> Family:
    """MLP on digits by width.

    Args:
        rules: and ``changes`` to their fields: ``mlp_family(optimizer="sgd", fault="readout_lr")``.
        batches: by default all digits in batches of 64.
    """
    rules = replace(rules or Rules(), **changes)
    return Family(
        build=lambda width: MLP(width, rules),
        optimizer=lambda model, width: rules.make_optimizer(model, width, 1),
        data=batches or digit_batches(),
        loss=F.cross_entropy,
    )


def transformer_family(rules: Rules | None = None, *, depth: int = 1, batches: Any = None, **changes: Any) -> Family:
    """Character-level transformer by width, with two heads at every width."""
    rules = replace(rules or Rules(), **changes)
    return Family(
        build=lambda width: Transformer(width, rules, depth=depth),
        optimizer=lambda model, width: rules.make_optimizer(model, width, depth),
        data=batches or text_batches(),
        loss=F.cross_entropy,
    )


def depth_family(rules: Rules | None = None, *, width: int = 64, batches: Any = None, **changes: Any) -> Family:
    """The same transformer by number of blocks."""
    rules = replace(rules or Rules(), **changes)
    return Family(
        build=lambda depth: Transformer(width, rules, depth=depth),
        optimizer=lambda model, depth: rules.make_optimizer(model, width, depth),
        data=batches or text_batches(),
        loss=F.cross_entropy,
        dimension="depth",
    )


def microsoft_family(*, optimizer: str = "adam", lr: float | None = None, base_width: int = 64, batches: Any = None) -> Family:
    """The MLP in microsoft's mup package: MuReadout, set_base_shapes, MuAdam or MuSGD."""
    import mup

    def plain(width: int) -> nn.Module:
        readout = mup.MuReadout(width, 10)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), readout)

    def build(width: int) -> nn.Module:
        model = plain(width)
        mup.set_base_shapes(model, plain(base_width), delta=plain(2 * base_width))
        return model

    make = {"adam": mup.MuAdam, "sgd": mup.MuSGD}[optimizer]
    return Family(
        build=build,
        optimizer=lambda model, width: make(model.parameters(), lr=lr or DEFAULT_LR[optimizer]),
        data=batches or digit_batches(),
        loss=F.cross_entropy,
    )
