"""Every optimizer with every call that asks about one: a number, or a refusal that names it, says why and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkit as sk

Run = tuple[nn.Module, tuple[Tensor, Tensor], torch.optim.Optimizer]
NO_RULE, MEASURE, GENERALIZED = "has no linear rule", r"sharpkit\.measure\(", r"sharpkit\.generalized_sharpness\("
UNKNOWN = r"is not known.*register it with sharpkit\.register_optimizer\("
LIMITS = ("stable_learning_rate", "measure", "monitor", "learner", "learning_rate_curve")
ALONG = ("critical_learning_rate", "directional_sharpness")


def refusals(limits: str, along: str = "") -> dict[str, str]:
    return {**dict.fromkeys(LIMITS, limits), **(dict.fromkeys(ALONG, along) if along else {})}


UNSETTLED = {"learning_rate_curve": f"divides gradients by does not follow.*{MEASURE}"}
TURNING = dict.fromkeys(ALONG, f"not proportional to its learning rate here.*{MEASURE}")
# name or package and name -> calls that are refused, and with what; all others give a number
REFUSED: dict[str, dict[str, str]] = {
    **{name: {} for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "RMSprop", "ASGD")},
    **dict.fromkeys(("Adamax", "Adadelta", "Adafactor"), UNSETTLED),
    "Rprop": refusals(f"{NO_RULE}.*{GENERALIZED}", f"not proportional to its learning rate here.*{GENERALIZED}"),
    "Muon": refusals(f"{NO_RULE}.*{GENERALIZED}"),
    "LBFGS": refusals(f"{NO_RULE}.*measure without optimizer=", "several times in a step.*use another"),
    "SparseAdam": refusals(f"{NO_RULE}.*use Adam", "failed on a copy.*consider Adam instead"),
    "schedulefree.SGDScheduleFree": TURNING,
    "schedulefree.AdamWScheduleFree": TURNING,
    "schedulefree.RAdamScheduleFree": TURNING,
    "prodigyopt.Prodigy": UNSETTLED,
    "lion_pytorch.Lion": refusals(f"{NO_RULE}.*{GENERALIZED}"),
    "pytorch_optimizer.Lion": refusals(f"{NO_RULE}.*{GENERALIZED}"),
    "pytorch_optimizer.Lamb": refusals(UNKNOWN),
    "pytorch_optimizer.LARS": refusals(UNKNOWN, "not proportional to its learning rate here.*use another optimizer"),
    "pytorch_optimizer.StableSPAM": refusals(UNKNOWN, "not proportional to its learning rate here.*use another optimizer"),
    "pytorch_optimizer.Prodigy": refusals(UNKNOWN),
    "pytorch_optimizer.ScheduleFreeSGD": refusals(UNKNOWN, "not proportional to its learning rate here.*use another optimizer"),
}


def run_of(name: str) -> Run:
    """A network without biases, as Muon takes no vectors, after ten steps of its optimizer."""
    package, _, cls = name.rpartition(".")
    module = pytest.importorskip(package) if package else torch.optim
    if not hasattr(module, cls):
        pytest.skip(f"this release has no {cls}")  # torch's Muon came with 2.9, packages drop and add classes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False)).double()
        inputs = torch.randn(32, 3, dtype=torch.float64)
    batch = inputs, inputs[:, :1] * inputs[:, 1:2]
    optimizer = getattr(module, cls)(model.parameters(), lr=1.0 if cls == "Prodigy" else 0.01)
    if hasattr(optimizer, "train"):
        optimizer.train()
    if cls not in ("LBFGS", "SparseAdam"):
        for _ in range(200 if cls == "Prodigy" else 10):  # its d, and so eps d, still jumps in the first steps
            train(model, batch, optimizer)
    return model, batch, optimizer


def train(
    model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, look: Callable[[Any], Any] | None = None
) -> None:
    optimizer.zero_grad()
    F.mse_loss(model(batch[0]), batch[1]).backward()
    if look is not None:
        look(batch)
    if type(optimizer).__name__ not in ("LBFGS", "SparseAdam"):
        optimizer.step()


def objective_of(run: Run) -> sk.Objective:
    return sk.Objective(run[0], run[1], loss=F.mse_loss)


def stable_learning_rate(run: Run) -> float:
    return float(sk.stable_learning_rate(1.0, optimizer=run[2]))


def measure(run: Run) -> float:
    return float(sk.measure(objective_of(run), optimizer=run[2], num_probes=3, num_steps=8).stable_lr)


def critical_learning_rate(run: Run) -> float:
    critical = sk.critical_learning_rate(objective_of(run), run[2])
    return critical.value if critical.outcome == "found" else 1.0  # so short or so good a step has none, which is an answer too


def directional_sharpness(run: Run) -> float:
    return abs(sk.directional_sharpness(objective_of(run), run[2]))


def monitor(run: Run) -> float:
    """The preconditioned curvature's limit; a refusal stands in the record, as training must go on."""
    model, batch, optimizer = run
    watching = sk.Monitor(model, optimizer, loss=F.mse_loss, every=1, metrics=["preconditioned_lambda_max"])
    for _ in range(3):
        train(model, batch, optimizer, watching.step)
    record = watching.history[-1]
    if failed := record.failed.get("preconditioned_lambda_max"):
        raise sk.UnsupportedError(failed)
    limit = record.values["preconditioned_lambda_max"].limit
    assert limit is not None
    return limit


def learner(run: Run) -> float:
    model, batch, optimizer = run
    learning = sk.CurvatureLearner(optimizer, model=model, loss=F.mse_loss, total_steps=20)
    for _ in range(10):
        train(model, batch, optimizer, learning.step)
    return float(optimizer.param_groups[0]["lr"])


def learning_rate_curve(run: Run) -> float:
    return sk.learning_rate_curve(objective_of(run), run[2], batch_sizes=[8, 16], pilot=10, calibrate=False).limits[0][1]


CALLS = (stable_learning_rate, measure, critical_learning_rate, directional_sharpness, monitor, learner, learning_rate_curve)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::sharpkit.ConvergenceWarning", "ignore::UserWarning")
def test_every_call_answers_or_refuses_with_the_reason_and_the_remedy(name: str, call: Callable[[Run], float]) -> None:
    run, why = run_of(name), REFUSED[name].get(call.__name__)
    if why is None:
        value = call(run)
        capped = name == "Adafactor" and call is stable_learning_rate  # its rate acts up to 1 / sqrt(t)
        assert value > 0 and (math.isfinite(value) or capped)
        return
    with pytest.raises(sk.UnsupportedError) as refusal:
        call(run)
    text = str(refusal.value)
    assert type(run[2]).__name__ in text and re.search(why, text), text
