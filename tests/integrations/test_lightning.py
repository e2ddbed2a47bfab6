"""The Lightning callback against the real package: sees what is trained, changes nothing, resumes, refuses with a remedy."""

from __future__ import annotations

import csv
import importlib.util
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from traces import same

import sharpkit.integrations.lightning as hooks
from sharpkit import SharpkitWarning
from sharpkit.integrations.lightning import SharpnessCallback
from sharpkit.monitor.runs import read_run

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
_NOISE = "num_workers|log_every_n_steps|logging interval|pytree|treespec|Experiment logs|checkpoint directory"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*({_NOISE}).*")

STEPS = 6
METRICS = ["lambda_max", "batch_sharpness"]


class Classifier(pl.LightningModule):
    """Everything that running training_step once more could disturb: dropout, batch statistics, a metric, a list, a count, logs."""

    def __init__(self, *, dropout: float = 0.2, adam: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.total = torchmetrics.SumMetric()
        self.losses: list[float] = []
        self.sums = {"train": [0.0]}
        self.calls = 0
        self.adam = adam

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self(batch[0])
        loss = F.cross_entropy(output, batch[1])
        self.calls += 1
        self.losses.append(loss.item())
        self.sums["train"].append(loss.item())
        self.accuracy(output, batch[1])
        self.total.update(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01) if self.adam else torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(num_batches: int = STEPS // 2, *, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_batches * 8, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (len(x),), generator=generator)), 8, shuffle=shuffle)


def trainer(*callbacks: Any, package: Any = pl, **settings: Any) -> Any:
    plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return package.Trainer(accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": 2, **plain, **settings})


def fitted(callback: SharpnessCallback | None = None, *, model: Any = None, data: Any = None, ckpt: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = model() if model is not None else Classifier()
    run = trainer(*([callback] if callback else []), **settings)
    run.fit(model, data or loader(), ckpt_path=ckpt)
    return run


def everything(run: Any) -> dict[str, Any]:
    model = run.lightning_module
    return {
        "model": model.state_dict(),
        "optimizer": run.optimizers[0].state_dict(),
        "losses": [model.losses, model.sums, model.calls, model.total.sum_value],
        "logged": {name: value for name, value in run.callback_metrics.items() if not name.startswith("sharpkit/")},
        "mode": [m.training for m in model.modules()],
        "random": [torch.get_rng_state(), random.getstate(), list(np.random.get_state())],  # noqa: NPY002
        "plain attributes": sorted(vars(model)),
    }


def off_the_training_gradient(objective: Any, optimizer: torch.optim.Optimizer) -> float:
    """|gradient of the measured objective - .grad of training| / |.grad|."""
    trained = torch.cat([p.grad.reshape(-1) for group in optimizer.param_groups for p in group["params"]])
    return float((objective.gradient()[1] - trained).norm() / trained.norm())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "data": loader(4, shuffle=True)},
        {"model": lambda: Classifier(adam=False)},
    ],
    ids=["adamw", "bf16", "accumulation, clipping", "clipping by value, shuffled", "sgd"],
)
def test_training_is_bit_identical_with_and_without(settings: dict[str, Any]) -> None:
    callback = SharpnessCallback(every=1, metrics=[*METRICS, "critical_sharpness", "trace", "top_k"])
    without, with_callback = everything(fitted(**settings)), everything(fitted(callback, **settings))
    assert len(callback.history) >= 4 and {name for record in callback.history for name in record} >= set(METRICS)
    assert not any(record.failed for record in callback.history)
    for what, value in without.items():
        assert same(value, with_callback[what]), what


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"accumulate_grad_batches": 3, "gradient_clip_val": 0.01, "data": loader(6)}, 1e-5),  # float32 sums of three parts
        ({"plugins": "scaler", "gradient_clip_val": 0.01}, 1e-2),  # training rounds to float16, the measurement does not
    ],
    ids=["accumulation", "scaled"],
)
def test_measures_the_whole_accumulated_batch_on_unscaled_unclipped_gradients(settings: dict[str, Any], tolerance: float) -> None:
    if settings.get("plugins") == "scaler":  # the Trainer itself takes bfloat16, without scaling, on a CPU
        settings = {**settings, "plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}
    callback = SharpnessCallback(every=1, metrics=[off_the_training_gradient])
    run = fitted(callback, model=lambda: Classifier(dropout=0.0, adam=False), **settings)
    found = callback.history.series("off_the_training_gradient")
    assert len(found.values) == run.global_step > 1
    assert found.values.max() < tolerance
    assert callback.history[0].loss == pytest.approx(np.mean(run.lightning_module.losses[: run.accumulate_grad_batches]), rel=1e-3)


def test_loss_closure_and_the_modules_own_step_agree() -> None:
    def closure(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    ways: list[dict[str, Any]] = [{}, {"loss": F.cross_entropy}, {"closure": closure}]
    callbacks = [SharpnessCallback(every=2, metrics=METRICS, **way) for way in ways]
    for callback in callbacks:
        fitted(callback, model=lambda: Classifier(dropout=0.0))
    first, *others = ([record["lambda_max"].value for record in callback.history] for callback in callbacks)
    assert len(first) == STEPS // 2
    for other in others:
        assert other == pytest.approx(first, rel=1e-5)  # the same function, summed in float32


def test_a_resumed_training_continues_the_series_exactly(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"

    def plain() -> Classifier:
        return Classifier(dropout=0.0)  # Lightning does not restore the random state

    whole, begun, resumed = (SharpnessCallback(every=1, metrics=METRICS, sinks=sinks) for sinks in ((), file, file))
    uninterrupted = fitted(whole, model=plain)
    fitted(begun, model=plain, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    finished = fitted(resumed, model=plain, ckpt=tmp_path / "half.ckpt")
    assert same(uninterrupted.lightning_module.state_dict(), finished.lightning_module.state_dict())
    assert [r.step for r in resumed.history] == [r.step for r in whole.history] == list(range(STEPS))
    for name in METRICS:
        assert same(list(whole.history.series(name).values), list(resumed.history.series(name).values))
    assert [header.get("resumed_at") for header in read_run(file).headers] == [None, STEPS // 2]
    assert [record["step"] for record in read_run(file).records] == list(range(STEPS))


def test_a_second_fit_of_the_same_model_goes_on() -> None:
    callback = SharpnessCallback(every=1, metrics=["lambda_max"])
    run = fitted(callback, max_epochs=1)
    run.fit_loop.max_epochs = 2
    run.fit(run.lightning_module, loader())
    assert [record.step for record in callback.history] == list(range(STEPS))


def test_values_reach_the_loggers_once_and_the_modules_own_logs_are_as_without(tmp_path: Path) -> None:
    def rows(callback: SharpnessCallback | None, name: str) -> list[dict[str, str]]:
        fitted(callback, logger=CSVLogger(tmp_path, name=name), log_every_n_steps=1)
        with open(tmp_path / name / "version_0" / "metrics.csv", newline="") as stream:
            return list(csv.DictReader(stream))

    callback = SharpnessCallback(every=4, metrics=["lambda_max"])
    with_callback, without = rows(callback, "with"), rows(None, "without")
    shown = [(int(row["step"]), float(row["sharpkit/lambda_max"])) for row in with_callback if row.get("sharpkit/lambda_max")]
    assert shown == [(r.step, pytest.approx(r["lambda_max"].value, rel=1e-6)) for r in callback.history]
    kept = [{name: row[name] for name in without[0]} for row in with_callback]
    assert [row for row in kept if any(value for name, value in row.items() if name not in ("step", "epoch"))] == without


def test_values_can_steer_other_callbacks_and_go_to_a_file(tmp_path: Path) -> None:
    class Reader(pl.Callback):
        seen: list[float]

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.seen.append(float(trainer.callback_metrics["sharpkit/lambda_max"]))

    reader, callback = Reader(), SharpnessCallback(every=1, metrics=["lambda_max"], sinks=tmp_path / "run.jsonl")
    reader.seen = []
    torch.manual_seed(0)
    trainer(callback, reader).fit(Classifier(), loader())
    expected = [record["lambda_max"].value for record in callback.history]
    assert reader.seen == pytest.approx(expected, rel=1e-6)
    assert [r["values"]["lambda_max"]["value"] for r in read_run(tmp_path / "run.jsonl").records] == pytest.approx(expected)


def test_a_failure_is_recorded_and_training_is_as_without() -> None:
    def broken(objective: Any, optimizer: Any) -> float:
        raise RuntimeError("injected")

    def closure(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("no loss today")

    without = everything(fitted())
    for callback in (SharpnessCallback(every=1, metrics=[broken, "lambda_max"]), SharpnessCallback(every=1, closure=closure)):
        with pytest.warns(SharpkitWarning, match="Training goes on"):
            assert same(everything(fitted(callback)), without)
        assert all(any("injected" in why or "no loss today" in why for why in r.failed.values()) for r in callback.history)
        assert len(callback.history) == STEPS


class Adversaries(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, part in zip(self.optimizers(), (self.one, self.two), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(part(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.one.parameters(), lr=0.1), torch.optim.Adam(self.two.parameters(), lr=0.1)]


def test_manual_optimization_and_several_optimizers_are_refused_with_the_remedy_and_then_work() -> None:
    def closure(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model.two(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"optimizes manually.*closure="):
        fitted(SharpnessCallback(), model=Adversaries)
    with pytest.raises(ValueError, match=r"2 optimizers \(0: SGD, 1: Adam\).*optimizer=0"):
        fitted(SharpnessCallback(closure=closure), model=Adversaries)
    with pytest.raises(ValueError, match="no optimizer 2; there are 0: SGD, 1: Adam"):
        fitted(SharpnessCallback(closure=closure, optimizer=2), model=Adversaries)
    callback = SharpnessCallback(closure=closure, optimizer=1, every=1, metrics=[off_the_training_gradient])
    fitted(callback, model=Adversaries)
    assert len(callback.history) == STEPS
    assert callback.history.series("off_the_training_gradient").values.max() < 1e-5  # float32
    assert {record.num_samples for record in callback.history} == {8}  # both backwards were on the same batch


def test_settings_that_make_no_sense_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="it is a share"):
        SharpnessCallback(budget=5)
    with pytest.raises(ValueError, match="not both"):
        SharpnessCallback(loss=F.cross_entropy, closure=lambda model, batch: model(batch))


def test_a_closure_based_optimizer_is_measured_once_a_step() -> None:
    class WithLBFGS(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    callback = SharpnessCallback(every=1, metrics=[lambda objective, optimizer: objective.value()])
    run = fitted(callback, model=lambda: WithLBFGS(dropout=0.0))
    assert run.lightning_module.calls > STEPS  # several a step
    assert len(callback.history) == STEPS


def test_users_of_the_old_name_are_served() -> None:
    class Old(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        training_step = Classifier.training_step
        forward = Classifier.forward
        losses: list[float] = []  # noqa: RUF012
        sums: dict[str, list[float]] = {"train": []}  # noqa: RUF012
        calls = 0
        accuracy = staticmethod(lambda output, target: None)
        total = torchmetrics.SumMetric()

        def log(self, *_: Any, **__: Any) -> None: ...

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = SharpnessCallback(every=2, metrics=["lambda_max"])
    trainer(callback, package=pytorch_lightning).fit(Old(), loader())
    assert [record.step for record in callback.history] == [0, 2, 4]
    assert isinstance(callback, pl.Callback) and isinstance(callback, pytorch_lightning.Callback)


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def load(path: str) -> None:
        spec = importlib.util.spec_from_file_location("adapter_alone", path)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with warnings.catch_warnings():
        yield load


def test_without_lightning_the_import_names_the_remedy(without_packages: Callable[[str], None]) -> None:
    with pytest.raises(ImportError, match="pip install lightning"):
        without_packages(str(hooks.__file__))
