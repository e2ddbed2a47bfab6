"""An excerpt of the experiment: real optimizers with three groups that differ in everything break within 1 % of the stated limit."""

from __future__ import annotations

import pytest
import torch

import sharpkit as sk
from experiments.optimizer_limits import NAMES, PACKAGES, REFUSED, Frozen, stated

pytestmark = pytest.mark.usefixtures("optimizers_as_known")


def installed(name: str) -> None:
    base = name.split()[0]
    if not hasattr(pytest.importorskip(PACKAGES[name]), base):
        pytest.skip(f"this release has no {base}")  # torch's Muon came with 2.9, packages drop and add classes


@pytest.mark.parametrize("spectrum", ["even", "four decades"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_three_groups_break_within_one_per_cent_of_the_stated_limit(name: str, spectrum: str) -> None:
    """A step of the real optimizer, its second moments held, as a matrix: its spectral radius passes 1 there."""
    installed(name)
    limit = stated(name, "three groups", spectrum)
    below, above = (Frozen(name, "three groups", spectrum, factor=factor * limit).spectral_radius() for factor in (0.99, 1.01))
    assert below <= 1 + 1e-9 < 1.001 < above


@pytest.mark.parametrize("kind", ["one group", "three groups"])
@pytest.mark.parametrize("name", REFUSED)
def test_those_without_a_linear_rule_are_refused_by_name(name: str, kind: str) -> None:
    installed(name)
    if (name, kind) == ("LBFGS", "three groups"):
        pytest.skip("torch makes no LBFGS with several groups")  # its __init__ refuses them, so there is no such step to look at
    with pytest.raises(
        sk.UnsupportedError, match=rf"{name} has no linear rule|stability limit of {name} is not known.*register_optimizer\({name}"
    ):
        stated(name, kind)


def test_the_table_has_every_optimizer_of_torch() -> None:
    classes = {name for name, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)}
    assert classes - {"Optimizer"} <= {name.split()[0] for name in NAMES}
