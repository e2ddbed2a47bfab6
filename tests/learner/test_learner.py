"""The learner: rates that settle at a share of the limit, whatever rate was given; decisions with reasons; nothing raised."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.learner.gauge import bulk_curvature, polyak_pair
from sharpkit.learner.rate import LearnedRate, Pace
from sharpkit.learner.rollback import GoodPoints, LossWatch, tells_of_return
from sharpkit.optimizers import kinds
from sharpkit.training_run import Snapshot

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()


def network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, learner: sk.CurvatureLearner, *, steps: int, start: int = 0, size: int = 16
) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        chosen = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:size]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X[chosen]), Y[chosen])
        loss.backward()
        optimizer.step()
        learner.step((X[chosen], Y[chosen]), loss=loss)
        losses.append(float(loss.detach()))
    return losses


def sgd(p: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=lr, momentum=0.9)


def adamw(p: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=lr)


def quadratic(curvature: list[float], optimizer: Any, *, steps: int = 200, **settings: Any) -> sk.CurvatureLearner:
    """f = (1/2) sum c_i w_i^2, whose limit never moves."""
    scale = torch.tensor(curvature, dtype=torch.float64)
    model = nn.Linear(len(curvature), 1, bias=False).double()
    made = optimizer(model.parameters())
    closure = lambda m, batch: 0.5 * (batch * m.weight.square()).sum()  # noqa: E731
    learner = sk.CurvatureLearner(made, model=model, closure=closure, count=lambda b: 1.0, total_steps=steps, **settings)
    for _ in range(steps):
        made.zero_grad()
        closure(model, scale[None]).backward()
        made.step()
        learner.step(scale[None])
    return learner


# -- where the rate settles ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        (lambda p: torch.optim.SGD(p, lr=7.0), 2 / 50),
        (lambda p: torch.optim.SGD(p, lr=7.0, momentum=0.9), 3.8 / 50),
        (lambda p: torch.optim.SGD(p, lr=7.0, momentum=0.9, nesterov=True), 3.8 / 2.8 / 50),
        (lambda p: torch.optim.SGD(p, lr=7.0, weight_decay=10.0), 2 / 60),
        (lambda p: torch.optim.ASGD(p, lr=7.0, lambd=10.0, alpha=0.0), 2 / 60),
    ],
    ids=["SGD", "momentum", "Nesterov", "weight decay", "ASGD"],
)
@pytest.mark.parametrize("safety", [0.3, 0.6])
def test_on_a_quadratic_the_rate_settles_at_the_asked_share_of_the_limit(optimizer: Any, limit: float, safety: float) -> None:
    learner = quadratic([50.0, 3.0, 1.0], optimizer, safety=safety)
    assert learner.lr == pytest.approx(safety * limit, rel=0.02)
    assert "batches: settles at" in str(learner.history)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_the_rate_given_does_not_matter(make: Any) -> None:
    found = []
    for lr in (1e-6, 1e-2, 1e3):
        model = network()
        optimizer = make(model.parameters(), lr=lr)
        learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=60)
        losses = train(model, optimizer, learner, steps=60)
        found.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert found[0][0] == found[1][0] == found[2][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[2][1], strict=True))


@pytest.mark.parametrize("make", [sgd, adamw])
def test_training_works_and_stays_within_the_budget_of_products(make: Any) -> None:
    model = network()
    optimizer = make(model.parameters())
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=600)
    losses = train(model, optimizer, learner, steps=600)
    assert sum(losses[-20:]) / 20 < 0.1 * sum(losses[:20]) / 20
    gradients = sum(1.3 + 1.6 * d.num_matvecs for d in learner.history if d.num_matvecs)
    assert gradients <= 0.07 * 600
    assert optimizer.param_groups[0]["lr"] == 0.0, "linear decay ends at 0"


def test_groups_keep_the_ratio_of_their_rates_or_get_their_own_by_their_blocks() -> None:
    for per_group in (False, True):
        scale = torch.tensor([[50.0, 50.0, 2.0]], dtype=torch.float64)
        first, second = nn.Parameter(torch.ones(2).double()), nn.Parameter(torch.ones(1).double())
        model = nn.ParameterList([first, second])
        optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.3}], lr=0.1)
        closure = lambda m, b: 0.5 * (b[0, :2] * m[0].square()).sum() + 0.5 * b[0, 2] * m[1].square().sum()  # noqa: E731
        learner = sk.CurvatureLearner(
            optimizer, model=model, closure=closure, count=lambda b: 1.0, total_steps=100, decay="constant", per_group=per_group
        )
        for _ in range(100):
            optimizer.zero_grad()
            closure(model, scale).backward()
            optimizer.step()
            learner.step(scale)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[1] / rates[0] == pytest.approx(25.0 if per_group else 3.0, rel=0.02)


def test_any_torch_scheduler_multiplies_the_learned_rate() -> None:
    learner = quadratic(
        [50.0, 1.0],
        lambda p: torch.optim.SGD(p, lr=1.0),
        decay="constant",
        schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 100, gamma=0.1),
    )
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * learner.lr)
    assert learner.lr == pytest.approx(learner.safety * 0.04, rel=0.02)


@pytest.mark.parametrize(("bulk", "lower"), [("median", 2.0), ("weighted median", 2.0), (100.0, 0.5)])
def test_polyaks_momentum_follows_the_top_and_the_bulk_of_the_curvature(bulk: Any, lower: float) -> None:
    make = lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5)  # noqa: E731
    learner = quadratic([50.0, 2.0, 2.0, 2.0, 1.0], make, momentum="polyak", bulk=bulk, interval=20)
    momentum = polyak_pair(50.0, lower)[1]
    assert learner.history[-1].momentum == pytest.approx(momentum, rel=1e-3)
    assert learner.lr == pytest.approx(learner.safety * 2 * (1 + momentum) / 50, rel=0.02), "the share of the limit stays"


def test_the_bulk_is_read_from_positive_nodes_that_carry_weight() -> None:
    nodes, weights = [-3.0, 0.0, 1.0, 2.0, 10.0, 4.0], [0.2, 0.1, 0.4, 0.2, 0.1, 1e-16]
    found = [bulk_curvature(nodes, weights, 10.0, reading) for reading in ("median", "weighted median", "mean", 20.0)]
    assert found == pytest.approx([2.0, 1.0, (0.4 + 0.4 + 1.0) / 0.7, 0.5])
    assert bulk_curvature([-1.0], [1.0], 10.0, "mean") is None
    assert bulk_curvature([3.0], [1.0], 2.0, "median") == 2.0, "never above lambda_max"


def test_momentum_is_left_where_it_cannot_be_measured() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=100, momentum="polyak")
    learner._gauge.polyak_momentum = lambda *_, **__: 1 / 0  # type: ignore[method-assign]
    train(model, optimizer, learner, steps=100)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert "momentum not measured (ZeroDivisionError" in str(learner.history)


def test_polyaks_pair_is_the_fastest_heavy_ball_on_a_quadratic() -> None:
    eta, beta = polyak_pair(30.0, 2.0)
    rate = lambda e, b: max(  # noqa: E731
        float(torch.linalg.eigvals(torch.tensor([[1 + b - e * c, -b], [1.0, 0.0]]).double()).abs().max()) for c in (2.0, 30.0)
    )
    best = rate(eta, beta)
    assert best == pytest.approx(math.sqrt(beta), rel=1e-4)
    assert all(rate(eta * f, min(beta * h, 0.999)) >= best - 1e-6 for f in (0.9, 1, 1.1) for h in (0.9, 1, 1.1))


# -- changes, failures, going back ---------------------------------------------------------------------------------------------------
def test_a_change_of_the_batch_size_is_measured_at_once_and_the_rate_follows_the_limit() -> None:
    """Least squares: the curvature of a batch does not move in training, and smaller batches are sharper."""
    inputs = X.clone()
    inputs[1] = inputs[0]
    limits = {size: 3.8 / float(torch.linalg.eigvalsh(2 * inputs[:size].T @ inputs[:size] / size)[-1]) for size in (2, 64)}
    targets = torch.randn(64, 1, generator=torch.Generator().manual_seed(3))
    targets[0], targets[1] = 1.0, -1.0  # two like samples of opposite targets: their loss stays
    model = nn.Linear(6, 1, bias=False)
    optimizer = sgd(model.parameters())
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.mse_loss, total_steps=600, decay="constant", interval=50)
    rates = []
    for step in range(600):
        size = 64 if 200 <= step < 400 else 2
        x = inputs[:size]
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), targets[:size])
        loss.backward()
        optimizer.step()
        learner.step((x, targets[:size]), loss=loss)
        rates.append(learner.lr)
    assert limits[64] > 2 * limits[2]
    assert [d.step for d in learner.history if "batch size changed" in d.reason] == [202, 402]
    assert rates[199] == pytest.approx(learner.safety * limits[2], rel=0.05)
    assert rates[399] == pytest.approx(learner.safety * limits[64], rel=0.05)
    assert rates[201] == pytest.approx(min(math.sqrt(32) * rates[199], learner.safety * limits[64]), rel=0.05)
    assert rates[401] == pytest.approx(rates[399] / 32), "the second smaller batch lowers it as linear scaling does"
    at_most = rates[399] / math.sqrt(32)  # by the square-root rule, which here is the lower of the two
    assert rates[599] == pytest.approx(min(learner.safety * limits[2], at_most), rel=0.05)


def test_the_odd_last_batch_of_an_epoch_is_no_change_of_the_batch_size() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=200, interval=10)
    for step in range(200):
        x, y = (X[:5], Y[:5]) if step % 4 == 3 else (X[:20], Y[:20])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        learner.step((x, y), loss=loss)
    assert {d.batch_size for d in learner.history if d.num_matvecs} == {20}
    assert "changed" not in str(learner.history)


def test_where_the_limit_flees_the_growth_ends() -> None:
    """On a loss that is already 0 the curvature says nothing: the rate must not grow for ever."""
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = sgd(model.parameters())
    closure = lambda m, batch: 1e-8 * sum(p.square().sum() for p in m.parameters())  # noqa: E731
    learner = sk.CurvatureLearner(optimizer, model=model, closure=closure, count=lambda b: 1.0, total_steps=1000, safety=0.9)
    learner._pace._growth = 0.0  # nothing else would ever meet the limit
    for _ in range(500):
        optimizer.step()
        learner.step((X, Y), loss=0.0)
    assert learner._rate.settled and "without meeting" in str(learner.history)
    assert sum(d.num_matvecs > 0 for d in learner.history) < 12


def meeting(limits: list[float], *, loss: float = 1.0) -> tuple[LearnedRate, list[float]]:
    """A rate that has met its share of the first limit, and what it becomes at each of the others; the loss was 1 at first."""
    rate = LearnedRate(Pace(1000, start=0.02, warmup=0.1, budget=0.05, interval="auto", adaptive=False), safety=0.25, max_lr=math.inf)
    losses = LossWatch()
    about = {"step": 30, "decay": 1.0, "losses": losses, "batch_size": 8, "changed": False}
    for _ in range(16):
        losses.add(1.0)
    rate.decide(limits[0], **about)  # type: ignore[arg-type]
    rate.value = limits[0]
    rates = []
    for limit in limits:
        rate.decide(limit, **about)  # type: ignore[arg-type]
        rates.append(rate.value)
        losses.add(loss)
        rate.grow()
        assert rate.value == rates[-1], "it does not grow once it has met its limit"
    return rate, rates


def test_where_the_growth_ends_the_mean_of_several_batches_decides() -> None:
    rate, rates = meeting([0.4, 0.8, 0.2, 0.4])
    assert rate.settled
    assert rates == pytest.approx([0.1, 0.5 / (1 / 0.4 + 1 / 0.8), 0.75 / (1 / 0.4 + 1 / 0.8 + 1 / 0.2), 1 / (2 / 0.4 + 1 / 0.8 + 1 / 0.2)])
    assert meeting([0.4, 40.0, 40.0, 40.0])[1] == pytest.approx([0.1, 0.14, 0.196, 0.2744]), "it rises by 1.4 at each at most"
    assert not meeting([0.4, 0.8, 0.2])[0].settled
    assert meeting([0.4, 40.0, 40.0, 40.0], loss=0.01)[1][-1] == pytest.approx(0.1), "the curvature of fitted data raises nothing"


def test_a_run_lost_where_the_growth_ended_goes_back_to_half_of_the_rate_at_the_good_point() -> None:
    """The spike that lost it is what made its limit low: that is not halved once more."""
    losses = LossWatch()
    rate = LearnedRate(Pace(1000, start=0.02, warmup=0.1, budget=0.05, interval="auto", adaptive=False), safety=0.25, max_lr=math.inf)
    about = {"step": 30, "decay": 1.0, "losses": losses, "batch_size": 8, "changed": False}
    rate.decide(1.0, **about)  # type: ignore[arg-type]
    rate.value = 0.08
    rate.remember()
    rate.value = 0.16
    rate.decide(0.04, **about)  # type: ignore[arg-type]
    assert rate.value == pytest.approx(0.01)
    rate.back_off()
    assert rate.value == pytest.approx(0.04) and rate.settled
    rate.back_off()
    assert rate.value == pytest.approx(0.02)


def test_a_state_of_another_version_is_refused() -> None:
    model = network()
    learner = sk.CurvatureLearner(sgd(model.parameters()), model=model, loss=F.cross_entropy, total_steps=100)
    with pytest.raises(ValueError, match="version 1 cannot be loaded"):
        learner.load_state_dict({**learner.state_dict(), "version": 1})


def test_a_lost_run_goes_back_to_the_last_good_point_with_half_the_rate() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=400, interval=20)
    train(model, optimizer, learner, steps=120)
    good, rate = learner.history[-1].loss, learner.lr
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(9)))
    with pytest.warns(sk.SharpkitWarning, match="back to step 1[01].*, the last good point, with half the rate"):
        train(model, optimizer, learner, steps=24, start=120)
    assert learner.lr <= 0.5 * rate
    with torch.no_grad():
        assert float(F.cross_entropy(model(X), Y)) < 2 * good + 0.1


def test_nan_is_a_lost_run_too_and_training_recovers() -> None:
    model = network()
    optimizer = adamw(model.parameters())
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=300, interval=20)
    train(model, optimizer, learner, steps=100)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SharpkitWarning)
        losses = train(model, optimizer, learner, steps=100, start=100)
    assert math.isfinite(losses[-1]) and losses[-1] < 1.0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("bad", [130, 203])
def test_a_broken_batch_costs_few_steps_leaves_the_rate_and_is_named(bad: int) -> None:
    ends = {}
    for broken in (None, bad):
        model = network()
        optimizer = sgd(model.parameters())
        learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=300)
        for step in range(300):
            chosen = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:16]
            x = X[chosen] * (math.nan if step == broken else 1.0)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), Y[chosen])
            loss.backward()
            optimizer.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", sk.SharpkitWarning)
                learner.step((x, Y[chosen]), loss=loss)
        with torch.no_grad():
            ends[broken] = float(F.cross_entropy(model(X), Y))
        returns = [d for d in learner.history if tells_of_return(d.reason)]
        assert len(returns) == (broken is not None)
        for decision in returns:
            at = int(decision.reason.partition("back to step ")[2].partition(",")[0])
            assert f"the loss was nan at step {bad + 1} " in decision.reason and "with the same rate" in decision.reason
            assert bad - 40 < at <= bad  # the last measurement was 60 steps before
    assert ends[bad] < 1.5 * ends[None] + 0.01


def test_a_loss_that_is_nan_again_from_the_same_point_is_the_rates_fault() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=300)
    train(model, optimizer, learner, steps=120)
    rate = learner.lr
    for _ in range(16):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sk.SharpkitWarning)
            learner.step((X[:16], Y[:16]), loss=math.nan)
    assert [d.reason.rpartition(", with ")[2] for d in learner.history[-2:]] == ["the same rate", "half the rate"]
    assert learner.lr == pytest.approx(rate / 2)


def test_a_point_that_the_next_losses_do_not_confirm_is_not_gone_back_to() -> None:
    model = nn.Linear(1, 1)
    optimizer = sgd(model.parameters())
    points = GoodPoints()
    for step, good in ((16, True), (24, True), (40, True), (48, False)):
        model.weight.data.fill_(float(step))
        points.advance(model, optimizer, step=step, rate=0.1 * step, good=good)
    assert points.step == 16 and points.rate == pytest.approx(1.6)
    other = GoodPoints()
    other.load_state_dict(points.state_dict())
    assert other.restore(model, optimizer) and model.weight.item() == 16.0


def test_a_failed_measurement_keeps_the_rate_is_said_once_and_stops_nothing() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=100, interval=5)
    train(model, optimizer, learner, steps=40)
    rate = learner.lr
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            learner.step({"not": "a pair"})
    assert len(caught) == 1 and "not measured (TypeError" in str(caught[0].message)
    assert learner.lr == pytest.approx(rate) or not learner._rate.settled


def test_a_rate_that_bounds_nothing_is_learned_up_to_its_ceiling() -> None:
    """Adafactor's steps grow with its rate up to 1 / sqrt(t): here no rate breaks it."""
    learner = quadratic([1.0, 1.0], lambda p: torch.optim.Adafactor(p, lr=0.1), steps=100)
    assert all(0 < decision.lr <= 1.0 for decision in learner.history), learner.history


def test_where_no_steps_are_taken_training_goes_on_with_the_rate_given(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = type("Silent", (torch.optim.SGD,), {"step": lambda self, closure=None: None})
    monkeypatch.setitem(kinds._KINDS, silent, kinds.OptimizerKind(lambda settings: sk.UpdateRule(share=0.0)))
    with pytest.warns(sk.SharpkitWarning, match="the Silent takes no steps yet"):
        learner = quadratic([1.0, 1.0], lambda p: silent(p, lr=0.05), steps=100)
    assert learner.lr == 0.05


def test_where_nothing_can_be_measured_training_goes_on_with_the_rate_given() -> None:
    model = network()
    optimizer = sgd(model.parameters(), lr=0.05)
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=100, decay="constant")
    for _ in range(21):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sk.SharpkitWarning)
            learner.step({"not": "a pair"})
    assert "goes on with the rate given, 0.05" in str(learner.history)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_snapshots_restore_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = adamw(model.parameters())
    step = lambda: (optimizer.zero_grad(), F.cross_entropy(model(X), Y).backward(), optimizer.step())  # noqa: E731
    step()
    snapshot = Snapshot(model, optimizer)
    kept = [t.clone() for t in (*model.parameters(), *model.buffers(), *(s["exp_avg"] for s in optimizer.state.values()))]
    step()
    optimizer.param_groups[0]["lr"] = 0.123
    snapshot.restore(model, optimizer)
    now = [*model.parameters(), *model.buffers(), *(s["exp_avg"] for s in optimizer.state.values())]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.123


def test_losses_that_fall_or_scatter_are_not_lost_and_those_that_rise_are() -> None:
    noise = torch.Generator().manual_seed(0)

    def watch(course: Any) -> LossWatch:
        found = LossWatch()
        for step in range(200):
            found.add(course(step) * (1 + 0.3 * float(torch.randn(1, generator=noise))))
        return found

    assert not watch(lambda t: 2.0 * math.exp(-t / 50)).is_lost
    assert not watch(lambda t: 2.0).is_lost
    assert watch(lambda t: 2.0 * math.exp(-t / 50) if t < 150 else 2.0).is_lost
    assert watch(lambda t: 2.0 if t < 150 else 20.0).is_lost
    assert watch(lambda t: math.nan if t == 199 else 1.0).is_lost
    assert not watch(lambda t: math.nan if t == 190 else 1.0).is_lost, "a step that a gradient scaler skipped"


# -- resuming, settings ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_resumed_run_is_identical_to_an_uninterrupted_one(make: Any, tmp_path: Any) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, sk.CurvatureLearner]:
        model = network(dropout=0.1)
        optimizer = make(model.parameters())
        schedule = lambda o: torch.optim.lr_scheduler.StepLR(o, 30, gamma=0.7)  # noqa: E731
        return model, optimizer, sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=100, schedule=schedule)

    torch.manual_seed(0)
    model, optimizer, learner = fresh()
    train(model, optimizer, learner, steps=45)
    torch.save([model.state_dict(), optimizer.state_dict(), learner.state_dict(), torch.get_rng_state()], tmp_path / "saved.pt")
    expected = train(model, optimizer, learner, steps=55, start=45)
    history = str(learner.history)
    kept: list[Tensor] = [p.detach().clone() for p in model.parameters()]

    model, optimizer, learner = fresh()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    for thing, state in zip((model, optimizer, learner), saved[:3], strict=True):
        thing.load_state_dict(state)
    torch.set_rng_state(saved[3])
    assert train(model, optimizer, learner, steps=55, start=45) == expected
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    assert str(learner.history) == history


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 3}, "total_steps must be"),
        ({"safety": 1.5}, "safety must be a number between"),
        ({"interval": "often"}, "interval must be"),
        ({"decay": "exponential"}, "or one of 'linear', 'cosine', 'constant'"),
        ({"momentum": "auto"}, "momentum must be"),
        ({"bulk": "mode"}, "or one of 'median', 'weighted median', 'mean'"),
        ({"bulk": 0.5}, "a number above 1"),
    ],
)
def test_settings_without_sense_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        sk.CurvatureLearner(sgd(model.parameters()), model=model, loss=F.cross_entropy, **{"total_steps": 100, **settings})


def test_polyak_for_adam_and_an_existing_scheduler_are_refused_with_the_remedy() -> None:
    model = network()
    optimizer = adamw(model.parameters())
    with pytest.raises(ValueError, match="for SGD"):
        sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=100, momentum="polyak")
    asgd = torch.optim.ASGD(model.parameters())
    with pytest.raises(ValueError, match="for SGD"):
        sk.CurvatureLearner(asgd, model=model, loss=F.cross_entropy, total_steps=100, momentum="polyak")
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    with pytest.raises(TypeError, match="lambda o: torch"):
        sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=100, schedule=scheduler)
    with pytest.raises(sk.UnsupportedError, match="Rprop has no linear rule"):
        sk.CurvatureLearner(torch.optim.Rprop(model.parameters()), model=model, loss=F.cross_entropy, total_steps=100)


def test_the_pace_measures_more_in_longer_runs_and_keeps_to_its_share() -> None:
    for total in (200, 2000, 20_000):
        pace, counts, step = Pace(total, start=0.02, warmup=0.1, budget=0.05, interval="auto", adaptive=False), [], 0
        assert pace.growth ** (0.1 * total) == pytest.approx(50)
        while step < total:
            step += 1
            if pace.is_due(step):
                counts.append(step)
                pace.plan(step, settled=step > 0.15 * total, growing=step < 0.1 * total)
        assert 9.3 + 7.3 * (len(counts) - 1) <= max(0.05 * total, 9.3 + 5 * 7.3)
        assert len(counts) >= 5 and counts[-1] < total


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_groups_that_the_loss_does_not_reach_keep_their_ratio_and_hold_nothing_up(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"unused": nn.Linear(3, 3), "first": nn.Linear(6, 4), "last": nn.Linear(4, 1)})
    x, y = torch.randn(40, 6), torch.randn(40, 1)
    groups = [{"params": model[name].parameters(), "lr": lr} for name, lr in (("unused", 1e-3), ("first", 1e-2), ("last", 1e-2))]
    optimizer = make(groups, lr=1e-2)

    def closure(m: Any, batch: Any) -> Tensor:
        return F.mse_loss(m["last"](m["first"](batch[0]).tanh()), batch[1])

    learner = sk.CurvatureLearner(optimizer, model=model, closure=closure, total_steps=60, per_group=True)
    for _ in range(30):
        optimizer.zero_grad()
        closure(model, (x, y)).backward()
        optimizer.step()
        learner.step((x, y))
    assert all(not decision.reason.startswith("not measured") for decision in learner.history)
    unused, first, last = (group["lr"] for group in optimizer.param_groups)
    assert unused == pytest.approx(0.1 * (first * last) ** 0.5), "at its given share of what the others have in the geometric mean"
    assert 0.01 <= first / last <= 100
