"""Attention logits and log Z of a small transformer at high learning rates, plain, with QK norm, with a z-loss.

    python -m experiments.logit_growth          # results/logit_growth.jsonl, figures/logit_growth.png

A char transformer (two layers, width 64), AdamW after 50 steps of warm-up, 400 steps at rates a factor of 4 apart, two seeds; measured by
the monitor's metrics `attention_logits` and `output_log_z` every 20 steps. QK norm: a layer norm without scale on the queries and keys of
each head, times a learned scale. z-loss: 1e-4 (log Z)^2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import GPT, Block, seeded, text

WAYS, RATES, SEEDS, STEPS, WARMUP, EVERY = ("plain", "QK norm", "z-loss"), (0.003, 0.012, 0.05, 0.2), (0, 1), 400, 50, 20


class NormedBlock(Block):
    """With a norm on queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        x = x + self.out(F.scaled_dot_product_attention(self.scale * q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def model_of(way: str, seed: int) -> nn.Module:
    def make() -> nn.Module:
        model = GPT(time=32, width=64, layers=2, heads=4)
        if way == "QK norm":
            model.blocks = nn.ModuleList(NormedBlock(64, 4) for _ in range(2))
        return model

    return seeded(make, seed)


def with_z_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets) + 1e-4 * logits.logsumexp(1).square().mean()


def trained(way: str, lr: float, seed: int, steps: int) -> Row:
    """What the monitor recorded."""
    model, loss_of = model_of(way, seed), with_z_loss if way == "z-loss" else F.cross_entropy
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = sk.laws.scheduler(optimizer, lambda z: 1.0, total_steps=steps, warmup=min(WARMUP, steps // 4))
    x, y, _ = text(2000, 32, seed=1)
    generator, losses = torch.Generator().manual_seed(seed), []
    with sk.Monitor(model, optimizer, loss=loss_of, metrics=["attention_logits", "output_log_z"], every=EVERY) as monitor:
        for _ in range(steps):
            chosen = torch.randint(len(x), (16,), generator=generator)
            optimizer.zero_grad()
            logits = model(x[chosen])
            loss = loss_of(logits, y[chosen])
            losses.append(float(F.cross_entropy(logits.detach(), y[chosen])))
            loss.backward()
            monitor.step((x[chosen], y[chosen]), loss=loss)
            optimizer.step()
            schedule.step()
            if not math.isfinite(losses[-1]):
                break
        history = monitor.history
    said = [finding for finding in history.findings() if "norm" in finding or "z-loss" in finding]
    values = {name: [record[name].value for record in history if name in record] for name in ("attention_logits", "output_log_z")}
    row = {"way": way, "lr": lr, "seed": seed, "loss": float(np.mean(losses[-50:])), "highest": max(losses[len(losses) // 2 :])}
    return {**row, "steps": [record.step for record in history], **values, "said": said}


def measure(quick: bool) -> list[Row]:
    """One row for each way, rate and seed."""
    torch.set_num_threads(1)
    rates, seeds, steps = (RATES[:2], SEEDS[:1], 60) if quick else (RATES, SEEDS, STEPS)
    return [trained(way, lr, seed, steps) for way in WAYS for lr in rates for seed in seeds]


def draw(rows: list[Row], canvas: Any) -> None:
    """Final loss, attention logit and log Z against the rate."""
    axes = canvas.subplots(1, 3)
    panels = (("loss", "training loss, last 50 steps (nats)"), ("attention_logits", "largest attention logit at the end"))
    for ax, (name, label) in zip(axes, (*panels, ("output_log_z", "log Z at the end (nats, root mean square)")), strict=True):
        for way, mark in zip(WAYS, "os^", strict=True):
            own = [row for row in rows if row["way"] == way]
            rates = sorted({row["lr"] for row in own})
            ends = [np.mean([row[name] if name == "loss" else row[name][-1] for row in own if row["lr"] == lr]) for lr in rates]
            ax.plot(rates, ends, mark + "-", label=way)
        ax.set(xscale="log", yscale="log" if name == "attention_logits" else "linear", xlabel="learning rate", ylabel=label)
    axes[0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run_as_script("logit_growth", measure, draw)
