"""What the fuzzing experiment calls an input, what it may mean, and how the outcome of one is judged."""

from __future__ import annotations

import dis
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sharpkit as sk

OUTCOMES = ("right", "refused", "told", "own error", "raw error", "silent wrong")
SECONDS = 60  # by judgement: an input that takes longer hangs
_PACKAGE = Path(sk.__file__).parent
_TORCH_TELLS = "Using a target size"  # PyTorch's own warning of broadcast targets
_SHORTEST = 25  # characters of a message that can say what came and what to do, by judgement


class OwnError(Exception):
    """Raised by a user's function on purpose: it must come through as it is."""


@dataclass(frozen=True)
class Input:
    """One call.

    Attributes:
        function: public name.
        what: the input, in words.
        call: makes it.
        meaning: result -> whether it is right; None for an input that means nothing and must be refused or commented on; True for one whose
            meaning is open: any answer but a raw error will do.
    """

    function: str
    what: str
    call: Callable[[], Any]
    meaning: Callable[[Any], bool] | bool | None = None


@dataclass(frozen=True)
class Judged:
    """The outcome of an input, one of OUTCOMES, and what was said."""

    function: str
    what: str
    outcome: str
    said: str


def judge(given: Input) -> Judged:
    """Make the call and classify what comes of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.random.fork_rng():
                result = given.call()
        except OwnError:
            return Judged(given.function, given.what, "own error", "")
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            return Judged(given.function, given.what, "refused" if is_refusal(error) else "raw error", said)
    ours = [str(w.message) for w in caught if issubclass(w.category, sk.SharpkitWarning) or _TORCH_TELLS in str(w.message)]
    if given.meaning is True:
        return Judged(given.function, given.what, "right", "")
    if given.meaning is not None and given.meaning(result):
        return Judged(given.function, given.what, "right", "")
    if ours:
        return Judged(given.function, given.what, "told", ours[0])
    return Judged(given.function, given.what, "silent wrong", repr(result)[:200])


def is_refusal(error: Exception) -> bool:
    """Whether an error is one that sharpkit raised on purpose, with a message that can be read."""
    frames = list(traceback.walk_tb(error.__traceback__))
    where = Path(frames[-1][0].f_code.co_filename)
    if isinstance(error, sk.SharpkitError):
        return len(str(error)) >= _SHORTEST
    if isinstance(error, OSError):
        return error.filename is not None or _PACKAGE in where.parents
    if isinstance(error, KeyError):  # as mappings raise it
        return _PACKAGE in where.parents and len(str(error)) >= _SHORTEST and _raised(error)
    if isinstance(error, ImportError):
        return "pip install" in str(error)
    # a wrong number of arguments, said by Python of the public function that the experiment calls
    if isinstance(error, TypeError) and _PACKAGE not in where.parents and "argument" in str(error):
        return all(_PACKAGE not in Path(f.f_code.co_filename).parents for f, _ in frames)
    own = isinstance(error, (TypeError, ValueError)) and _PACKAGE in where.parents
    return own and len(str(error)) >= _SHORTEST and _raised(error)


def _raised(error: Exception) -> bool:
    """Whether the last frame raised the error itself, by a raise statement."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    last = next((i for i in dis.get_instructions(trace.tb_frame.f_code) if i.offset == trace.tb_lasti), None)
    return last is not None and last.opname in ("RAISE_VARARGS", "RERAISE")


def counts(judged: list[Judged]) -> dict[str, int]:
    """How many inputs had each outcome."""
    return {outcome: sum(j.outcome == outcome for j in judged) for outcome in OUTCOMES}
