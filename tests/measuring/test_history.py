"""A training run's curvature: the sentences say what the series say."""

from __future__ import annotations

import math
from typing import Any

import pytest

import sharpkit as sk


def history(lambda_max: tuple[float, ...], **changes: Any) -> sk.CurvatureHistory:
    n = len(lambda_max)
    fields: dict[str, Any] = {
        "steps": tuple(range(0, 10 * n, 10)), "loss": (1.0,) * n, "lambda_max": lambda_max, "residual": (0.1,) * n, "limit": (20.0,) * n,
        "lr": (0.1,) * n, "name": "net",
    }  # fmt: skip
    return sk.CurvatureHistory(**{**fields, **changes})


def test_the_limit_counts_as_reached_within_the_error() -> None:
    assert history((5.0, 19.95, 19.0)).first_at_limit == 10
    assert history((5.0, 19.85, 19.0)).first_at_limit is None


def test_settled_ratio_is_mean_and_deviation_of_the_last_half() -> None:
    mean, deviation = history((1.0, 2.0, 18.0, 22.0)).settled_ratio() or (0.0, 0.0)
    assert mean == pytest.approx(1.0)
    assert deviation == pytest.approx(math.sqrt(2 * 0.1**2))
    assert history((1.0, 2.0, 3.0)).settled_ratio() is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((5.0, 21.0, 20.0), "net: lambda_max rose from 5 to 21 and reached the stability limit 2/lr = 20 by step 10."),
        ((5.0, 12.0, 10.0), "net: lambda_max rose from 5 to at most 12 and stayed below the stability limit 2/lr = 20; it ended at 10."),
        ((9.0, 8.0, 7.0), "net: lambda_max did not rise above its start, 9 and stayed below the stability limit 2/lr = 20; it ended at 7."),
        ((30.0, 20.0, 19.0), "net: lambda_max started at 30 and reached the stability limit 2/lr = 20 by step 0."),
    ],
)
def test_findings_tell_rise_and_limit(values: tuple[float, ...], sentence: str) -> None:
    assert history(values).findings()[0] == sentence


def test_minibatches_and_lack_of_convergence_are_said() -> None:
    plain = " ".join(history((5.0, 6.0)).findings())
    assert "minibatches" not in plain
    assert "tolerance" not in plain
    careful = " ".join(history((5.0, 6.0), full_batch=False, converged=False).findings())
    assert "may settle below it" in careful
    assert "did not reach its tolerance" in careful


@pytest.mark.parametrize("changes", [{"loss": (1.0,)}, {"steps": (0, 0)}, {"steps": (10, 0)}])
def test_series_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"same number of checkpoints|must increase"):
        history((1.0, 2.0), **changes)


def test_no_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        history(())
