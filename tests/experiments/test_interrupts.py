"""Ctrl-C in the midst of a call leaves nothing changed: an excerpt of the experiment."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from experiments.interrupts import Training, random_instants, swept_instants


@pytest.fixture
def training() -> Iterator[Training]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    yield Training()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["eigenpairs", "monitor.step"])
def test_a_signal_at_a_bytecode_of_the_guard_changes_nothing(training: Training, name: str) -> None:
    row = swept_instants(training, name, instants=16)
    assert row["changed"] == {}
    assert row["same_answer_afterwards"]
    assert row["interrupted"] >= 12


@pytest.mark.filterwarnings("ignore")
def test_a_signal_at_a_random_instant_changes_nothing(training: Training) -> None:
    row = random_instants(training, "trace", signals=8, seed=1)
    assert row["changed"] == {}
    assert row["same_answer_afterwards"]
