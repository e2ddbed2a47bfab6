"""Who races: the learner, rates that were given, and ways to find a rate that pay for it out of the same number of gradients."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sharpkit._errors import ObjectiveError, UnsupportedError
from sharpkit.learner.learner import CurvatureLearner
from sharpkit.learner.schedules import DECAYS, Schedule
from sharpkit.learner.suggest import suggest_learning_rate
from sharpkit.objective.guard import random_states_kept, silenced
from sharpkit.objective.objective import Objective
from sharpkit.optimizers import averaging, is_adaptive, weight_decay
from sharpkit.training_run import MakeOptimizer, RaceProblem, RaceRun

LEARNER, SUGGESTED = "learner", "suggested rate, then learner"
MISSING = "not installed: pip install 'sharpkit[race]'"
_SHARE = 0.05  # of its steps that the learner may spend on measuring; by judgement, the default of CurvatureLearner
# Nothing in the methods says how much of a run a good rate is worth.
_RAMP = 0.1  # of the gradients for a range test; by judgement
_SEARCH = 0.5  # of the gradients for trials; by judgement
_LEAST_RAMP = 20  # steps of a range test, by judgement: fewer have no slope
_LEAST_SUGGESTED = 300  # gradients of a run, by judgement: a suggestion takes 100
_STAGES, _TRIALS, _LEAST_TRIAL = 3, 10, 8  # ten trials as in AutoLRS; stages, and the least steps of a trial, by judgement


@dataclass(frozen=True)
class Entrant:
    """A way to train."""

    name: str  # name in the table
    run: Callable[[RaceRun], float]  # trains until no gradients remain and returns the rate used
    given: bool = False  # whether the rate was given; finding it would have cost the runs with the other rates
    foreign: bool = False  # whether another package does the work; what it raises does not end the race
    optimizer: MakeOptimizer | None = None  # params -> its own optimizer, if it does not use the problem's


def entrants(problem: RaceProblem, rates: Sequence[float]) -> tuple[list[Entrant], dict[str, str]]:
    """All that can start at the rates of an increasing grid, and why others cannot; the problem's optimizer decides between variants."""
    starting = [Entrant(LEARNER, learn), Entrant(SUGGESTED, suggested)]
    for name in ("constant", "cosine"):
        starting += [Entrant(f"{name}, lr {rate:.3g}", partial(_given, rate=rate, schedule=DECAYS[name]), given=True) for rate in rates]
    starting.append(Entrant("grid search, then cosine", partial(grid_search, rates=rates)))
    for rule in ("steepest/10", "minimum/10"):
        starting.append(Entrant(f"range test ({rule}), then cosine", partial(_ranged, rates=rates, rule=rule)))
    skipped = {}
    if importlib.util.find_spec("optuna") is not None:
        starting.append(Entrant("Bayesian search in stages", lambda run: bayesian(run, rates[0], rates[-1]), foreign=True))
    else:
        skipped["Bayesian search in stages"] = f"optuna is {MISSING}"
    for name, package, make in (("schedule-free", "schedulefree", _schedule_free), ("Prodigy, cosine", "prodigyopt", _prodigy)):
        if importlib.util.find_spec(package) is not None:
            starting.append(make(name, problem))
        else:
            skipped[name] = f"{package} is {MISSING}"
    return starting, skipped


def learn(run: RaceRun, *, peak: float | None = None) -> float:
    """sharpkit's learner; a measurement is charged one gradient for its graph and two for each product."""
    begun = run.spent

    def decay(_: float) -> float:  # by gradients, not by steps: how many steps its measurements leave is not known before
        return max(0.0, 1 - (run.spent - begun) / (run.max_gradients - begun))

    learner = CurvatureLearner(
        run.optimizer,
        model=run.model,
        loss=run.problem.loss,
        closure=run.problem.closure,
        total_steps=max(20, round(run.remaining / (1 + _SHARE))),
        budget=_SHARE,
        decay=decay,
        peak=peak,
        process_group=False,
        seed=run.seed,
    )
    while run.remaining > 0:
        batch = run.next_batch()
        decision = learner.step(batch, loss=run.step(batch))
        if decision is not None and decision.num_matvecs:
            run.charge(1 + 2 * decision.num_matvecs)
    return learner.lr


def suggested(run: RaceRun) -> float:
    """The learner, to a peak that a tenth of the gradients suggested; by curvature alone where the run is short or none is suggested."""
    problem = run.problem
    if run.max_gradients < _LEAST_SUGGESTED:
        return learn(run)
    try:
        objective = Objective(run.model, problem.batches, loss=problem.loss, closure=problem.closure, process_group=False)
        size = max(1, round(sum(objective.batch_lengths) / objective.num_batches))
        found = suggest_learning_rate(objective, run.optimizer, batch_size=size, steps=run.max_gradients, seed=run.seed)
    except (ObjectiveError, UnsupportedError):
        return learn(run)
    run.charge(math.ceil(found.gradients))
    return learn(run, peak=float(found))


def _given(run: RaceRun, *, rate: float, schedule: Schedule) -> float:
    run.train(rate, run.remaining, schedule=schedule)
    return rate


def grid_search(run: RaceRun, rates: Sequence[float]) -> float:
    """Half of the gradients for one short trial of each rate from the start, the rest for a run with the best."""
    steps = max(1, int(_SEARCH * run.max_gradients / len(rates)))
    best = min(rates, key=lambda rate: _trial(run, rate, steps))
    run.train(best, run.remaining, schedule=DECAYS["cosine"])
    return best


def _trial(run: RaceRun, rate: float, steps: int) -> float:
    """Mean loss of a trial's second half; the steps that a diverged trial did not make are not charged."""
    with run.trial():
        losses = run.train(rate, steps, schedule=DECAYS["constant"])
        tail = losses[-max(steps // 2, 1) :]
        return math.inf if run.diverged else sum(tail) / len(tail)


def _ranged(run: RaceRun, *, rates: Sequence[float], rule: str) -> float:
    rate = range_test(run, rates[0] / 10, rates[-1] * 10, rule=rule)
    run.train(rate, run.remaining, schedule=DECAYS["cosine"])
    return rate


def range_test(run: RaceRun, low: float, high: float, *, rule: str) -> float:
    """The rate grows exponentially, one step each; the loss says which to take.

    Args:
        run: the run; a tenth of its gradients is spent, at least 20, fewer if the loss quadruples before the end.
        low, high: first and last rate.
        rule: ``"steepest/10"`` for a tenth of the rate at which the smoothed loss falls fastest against log rate; ``"minimum/10"`` for a
            tenth of the rate at which it is lowest.

    References:
        Smith (2017), arXiv 1506.01186, section 3.3.
    """
    steps = min(max(_LEAST_RAMP, round(_RAMP * run.max_gradients)), run.max_gradients // 2)
    rates: list[float] = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    keep = 1 - 10 / steps if steps > _LEAST_RAMP else 0.5  # smoothed over a tenth of the ramp, by judgement
    smooth: list[float] = []
    mean = 0.0
    with run.trial():
        for i, rate in enumerate(rates):
            run.set_rate(rate)
            mean = keep * mean + (1 - keep) * run.step()
            smooth.append(mean / (1 - keep ** (i + 1)))  # the running mean starts from 0, which this corrects
            if run.diverged or not smooth[-1] <= 4 * max(min(smooth), 1e-12):
                smooth.pop()
                break
    if rule == "minimum/10":
        return rates[min(range(len(smooth)), key=lambda i: smooth[i])] / 10
    falls = [smooth[i + 1] - smooth[i - 1] for i in range(1, len(smooth) - 1)] or [0.0]
    return rates[1 + min(range(len(falls)), key=lambda i: falls[i])] / 10


def bayesian(run: RaceRun, low: float, high: float) -> float:
    """Stages as in AutoLRS: ten short trials by a Gaussian process from where training stands, then as many steps with the best.

    Returns:
        the rate of the first stage.

    References:
        Jin et al. (2021), arXiv 2105.10762; there the loss of a trial is extrapolated, here it is taken as it is.
    """
    per_stage = run.max_gradients // _STAGES
    trials = max(4, min(_TRIALS, int(_SEARCH * per_stage / _LEAST_TRIAL)))
    steps = max(1, int(_SEARCH * per_stage / trials))
    first = math.nan
    for stage in range(_STAGES):
        rate = _suggested(run, low, high, trials=trials, steps=steps, seed=run.seed + 101 * stage)
        first = rate if stage == 0 else first
        # trials that diverged early left some of their share: the last stage gets it
        until = per_stage - trials * steps if stage < _STAGES - 1 else run.remaining
        run.train(rate, until, schedule=DECAYS["constant"])
        if run.diverged:
            break
    return first


def _suggested(run: RaceRun, low: float, high: float, *, trials: int, steps: int, seed: int) -> float:
    import optuna

    # a diverged trial's loss would flatten the Gaussian process everywhere else
    worst = 10 * abs(run.losses[0]) if run.losses and math.isfinite(run.losses[0]) else 1e3
    before = optuna.logging.get_verbosity()
    with silenced(Warning), random_states_kept():  # optuna's warnings on its experimental samplers, and what it draws
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=max(2, trials // 3)))
            for _ in range(trials):
                trial = study.ask()
                loss = _trial(run, trial.suggest_float("lr", low, high, log=True), steps)
                study.tell(trial, loss if loss < worst else worst)
        finally:
            optuna.logging.set_verbosity(before)
    return float(study.best_params["lr"])


def _schedule_free(name: str, problem: RaceProblem) -> Entrant:
    """Defazio et al. (2024), arXiv 2405.15682, with its package's own rates and the problem's weight decay."""

    def make(params: Any) -> torch.optim.Optimizer:
        import schedulefree

        like = _sample(problem)
        betas, decay = averaging(like), weight_decay(like)
        if betas is not None:
            made: torch.optim.Optimizer = schedulefree.AdamWScheduleFree(params, betas=betas, weight_decay=decay, foreach=False)
        else:
            made = schedulefree.SGDScheduleFree(params, weight_decay=decay, foreach=False)
        made.train()  # type: ignore[attr-defined]
        return made

    return Entrant(name, partial(_own_rate, schedule=DECAYS["constant"]), foreign=True, optimizer=make)


def _prodigy(name: str, problem: RaceProblem) -> Entrant:
    """Mishchenko and Defazio (2023), arXiv 2306.06101, with the problem's weight decay, always Adam-like."""

    def make(params: Any) -> torch.optim.Optimizer:
        import prodigyopt

        made: torch.optim.Optimizer = prodigyopt.Prodigy(params, weight_decay=weight_decay(_sample(problem)))
        return made

    return Entrant(name, partial(_own_rate, schedule=DECAYS["cosine"]), foreign=True, optimizer=make)


def _own_rate(run: RaceRun, *, schedule: Schedule) -> float:
    run.train(1.0, run.remaining, schedule=schedule)  # times the package's own
    distance = run.optimizer.param_groups[0].get("d")  # Prodigy's estimate of the rate
    return run.own_rate if distance is None else float(distance)


def _sample(problem: RaceProblem) -> torch.optim.Optimizer:
    """The problem's optimizer over a single parameter, to read its kind and settings from."""
    return problem.optimizer([torch.nn.Parameter(torch.zeros(1))], 1.0)


def has_adaptive_optimizer(problem: RaceProblem) -> bool:
    """Whether the problem's optimizer scales gradients by their own size.

    Raises:
        UnsupportedError: an optimizer that the learner does not know.
    """
    return is_adaptive(_sample(problem))
