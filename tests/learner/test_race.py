"""The race: equal budgets with all searches paid for, known best rates, determinism, what is said and drawn."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import Tensor, nn

import sharpkit as sk
from sharpkit._results import to_json
from sharpkit.learner import baselines
from sharpkit.learner.race import RaceResult, default_rates, race
from sharpkit.training_run import RaceProblem, RaceRun

mpl.use("Agg")

STEPS = 120
CURVATURES = torch.tensor([[4.0, 2.0, 1.0]])  # gradient descent is stable below 2 / 4
RATES = [0.01, 0.1, 0.4, 0.6]


def quadratic_model(seed: int) -> nn.Module:
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def quadratic_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """f = (1/2) sum c_i w_i^2, the same on every batch."""
    return 0.5 * (batch * model.weight.square()).sum()  # type: ignore[operator, no-any-return]


def sgd(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def quadratic() -> RaceProblem:
    return RaceProblem(quadratic_model, sgd, [CURVATURES], closure=quadratic_loss)


X = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()


def network(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 3))


def classification(optimizer: Any = sgd) -> RaceProblem:
    batches = list(zip(X[:64].split(16), Y[:64].split(16), strict=True))
    return RaceProblem(network, optimizer, batches, nn.functional.cross_entropy, test_data=[(X[64:], Y[64:])])


OURS = (baselines.LEARNER, baselines.SUGGESTED)


@pytest.fixture(scope="module")
def result() -> RaceResult:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seen: list[sk.Progress] = []
    raced = race(classification(), max_gradients=STEPS, seeds=2, rates=[0.01, 0.1, 1.0], callback=seen.append)
    assert torch.equal(before, torch.get_rng_state()), "the global random state was touched"
    assert len(seen) == len(raced.finishes) and {progress.unit for progress in seen} == {"runs"}
    assert seen[-1].done == seen[-1].expected == 2 * len(seen) and seen[0].text.startswith("learner: training loss")
    return raced


# -- the budget ------------------------------------------------------------------------------------------------------------------
def counted(problem: RaceProblem) -> tuple[RaceProblem, list[int]]:
    """The problem, and where backward passes through its loss are counted."""
    passes = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(output, target)
        if value.requires_grad:
            value.register_hook(lambda _: passes.__setitem__(0, passes[0] + 1))
        return value

    return RaceProblem(problem.model, problem.optimizer, problem.data, loss), passes


def test_every_entrant_spends_the_same_gradients(result: RaceResult) -> None:
    a_measurement = 1 + 2 * 6  # the learner's last may begin with one gradient left
    for finish in result.finishes:
        most = STEPS + (a_measurement if finish.name in OURS else 0)
        assert all(spent <= most for spent in finish.spent), finish.name
        if not finish.lost:
            assert all(spent >= STEPS for spent in finish.spent), finish.name
        assert all(0 <= searched < spent for searched, spent in zip(finish.searched, finish.spent, strict=True))
        assert (finish.searched == [0, 0]) == (finish.given or finish.name in ("schedule-free", "Prodigy, cosine")), finish.name


def test_the_gradients_counted_are_those_made() -> None:
    problem, passes = counted(classification())
    started, _ = baselines.entrants(problem, [0.01, 0.1, 1.0])
    for entrant in started:
        run = RaceRun(problem, seed=0, max_gradients=STEPS, optimizer=entrant.optimizer)
        passes[0] = 0
        entrant.run(run)
        if entrant.name in OURS:  # a product passes twice, once for the gradient's graph and once through it
            assert STEPS * 0.5 < passes[0] <= 1.3 * run.spent
        else:
            assert passes[0] == run.spent, entrant.name


def test_a_suggested_rate_is_paid_for_and_trained_to() -> None:
    problem, passes = counted(classification())
    run = RaceRun(problem, seed=0, max_gradients=400)
    assert run.optimizer.param_groups[0]["lr"] == 1.0
    rate = baselines.suggested(run)
    assert run.searched >= 90 and 400 <= run.spent <= 400 + 1 + 2 * 6
    assert max(loss for _, loss in run.curve[-20:]) < run.curve[0][1] and run.curve[0][0] > 80, "nothing was trained before"
    assert 0 < rate < 10 and 0.5 < passes[0] / run.spent <= 1.3


# -- rates -----------------------------------------------------------------------------------------------------------------------
def test_on_a_quadratic_searches_find_the_rate_that_is_known_to_be_best() -> None:
    result = race(quadratic(), max_gradients=STEPS, seeds=[0], rates=RATES)
    # constant steps leave (1 - rate c)^T of each coordinate: 0.4 is best of the grid, 0.6 > 2/4 diverges
    for rate in (0.01, 0.1, 0.4):
        left = (1 - rate * CURVATURES[0].double()) ** STEPS
        expected = 0.5 * float((CURVATURES[0].double() * left.square()).sum())
        # float32 rounds each of the 120 factors by 6e-8, and the smallest losses to nothing
        assert result[f"constant, lr {rate:.3g}"].train_loss == pytest.approx(expected, rel=1e-3, abs=1e-30)
    assert result["constant, lr 0.6"].lost == 1 and result["constant, lr 0.6"].spent[0] < STEPS
    assert result["grid search, then cosine"].rates == [0.4]
    for name in ("range test (minimum/10), then cosine", "range test (steepest/10), then cosine"):
        assert 0.001 < result[name].rates[0] < 0.5
    assert result["learner"].rates[0] == pytest.approx(0.25 * 2 / 4, rel=0.05)  # its share of the limit, measured to a few per cent
    if importlib.util.find_spec("optuna"):
        assert 0.05 < result["Bayesian search in stages"].rates[0] < 0.5


def test_trials_leave_no_trace() -> None:
    run = RaceRun(classification(), seed=0, max_gradients=STEPS)
    run.train(0.1, 3, schedule=lambda z: 1.0)
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    scores = [baselines._trial(run, rate, 8) for rate in (0.1, 0.3, 0.1)]
    assert scores[0] == scores[2] != scores[1], "trials are on the same batches"
    assert all(torch.equal(t, before[name]) for name, t in run.model.state_dict().items())
    assert (run.position, run.spent, run.searched, len(run.curve)) == (3, 27, 24, 3)


def test_default_rates_suit_the_optimizer() -> None:
    assert default_rates(quadratic())[::4] == [1e-3, 0.1, 10.0]
    assert default_rates(classification(lambda p, lr: torch.optim.AdamW(p, lr=lr)))[::4] == [1e-5, 1e-3, 0.1]


# -- the result ------------------------------------------------------------------------------------------------------------------
def test_a_race_is_deterministic(result: RaceResult) -> None:
    problem = classification()
    started, _ = baselines.entrants(problem, [0.01, 0.1, 1.0])
    for entrant in started:
        if entrant.given and entrant.name != "cosine, lr 0.1":
            continue
        run = RaceRun(problem, seed=1, max_gradients=STEPS, optimizer=entrant.optimizer)
        again = (entrant.run(run), run.final_loss(problem.data))
        assert again == (result[entrant.name].rates[1], result[entrant.name].train_losses[1]), entrant.name


def test_the_table_is_sorted_and_comes_back_from_json(result: RaceResult) -> None:
    losses = [f.test_loss for f in result.finishes]
    assert losses == sorted(losses) and result.findings()[0].startswith(f"Lowest test loss: {result.finishes[0].name}")
    curve = result[baselines.LEARNER].curve
    assert (
        len(result[baselines.LEARNER].spikes) == 2
        and 0 < result[baselines.LEARNER].spikes[0] <= 1.2 * max(y for _, y in curve) / curve[0][1]
    )
    back = RaceResult.from_dict(json.loads(to_json(result.to_dict())))
    assert back.finishes == result.finishes and back.findings() == result.findings() and str(back) == str(result)
    lines = str(result).splitlines()
    assert lines[2].startswith(result.finishes[0].name) and "the rate was given" in str(result)
    assert all(math.isfinite(f.test_loss) for f in result.finishes if not f.lost)


def test_the_picture_shows_every_way(result: RaceResult) -> None:
    ax = result.plot()
    assert "gradients" in ax.get_xlabel() and "loss" in ax.get_ylabel()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"learner", "grid search, then cosine"} <= set(labels) and any("the best of them" in label for label in labels)


def test_adam_and_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = classification(lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.01))
    result = race(problem, max_gradients=100, seeds=[0], rates=[1e-3, 1e-2])
    assert all(math.isfinite(f.train_loss) for f in result.finishes)
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name in ("optuna", "schedulefree", "prodigyopt") else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    _, skipped = baselines.entrants(problem, [1e-3, 1e-2])
    assert set(skipped) == {"Bayesian search in stages", "schedule-free", "Prodigy, cosine"}
    assert skipped["Bayesian search in stages"] == "optuna is not installed: pip install 'sharpkit[race]'"


def test_what_another_package_raises_does_not_end_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> float:
        raise RuntimeError("no kernel today")

    monkeypatch.setattr(baselines, "bayesian", fails)
    found = importlib.util.find_spec

    def only_optuna(name: str, package: str | None = None) -> Any:
        return True if name == "optuna" else None if name in ("schedulefree", "prodigyopt") else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", only_optuna)
    result = race(quadratic(), max_gradients=100, seeds=[0], rates=[0.1, 0.2])
    assert result.skipped["Bayesian search in stages"] == "it raised RuntimeError: no kernel today"


def test_arguments_that_make_no_sense_are_named() -> None:
    for wrong, said in (
        ({"max_gradients": 50}, "of at least 100"),
        ({"seeds": []}, "at least one"),
        ({"rates": [0.1]}, "two different positive"),
    ):
        with pytest.raises(ValueError, match=said):
            race(quadratic(), **wrong)
    with pytest.raises(TypeError, match=r"model must be a function called as model\(seed\)"):
        RaceProblem(nn.Linear(1, 1).weight, sgd, [X])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must return a torch optimizer"):
        race(RaceProblem(quadratic_model, lambda p, lr: None, [X], closure=quadratic_loss), rates=[0.1, 1.0])  # type: ignore[arg-type, return-value]
    with pytest.raises(sk.UnsupportedError):
        race(RaceProblem(quadratic_model, lambda p, lr: torch.optim.Rprop(p, lr=lr), [CURVATURES], closure=quadratic_loss))
