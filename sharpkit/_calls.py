"""What public calls share besides their own arguments: a progress bar where one lasts, and a name for what it returns."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from sharpkit._arguments import as_text
from sharpkit._results import Progress, Result

P = ParamSpec("P")
R = TypeVar("R")

SHOWN_AFTER = 5.0  # seconds, by judgement: what ends sooner needs no bar
SWITCH = "SHARPKIT_PROGRESS"  # of the environment: "0" shows no bar, "1" one everywhere; else where somebody looks

# Whether a call made now is part of another that has its own bar, or belongs to nobody who waits for it.
_silent: ContextVar[bool] = ContextVar("silent", default=False)


def public_call(function: Callable[P, R]) -> Callable[P, R]:
    """A function that a user calls: it shows a bar if it has a ``callback`` and none was given, and names its result by ``name``.

    Both are done here for all calls, so a function that takes ``name`` has no line about it. The bar comes after five seconds, goes when
    the call ends, and stands where somebody looks: on a terminal or in a notebook. A call within a call has none of its own.
    """
    takes = inspect.signature(function).parameters
    names = "name" in takes and takes["name"].default == ""  # with another default it is a field of the result, and the function's own

    @functools.wraps(function)
    def calling(*args: P.args, **kwargs: P.kwargs) -> R:
        given = cast(dict[str, Any], kwargs)
        name = given.pop("name", "") if names else ""
        if name != "":
            as_text("name", name)
        if "callback" not in takes:
            result: Any = function(*args, **kwargs)
        else:
            shows = given.get("callback") is None and not _silent.get() and somebody_looks()
            with no_bars(), ProgressBar(after=SHOWN_AFTER) if shows else contextlib.nullcontext() as bar:
                result = function(*args, **{**given, "callback": bar} if shows else kwargs)  # type: ignore[arg-type]
        return cast(R, result.named(name) if name and isinstance(result, Result) else result)

    return calling


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Inside, calls show no bar of their own: they are parts of something, or nobody waits for them."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def somebody_looks() -> bool:
    """Whether a bar would be seen: stderr is a terminal, or this is a notebook; of several processes, the first one's.

    The environment variable ``SHARPKIT_PROGRESS`` decides otherwise: 0 for never, 1 for always.
    """
    switch, group = os.environ.get(SWITCH, ""), sys.modules.get("torch.distributed")
    if switch == "0" or sys.stderr is None:
        return False
    if group is not None and group.is_available() and group.is_initialized() and group.get_rank() != 0:
        return False
    return switch == "1" or sys.stderr.isatty() or _is_notebook()


def _is_notebook() -> bool:
    """As tqdm.auto asks: a kernel that serves a page, and no shell."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


class ProgressBar:
    """A tqdm bar that is fed by a call's ``callback``: on stderr, or a widget in a notebook that has ipywidgets.

    Used as a context manager; the instance itself is the callback.

    Args:
        after: seconds before it appears.
    """

    def __init__(self, *, after: float = 0.0) -> None:
        self._bar: Any = None
        self._due, self._broken = time.monotonic() + after, False

    def __call__(self, progress: Progress) -> None:
        """Show where the call stands."""
        if self._broken or (self._bar is None and time.monotonic() < self._due):
            return
        try:
            self._show(progress)
        except Exception:  # whatever a terminal or a widget cannot do: no call of hours ends for its bar
            self._broken = True

    def _show(self, progress: Progress) -> None:
        if self._bar is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tqdm's, of a notebook without ipywidgets: it shows a bar of text then
                from tqdm.auto import tqdm

                # The times are the call's own: the bar came later, and tqdm would divide by its own age. leave: the answer makes a finished
                # bar old news.
                layout: Any = {"bar_format": "{l_bar}{bar}| {n_fmt} of {total_fmt}{unit}{postfix}", "dynamic_ncols": True, "leave": False}
                # a delay: it is not drawn when made, when it knows nothing yet
                self._bar = tqdm(total=progress.expected, file=sys.stderr, disable=False, delay=1e-9, **layout)
        # not update(): it adds up, and an algorithm may lower its count of what is done or expected
        self._bar.total, self._bar.n, self._bar.unit = progress.expected or None, progress.done, f" {progress.unit}"
        left = f", about {_clock(progress.remaining)} left" if 0 <= progress.remaining < float("inf") else ""
        self._bar.set_postfix_str(f"{_clock(progress.elapsed)}{left}", refresh=False)
        self._bar.set_description(progress.text, refresh=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            with contextlib.suppress(Exception):
                self._bar.close()


def _clock(seconds: float) -> str:
    """A time as a bar shows it.

    Example:
        >>> _clock(7.4), _clock(130), _clock(7300)
        ('7 s', '2:10 min', '2:01 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"
