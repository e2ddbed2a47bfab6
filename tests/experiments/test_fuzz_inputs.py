"""An excerpt of experiments/fuzz_inputs.py: no input has a raw error, none is accepted without a word where it means nothing."""

from __future__ import annotations

from experiments._fuzz import counts, judge
from experiments.fuzz_inputs import FAULTS, sample


def test_inputs_are_right_or_refused() -> None:
    judged = [judge(given) for given in sample(80, seed=1, without=("lightning", "transformers"))]  # importing them takes seconds
    assert [j for j in judged if j.outcome in FAULTS] == []
    found = counts(judged)
    assert found["right"] > 15, "most of what means something must be taken"
    assert found["refused"] > 50
