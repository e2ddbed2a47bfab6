"""An excerpt of the experiment: with its second moment held, Adam breaks at the stated limit after its first steps too."""

from __future__ import annotations

import pytest

from experiments.adam_first_steps import breaks, stated_limit, train


@pytest.mark.parametrize("t", [1, 3, 10, 30, 1000])
def test_adam_breaks_at_the_limit_without_the_factor_of_its_age(t: int) -> None:
    assert not breaks(t, 0.99 * stated_limit(t))
    assert breaks(t, 1.01 * stated_limit(t))


@pytest.mark.parametrize("t", [1, 3, 10])
def test_only_an_adam_that_grew_no_older_would_break_at_the_limit_with_it(t: int) -> None:
    factor = 1 - 0.9 ** (t + 1)
    assert not breaks(t, 0.99 * factor * stated_limit(t), held=True)
    assert breaks(t, 1.01 * factor * stated_limit(t), held=True)


def test_what_grows_after_the_first_step_at_half_the_limit_decays_again() -> None:
    sizes = train(1, 0.5 * stated_limit(1), steps=600)
    assert max(sizes) > 100 and sizes[-1] < 1e-6
