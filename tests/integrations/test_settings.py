"""The callbacks' settings are the monitor's and the learner's own: each argument is known, typed and defaulted as there."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import pytest

import sharpkit as sk
from sharpkit.integrations.attachment import LearnerSettings, MonitorSettings


@pytest.mark.parametrize(("settings", "made"), [(MonitorSettings, sk.Monitor), (LearnerSettings, sk.CurvatureLearner)])
def test_the_settings_are_exactly_the_keyword_arguments_with_their_types(settings: type, made: type) -> None:
    own = {"model", "total_steps"}  # the callback's own, or what it finds out itself
    arguments = {name for name, p in inspect.signature(made).parameters.items() if p.kind is p.KEYWORD_ONLY and name not in own}
    assert set(settings.__annotations__) == arguments
    hints, expected = get_type_hints(settings), get_type_hints(made.__init__)
    assert {name: hints[name] for name in arguments} == {name: expected[name] for name in arguments}


def callbacks() -> list[Any]:
    from sharpkit.integrations import lightning, transformers

    return [lightning.SharpnessCallback, lightning.LearnerCallback, transformers.SharpnessCallback, transformers.LearnerCallback]


@pytest.mark.parametrize("callback", callbacks(), ids=lambda c: f"{c.__module__.rpartition('.')[2]}.{c.__name__}")
def test_an_argument_that_does_not_exist_is_named_when_the_callback_is_made(callback: Any) -> None:
    with pytest.raises(TypeError, match=r"has no argument evry; its settings are .*budget"):
        callback(evry=3)
