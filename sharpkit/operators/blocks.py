"""Several products at once over one retained graph, where the first ones show that it is faster than one by one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpkit.objective.guard import silenced
from sharpkit.objective.memory import GraphCost, is_out_of_memory
from sharpkit.objective.params import ParamLayout

logger = logging.getLogger(__name__)

Pieces = list[Tensor | None]  # one tensor per parameter, None meaning zero

_WIDEST = 32  # products at once: twice as many cost more again (experiments/speed_products.py)
_FROM = 4  # vectors from which on it is worth finding out, by judgement
_TRIES = 2  # times that several at once are timed if they are slower at first, by judgement: the first time loads what they need
_MEMORY_SHARE = 0.25  # of what is free may be taken by the products at once, by judgement


@dataclass(frozen=True)
class PieceProduct:
    """The product with one piece's matrix, unweighted, on tensors in the parameters' shapes.

    Attributes:
        multiply: (vectors, batched) -> products; batched for k vectors at once, tensors of shape (k, ...) each.
        weight: of the piece.
        cost: of its graph.
        may_batch: whether ``multiply`` knows batched vectors.
    """

    multiply: Callable[[Sequence[Tensor], bool], Pieces]
    weight: float
    cost: GraphCost
    may_batch: bool = True


def derivative(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], along: Sequence[Tensor], *, batched: bool, zeros: bool = False
) -> Pieces:
    """``torch.autograd.grad`` over a graph that is kept; ``batched`` for k vectors at once, tensors of shape (k, ...) each."""
    return list(
        torch.autograd.grad(
            outputs, inputs, grad_outputs=along, retain_graph=True, allow_unused=True, is_grads_batched=batched, materialize_grads=zeros
        )
    )


def seconds_now(device: torch.device) -> float:
    """Seconds: of this thread's processor, which other work on the machine hardly disturbs; of a GPU, once it has done all it was given."""
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Blocks:
    """How one operator multiplies several vectors: one by one, or some at once through PyTorch's vmap of the second backward pass.

    The first few columns are timed both ways, the first products at once compared with one made alone, and the faster way is kept. What has
    no batching rule, or does not fit, goes one by one.

    Args:
        layout: the parameters.
        rounding: of a product, relative.

    """

    def __init__(self, layout: ParamLayout, rounding: float) -> None:
        self._layout, self._rounding = layout, rounding
        self._widest: int | None = None  # None until memory was asked, 1 where one by one is all that works
        self._tries = 0  # at once; _TRIES once it is settled
        self._seconds = {False: math.inf, True: math.inf}  # the best of a column, one by one and at once

    @property
    def width(self) -> int:
        """Products made at once; 1 until it is known to be worth it."""
        return self._widest or 1 if self._tries >= _TRIES else 1

    def known(self) -> list[Any]:
        """What has been found out so far, for :meth:`take`."""
        return [self._widest, self._tries, self._seconds[False], self._seconds[True]]

    def take(self, known: Sequence[Any]) -> None:
        """Go on from what another process has found out."""
        self._widest, self._tries, self._seconds[False], self._seconds[True] = known

    def add_(self, total: Tensor, product: PieceProduct, vectors: Tensor, *, plain: bool, free_memory: Callable[[], float]) -> None:
        """``total += weight * products``, (n, k) each.

        Args:
            total: the sum so far.
            product: of one piece.
            vectors: to multiply.
            plain: whether nothing in the graph forbids products at once.
            free_memory: bytes that are left.
        """
        k, start = vectors.shape[1], 0
        while start < k:
            width = self._next_width(product, k - start, free_memory) if plain and product.may_batch and product.cost.closed else 1
            columns = vectors[:, start : start + width]
            began = self._now()
            if width == 1:
                self._layout.add_flat_(total[:, start], product.multiply(self._layout.split(columns[:, 0]), False), product.weight)
            elif (pieces := self._at_once(product, columns)) is not None:
                self._layout.add_flat_(total[:, start : start + width], pieces, product.weight)
            else:
                continue
            self._learn((self._now() - began) / width, at_once=width > 1)
            start += width

    def _now(self) -> float:
        if self._tries < _TRIES and self._layout.device.type == "cuda":  # while it is being found out
            torch.cuda.synchronize(self._layout.device)
        return time.perf_counter()

    def _learn(self, seconds: float, *, at_once: bool) -> None:
        if self._tries >= _TRIES:
            return
        self._seconds[at_once] = min(self._seconds[at_once], seconds)
        self._tries += at_once
        if self._seconds[True] < self._seconds[False]:
            self._tries = _TRIES
        elif self._tries >= _TRIES:
            self._widest = 1
        if self._tries >= _TRIES:
            logger.info("products at once take %.3g of the time of one by one", self._seconds[True] / self._seconds[False])

    def _next_width(self, product: PieceProduct, left: int, free_memory: Callable[[], float]) -> int:
        if self._tries < _TRIES and left < _FROM:
            return 1
        if self._widest is None:
            if self._seconds[False] == math.inf:  # one by one first
                return 1
            # a second backward pass takes as much as its graph, a vector, its product and their copies in the parameters' shapes
            each = product.cost.nbytes + 4 * self._layout.size * self._layout.dtype.itemsize
            self._widest = max(1, min(_WIDEST, int(_MEMORY_SHARE * free_memory() / each)))
        return min(self._widest, left)

    def _at_once(self, product: PieceProduct, columns: Tensor) -> Pieces | None:
        """Products with several vectors; None where that does not work, and is not tried again so."""
        try:
            with silenced(UserWarning):  # of an operation without a batching rule, which is then slow: the clock tells
                pieces = product.multiply(self._layout.split(columns), True)
        except RuntimeError as error:
            self._widest = columns.shape[1] // 2 if is_out_of_memory(error) else 1
            logger.info("%d products at once failed, going on with %d: %s", columns.shape[1], self._widest, error)
            return None
        if self._tries == 0 and not self._agree(pieces, product.multiply(self._layout.split(columns[:, 0]), False)):
            self._widest = 1
            logger.warning("products at once differ from one alone: going on one by one")
            return None
        return pieces

    def _agree(self, pieces: Pieces, alone: Pieces) -> bool:
        first = self._layout.flatten([None if piece is None else piece[0] for piece in pieces])
        expected = self._layout.flatten(alone)
        # the square root of the rounding, by judgement: far above what another order of sums changes, far below a wrong rule
        gap, size = float((first - expected).norm()), float(expected.norm())
        return gap <= math.sqrt(self._rounding) * size
