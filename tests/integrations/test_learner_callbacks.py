"""The learner callbacks against the real packages: the rates of a plain loop, accumulation, resuming, schedulers, refusals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from traces import same
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import sharpkit as sk
from sharpkit.integrations.lightning import GradientNormsCallback
from sharpkit.integrations.lightning import LearnerCallback as LightningLearner
from sharpkit.integrations.transformers import LEARNER_FILE
from sharpkit.integrations.transformers import LearnerCallback as TrainerLearner

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
_NOISE = "num_workers|log_every_n_steps|logging interval|pytree|treespec|Experiment logs|checkpoint directory"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*({_NOISE}).*")

STEPS = 24
X = torch.randn(16 * 12, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()


# -- Lightning -------------------------------------------------------------------------------------------------------------------
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def optimizer_for(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=3.0)
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    return torch.optim.SGD([{"params": first, "lr": 1e-6}, {"params": second, "lr": 5e-7}], lr=1.0, momentum=0.9)


class Module(pl.LightningModule):
    def __init__(self, kind: str = "sgd", *, scheduler: bool = False) -> None:
        super().__init__()
        self.net, self.kind, self.scheduler, self.rates = network(), kind, scheduler, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def configure_optimizers(self) -> Any:
        made = optimizer_for(self, self.kind)
        return ([made], [torch.optim.lr_scheduler.StepLR(made, 5)]) if self.scheduler else made


def fitted(callback: Any, *, kind: str = "sgd", accumulate: int = 1, ckpt: Any = None, module: Any = None, **settings: Any) -> Any:
    plain: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain |= {"max_epochs": 2 * accumulate, "accumulate_grad_batches": accumulate}
    run = pl.Trainer(accelerator="cpu", callbacks=[callback], **{**plain, **settings})
    run.fit(module or Module(kind), DataLoader(TensorDataset(X, Y), 16), ckpt_path=ckpt)
    return run


def plain_loop(kind: str, accumulate: int, schedule: Any = None) -> tuple[nn.Module, sk.CurvatureLearner]:
    model = network()
    optimizer = optimizer_for(model, kind)
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=STEPS, schedule=schedule)
    batches = list(zip(X.split(16), Y.split(16), strict=True)) * 2 * accumulate
    for begin in range(0, len(batches), accumulate):
        taken = batches[begin : begin + accumulate]
        optimizer.zero_grad()
        losses = [F.cross_entropy(model(x), y) / accumulate for x, y in taken]
        for loss in losses:
            loss.backward()
        optimizer.step()
        learner.step(taken, loss=sum(losses))
    return model, learner


@pytest.mark.parametrize(("kind", "accumulate"), [("sgd", 1), ("sgd", 3), ("adamw", 1)], ids=["SGD", "accumulated", "AdamW"])
def test_lightning_learns_the_rates_of_a_plain_loop(kind: str, accumulate: int) -> None:
    callback = LightningLearner()
    run = fitted(callback, kind=kind, accumulate=accumulate)
    model, learner = plain_loop(kind, accumulate)
    assert run.global_step == STEPS and callback.learner is not None and callback.learner.total_steps == STEPS
    assert len(learner.history) >= 3 and learner.lr > 0
    assert [d.step for d in callback.history] == [d.step for d in learner.history]
    assert [d.batch_size for d in callback.history] == [16 * accumulate] * len(callback.history)
    # the same sums in float32, through training_step instead of the network itself
    assert [d.lr for d in callback.history] == pytest.approx([d.lr for d in learner.history], rel=1e-4)
    assert float(run.callback_metrics["sharpkit/learned_lr"]) == pytest.approx(callback.history[-1].lr)
    for mine, theirs in zip(run.lightning_module.net.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_lightning_keeps_the_ratio_of_groups_and_takes_a_schedule() -> None:
    def halved(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, STEPS // 2, gamma=0.5)

    callback = LightningLearner(schedule=halved)
    run = fitted(callback)
    _, learner = plain_loop("sgd", 1, schedule=halved)
    assert [d.lr_in_use for d in callback.history] == pytest.approx([d.lr_in_use for d in learner.history], rel=1e-4)
    rates = run.lightning_module.rates[2:]
    assert all(first > 0 and second == pytest.approx(first / 2) for first, second in rates)


def test_a_resumed_lightning_training_learns_identically(tmp_path: Path) -> None:
    often = {"interval": 3}
    whole, begun, resumed = LightningLearner(**often), LightningLearner(total_steps=STEPS, **often), LightningLearner(**often)
    uninterrupted = fitted(whole)
    fitted(begun, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    finished = fitted(resumed, ckpt=tmp_path / "half.ckpt")
    assert same(uninterrupted.lightning_module.state_dict(), finished.lightning_module.state_dict())
    assert same(whole.history.to_dict(), resumed.history.to_dict())
    assert any(d.step > STEPS // 2 for d in resumed.history)


def test_lightning_says_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"StepLR.*overwrite the learned rate.*schedule="):
        fitted(LightningLearner(), module=Module(scheduler=True))
    with pytest.raises(ValueError, match=r"LearnerCallback\(total_steps"):
        fitted(LightningLearner(), max_epochs=-1)
    with pytest.raises(ValueError, match="safety must be a number between"):
        LightningLearner(safety=2.0)
    with pytest.raises(ValueError, match="not both"):
        LightningLearner(loss=F.cross_entropy, closure=lambda model, batch: X)
    run = fitted(LightningLearner(total_steps=STEPS), max_epochs=1)
    run.callbacks.clear()
    run.save_checkpoint(tmp_path / "none.ckpt")
    fresh = LightningLearner()
    with pytest.warns(sk.SharpkitWarning, match=r"at step 12, but no state of a learner.*remaining 20 steps"):
        fitted(fresh, ckpt=tmp_path / "none.ckpt")
    assert len(fresh.history) > 0


# -- the Hugging Face Trainer ----------------------------------------------------------------------------------------------------
def padded_data(num_samples: int = 32) -> list[dict[str, Tensor]]:
    """Sequences of 3 to 10 tokens, padded to 10; padding is masked and not counted."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(num_samples):
        ids = torch.randint(1, 40, (10,), generator=generator)
        mask = (torch.arange(10) < 3 + index % 8).long()
        samples.append({"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)})
    return samples


def llama() -> LlamaForCausalLM:
    """Whose labels the Trainer knows to be shifted, so that its loss is the mean over counted tokens."""
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "max_position_embeddings": 12, "hidden_size": 16, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, num_attention_heads=2))


class Ordered(Trainer):
    """Takes the samples in their order, so that a plain loop can."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def trained(
    callback: Any, folder: Path, *, attach: bool = False, resume: Any = None, more: Any = (), kind: Any = Ordered, **settings: Any
) -> Any:
    plain = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "seed": 1, "max_grad_norm": 0.0}
    plain |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "log_level": "error", "optim": "sgd", "max_steps": STEPS}
    arguments = TrainingArguments(output_dir=str(folder), **{**plain, "learning_rate": 1e3, "warmup_steps": 5, **settings})
    own = [] if attach or callback is None else [callback]
    trainer = kind(model=llama(), args=arguments, train_dataset=padded_data(), eval_dataset=padded_data(4), callbacks=[*own, *more])
    trainer.pop_callback(transformers.PrinterCallback)
    if attach:
        assert callback.attach(trainer) is callback
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plain_llama_loop(accumulate: int) -> sk.CurvatureLearner:
    """The accumulated loss is the mean over the counted tokens of all micro-batches."""
    model = llama().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    learner = sk.CurvatureLearner(optimizer, model=model, total_steps=STEPS)
    samples = padded_data()
    batches = [{k: torch.stack([s[k] for s in samples[i : i + 4]]) for k in samples[0]} for i in range(0, 32, 4)] * accumulate * STEPS
    for begin in range(0, STEPS * accumulate, accumulate):
        taken = batches[begin : begin + accumulate]
        counts = [float((b["labels"][:, 1:] != -100).sum()) for b in taken]
        optimizer.zero_grad()
        losses = [model(**b).loss * (n / sum(counts)) for b, n in zip(taken, counts, strict=True)]
        for loss in losses:
            loss.backward()
        optimizer.step()
        learner.step(taken, loss=sum(losses))
    return learner


@pytest.mark.parametrize(("accumulate", "attach"), [(1, False), (2, False), (2, True)], ids=["hook", "accumulated", "attached"])
def test_the_trainer_learns_the_rates_of_a_plain_loop(accumulate: int, attach: bool, tmp_path: Path) -> None:
    callback = TrainerLearner()
    trainer = trained(callback, tmp_path, attach=attach, gradient_accumulation_steps=accumulate)
    learner = plain_llama_loop(accumulate)
    assert callback.learner is not None and callback.learner.total_steps == trainer.state.global_step == STEPS
    assert len(learner.history) >= 3 and learner.lr > 0
    assert [d.step for d in callback.history] == [d.step for d in learner.history]
    # sums in float32; a scheduler's rates, up to 1000 here, would be another world
    assert [d.lr for d in callback.history] == pytest.approx([d.lr for d in learner.history], rel=1e-3)
    assert callback.learner.optimizer.param_groups[0]["lr"] == 0.0 == learner.optimizer.param_groups[0]["lr"]


def test_the_trainers_log_shows_the_rates_learned(tmp_path: Path) -> None:
    callback = TrainerLearner()
    logs = trained(callback, tmp_path, attach=True).state.log_history
    assert [e["sharpkit/learned_lr"] for e in logs if "sharpkit/learned_lr" in e] == [d.lr for d in callback.history]
    shown = {e["step"]: e["learning_rate"] for e in logs if "learning_rate" in e}  # that the step was made with
    assert shown[1] == 0
    decided = {d.step + 1: d.lr_in_use for d in callback.history if d.step < STEPS}
    assert {step: shown[step] for step in decided} == pytest.approx(decided)


def test_a_resumed_trainer_learns_identically(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole, begun, resumed = (TrainerLearner(interval=3) for _ in range(3))
    uninterrupted = trained(whole, tmp_path / "whole", **saving)
    trained(begun, tmp_path / "run", more=[StopAfter(STEPS // 2)], **saving)
    place = tmp_path / "run" / f"checkpoint-{STEPS // 2}"
    finished = trained(resumed, tmp_path / "run", resume=place, **saving)
    assert same(uninterrupted.model.state_dict(), finished.model.state_dict())
    assert same(whole.history.to_dict(), resumed.history.to_dict())
    assert any(d.step > STEPS // 2 for d in resumed.history)
    (place / LEARNER_FILE).unlink()
    with pytest.warns(sk.SharpkitWarning) as caught:
        trained(TrainerLearner(), tmp_path / "run", resume=place, **saving)
    said = " ".join(str(w.message) for w in caught)
    assert "no sharpkit_learner.pt" in said and "LearnerCallback(resume_from=" in said and "remaining 20 steps" in said


class OwnLoss(Ordered):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits[:, :-1].transpose(1, 2), labels[:, 1:]).square()


def test_the_trainer_says_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="changes the rate after evaluations"):
        trained(TrainerLearner(), tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=5)
    with pytest.raises(ValueError, match=r"label_smoothing_factor.*LearnerCallback\(...\).attach\(trainer\)"):
        trained(TrainerLearner(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(sk.UnsupportedError, match=r"took no part in the gradient.*LearnerCallback\(...\).attach\(trainer\)"):
        trained(TrainerLearner(), tmp_path, kind=OwnLoss)
    attached = TrainerLearner()
    trained(attached, tmp_path, kind=OwnLoss, attach=True)
    assert attached.learner is not None and attached.learner.lr > 0


def test_lightning_records_the_norms_from_before_clipping_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = network(), []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()], 2.0)))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trainer(epochs: int, callback: GradientNormsCallback) -> pl.Trainer:
        quiet: Any = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
        return pl.Trainer(
            max_epochs=epochs, callbacks=[callback], gradient_clip_val=1e-3, accelerator="cpu", default_root_dir=tmp_path, **quiet
        )

    loader = DataLoader(TensorDataset(X, Y), batch_size=16)
    module, callback = Plain(), GradientNormsCallback()
    first = trainer(1, callback)
    first.fit(module, loader)
    assert callback.norms is not None and callback.norms.values == pytest.approx(module.seen) and min(module.seen) > 1e-2
    first.save_checkpoint(tmp_path / "run.ckpt")
    again, resumed = Plain(), GradientNormsCallback()
    trainer(2, resumed).fit(again, loader, ckpt_path=tmp_path / "run.ckpt", weights_only=False)
    assert resumed.norms is not None and resumed.norms.values == pytest.approx([*module.seen, *again.seen])
    assert 0 <= resumed.norms.schedule()(0.5) <= 1
