"""Excerpts of the experiments on sharpness in other norms: the search against brute force, critical rates against a scan."""

from __future__ import annotations

import pytest

import sharpkit as sk
from experiments import geometry_relative, geometry_search


def test_most_searches_end_within_a_hundredth_of_brute_force() -> None:
    shares = [sk.generalized_sharpness(f, norm, seed=j).value / best for j, (norm, _, f, best) in enumerate(geometry_search.problems(True))]
    assert sum(share >= 0.99 for share in shares) >= 5, shares
    assert max(shares) <= 1 + 1e-6


def test_relative_critical_rates_are_those_of_a_scan() -> None:
    rows = [row for row in geometry_relative.measure(True) if row.get("outcome") == "found"]
    assert len(rows) >= 3
    for row in rows:
        assert row["rate"] == pytest.approx(row["scan"], rel=0.06), row
