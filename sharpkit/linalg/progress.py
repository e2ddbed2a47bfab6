"""Budgets and progress of long computations: how much is done, how long the rest may take, when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sharpkit.operators.base import SymmetricOperator


@dataclass(frozen=True)
class Progress:
    """Where a computation stands, handed to a ``callback`` after each step.

    Attributes:
        num_matvecs: products done.
        expected_matvecs: products the whole computation is expected to need, as far as known now.
        elapsed: seconds so far.
        remaining: seconds the rest may take, from the cost of a product so far.
        stage: what is being done, in a few words.
    """

    num_matvecs: int
    expected_matvecs: int
    elapsed: float
    remaining: float
    stage: str


ProgressCallback = Callable[[Progress], None]


class Budget:
    """Counts the products and seconds of one computation and says when either runs out.

    Decisions go through ``operator.agree``, so that every process of a distributed run stops at the same product.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        *,
        max_matvecs: int | None = None,
        max_seconds: float | None = None,
        callback: ProgressCallback | None = None,
    ) -> None:
        if max_matvecs is not None and max_matvecs < 1:
            raise ValueError(f"max_matvecs must be at least 1, got {max_matvecs}")
        if max_seconds is not None and max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, got {max_seconds}")
        self._operator, self._callback = operator, callback
        self._max_matvecs, self._max_seconds = max_matvecs, max_seconds
        self._first_matvec = operator.num_matvecs
        self._start = time.perf_counter()

    @property
    def num_matvecs(self) -> int:
        """Products made since this budget was opened."""
        return self._operator.num_matvecs - self._first_matvec

    @property
    def seconds(self) -> float:
        """Seconds since this budget was opened."""
        return time.perf_counter() - self._start

    def allows(self, matvecs: int = 1) -> bool:
        """Whether so many more products fit into the product budget and the time is not up."""
        if self._max_matvecs is not None and self.num_matvecs + matvecs > self._max_matvecs:
            return False
        return self._max_seconds is None or self._operator.agree(self.seconds) < self._max_seconds

    def report(self, expected_matvecs: int, stage: str) -> None:
        """Tell the callback, if there is one."""
        if self._callback is None:
            return
        done, elapsed = self.num_matvecs, self.seconds
        expected = max(expected_matvecs, done)
        if self._max_matvecs is not None:
            expected = min(expected, max(self._max_matvecs, done))
        remaining = elapsed / done * (expected - done) if done else float("nan")
        self._callback(Progress(done, expected, elapsed, remaining, stage))
