"""Checks of arguments: whole and real numbers, choices, flags, functions and texts, each refused by name with what was expected.

Arrays and tensors are told by their attributes: the sinks, which use this module, load neither NumPy nor torch.
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_SEEDS = 2**63  # by convention of torch.manual_seed: 64 bits; further seeds are made by adding to the given one


def shown(value: Any) -> str:
    """A value in a message: its type and, where that is short, itself."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or (type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device")):
        return repr(value)
    if (_is_flag(value) and not _is_array(value)) or isinstance(value, (numbers.Number, str, bytes)):
        return f"{repr(value)[:80]} ({type(value).__name__})"
    if _is_array(value):
        what = "a tensor" if type(value).__module__.startswith("torch") else "an array"
        return f"{what} of shape {tuple(value.shape)} and type {value.dtype}"
    return type(value).__name__


def whole(name: str, value: Any, *, least: int | None = 1, most: int | None = None, other: str = "", hint: str = "") -> int:
    """A whole number, also one of NumPy or a tensor of one; True is none.

    Args:
        name: the argument's, for messages.
        value: what came.
        least, most: bounds that are included.
        other: what else it may be, in words; the caller has seen that it is not that.
        hint: added to messages.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of range.
    """
    expected, hint = f"{name} must be {_or(other)}a whole number{_range(least, most)}", hint and f": {hint}"
    several = _is_array(value) and (value.ndim > 0 or _is_meta(value))
    if _is_flag(value) or several or not hasattr(value, "__index__"):
        raise _error(value, other)(f"{expected}, got {shown(value)}{hint}")
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # every tensor has the method, but not every one is whole
        raise TypeError(f"{expected}, got {shown(value)}{hint}") from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{expected}, got {number}{hint}")
    return number


def real(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    below: float | None = None,
    least: float | None = None,
    most: float | None = None,
    infinite: bool = False,
    other: str = "",
    hint: str = "",
) -> float:
    """A real number, also one of NumPy or a tensor of one; True is none, nor is NaN.

    Args:
        name: the argument's, for messages.
        value: what came.
        above, below: bounds that are excluded.
        least, most: bounds that are included.
        infinite: whether infinity is a value.
        other, hint: as for :func:`whole`.

    Raises:
        TypeError: it is no real number.
        ValueError: it is out of range, NaN, or infinite where that means nothing.
    """
    expected, hint = f"{name} must be {_or(other)}{_interval(above, below, least, most)}", hint and f": {hint}"
    one = _is_array(value) and math.prod(value.shape) == 1 and not _is_meta(value) and any(k in str(value.dtype) for k in ("float", "int"))
    if _is_flag(value) or not (one or isinstance(value, numbers.Real)):
        raise _error(value, other)(f"{expected}, got {shown(value)}{hint}")
    number = float(value)
    inside = (above is None or number > above) and (below is None or number < below)
    inside = inside and (least is None or number >= least) and (most is None or number <= most)
    if math.isnan(number) or not inside or (math.isinf(number) and not infinite):
        raise ValueError(f"{expected}, got {number:g}{hint}")
    return number


def as_seed(value: Any, *, name: str = "seed") -> int:
    """A seed: any whole number of 64 bits."""
    return whole(name, value, least=-_SEEDS, most=_SEEDS - 1)


def choice(name: str, value: Any, choices: Collection[str], *, other: str = "") -> str:
    """One of several words.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {_or(other)}one of {', '.join(map(repr, choices))}, got {shown(value)}")
    return value


def flag(name: str, value: Any, *, other: str = "") -> bool:
    """True or False, also as 1 or 0 or NumPy's.

    Raises:
        TypeError: it is neither; a text such as ``"no"`` would count as True.
    """
    if not (isinstance(value, int) or (_is_flag(value) and math.prod(getattr(value, "shape", ())) == 1)) or value not in (0, 1):
        raise TypeError(f"{name} must be {_or(other)}True or False, got {shown(value)}")
    return bool(value)


def check_callable(name: str, value: Any, form: str) -> None:
    """A function that is called as ``form`` shows.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function called as {form}, got {shown(value)}")


def called(name: str, function: Any, *given: Any) -> Any:
    """What a user's function returns.

    Raises:
        TypeError: it does not take so many arguments.
    """
    try:
        inspect.signature(function).bind(*given)
    except TypeError as error:
        raise TypeError(
            f"{name} is called with {len(given)} argument{'' if len(given) == 1 else 's'}, which it does not take: {error}"
        ) from None
    except ValueError:  # some callables written in C have no signature
        pass
    return function(*given)


def check_callback(value: Any) -> None:
    """None, or a function of a :class:`sharpkit.Progress`."""
    if value is not None:
        check_callable("callback", value, "callback(progress)")


def as_text(name: str, value: Any, *, least: int = 0) -> str:
    """A text of at least so many characters.

    Raises:
        TypeError: it is no text.
        ValueError: it is too short.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {shown(value)}")
    if len(value) < least:
        raise ValueError(f"{name} must not be empty")
    return value


def as_path(name: str, value: Any) -> str:
    """A path as a text.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty, or holds a null byte, which no file system takes.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(where := os.fspath(value), bytes):
        raise TypeError(f"{name} must be a path, as a text or a pathlib.Path, got {shown(value)}")
    if not where or "\0" in where:
        raise ValueError(f"{name} must be a path to a file, got {where!r}")
    return where


def _is_array(value: Any) -> bool:
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("ndim", "shape", "dtype"))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or (_is_array(value) and str(value.dtype) in ("bool", "torch.bool"))


def _is_meta(value: Any) -> bool:
    return str(getattr(value, "device", "cpu")) == "meta"


def _error(value: Any, other: str) -> type[Exception]:
    return ValueError if isinstance(value, str) and "'" in other else TypeError  # another word, where some word was expected


def _or(other: str) -> str:
    return f"{other} or " if other else ""


def _interval(above: float | None, below: float | None, least: float | None, most: float | None) -> str:
    low, high = above if least is None else least, below if most is None else most
    if low is not None and high is not None:
        if above is not None and below is not None:
            return f"a number between {low:g} and {high:g}"
        return f"a number in {'[' if above is None else '('}{low:g}, {high:g}{']' if below is None else ')'}"
    if low is not None:
        return f"a number of at least {low:g}" if above is None else "a positive number" if low == 0 else f"a number above {low:g}"
    return "a finite number" if high is None else f"a number of at most {high:g}" if below is None else f"a number below {high:g}"


def _range(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else f" of at most {most}" if most is not None else ""


def wholes(name: str, values: Any, *, least: int | None = 1) -> list[int]:
    """Several whole numbers, each as :func:`whole` takes it."""
    return [whole(f"each of {name}", value, least=least) for value in _items(name, values, "whole numbers")]


def reals(name: str, values: Any, *, length: int | None = None, **bounds: Any) -> list[float]:
    """Several real numbers, each as :func:`real` takes it.

    Args:
        name: the argument's, for messages.
        values: what came.
        length: how many there must be, None for any number.
        bounds: those of :func:`real`.
    """
    items = _items(name, values, "numbers")
    if length is not None and len(items) != length:
        raise ValueError(f"{name} must hold {length} numbers, got {len(items)}")
    return [real(f"each of {name}", value, **bounds) for value in items]


def texts(name: str, values: Any) -> list[str]:
    """Several texts."""
    return [as_text(f"each of {name}", value) for value in _items(name, values, "texts")]


def _items(name: str, values: Any, what: str) -> list[Any]:
    single = isinstance(values, (str, bytes, Mapping)) or (_is_array(values) and values.ndim != 1)
    if single or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of {what}, got {shown(values)}")
    return list(values)
