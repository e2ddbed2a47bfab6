"""Where the best learning rate lies at each width of networks as they come, made muP by ``sk.transfer.parametrize`` or left alone.

MLP and residual convolutional network with batch norm on digits; GPT-2 (tied embedding, more heads) and Llama (larger heads) from their
Hugging Face configurations on characters. Runs are kept in a temporary folder: an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments._common import Row, run_as_script
from experiments._transfer_models import digit_batches, text_batches
from sharpkit.transfer.learning_rates import learning_rate_transfer
from sharpkit.transfer.parametrize import parametrize
from sharpkit.transfer.setup import Build, Family

NAME = "transfer_parametrize"
STEPS = {"Llama": 60}  # the others 100; the transformers with two seeds, the others three: what time allowed
SEEDS = {"GPT-2": 2, "Llama": 2}
WIDTHS = {"MLP": (64, 128, 256, 512), "ResNet": (16, 32, 64, 128), "GPT-2": (32, 64, 128), "Llama": (32, 64, 128)}


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


class Block(nn.Module):
    """Pre-activation residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.norm(x)))


class ResNet(nn.Module):
    """Two blocks on 8 x 8 images at half resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, width, 3, padding=1, stride=2), nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(x[:, None])))).mean((2, 3)))


def gpt2(width: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": width, "n_head": width // 16, "n_layer": 1, "vocab_size": 96, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def llama(width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=96, max_position_embeddings=16))


def words() -> list[dict[str, Tensor]]:
    return [{"input_ids": x, "labels": x} for x, _ in text_batches(windows=16, count=64)]


CASES: dict[str, tuple[Build, Callable[[], Any], Any]] = {
    "MLP": (mlp, digit_batches, F.cross_entropy),
    "ResNet": (ResNet, digit_batches, F.cross_entropy),
    "GPT-2": (gpt2, words, None),
    "Llama": (llama, words, None),
}


def family(name: str, *, parametrized: bool) -> Family:
    build, batches, loss = CASES[name]

    def optimizer(model: nn.Module, width: int) -> torch.optim.Optimizer:
        adam = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
        if parametrized:
            torch.manual_seed(0)  # the base's initial deviations are part of the parametrisation, and no part of the run's seed
            parametrize(model, build(WIDTHS[name][0]), adam)
        return adam

    return Family(build, optimizer, batches(), loss)


def measure(quick: bool) -> list[Row]:
    store = Path(tempfile.gettempdir()) / "sharpkit-experiments" / f"{NAME}_runs.jsonl"
    store.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name, parametrized in [(name, True) for name in CASES] + ([] if quick else [("MLP", False)]):
        made = family(name, parametrized=parametrized)
        result = learning_rate_transfer(
            made.build,
            WIDTHS[name][: 2 if quick else None],
            optimizer=made.optimizer,
            data=made.batches,
            loss=made.loss,
            steps=20 if quick else STEPS.get(name, 100),
            seeds=1 if quick else SEEDS.get(name, 3),
            store=store,
        )
        rows.append({"case": f"{name}, {'parametrize' if parametrized else 'as it comes'}", **result.to_dict()})
        print(rows[-1]["case"], result, file=sys.stderr, flush=True)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    from sharpkit.plots.transfer import plot_learning_rate_transfer

    figure.set_size_inches(4.2 * len(rows), 3.9)
    for ax, row in zip(np.atleast_1d(figure.subplots(1, len(rows))), rows, strict=True):
        plot_learning_rate_transfer(row, ax=ax, title=row["case"])


if __name__ == "__main__":
    run_as_script(NAME, measure, draw)
