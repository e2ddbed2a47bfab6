"""Rules carry hyperparameters between batch sizes as written, and warn where they end."""

from __future__ import annotations

import pickle
import types
import warnings

import pytest
import torch

import sharpkit as sk
from sharpkit.batch_size.scaling import safe_damping


def test_the_linear_and_square_root_rules() -> None:
    assert sk.scale_learning_rate(0.1, 128, 512) == pytest.approx(0.4)
    assert sk.scale_learning_rate(0.1, 128, 512, rule="sqrt") == pytest.approx(0.2)
    assert sk.scale_learning_rate(0.4, 512, 128) == pytest.approx(0.1)


def test_companions_of_the_square_root_rule() -> None:
    scaled = sk.scale_learning_rate(1e-3, 256, 1024, rule="sqrt", betas=(0.95, 0.999), eps=1e-8, weight_decay=0.1)
    assert scaled.betas == pytest.approx((1 - 4 * 0.05, 1 - 4 * 0.001))
    assert scaled.eps == pytest.approx(0.5e-8)
    # per epoch: lr x decay x steps, with steps / 4 and lr x 2, is kept by decay x 2
    assert scaled.weight_decay == pytest.approx(0.2)


def test_the_linear_rule_keeps_momentum_and_decay() -> None:
    scaled = sk.scale_learning_rate(0.1, 64, 128, momentum=0.9, weight_decay=5e-4)
    assert (scaled.momentum, scaled.weight_decay) == (0.9, pytest.approx(5e-4))


def test_beyond_the_square_root_rules_range_it_warns_and_an_average_over_less_than_a_batch_is_none() -> None:
    with pytest.warns(sk.SharpkitWarning, match="not small"):
        assert sk.scale_learning_rate(1e-3, 64, 512, rule="sqrt", betas=(0.9, 0.999)).betas == pytest.approx((0.2, 0.992))
    with pytest.warns(sk.SharpkitWarning, match="not small"):
        scaled = sk.scale_learning_rate(1e-3, 32, 512, rule="sqrt", betas=(0.9, 0.999))
    assert float(scaled) == pytest.approx(4e-3) and scaled.betas == pytest.approx((0.0, 0.984))


def _curve(rates: dict[float, float], exponent: float = 1.0) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        max_lr=lambda b: sk.Bounded(rates[b], 0.8 * rates[b], 1.2 * rates[b]), exponent=exponent, batch_sizes=(32, 128)
    )


def test_a_curve_scales_by_its_own_ratio_and_says_where_the_rule_is_off() -> None:
    with pytest.warns(sk.SharpkitWarning, match="linear rule is off by 2x"):
        scaled = sk.scale_learning_rate(0.1, 32, 128, rule=_curve({32: 0.5, 128: 1.0}))  # type: ignore[arg-type]
    assert scaled == pytest.approx(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sk.scale_learning_rate(0.1, 32, 128, rule=_curve({32: 0.5, 128: 2.0})) == pytest.approx(0.4)  # type: ignore[arg-type]


def test_a_curve_keeps_the_companions_of_sgd_and_adjusts_those_of_an_adaptive_optimizer() -> None:
    given = {"momentum": 0.9, "betas": (0.95, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    kept = sk.scale_learning_rate(0.1, 32, 128, rule=_curve({32: 0.5, 128: 2.0}), **given)  # type: ignore[arg-type]
    assert (kept.momentum, kept.betas, kept.eps, kept.weight_decay) == (0.9, (0.95, 0.999), 1e-8, pytest.approx(0.1))
    adaptive = sk.scale_learning_rate(0.1, 32, 128, rule=_curve({32: 0.5, 128: 1.0}, exponent=0.5), **given)  # type: ignore[arg-type]
    assert adaptive.betas == pytest.approx((0.8, 0.996)) and adaptive.eps == pytest.approx(0.5e-8)


def test_outside_of_the_sizes_measured_a_curve_goes_on_by_the_rule_and_says_so() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(200, 5, dtype=torch.float64), torch.randn(200, 1, dtype=torch.float64)
    model = torch.nn.Linear(5, 1, bias=False).double()
    objective = sk.Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
    curve = sk.learning_rate_curve(objective, torch.optim.SGD(model.parameters(), lr=0.01), batch_sizes=[32, 64], calibrate=False)
    with pytest.warns(sk.SharpkitWarning, match="B = 1 lies outside of the batch sizes measured, 32 to 64"):
        low = sk.scale_learning_rate(0.01, 32, 1, rule=curve)
    assert float(low) == pytest.approx(0.01 / 32, rel=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.scale_learning_rate(1e-4, 32, 64, rule=_curve({32: 0.5, 64: 1.0}))  # type: ignore[arg-type]


def test_a_rate_that_was_too_large_before_is_named() -> None:
    with pytest.warns(sk.SharpkitWarning, match="too large before"):
        sk.scale_learning_rate(1.0, 32, 128, rule=_curve({32: 0.5, 128: 2.0}))  # type: ignore[arg-type]


def test_the_answer_is_a_number_that_loads_anywhere() -> None:
    scaled = sk.scale_learning_rate(0.1, 1, 2)
    assert type(pickle.loads(pickle.dumps(scaled))) is float and "k = 2" in repr(scaled)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        sk.scale_learning_rate(0.1, 0, 2)
    with pytest.raises(ValueError, match="'linear', 'sqrt'"):
        sk.scale_learning_rate(0.1, 1, 2, rule="cubic")


@pytest.mark.parametrize("given", [(0.5, float("nan"), 1.0), (float("inf"), 2.0, 1.0), (0.5, 2.0, float("nan"))])
def test_the_damping_of_nonsense_is_refused(given: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"(lr|batch_size) must be a positive number|bulk_trace must be a finite number"):
        safe_damping(*given)


def test_safe_damping_is_proportional_to_rate_over_batch() -> None:
    assert safe_damping(0.2, 64, 10.0) == pytest.approx(2 * safe_damping(0.1, 64, 10.0)) == pytest.approx(2 * safe_damping(0.2, 128, 10.0))
