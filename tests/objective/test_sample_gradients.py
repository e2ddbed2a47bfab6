"""Gradients of single samples: the same several at a time as one by one, and one by one where that is not so."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import PROBLEMS, Square, built, gaussian, labels, relative_error
from problems import sample_gradients as reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint
from traces import untouched

import sharpkit as sk
from sharpkit.objective import loss as loss_module
from sharpkit.objective import sample_gradients
from sharpkit.objective.sample_gradients import SampleGradients


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time are worth it, and take half the time of one by one."""
    ticks = itertools.cycle([0.0, 4.0, 0.0, 1.0])
    monkeypatch.setattr(SampleGradients, "_now", lambda self: next(ticks))
    monkeypatch.setattr(sample_gradients, "_FEWEST", 2)


def rows_of(objective: sk.Objective) -> tuple[Tensor, bool | None]:
    """(N, n), each scaled by its count, and whether several were computed at a time."""
    gradients, rows = SampleGradients(objective), []
    with objective.undisturbed():
        for piece in objective.pieces():
            samples = objective.samples_of(piece)
            for some, chunk in gradients.of(samples):
                rows.append(chunk * torch.tensor([sample.count for sample in samples[some]], dtype=torch.float64)[:, None])
    return torch.cat(rows), gradients.at_once


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("name", sorted(set(PROBLEMS) - {"lstm", "encoder"}))  # which have no batching rule, or a fused kernel
def test_several_at_a_time_are_those_one_by_one(name: str) -> None:
    problem = PROBLEMS[name]()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    with untouched(problem.model):
        rows, at_once = rows_of(objective)
    assert at_once
    assert relative_error(rows * (objective.num_samples / objective.num_targets), reference(problem)) < 1e-12


@pytest.mark.usefixtures("faster")
def test_closures_of_dict_batches_with_a_tensor_that_all_share() -> None:
    model = built(lambda: nn.Linear(4, 3))
    batch = {"x": gaussian(6, 4), "y": labels(6), "scale": gaussian(4, seed=9), "name": "first"}

    def closure(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"] * batch["scale"]), batch["y"])

    objective = sk.Objective(model, [batch], closure=closure, count=lambda batch: len(batch["y"]))
    rows, at_once = rows_of(objective)
    expected = [
        torch.autograd.grad(closure(model, {**batch, "x": batch["x"][i : i + 1], "y": batch["y"][i : i + 1]}), model.parameters())
        for i in range(6)
    ]
    assert at_once
    assert relative_error(rows, torch.stack([torch.cat([g.reshape(-1) for g in each]) for each in expected])) < 1e-13


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.last = function, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return self.function(x)


MIDDLES: dict[str, Callable[[Tensor], Tensor]] = {
    "a custom function": Square.apply,
    "a value read": lambda x: x * 2 if x.sum().item() > -1e9 else x,
    "a checkpoint": lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
    "nothing special": torch.tanh,
}


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("middle", MIDDLES)
def test_what_vmap_cannot_do_goes_one_by_one_and_no_batched_tensor_stays(middle: str) -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 5), Applied(MIDDLES[middle]), nn.Linear(5, 3)))
    objective = sk.Objective(model, (gaussian(6, 4), labels(6)), loss=F.cross_entropy)
    with untouched(model):
        rows, at_once = rows_of(objective)
    one_by_one = SampleGradients(objective)
    one_by_one.at_once = False
    with objective.undisturbed():
        (piece,) = objective.pieces()
        expected = torch.cat([row for _, row in one_by_one.of(objective.samples_of(piece))])
    assert relative_error(rows, expected) < 1e-13
    assert at_once is True or middle != "nothing special"
    assert at_once is False or middle not in ("a custom function", "a value read")
    assert torch.isfinite(model[1].last.detach()).all(), "it can be read"


@pytest.mark.usefixtures("faster")
def test_hooks_may_keep_what_they_see_so_models_with_hooks_go_one_by_one() -> None:
    model, kept = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), []
    model[1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    rows, at_once = rows_of(sk.Objective(model, (gaussian(6, 4), labels(6)), loss=F.cross_entropy))
    assert at_once is False
    assert len(rows) == 6
    assert all(output.shape[-1] == 5 for output in kept)


@pytest.mark.parametrize("fault", ["slower", "wrong"])
def test_several_that_are_slower_or_wrong_are_not_computed_at_a_time(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    ticks = itertools.cycle([0.0, 1.0, 0.0, 8.0] if fault == "slower" else [0.0, 4.0, 0.0, 1.0])
    monkeypatch.setattr(SampleGradients, "_now", lambda self: next(ticks))
    monkeypatch.setattr(sample_gradients, "_FEWEST", 2)
    if fault == "wrong":
        mapped = SampleGradients._mapped
        monkeypatch.setattr(SampleGradients, "_mapped", lambda self, pieces: 1.001 * mapped(self, pieces))
    problem = PROBLEMS["mlp"]()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    rows, at_once = rows_of(objective)
    assert relative_error(rows * (objective.num_samples / objective.num_targets), reference(problem)) < 1e-12
    assert at_once is False


def test_as_many_as_fit_are_computed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(SampleGradients, "_now", lambda self: float(next(ticks)))
    monkeypatch.setattr(sample_gradients, "_FEWEST", 2)
    problem = PROBLEMS["mlp"]()
    objective = sk.Objective(problem.model, [(gaussian(40, 4), labels(40))], loss=problem.loss)
    widths, mapped = list[int](), SampleGradients._mapped
    limit = 10**9

    def limited(self: SampleGradients, pieces: Any) -> Tensor | None:
        widths.append(len(pieces))
        if len(pieces) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return mapped(self, pieces)

    monkeypatch.setattr(SampleGradients, "_mapped", limited)
    expected, _ = rows_of(objective)
    assert widths == [40]
    widths.clear()
    limit = 12
    assert relative_error(rows_of(objective)[0], expected) < 1e-13
    assert widths == [40, 20, 10, 10, 10, 10]
    widths.clear()
    monkeypatch.setattr(sample_gradients, "available_memory", lambda device: 4 * 8 * 43 * 4 * 10)  # some ten gradients' share
    assert relative_error(rows_of(objective)[0], expected) < 1e-13
    assert 2 <= widths[0] <= 10
    widths.clear()
    monkeypatch.setattr(sample_gradients, "available_memory", lambda device: 1000.0)
    assert relative_error(rows_of(objective)[0], expected) < 1e-13
    assert widths == [], "one by one"


@pytest.mark.usefixtures("faster")
def test_a_sample_whose_loss_is_not_finite_is_named() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.w * x)

    objective = sk.Objective(Log(), (torch.ones(4, 1).double(), torch.zeros(4, 1).double()), loss=F.mse_loss)
    pool = objective.with_data([(torch.tensor([[1.0], [2.0], [3.0], [0.0]]).double(), torch.zeros(4, 1).double())])
    with pytest.raises(sk.NonFiniteError, match="the loss of batch 0"):
        rows_of(pool)


def test_batch_size_tests_of_100_samples_take_few_passes_and_import_no_compiler() -> None:
    code = """
import sys, torch
import sharpkit as sk
from torch.nn import functional as F
class Counted(torch.nn.Linear):
    passes = 0
    def forward(self, x):
        Counted.passes += 1
        return super().forward(x)
objective = sk.Objective(Counted(20, 10), (torch.randn(200, 20), torch.arange(200) % 10), loss=F.cross_entropy)
before = Counted.passes
sk.batch_size_tests(objective)
print(Counted.passes - before, "torch._dynamo" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    passes, imported = run.stdout.split()
    assert int(passes) <= 8, "the mean gradient, a look at one sample, and twice two to compare with all 200"
    if TorchVersion(torch.__version__) >= "2.11":  # 2.6's own vmap imports it
        assert imported == "False"


WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
TARGETS = {
    "labels": ((6,), F.cross_entropy),
    "labels in rows": ((6, 3, 2), F.cross_entropy),
    "weighted, some ignored": ((6, 3, 2), nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1)),
    "squares": ((6, 3, 2), F.mse_loss),
    "probabilities": ((6, 3, 2), nn.CrossEntropyLoss(weight=WEIGHTS)),
}


@pytest.mark.parametrize("name", TARGETS)
def test_counts_of_samples_are_those_of_each_by_itself(name: str) -> None:
    shape, loss = TARGETS[name]
    known = loss_module.recognise_loss(loss)
    assert known is not None
    wants_labels = name.startswith(("labels", "weighted"))
    target = labels(math.prod(shape)).reshape(shape) if wants_labels else gaussian(*shape).abs()
    if name.startswith("weighted"):
        target[2] = 1  # a sample that counts nothing
    expected = [known.count(target[i : i + 1]) for i in range(6)]
    assert known.counts(target).tolist() == pytest.approx(expected, rel=1e-14)
    assert (0.0 in expected) == name.startswith("weighted")


def test_samples_are_cut_when_asked_for_and_those_that_count_nothing_are_left_out() -> None:
    model, x, y = built(lambda: nn.Linear(4, 3)), gaussian(6, 4), labels(6)
    y[[1, 4]] = -100
    objective = sk.Objective(model, [(x[:1], y[:1]), (x, y)], loss=F.cross_entropy)
    _, piece = objective.pieces()
    samples = objective.samples_of(piece)
    assert [sample.key for sample in samples] == [(1, 0), (1, 2), (1, 3), (1, 5)]
    assert samples.counts == [sample.count for sample in samples] == [1.0] * 4
    assert [sample.weight for sample in samples[1:3]] == pytest.approx([1 / 5] * 2)
    for some in (samples, samples[1:3]):
        (inputs, targets), own = some.stacked()
        assert own == [True, True]
        assert torch.equal(inputs, torch.stack([sample.batch[0] for sample in some]))
        assert torch.equal(targets, torch.stack([sample.batch[1] for sample in some]))
