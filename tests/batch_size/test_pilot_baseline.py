"""The loss of the best constant output, and what counts as trained against it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.batch_size import pilot as pilot_module
from sharpkit.batch_size.baseline import constant_loss
from sharpkit.batch_size.pilot import Ledger, TimeIsUp, Trainer
from sharpkit.batch_size.search import RateSearch
from sharpkit.objective.samples import SamplePool
from sharpkit.optimizers import update_rule


def _entropy(labels: torch.Tensor) -> float:
    shares = torch.bincount(labels.flatten()).double() / labels.numel()
    return float(-torch.xlogy(shares, shares).sum())


def test_of_cross_entropy_it_is_the_entropy_of_the_labels() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.multinomial(torch.tensor([0.7, 0.2, 0.1, 0.0]), 90, replacement=True, generator=g)  # the fourth class never occurs
    x, model = torch.randn(90, 5, generator=g), nn.Linear(5, 4)
    assert constant_loss(sk.Objective(model, (x, y), loss=F.cross_entropy)) == pytest.approx(_entropy(y), rel=2e-3)
    cut = sk.Objective(model, [(x[:50], y[:50]), (x[50:], y[50:])], loss=F.cross_entropy)
    assert constant_loss(cut) == pytest.approx(_entropy(y), rel=2e-3)


def test_of_squared_error_it_is_the_variance_of_the_targets() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(60, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 2.0, 5.0]) + 4
    objective = sk.Objective(nn.Linear(2, 3).double(), (torch.randn(60, 2, generator=g, dtype=torch.float64), y), loss=F.mse_loss)
    assert constant_loss(objective) == pytest.approx(float(y.var(dim=0, correction=0).mean()), rel=1e-6)


class _Text(nn.Module):
    """Class scores of 7 characters at 6 positions, as cross_entropy takes them or with the characters last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.inner, self.last = nn.Embedding(7, 7), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.inner(x)
        return scores if self.last else scores.transpose(1, 2)


@pytest.mark.parametrize("last", [False, True])
def test_one_vector_of_class_scores_serves_all_positions(last: bool) -> None:
    """With one of its own, each position would fit the chance of its 12 characters, far below the entropy of all."""
    tokens = torch.randint(7, (12, 6), generator=torch.Generator().manual_seed(0))

    def flat(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores.flatten(0, 1), target.flatten())

    objective = sk.Objective(_Text(last), (tokens, tokens), loss=flat if last else F.cross_entropy)
    assert constant_loss(objective) == pytest.approx(_entropy(tokens), rel=1e-4)


def test_it_is_nan_where_it_cannot_be_told() -> None:
    x, y, model = torch.randn(8, 2), torch.randn(8, 1), nn.Linear(2, 1)
    assert math.isnan(constant_loss(sk.Objective(model, (x, y), closure=lambda m, b: F.mse_loss(m(b[0]), b[1]))))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Linear(2, 3)
    objective = sk.Objective(model, (torch.randn(20, 2), torch.randint(3, (20,))), loss=F.cross_entropy)
    before, rng = [p.clone() for p in model.parameters()], torch.get_rng_state()
    constant_loss(objective)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and torch.equal(rng, torch.get_rng_state())


def test_getting_the_frequencies_right_is_not_training() -> None:
    """Losses of a network on text: 4.7 before training, 1.0 at best, 2.8 by character frequencies, which any rate up to 2^3 reaches."""
    losses = {-4: 1.4, -2: 1.0, 0: 1.5, 1: 1.9, 2: 2.1, 4: 2.7, 5: 2.8, 6: 2.8, 7: 30.0, 8: 40.0}
    with_constant = RateSearch(lambda power: losses[power], initial=4.7, constant=2.8)
    without = RateSearch(lambda power: losses[power], initial=4.7, constant=math.nan)
    assert with_constant.from_below() == 1
    assert without.from_below() == 6


def test_runs_no_better_than_a_constant_are_judged_by_the_first_loss() -> None:
    losses = {power: 3.0 + 0.1 * abs(power + 2) for power in range(-20, 3)} | dict.fromkeys(range(3, 9), 9.0)
    search = RateSearch(lambda power: losses[power], initial=4.7, constant=2.8)
    assert search.from_below() == 2
    assert min(search.losses) == -8, "it looks a factor of 8 below the best for a better one, no further"


def test_a_repeat_that_knows_the_best_loss_finds_the_same_in_a_few_runs() -> None:
    losses = {power: 0.5 + 0.02 * power**2 if power < 6 else 4.0 for power in range(-20, 20)}
    full = RateSearch(lambda power: losses[power], initial=2.3, constant=2.3)
    assert full.from_below() == 5
    for start in (3, 5, 8):
        again = RateSearch(lambda power, start=start: losses[start + power], initial=2.3, constant=2.3, known=0.5)
        assert start + (again.near() or 0) == 5 and len(again.losses) <= 4


def test_a_search_without_an_answer_says_why() -> None:
    x, model = torch.randn(16, 2), nn.Linear(2, 1)
    flat = sk.Objective(model, (x, torch.zeros(16, 1)), loss=lambda z, t: (0.0 * z).sum() / len(z) + 1.0)
    trainer = Trainer(SamplePool(flat), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(sk.ObjectiveError, match="lowered the loss"):
        trainer.largest_stable_rate(0.1, batch_size=4, steps=3)


def test_the_groups_of_an_optimizer_keep_their_ratio_in_the_pilot() -> None:
    """The rate is looked up once a step, not once a group, so both groups see the same look at lambda_max."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=g)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    objective = sk.Objective(model, (x, x.sum(1, keepdim=True)), loss=F.mse_loss)
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.05}], lr=0.1)
    trainer = Trainer(SamplePool(objective), optimizer)
    settled = trainer.settle(steps=11, batch_size=16, rule=update_rule(optimizer))  # the last step is one with a look
    assert [group["lr"] for group in settled.run.optimizer.param_groups] == pytest.approx([settled.rate, settled.rate / 2])


def test_the_pilot_compares_lambda_max_of_the_hessian_before_and_after_also_for_an_adaptive_optimizer() -> None:
    """A quadratic, whose Hessian does not move while D^-1 H grows as the gradients fall."""
    x = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(4, 1, bias=False).double()
    objective = sk.Objective(model, (x, torch.zeros(64, 1, dtype=torch.float64)), loss=F.mse_loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    trainer = Trainer(SamplePool(objective), optimizer)
    settled = trainer.settle(steps=20, batch_size=16, rule=update_rule(optimizer))
    assert settled.after == pytest.approx(settled.before, rel=0.03)
    assert settled.before == pytest.approx(float(torch.linalg.eigvalsh(2 * x.T @ x / 64)[-1]), rel=0.03)


# -- from a trained point ---------------------------------------------------------------------------------------------------------
def test_from_a_trained_point_a_rate_trains_that_loses_nothing() -> None:
    """No run halves the loss of .1: half of the best improvement, .095, would be noise; .11 is the bar."""
    losses = dict.fromkeys(range(-30, -3), 0.1) | {-3: 0.097, -2: 0.096, -1: 0.1, 0: 0.105, 1: 0.108, 2: 0.2, 3: 0.5, 4: math.inf}
    search = RateSearch(lambda power: losses[power], initial=0.1, constant=0.7)
    assert search.from_below() == 1 and search.keeping
    higher = RateSearch(lambda power: losses.get(power + 4, math.inf), initial=0.1, constant=0.7)
    assert higher.from_below() == -3, "from a guess that diverges it walks down until nothing is lost"


def test_where_every_rate_loses_a_trained_points_noise_floor_the_search_ends_at_rates_that_change_nothing() -> None:
    losses = {power: 0.1 * (1 + 2.0 ** (power / 2)) for power in range(-40, 20)}
    search = RateSearch(lambda power: losses[power], initial=0.1, constant=0.7)
    low = search.from_below()
    assert low == -7 and losses[-7] <= 0.11 < losses[-6] and len(search.losses) < 12


def test_from_a_trained_point_that_still_improves_half_the_improvement_counts() -> None:
    losses = {power: 0.02 + 0.005 * abs(power + 2) if power < 1 else 0.3 for power in range(-30, 20)}
    search = RateSearch(lambda power: losses[power], initial=0.1, constant=0.7)
    assert search.from_below() == 0 and not search.keeping


def test_from_scratch_nothing_gained_is_no_training() -> None:
    search = RateSearch(lambda power: 0.72, initial=0.7, constant=0.7)
    assert search.from_below() is None


# -- pilots that go astray --------------------------------------------------------------------------------------------------------
def _least_squares() -> tuple[sk.Objective, torch.optim.Optimizer]:
    x = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(4, 1, bias=False).double()
    return sk.Objective(model, (x, x.sum(1, keepdim=True)), loss=F.mse_loss), torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_pilot_that_diverges_begins_anew_at_a_quarter_of_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot_module, "_PILOT_SHARE", 8.0)  # of the limit: a quarter and a sixteenth of that are 2 and .5
    objective, optimizer = _least_squares()
    settled = Trainer(SamplePool(objective), optimizer).settle(steps=100, batch_size=64, rule=update_rule(optimizer))
    assert (settled.attempts, settled.steps) == (2, 100)
    assert settled.run.objective.value() < objective.value()
    limit = 2 / float(torch.linalg.eigvalsh(sk.HessianOperator(objective).to_dense())[-1])
    assert settled.rate == pytest.approx(0.5 * limit, rel=0.1)


def test_where_no_pilot_holds_the_point_is_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot_module, "_PILOT_SHARE", 1e9)
    objective, optimizer = _least_squares()
    settled = Trainer(SamplePool(objective), optimizer).settle(steps=20, batch_size=64, rule=update_rule(optimizer))
    assert settled.steps == 0 and settled.attempts > 0
    assert settled.run.objective.value() == objective.value()


def test_at_a_fitted_point_a_pilot_is_not_astray_because_batches_differ() -> None:
    """The first batch's loss is 0, so that any other is infinitely more."""
    x = torch.eye(32, dtype=torch.float64)
    model = nn.Linear(32, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0] = 1e-3
    target = torch.zeros(32, 1, dtype=torch.float64)
    target[16:] = 1.0
    with torch.no_grad():
        model.weight[0, 16:] = 1.0
    objective = sk.Objective(model, (x, target), loss=F.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settled = Trainer(SamplePool(objective), optimizer).settle(steps=40, batch_size=8, rule=update_rule(optimizer))
    assert (settled.attempts, settled.steps) == (0, 40)


def test_a_pilot_that_unlearns_a_trained_point_begins_anew() -> None:
    """A loss of .01 that ends at .3 is still far below the constant output's 1."""
    objective, optimizer = _least_squares()
    trainer = Trainer(SamplePool(objective), optimizer)
    trainer.__dict__["yardsticks"] = (0.01, 1.0)
    run = trainer.start(8)
    run.losses.append(0.01)
    for end, astray in ((0.015, False), (0.3, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_judge", lambda self, _, end=end: end)
            assert trainer._went_astray(run) is astray


def test_after_the_deadline_no_run_goes_on() -> None:
    objective, optimizer = _least_squares()
    trainer = Trainer(SamplePool(objective), optimizer, ledger=Ledger(deadline=0.0))
    with pytest.raises(TimeIsUp):
        trainer.final_loss(0.1, batch_size=8, steps=20)
    assert trainer.settle(steps=20, batch_size=8, rule=update_rule(optimizer)).steps == 0
