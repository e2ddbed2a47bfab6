"""Suggested rates from what trainers hold: the same as by hand, and the trainer as it was."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import sharpkit as sk
from sharpkit.integrations.suggest import for_lightning, for_trainer
from tests.traces import untouched


def data() -> TensorDataset:
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    return TensorDataset(x, (x[:, :3] + 0.3 * torch.randn(400, 3)).argmax(dim=1))


class Classifier(pl.LightningModule):
    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.form, self.calls = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3)), form, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        made = torch.optim.AdamW(self.parameters(), lr=1e-3)
        decay = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0)
        forms = {"plain": made, "dict": {"optimizer": made, "lr_scheduler": decay}, "lists": ([made], [decay])}
        return forms.get(self.form, [made, torch.optim.SGD(self.net[0].parameters(), lr=0.1)])


@pytest.mark.parametrize("form", ["plain", "dict", "lists"])
def test_a_lightning_module_and_its_loader(form: str) -> None:
    module = Classifier(form)
    loader = DataLoader(data(), batch_size=32, shuffle=True, drop_last=True)
    state = torch.get_rng_state()
    with untouched(module):
        made = for_lightning(module, loader, steps=1000, schedule="cosine")
    assert torch.equal(state, torch.get_rng_state()) and module.calls == 0
    assert made.optimizer == "AdamW" and made.batch_size == 32 and made.num_samples == 400 and made.schedule == "cosine schedule"
    assert 1e-4 < made < 0.3
    both = Classifier("two")
    with pytest.raises(ValueError, match="0: AdamW, 1: SGD"):
        for_lightning(both, loader, steps=1000)
    assert for_lightning(both, loader, steps=1000, optimizer=1).optimizer == "SGD"


def test_a_hugging_face_trainer(tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    ids = torch.randint(0, 40, (128, 1)).repeat(1, 10)
    samples = [{"input_ids": row, "labels": row} for row in ids]
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "use_cpu": True, "report_to": [], "weight_decay": 0.1}
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=125, lr_scheduler_type="cosine", **settings)  # type: ignore[arg-type]
    trainer = Trainer(model=model, args=arguments, train_dataset=samples)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with untouched(model):
        made = for_trainer(trainer)
    assert trainer.optimizer is None and trainer.state.global_step == 0 and torch.equal(state, torch.get_rng_state())
    assert (made.batch_size, made.steps, made.schedule, made.num_samples) == (16, 1000, "cosine schedule", 128)
    objective = sk.Objective(model, list(trainer.get_train_dataloader()))  # as shuffled as there
    optimizer = trainer.create_optimizer()
    by_hand = sk.suggest_learning_rate(objective, optimizer, batch_size=16, steps=1000, schedule="cosine")
    assert made == pytest.approx(by_hand, rel=1e-3) and len(optimizer.param_groups) == 2
    trainer.optimizer = None
    trainer.args.lr_scheduler_type = "polynomial"
    with pytest.raises(sk.UnsupportedError, match="polynomial, is not known: pass schedule="):
        for_trainer(trainer)
    assert for_trainer(trainer, schedule="linear", steps=500).steps == 500
