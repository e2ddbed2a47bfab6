"""Checks of arguments: NumPy's and tensors' numbers are numbers, True and NaN are none, and each message says what came."""

from __future__ import annotations

import fractions
import math
from typing import Any

import numpy as np
import pytest
import torch

import sharpkit as sk
from sharpkit._arguments import as_path, as_seed, called, flag, real, reals, shown, whole, wholes


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_are_taken(value: Any) -> None:
    assert whole("k", value) == 3
    assert type(whole("k", value)) is int


@pytest.mark.parametrize(
    "value", [1.5, 3.0, "3", None, True, np.bool_(True), torch.tensor(True), [3], torch.tensor([3, 4]), 3j, math.nan, b"3"]
)
def test_what_is_no_whole_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="k must be a whole number of at least 1, got "):
        whole("k", value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), fractions.Fraction(1, 2)])
def test_real_numbers_of_any_library_are_taken(value: Any) -> None:
    assert real("tol", value, above=0, below=1) == 0.5
    assert type(real("tol", value)) is float


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], torch.ones(2), 1j, {}, torch.tensor(1j), torch.ones((), device="meta")])
def test_what_is_no_real_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="tol must be a number between 0 and 1, got "):
        real("tol", value, above=0, below=1)


@pytest.mark.parametrize("value", [0, 1, -1, math.nan, math.inf])
def test_a_number_out_of_range_is_a_value_error(value: float) -> None:
    with pytest.raises(ValueError, match=r"tol must be a number between 0 and 1, got .*: it is relative"):
        real("tol", value, above=0, below=1, hint="it is relative")


def test_messages_name_the_range() -> None:
    ranges: list[tuple[dict[str, Any], str]] = [
        ({"above": 0}, "a positive number"),
        ({"above": 1}, "a number above 1"),
        ({"least": 0, "below": 1}, r"a number in \[0, 1\)"),
        ({"above": 0, "most": 1}, r"a number in \(0, 1\]"),
        ({"least": 2}, "a number of at least 2"),
        ({"most": -9}, "a number of at most -9"),
        ({"below": -9}, "a number below -9"),
        ({}, "a finite number"),
    ]
    for bounds, words in ranges:
        with pytest.raises(ValueError, match=f"x must be {words}, got nan"):
            real("x", math.nan, **bounds)
    assert real("x", math.inf, infinite=True) == math.inf


def test_a_word_where_a_word_was_possible_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"every must be 'auto' or a whole number of at least 1, got 'often' \(str\)"):
        whole("every", "often", other="'auto'")


@pytest.mark.parametrize("values", ["48", 3, None, {4: 1}, torch.tensor([[4, 8]])])
def test_several_numbers_are_a_sequence(values: Any) -> None:
    with pytest.raises(TypeError, match="sizes must be a sequence of whole numbers, got"):
        wholes("sizes", values)
    assert wholes("sizes", torch.tensor([4, 8])) == [4, 8]
    assert reals("betas", (0.9, 0.99), length=2) == [0.9, 0.99]
    with pytest.raises(ValueError, match="betas must hold 2 numbers, got 1"):
        reals("betas", [0.9], length=2)


def test_flags_seeds_paths_and_functions() -> None:
    assert flag("offload", np.bool_(True)) is True
    assert flag("offload", 0) is False
    for wrong in ("no", None, 2, [], math.nan):
        with pytest.raises(TypeError, match="offload must be True or False, got"):
            flag("offload", wrong)
    assert as_seed(-5) == -5
    for name in ("", "a\0b"):
        with pytest.raises(ValueError, match="path must be a path to a file"):
            as_path("path", name)
    with pytest.raises(TypeError, match=r"path must be a path, as a text or a pathlib.Path, got 3"):
        as_path("path", 3)
    with pytest.raises(TypeError, match="build is called with 1 argument, which it does not take: too many positional arguments"):
        called("build", lambda: 1, 64)


def test_what_came_is_shown_shortly() -> None:
    given: list[tuple[Any, str]] = [
        (None, "None"),
        (3, "3 (int)"),
        ("a", "'a' (str)"),
        ([1, 2], "list"),
        (torch.nn.Linear, "the class Linear"),
        (torch.float32, "torch.float32"),
        (torch.ones(2, 3), "a tensor of shape (2, 3) and type torch.float32"),
        (np.ones(2), "an array of shape (2,) and type float64"),
    ]
    for value, words in given:
        assert shown(value) == words


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda a: sk.eigenpairs(a, k=True), "k must be a whole number"),
        (lambda a: sk.eigenpairs(a, k=1, initial=torch.full((3,), math.nan)), "initial must be finite"),
        (lambda a: sk.eigenpairs(a, callback=3), r"callback must be a function called as callback\(progress\), got 3"),
        (lambda a: sk.eigenpairs(a, offload="no"), "offload must be a folder that exists"),
        (lambda a: sk.trace(a, max_matvecs=0), "max_matvecs must be a whole number of at least 1, got 0"),
        (lambda a: sk.trace(a, max_seconds="1"), "max_seconds must be a positive number, got '1'"),
        (lambda a: sk.spectral_density(a, seed=0.5), "seed must be a whole number"),
        (lambda a: sk.as_operator(a.to("meta")), "one on the meta device"),
        (lambda a: sk.as_operator(torch.zeros(0, 0)), r"one of shape \(0, 0\)"),
        (lambda a: sk.as_operator(np.array([["a"]])), "expected a matrix of real numbers"),
        (lambda a: sk.as_operator(a, device="gpu"), "device must be a device of this machine"),
        (lambda a: sk.scale_learning_rate(0.1, 8, 16, betas=0.9), "betas must be a sequence of numbers, got 0.9"),
        (lambda a: sk.stable_learning_rate("4"), "lambda_max must be an Estimate, Eigenpairs or a finite number, got '4'"),
        (lambda a: sk.measure(a), "takes an Objective"),
        (lambda a: sk.gradient_noise_scale(a), "takes an Objective"),
        (lambda a: sk.learning_rate_curve(a, None), "learning_rate_curve takes an Objective"),  # type: ignore[arg-type]
        (lambda a: sk.UpdateRule(nesterov="no"), "nesterov must be True or False"),  # type: ignore[arg-type]
        (lambda a: sk.report("page.html", 3), "results must be a list of results"),  # type: ignore[arg-type]
        (lambda a: sk.sinks.jsonl(3), "path must be a path"),  # type: ignore[arg-type]
        (lambda a: sk.transfer.log_slope([1]), "sizes must be a dict"),  # type: ignore[arg-type]
        (lambda a: sk.spectral_density(a).expectation(lambda x: x[:1, :1]), "function must return one real number for each entry"),
    ],
)
def test_public_functions_say_what_they_expected(call: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        call(torch.eye(3, dtype=torch.float64))
