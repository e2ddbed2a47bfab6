"""A plain loop with accelerate: the monitor takes what ``prepare`` returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from traces import same

import sharpkit as sk


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trained(*, monitored: bool, precision: str = "no", accumulate: int = 1, dropout: float = 0.2) -> Any:
    """Everything after six batches, and the monitor."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    plain = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3))
    data = TensorDataset(torch.randn(48, 6), torch.randint(0, 3, (48,)))
    model, optimizer, loader = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=0.01), DataLoader(data, 8, shuffle=True))
    metrics = ["lambda_max", "batch_sharpness", off_the_training_gradient]
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=metrics) if monitored else None
    losses, micro_batches = [], []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            micro_batches.append((x, y))
            if accelerator.sync_gradients:
                if monitor is not None:
                    monitor.step(micro_batches, loss=loss)
                micro_batches = []
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return [plain.state_dict(), optimizer.state_dict(), losses, torch.get_rng_state()], monitor


def off_the_training_gradient(objective: Any, optimizer: torch.optim.Optimizer) -> float:
    """|gradient of the measured objective - .grad of training| / |.grad|."""
    trained = torch.cat([p.grad.reshape(-1) for group in optimizer.param_groups for p in group["params"]])
    return float((objective.gradient()[1] - trained).norm() / trained.norm())


@pytest.mark.parametrize(("precision", "accumulate"), [("no", 1), ("bf16", 1), ("no", 3)])
def test_training_is_bit_identical_with_and_without(precision: str, accumulate: int) -> None:
    with_monitor, monitor = trained(monitored=True, precision=precision, accumulate=accumulate)
    without, _ = trained(monitored=False, precision=precision, accumulate=accumulate)
    assert [record.step for record in monitor.history] == list(range(6 // accumulate))
    assert not any(record.failed for record in monitor.history)
    assert same(with_monitor, without)


@pytest.mark.parametrize(("precision", "accumulate"), [("no", 1), ("bf16", 1), ("no", 3)])
def test_measures_the_function_that_is_trained(precision: str, accumulate: int) -> None:
    _, monitor = trained(monitored=True, precision=precision, accumulate=accumulate, dropout=0.0)
    assert monitor.history.series("off_the_training_gradient").values.max() < 1e-5  # float32; with bf16 the same autocast in both
