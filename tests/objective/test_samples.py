"""Drawn mini-batches are the same loss over fewer samples, whatever the shape the data came in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import PROBLEMS, built, flat, gaussian, labels, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from traces import untouched

import sharpkit as sk
from sharpkit.objective.samples import SamplePool


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool_of(name: str) -> tuple[Any, SamplePool]:
    problem = PROBLEMS[name]()
    return problem, SamplePool(sk.Objective(problem.model, problem.batches, loss=problem.loss))


@pytest.mark.parametrize("name", ["mlp", "squared", "conv", "attention", "tied", "weighted"])
def test_any_samples_give_the_loss_and_gradient_averaged_over_what_they_count(name: str) -> None:
    problem, pool = pool_of(name)
    samples = problem.samples()
    assert pool.size == len(samples)
    for chosen in ([0], [pool.size - 1, 0, 2], list(range(pool.size))):
        parts = [samples[i] for i in chosen]
        expected = sum(problem.unit(problem.model(x), y) for x, y in parts) / sum(problem.count(y) for _, y in parts)
        gradient = flat(torch.autograd.grad(expected, problem.params, allow_unused=True), problem.params)
        with untouched(problem.model):
            drawn = pool.objective(torch.tensor(chosen))
            value, found = drawn.gradient()
        assert value == pytest.approx(expected.item(), rel=1e-12)
        assert relative_error(found, gradient) < 1e-12
        assert drawn.num_samples == len(chosen)
        assert drawn.num_targets == pytest.approx(sum(problem.count(y) for _, y in parts))


def test_the_parent_is_not_changed_by_drawing() -> None:
    _, pool = pool_of("mlp")
    before = (pool.parent.value(), pool.parent.num_samples, pool.parent.num_batches)
    for _, batch in zip(range(3), pool.draws(2, generator=generator()), strict=False):
        batch.value()
    assert (pool.parent.value(), pool.parent.num_samples, pool.parent.num_batches) == before


def numbered(count: int) -> SamplePool:
    """Samples that are their own numbers, in uneven batches."""
    x = torch.arange(count, dtype=torch.float64)[:, None]
    batches = list(zip(torch.tensor_split(x, (3, 4)), torch.tensor_split(x, (3, 4)), strict=True))
    return SamplePool(sk.Objective(built(lambda: nn.Linear(1, 1)), batches, loss=F.mse_loss))


def numbers(objective: sk.Objective) -> list[int]:
    return [int(v) for piece in objective.pieces() for v in piece.batch[0].flatten().tolist()]


def test_groups_are_disjoint_and_cover_all_but_a_rest() -> None:
    groups = [numbers(g) for g in numbered(11).groups(3, generator=generator())]
    assert [len(g) for g in groups] == [3, 3, 3]
    assert len({v for g in groups for v in g}) == 9
    assert len(numbered(11).groups(3, generator=generator(), max_groups=2)) == 2


def test_an_epoch_draws_every_sample_once_and_the_next_in_another_order() -> None:
    batches = numbered(12).epochs(4, generator=generator())
    first, second = ([numbers(next(batches)) for _ in range(3)] for _ in range(2))
    for epoch in (first, second):
        assert sorted(v for batch in epoch for v in batch) == list(range(12))
    assert [sorted(b) for b in first] != [sorted(b) for b in second]
    whole = numbered(12).epochs(12, generator=generator())
    assert numbers(next(whole)) == numbers(next(whole)) == list(range(12))


def test_draws_repeat_nothing_within_a_batch_are_even_over_many_and_follow_the_seed() -> None:
    pool, counts = numbered(10), torch.zeros(10)
    for _, batch in zip(range(600), pool.draws(3, generator=generator()), strict=False):
        chosen = numbers(batch)
        assert len(set(chosen)) == 3
        counts[chosen] += 1
    # 180 expected each, standard deviation sqrt(600 x .3 x .7) = 11
    assert float((counts - 180).abs().max()) < 4.5 * 11
    again = [numbers(next(pool.draws(3, generator=generator(seed)))) for seed in (5, 5, 6)]
    assert again[0] == again[1] != again[2]


def test_dict_batches_and_ragged_shapes_are_drawn_from() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, inputs: Tensor, scalar: Tensor) -> Tensor:
            return self.scale * inputs.mean(dim=1) + scalar

    def closure(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"], batch["s"]) - batch["y"]).square().mean()

    batches = [{"x": gaussian(n, width), "y": gaussian(n), "s": torch.tensor(0.5).double()} for n, width in ((3, 4), (2, 6))]
    model = built(Mean)
    pool = SamplePool(sk.Objective(model, batches, closure=closure, count=lambda b: float(len(b["y"]))))
    assert pool.size == 5
    drawn = pool.objective(torch.tensor([4, 1]))  # one sample of either width: two batches of one
    expected = [(model(b["x"][i : i + 1], b["s"]) - b["y"][i : i + 1]).square().mean() for b, i in ((batches[0], 1), (batches[1], 1))]
    assert drawn.num_batches == 2
    assert drawn.value() == pytest.approx(sum(expected).item() / 2, rel=1e-12)


def test_summed_losses_stay_sums() -> None:
    model = built(lambda: nn.Linear(2, 1))
    x, y = gaussian(6, 2), gaussian(6, 1)
    pool = SamplePool(sk.Objective(model, (x, y), loss=nn.MSELoss(reduction="sum")))
    assert pool.objective(torch.tensor([0, 3])).value() == pytest.approx((model(x[[0, 3]]) - y[[0, 3]]).square().sum().item(), rel=1e-12)


def test_a_draw_that_counts_nothing_is_an_error() -> None:
    model = built(lambda: nn.Linear(3, 4))
    y = labels(6)
    y[2] = -100
    pool = SamplePool(sk.Objective(model, (gaussian(6, 3), y), loss=F.cross_entropy))
    with pytest.raises(sk.ObjectiveError, match="no counted target"):
        pool.objective(torch.tensor([2]))


def test_what_does_not_fall_apart_into_samples_is_refused() -> None:
    norm = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    with pytest.raises(sk.ObjectiveError, match="mode='eval'"):
        SamplePool(sk.Objective(norm, (gaussian(6, 3), labels(6, classes=2)), loss=F.cross_entropy, mode="train"))
    for wrong in (0, 12):
        with pytest.raises(ValueError, match="between 1 and the 11 samples"):
            numbered(11).groups(wrong, generator=generator())
