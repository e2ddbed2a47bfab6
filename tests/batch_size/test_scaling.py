"""Rules carry hyperparameters between batch sizes as written, and warn where they end."""

from __future__ import annotations

import pickle
import types
import warnings

import pytest

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


def _curve(rates: dict[float, float]) -> types.SimpleNamespace:
    return types.SimpleNamespace(max_lr=lambda b: sk.Bounded(rates[b], 0.8 * rates[b], 1.2 * rates[b]), exponent=1.0)


def test_a_curve_scales_by_its_own_ratio_and_says_where_the_rule_is_off() -> None:
    with pytest.warns(sk.SharpkitWarning, match="linear rule is off by 2x"):
        scaled = sk.scale_learning_rate(0.1, 32, 128, rule=_curve({32: 0.5, 128: 1.0}))  # type: ignore[arg-type]
    assert scaled == pytest.approx(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sk.scale_learning_rate(0.1, 32, 128, rule=_curve({32: 0.5, 128: 2.0})) == pytest.approx(0.4)  # type: ignore[arg-type]


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


def test_safe_damping_is_proportional_to_rate_over_batch() -> None:
    assert safe_damping(0.2, 64, 10.0) == pytest.approx(2 * safe_damping(0.1, 64, 10.0)) == pytest.approx(2 * safe_damping(0.2, 128, 10.0))
