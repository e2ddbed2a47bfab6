"""Ctrl-C waits while a context is entered or left: what a measurement changes is put back whenever the signal comes.

Python runs a signal's handler between any two bytecodes: in the midst of ``__enter__``, or at the first one of ``__exit__``, where the
exception it raises (KeyboardInterrupt) leaves what was changed as it is. No ``try`` can be placed against that; a handler can.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]

# Those whose handlers people let raise: Ctrl-C, a scheduler's notice before it kills, a timeout by alarm. SIGINT first: taken back last.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
_PREVIOUS: dict[int, Handler] = {}  # by signal: who is asked once nothing is being entered or left
_PENDING: list[int] = []  # came meanwhile


class Whole(AbstractContextManager[T], Generic[T]):
    """A context that is entered and left as a whole; in between, signals do what they would do without it.

    Args:
        inner: the context.

    Example:
        >>> import warnings
        >>> with Whole(warnings.catch_warnings()):
        ...     warnings.simplefilter("ignore")
    """

    def __init__(self, inner: AbstractContextManager[T, Any]) -> None:
        self._inner = inner
        self._inside = False
        self._replaced: dict[int, Handler] = {}

    def __enter__(self) -> T:
        entered = False
        try:
            _install(self._replaced)
            value = self._inner.__enter__()
            entered = self._inside = True  # a signal from here on raises inside this try: `with` has not taken over yet
            _deliver()
            return value
        except BaseException as error:
            self._inside = False
            if entered:
                self._inner.__exit__(type(error), error, error.__traceback__)
            _uninstall(self._replaced)
            _deliver()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, trace)  # type: ignore[no-any-return]
        finally:
            _uninstall(self._replaced)  # before the next line, which lets signals raise: nothing may be left to do by then
            self._inside = False
            _deliver()


def check_pending() -> None:
    """Let a signal raise that came while a context is being entered; to be called there by what may wait for long."""
    for number in _taken():
        _PREVIOUS[number](number, None)


def _handle(number: int, frame: FrameType | None) -> None:
    """Note the signal if a context is being entered or left in any frame of the stack, else ask the handler that was there before."""
    arriving = []
    at = frame
    while at is not None:
        # The frames say it, no counter: an exception between two lines could leave a counter wrong for ever.
        if at.f_code in (_ENTER, _EXIT):
            whole = at.f_locals["self"]
            if whole._inside == (at.f_code is _EXIT):
                _PENDING.append(number)
                return
            arriving += [whole] if at.f_code is _ENTER else []
        at = at.f_back
    for whole in arriving:  # what was entered will be left at once, and a second signal must not come in between
        whole._inside = False
    _PREVIOUS[number](number, frame)
    for whole in arriving:  # that handler raised nothing: all goes on
        whole._inside = True


_ENTER, _EXIT = Whole.__enter__.__code__, Whole.__exit__.__code__


def _install(replaced: dict[int, Handler]) -> None:
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread alone
        return
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and handler is not _handle:  # the default of the system ends the process: nothing to put back
            if not replaced:
                _PENDING.clear()
            replaced[number] = _PREVIOUS[number] = handler  # before it is replaced: _handle must know whom to ask
            with contextlib.suppress(ValueError):  # a second interpreter in this process, which gets no signals
                signal.signal(number, _handle)


def _uninstall(replaced: dict[int, Handler]) -> None:
    for number, handler in reversed(replaced.items()):
        if signal.getsignal(number) is _handle:  # else user code has set another one meanwhile
            signal.signal(number, handler)


def _taken() -> list[int]:
    numbers, _PENDING[:] = list(_PENDING), []
    return numbers


def _deliver() -> None:
    """Send again what came meanwhile; it is noted once more if an outer context is still being entered or left."""
    for number in _taken() if _PENDING else ():
        signal.raise_signal(number)
