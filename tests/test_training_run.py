"""The one training loop: seeds, steps that are counted, divergence, trials and snapshots that give everything back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from sharpkit.training_run import ShuffledBatches, Snapshot, TrainingRun, as_seeds

BATCHES = [(torch.full((2, 1), float(i)), torch.zeros(2, 1)) for i in range(1, 4)]


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def started(*, lr: float = 0.01, halts: bool = True) -> TrainingRun:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return TrainingRun(model, torch.optim.SGD(model.parameters(), lr=lr), ShuffledBatches(model, loss_of, BATCHES, seed=0), halts=halts)


def weight(run: TrainingRun) -> float:
    return float(run.model.get_parameter("weight").detach())


def test_seeds_are_a_count_or_a_sequence() -> None:
    assert as_seeds(2) == (0, 1) and as_seeds([5, 3]) == (5, 3) and as_seeds(range(2, 4)) == (2, 3) and as_seeds(torch.tensor([4])) == (4,)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0, -1, [], [0, -2]])
def test_no_seed_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="seeds must be at least one"):
        as_seeds(wrong)


@pytest.mark.parametrize("wrong", [1.5, "3", True, None, [0.5], [True]])
def test_seeds_that_are_no_whole_numbers_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="whole number"):
        as_seeds(wrong)


def test_a_step_is_the_optimizers_own_and_is_counted() -> None:
    run = started()
    batch = run.next_batch()
    x = float(batch[0][0])
    assert run.step(batch) == pytest.approx(x**2)
    assert weight(run) == pytest.approx(1 - 0.01 * 2 * x**2)
    assert (run.spent, run.searched, run.position, run.curve) == (1, 0, 1, [(1, run.losses[0])])


def test_rates_are_asked_for_one_by_one_and_multiply_the_optimizers_own() -> None:
    run, seen = started(lr=2.0), []

    def rates() -> Any:
        for _ in range(3):
            seen.append(len(run.losses))
            yield 0.005

    assert run.follow(rates()) == run.losses and seen == [0, 1, 2]
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("halts", [True, False])
def test_a_diverged_run_stays_where_it_is_if_it_halts(halts: bool) -> None:
    run = started(lr=1e4, halts=halts)
    assert len(run.follow(1.0 for _ in range(9))) < 9 and run.diverged
    before, losses = weight(run), list(run.losses)
    assert (run.step() == math.inf and run.losses == losses and weight(run) == before) == halts


def test_what_a_trial_did_is_undone_but_not_what_it_cost() -> None:
    run = started(lr=0.01)
    run.step()
    before = weight(run)
    with run.trial():
        first = [run.step() for _ in range(4)]
    assert weight(run) == before and len(run.losses) == 1 and run.position == 1
    assert (run.spent, run.searched, len(run.curve)) == (5, 4, 1)
    assert [run.step() for _ in range(4)] == first, "on the same batches"


def test_a_snapshot_comes_back_from_its_state() -> None:
    run = started()
    again = Snapshot.__new__(Snapshot)
    again.load_state_dict(Snapshot(run.model, run.optimizer).state_dict())
    run.step()
    again.restore(run.model, run.optimizer)
    assert weight(run) == 1.0
