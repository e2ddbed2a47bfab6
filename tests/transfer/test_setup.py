"""Families: runs that depend on their seed alone, leave the random state alone, and refuse what would mislead."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit._errors import ObjectiveError
from sharpkit.transfer.setup import Family, check_sizes

X = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]


def build(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.Dropout(0.2), nn.ReLU(), nn.Linear(width, 2))


def sgd(model: nn.Module, width: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def family(**changes: Any) -> Family:
    arguments: dict[str, Any] = {"build": build, "optimizer": sgd, "data": BATCHES, "loss": F.cross_entropy} | changes
    return Family(**arguments)


def losses(chosen: Family, *, seed: int, steps: int = 6) -> list[float]:
    run = chosen.start(16, seed=seed)
    for _ in range(steps):
        run.step()
    return run.losses


def test_a_run_depends_on_its_seed_alone() -> None:
    first = losses(family(), seed=3)
    torch.manual_seed(99)
    assert losses(family(), seed=3) == first
    assert losses(family(), seed=4) != first


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    losses(family(), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_batch_is_used_once_an_epoch() -> None:
    run = family().start(8)
    seen = [int((run.next_batch()[0][0] == X[::8]).all(1).nonzero()) for _ in range(8)]
    assert sorted(seen[:4]) == sorted(seen[4:]) == [0, 1, 2, 3]


def test_the_factor_multiplies_every_rate() -> None:
    def two(model: nn.Module, width: int) -> torch.optim.Optimizer:
        first, last = list(model.parameters())[:2], list(model.parameters())[2:]
        return torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": last, "lr": 1.0 / width}], lr=1.0)

    run = family(optimizer=two).start(10, lr_factor=4.0)
    assert [g["lr"] for g in run.optimizer.param_groups] == pytest.approx([0.4, 0.4])


def test_a_step_is_the_optimizers_own() -> None:
    run = family(build=lambda width: nn.Linear(5, 2)).start(2, seed=7)
    weight = run.model.get_parameter("weight").detach().clone()
    batch = run.next_batch()
    logits = batch[0] @ weight.T + run.model.get_parameter("bias").detach()
    error = logits.softmax(1) - F.one_hot(batch[1], 2)  # gradient of the mean cross-entropy by hand
    run.step(batch)
    expected = weight - 0.1 * error.T @ batch[0] / len(batch[0])
    torch.testing.assert_close(run.model.get_parameter("weight").detach(), expected)


def test_a_diverged_run_says_so_and_stops() -> None:
    run = family(loss=lambda output, target: (output**4).mean()).start(8, lr_factor=1e6)
    for _ in range(8):
        run.step()
    assert run.diverged
    assert run.step() == math.inf
    assert run.final_loss() == math.inf


def test_a_closure_and_own_losses_work_too() -> None:
    def closure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    assert losses(family(loss=None, closure=closure), seed=1) == losses(family(), seed=1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"build": 3}, TypeError, "from width to a model"),
        ({"build": 3, "dimension": "depth"}, TypeError, "from depth to a model"),
        ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)}, TypeError, "one optimizer object would not do"),
        ({"closure": lambda model, batch: None}, ValueError, "not both"),
        ({"data": []}, ObjectiveError, "no batch"),
        ({"data": iter(BATCHES)}, ObjectiveError, "only once"),
    ],
)
def test_wrong_arguments_are_named_with_the_remedy(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        family(**changes)


def test_functions_that_return_something_else_are_named() -> None:
    with pytest.raises(TypeError, match=r"build\(8\) must return a torch module, got str"):
        family(build=lambda width: "model").start(8)
    with pytest.raises(TypeError, match="must return a torch optimizer, got NoneType"):
        family(optimizer=lambda model, width: None).start(8)


def test_sizes_are_sorted_and_need_two_different_ones() -> None:
    assert check_sizes([64, 16, 64, 32]) == (16, 32, 64)
    for wrong in ([], [8], [8, 8], [0, 8]):
        with pytest.raises(ValueError, match=r"at least 2 different positive numbers|whole number of at least 1, got 0"):
            check_sizes(wrong)
