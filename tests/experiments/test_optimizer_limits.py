"""An excerpt of the experiment: real optimizers with three groups that differ in everything break within 1 % of the stated limit."""

from __future__ import annotations

import pytest
import torch

import sharpkit as sk
from experiments.optimizer_limits import _NAMES, breaks, make

KNOWN = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad")


@pytest.mark.parametrize("name", [name for name in _NAMES if name.split()[0] in KNOWN])
def test_three_groups_break_within_one_per_cent_of_the_stated_limit(name: str) -> None:
    model, optimizer = make(name, "three groups")
    objective = sk.Objective(model, torch.ones(1, dtype=torch.float64), closure=lambda m, b: m(b))
    limit = sk.measure(objective, optimizer=optimizer, num_probes=3, num_steps=12, tol=1e-4)
    factor = float(limit.stable_lr) / optimizer.param_groups[0]["lr"]
    assert not breaks(name, "three groups", 0.99 * factor, steps=400)
    assert breaks(name, "three groups", 1.01 * factor, steps=400)


@pytest.mark.parametrize("kind", ["one group", "three groups"])
@pytest.mark.parametrize("name", [name for name in _NAMES if name.split()[0] not in KNOWN])
def test_all_others_are_refused_by_name(name: str, kind: str) -> None:
    if (name, kind) == ("LBFGS", "three groups") or not hasattr(torch.optim, name):
        pytest.skip("torch makes no LBFGS with several groups, and an older one has not every class")
    model, optimizer = make(name, kind)
    objective = sk.Objective(model, torch.ones(1, dtype=torch.float64), closure=lambda m, b: m(b))
    with pytest.raises(sk.UnsupportedError, match=f"stability limit of {name} is not known"):
        sk.measure(objective, optimizer=optimizer)


def test_the_table_has_every_optimizer_of_torch() -> None:
    classes = {name for name, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)}
    assert classes - {"Optimizer"} <= {name.split()[0] for name in _NAMES}
