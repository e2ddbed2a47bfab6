"""A context is entered and left as a whole, at whatever bytecode the signal comes."""

from __future__ import annotations

import dis
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from sharpkit.objective.interrupts import Whole, check_pending

OWN = ("interrupts.py", "contextlib.py", "test_interrupts.py")


class Switches:
    """Two settings that belong together: both on inside, both off outside."""

    def __init__(self) -> None:
        self.on = [False, False]

    @contextmanager
    def thrown(self) -> Iterator[None]:
        self.on[0] = True
        self.on[1] = True
        try:
            yield
        finally:
            self.on[0] = False
            self.on[1] = False


def interrupted_at(bytecode: int, switches: Switches) -> bool:
    """Use the switches with a SIGINT at one bytecode of the code involved; False where there are fewer."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        # Not in the caller's own frame, nor at a return: from the end of a body to __exit__'s first bytecode, and from __enter__'s last one
        # to the body, Python looks for no signal, and only a trace function could raise there.
        if not frame.f_code.co_filename.endswith(OWN) or frame.f_code.co_name == "use":
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] != dis.opmap["RETURN_VALUE"]:
            count += 1
            if count == bytecode:
                signal.raise_signal(signal.SIGINT)
        return trace

    def use() -> None:
        with Whole(switches.thrown()):
            assert switches.on == [True, True]

    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for this once, when tracing begins
    sys.settrace(trace)
    try:
        use()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count >= bytecode


def test_a_signal_at_any_bytecode_leaves_nothing_behind() -> None:
    handler, switches, bytecode = signal.getsignal(signal.SIGINT), Switches(), 0
    for bytecode in range(1, 10_000):
        came = interrupted_at(bytecode, switches)
        assert switches.on == [False, False], f"at bytecode {bytecode}"
        assert signal.getsignal(signal.SIGINT) is handler, f"at bytecode {bytecode}"
        if not came:
            break
    assert 200 < bytecode < 10_000, "the sweep went through all of the code"


def test_a_signal_while_entering_comes_before_the_body_and_once() -> None:
    switches, seen = Switches(), []

    @contextmanager
    def slow() -> Iterator[None]:
        with switches.thrown():
            signal.raise_signal(signal.SIGINT)
            seen.append("entered")
            yield

    with pytest.raises(KeyboardInterrupt), Whole(slow()):
        seen.append("body")
    assert seen == ["entered"]
    assert switches.on == [False, False]


@pytest.mark.parametrize("when", ["entering", "body", "leaving"])
def test_a_handler_that_raises_nothing_is_called_once_and_the_work_goes_on(when: str) -> None:
    calls: list[int] = []
    done = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))

    @contextmanager
    def context() -> Iterator[None]:
        if when == "entering":
            signal.raise_signal(signal.SIGTERM)
        yield
        if when == "leaving":
            signal.raise_signal(signal.SIGTERM)

    try:
        with Whole(context()):
            if when == "body":
                signal.raise_signal(signal.SIGTERM)
            done.append(1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]
    assert done == [1]


def test_nested_contexts_are_left_from_the_inside_and_the_handler_put_back_last() -> None:
    outer, inner, handler = Switches(), Switches(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Whole(outer.thrown()), Whole(inner.thrown()):
        signal.raise_signal(signal.SIGINT)
    assert [outer.on, inner.on] == [[False, False]] * 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_ignored_signal_stays_ignored_and_a_handler_set_inside_stays_set() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Whole(Switches().thrown()):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.signal(signal.SIGINT, signal.default_int_handler)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_while_entering_is_raised_and_the_handler_put_back() -> None:
    @contextmanager
    def failing() -> Iterator[None]:
        raise ValueError("cannot")
        yield

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="cannot"), Whole(failing()):
        pass
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_waits_for_long_while_it_is_entered_can_let_the_signal_raise() -> None:
    @contextmanager
    def waiting() -> Iterator[None]:
        signal.raise_signal(signal.SIGINT)
        check_pending()
        yield pytest.fail("it went on waiting")

    with pytest.raises(KeyboardInterrupt), Whole(waiting()):
        pass


def test_another_thread_enters_and_leaves_without_touching_handlers() -> None:
    handler, seen, errors = signal.getsignal(signal.SIGINT), [], []

    def work() -> None:
        try:
            with Whole(Switches().thrown()):
                seen.append(signal.getsignal(signal.SIGINT))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert seen == [handler]
