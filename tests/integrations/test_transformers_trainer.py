"""The Hugging Face Trainer callback against the real package: measures what is trained, changes nothing, resumes, refuses with a remedy."""

from __future__ import annotations

import importlib.util
import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from traces import same
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import sharpkit.integrations.transformers as hooks
from sharpkit import SharpkitWarning
from sharpkit.integrations.transformers import MONITOR_FILE, SharpnessCallback
from sharpkit.monitor.runs import read_run

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

STEPS = 4
METRICS = ["lambda_max", "batch_sharpness"]
Make = Callable[[], SharpnessCallback]


def padded_data(num_samples: int = 32) -> list[dict[str, Tensor]]:
    """Sequences of 3 to 10 tokens, padded to 10; padding is masked and not counted."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(num_samples):
        ids = torch.randint(1, 40, (10,), generator=generator)
        mask = (torch.arange(10) < 3 + index % 8).long()
        samples.append({"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)})
    return samples


def gpt(*, attention: str = "eager", dropout: float = 0.1) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    shape = {"vocab_size": 40, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, **rates, attn_implementation=attention))  # input and output embeddings are tied


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "max_position_embeddings": 12, "hidden_size": 16, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, num_attention_heads=2))


class OwnLoss(Trainer):
    """Trains another loss than the model's, logs from within, keeps a list."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[str, list[float]] = {"losses": []}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = (F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none") ** 2).mean()
        self.seen["losses"].append(loss.item())
        self.log({"inner": loss.item()})
        return loss


def trained(make: Make | None, folder: Path, *, attach: bool = False, kind: type[Trainer] = Trainer, **settings: Any) -> Any:
    """A finished Trainer and its callback."""
    model = settings.pop("model", None) or gpt()
    resume, more = settings.pop("resume", None), settings.pop("callbacks", [])
    plain = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "no", "seed": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "log_level": "error"}
    arguments = TrainingArguments(output_dir=str(folder), **{**plain, **quiet, "max_steps": STEPS, "learning_rate": 1e-2, **settings})
    callback = make() if make is not None else None
    own = [callback] if callback is not None and not attach else []
    trainer = kind(model=model, args=arguments, train_dataset=padded_data(), callbacks=[*own, *more])
    trainer.pop_callback(transformers.PrinterCallback)
    if attach and callback is not None:
        assert callback.attach(trainer) is callback
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def everything(trainer: Trainer) -> dict[str, Any]:
    timings = ("runtime", "per_second")
    own_logs = [entry for entry in trainer.state.log_history if not any(name.startswith("sharpkit/") for name in entry)]
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "logs": [{name: value for name, value in entry.items() if not any(t in name for t in timings)} for entry in own_logs],
        "seen": getattr(trainer, "seen", None),
        "random": [torch.get_rng_state(), random.getstate(), list(np.random.get_state())],  # noqa: NPY002
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in trainer.model.modules()],
        "plain attributes": sorted(vars(trainer)),
    }


def off_the_training_gradient(objective: Any, optimizer: torch.optim.Optimizer) -> float:
    """|gradient of the measured objective - .grad of training| / |.grad|."""
    trained = torch.cat([p.grad.reshape(-1) for p in objective.layout.params])
    return float((objective.gradient()[1] - trained).norm() / trained.norm())


@pytest.mark.parametrize(
    ("settings", "attach"),
    [
        ({"max_grad_norm": 0.1}, False),
        ({"max_grad_norm": 0.1}, True),
        ({"model": "sdpa"}, False),
        ({"bf16": True, "gradient_accumulation_steps": 1}, True),
        ({"optim": "sgd"}, False),
    ],
    ids=["eager, clipping", "attached", "sdpa", "bf16", "sgd"],
)
def test_training_is_bit_identical_with_and_without(settings: dict[str, Any], attach: bool, tmp_path: Path) -> None:
    def run(make: Make | None) -> Any:
        own = {**settings, "model": gpt(attention="sdpa")} if settings.get("model") == "sdpa" else settings
        return trained(make, tmp_path, attach=attach, **own)

    (plain, _), (watched, callback) = run(None), run(lambda: SharpnessCallback(every=2, metrics=[*METRICS, "critical_sharpness"], tol=0.1))
    assert [record.step for record in callback.history] == list(range(0, STEPS, 2))
    assert not any(record.failed for record in callback.history)
    for what, value in everything(plain).items():
        assert same(value, everything(watched)[what]), what


@pytest.mark.parametrize(
    ("settings", "attach", "tolerance"),
    [
        ({}, False, 1e-5),  # float32 sums over micro-batches of uneven token counts
        ({}, True, 1e-5),
        ({"bf16": True}, False, 1e-2),  # forward and backward are rounded to 2^-8 on their way
        ({"model": "llama"}, False, 1e-5),  # the Trainer knows that this model shifts its labels, that of GPT-2 it does not
        ({"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 1}, True, 1e-5),
        ({"kind": OwnLoss, "gradient_accumulation_steps": 1}, True, 1e-5),
    ],
    ids=["hook", "attached", "bf16", "llama", "label smoothing", "own loss"],
)
def test_measures_the_function_that_is_trained(settings: dict[str, Any], attach: bool, tolerance: float, tmp_path: Path) -> None:
    def make() -> SharpnessCallback:
        return SharpnessCallback(every=1, metrics=[off_the_training_gradient])

    own = {"max_grad_norm": 0.0, **settings, "model": llama() if "model" in settings else gpt(dropout=0.0)}
    trainer, callback = trained(make, tmp_path, attach=attach, **own)
    assert len(callback.history) == STEPS
    assert callback.history.series("off_the_training_gradient").values.max() < tolerance
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [record.loss for record in callback.history] == pytest.approx(logged, rel=1e-5)


@pytest.mark.filterwarnings("ignore:the loss may be a mean over target entries or a mean over samples")  # of equal length here
def test_an_own_compute_loss_runs_once_more_unnoticed(tmp_path: Path) -> None:
    plain, _ = trained(None, tmp_path, kind=OwnLoss)
    watched, callback = trained(lambda: SharpnessCallback(every=1, metrics=METRICS), tmp_path, kind=OwnLoss, attach=True)
    assert len(callback.history) == STEPS
    for what, value in everything(plain).items():
        assert same(value, everything(watched)[what]), what


def test_another_loss_than_the_models_own_is_not_measured_by_the_hook_but_named(tmp_path: Path) -> None:
    with pytest.warns(SharpkitWarning, match=r"took no part in the gradient.*attach\(trainer\)"):
        trainer, callback = trained(lambda: SharpnessCallback(every=1, metrics=METRICS), tmp_path, kind=OwnLoss)
    assert len(callback.history) == 0
    assert trainer.state.global_step == STEPS
    with pytest.raises(ValueError, match=r"label_smoothing_factor.*attach\(trainer\)"):
        trained(SharpnessCallback, tmp_path, label_smoothing_factor=0.1)


def test_loss_closure_and_the_models_own_agree(tmp_path: Path) -> None:
    def shifted(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].reshape(-1, 40), labels[:, 1:].reshape(-1))

    def closure(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss

    def count(batch: Any) -> float:
        labels = batch[1] if isinstance(batch, tuple) else batch["labels"]
        return float((labels[:, 1:] != -100).sum())

    found = []
    for way in ({}, {"loss": shifted, "count": count}, {"closure": closure, "count": count}):
        _, callback = trained(partial(SharpnessCallback, every=2, metrics=METRICS, **way), tmp_path, model=llama())
        assert not callback.history[-1].failed
        found.append([record["lambda_max"].value for record in callback.history])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3)  # a float32 Lanczos result on sums made in another order


def test_a_resumed_training_continues_the_series_exactly(tmp_path: Path) -> None:
    def make() -> SharpnessCallback:
        return SharpnessCallback(every=1, metrics=METRICS, sinks=tmp_path / "run.jsonl")

    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole, uninterrupted = trained(lambda: SharpnessCallback(every=1, metrics=METRICS), tmp_path / "whole", **saving)
    trained(make, tmp_path / "run", **saving, callbacks=[StopAfter(STEPS // 2)])
    finished, resumed = trained(make, tmp_path / "run", **saving, resume=tmp_path / "run" / f"checkpoint-{STEPS // 2}")
    assert same(whole.model.state_dict(), finished.model.state_dict())
    assert [record.step for record in resumed.history] == list(range(STEPS))
    for name in METRICS:
        assert same(list(uninterrupted.history.series(name).values), list(resumed.history.series(name).values))
    run = read_run(tmp_path / "run.jsonl")
    assert [record["step"] for record in run.records] == list(range(STEPS))
    assert run.header["model"] == "GPT2LMHeadModel"


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def test_a_checkpoint_moved_elsewhere_needs_to_be_named(tmp_path: Path) -> None:
    make: Make = lambda: SharpnessCallback(every=1, metrics=["lambda_max"])  # noqa: E731
    saving = {"save_strategy": "steps", "save_steps": 2}
    trained(make, tmp_path / "run", max_steps=2, **saving)
    moved = shutil.move(tmp_path / "run" / "checkpoint-2", tmp_path / "moved")
    assert (moved / MONITOR_FILE).is_file()
    with pytest.warns(SharpkitWarning, match=r"no sharpkit_monitor\.pt.*resume_from="):
        _, fresh = trained(make, tmp_path / "new", resume=moved)
    named: Make = lambda: SharpnessCallback(every=1, metrics=["lambda_max"], resume_from=moved)  # noqa: E731
    _, continued = trained(named, tmp_path / "new", resume=moved)
    assert [len(callback.history) for callback in (fresh, continued)] == [STEPS - 2, STEPS]


@pytest.mark.parametrize("attach", [False, True], ids=["hook", "attached"])
def test_values_are_logged_once_and_the_trainers_own_turn_is_not_used_up(attach: bool, tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        entries: list[dict[str, float]]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.entries.append(dict(logs))

    reporter = Reporter()
    reporter.entries = []
    make: Make = lambda: SharpnessCallback(every=2, metrics=["lambda_max"])  # noqa: E731
    trainer, callback = trained(make, tmp_path, attach=attach, callbacks=[reporter], logging_steps=2)
    name, expected = "sharpkit/lambda_max", [(r.step, r["lambda_max"].value) for r in callback.history]
    assert [(e["step"], e[name]) for e in trainer.state.log_history if name in e] == expected
    assert [e[name] for e in reporter.entries if name in e] == ([value for _, value in expected] if attach else [])
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [2, 4]


def test_a_turn_to_log_that_another_callback_asked_for_is_kept(tmp_path: Path) -> None:
    class Asks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_log = True

    make: Make = lambda: SharpnessCallback(every=1, metrics=["lambda_max"])  # noqa: E731
    trainer, _ = trained(make, tmp_path, attach=True, callbacks=[Asks()], logging_steps=1000)
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [1, 2, 3, 4]


def test_a_failure_is_recorded_and_training_is_as_without(tmp_path: Path) -> None:
    def broken(objective: Any, optimizer: Any) -> float:
        raise RuntimeError("injected")

    plain, _ = trained(None, tmp_path)
    with pytest.warns(SharpkitWarning, match=r"injected.*Training goes on"):
        watched, callback = trained(lambda: SharpnessCallback(every=1, metrics=[broken, "lambda_max"]), tmp_path)
    assert all("injected" in record.failed["broken"] and "lambda_max" in record for record in callback.history)
    assert same(everything(plain), everything(watched))


@pytest.mark.parametrize("attach", [False, True], ids=["hook", "attached"])
def test_nothing_stays_behind_when_training_breaks_off(attach: bool, tmp_path: Path) -> None:
    class Stumbles(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 2:
                raise RuntimeError("out of memory")
            return super().training_step(*args, **kwargs)

    callback = SharpnessCallback(every=1, metrics=["lambda_max"])
    model = gpt()
    with pytest.raises(RuntimeError, match="out of memory"):
        trained(lambda: callback, tmp_path, attach=attach, kind=Stumbles, model=model)
    assert len(callback.history) == 2
    if attach:
        assert "training_step" not in vars(callback._trainer)
    callback.close()
    assert not model._forward_hooks


def test_without_transformers_the_import_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("adapter_alone", str(hooks.__file__))
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match="pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
