"""A product over a kept graph as compiled code: the second backward pass, which is linear in the vector, traced and given to Inductor."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx

from sharpkit.objective.memory import is_out_of_memory
from sharpkit.objective.params import ParamLayout
from sharpkit.operators.blocks import PieceProduct, Pieces, seconds_now

logger = logging.getLogger(__name__)

_ROUNDS = 3  # products timed each way, by judgement: a tenth of the time is told from noise, and they take no time beside compiling

Code = Callable[..., Sequence[Tensor]]


class Compiling:
    """Compiled products of one operator; pieces of one form share the code, and so do graphs built anew after parameters have moved.

    Args:
        layout: the parameters.
        rounding: of a product, relative.

    Attributes:
        outcome: what came of it, in words; the reason where products are not compiled.
    """

    def __init__(self, layout: ParamLayout, rounding: float) -> None:
        self._layout, self._rounding = layout, rounding
        self._code: dict[str, Code] = {}  # by the traced program
        self._given_up, self._took = False, 0.0
        self._seen: WeakSet[Any] = WeakSet()  # what was compiled, or is to stay as it is
        self.outcome = "not yet: from the second product on, once all graphs are kept"

    def covers(self, products: Iterable[PieceProduct]) -> bool:
        """Whether nothing is left to be compiled."""
        return self._given_up or all(product.multiply in self._seen for product in products)

    def improved(self, product: PieceProduct) -> PieceProduct:
        """The product by compiled code; as it is where that fails, is wrong, or takes longer."""
        if self._given_up:
            return product
        try:
            began = time.perf_counter()
            multiply = self._compiled(product)
            self._took += time.perf_counter() - began
        except Exception as error:  # whatever tracing, Inductor or the C++ compiler have to say
            if is_out_of_memory(error):
                raise
            return self._give_up(product, f"no: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        vectors = self._vectors()
        expected, alone = multiply(vectors, False), product.multiply(vectors, False)
        gap, size = (float(self._layout.flatten(each).norm()) for each in (_difference(expected, alone), alone))
        # the square root of the rounding, by judgement: far above what another order of sums changes, far below wrong code
        if not gap <= math.sqrt(self._rounding) * size:
            return self._give_up(product, f"no: compiled products differ by {gap / size:.2g}")
        seconds = [min(self._seconds(way, vectors) for _ in range(_ROUNDS)) for way in (multiply, product.multiply)]
        if seconds[0] >= seconds[1]:
            return self._give_up(product, f"no: compiled products take {seconds[0] / seconds[1]:.3g} of the time")
        self.outcome = f"yes: products take {seconds[0] / seconds[1]:.3g} of the time, after {self._took:.3g} s of compiling"
        logger.info("compiled: %s", self.outcome)
        self._seen.add(multiply)
        return replace(product, multiply=multiply)

    def _give_up(self, product: PieceProduct, reason: str) -> PieceProduct:
        self._given_up, self.outcome = True, reason
        logger.warning("products are not compiled: %s", reason)
        return product

    def _compiled(self, product: PieceProduct) -> Callable[[Sequence[Tensor], bool], Pieces]:
        from torch.fx.experimental.proxy_tensor import make_fx  # here, since it imports torch._dynamo, which takes seconds

        vectors, present = self._vectors(), list[bool]()

        def linear(*along: Tensor) -> list[Tensor]:
            pieces = product.multiply(along, False)
            present[:] = [piece is not None for piece in pieces]
            return [piece for piece in pieces if piece is not None]

        traced: Any = make_fx(linear)(*vectors)
        constants = _lifted(traced)
        given = [*vectors, *constants]
        key = traced.code + "".join(f"{t.shape}{t.stride()}{t.dtype}{t.device}" for t in given)
        if key not in self._code:
            from torch import _inductor

            with torch.no_grad():
                self._code[key] = _inductor.compile(traced, given)  # type: ignore[arg-type]
        code = self._code[key]

        def multiply(vectors: Sequence[Tensor], batched: bool) -> Pieces:
            if batched:
                return product.multiply(vectors, True)
            with torch.no_grad():
                results = iter(code(*[v.contiguous() for v in vectors], *constants))
            return [next(results) if there else None for there in present]

        return multiply

    def _vectors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.detach()) for p in self._layout.params]

    def _seconds(self, multiply: Callable[[Sequence[Tensor], bool], Pieces], vectors: Sequence[Tensor]) -> float:
        began = seconds_now(self._layout.device)
        multiply(vectors, False)
        return seconds_now(self._layout.device) - began


def _difference(one: Pieces, other: Pieces) -> Pieces:
    return [a if b is None else b if a is None else a - b for a, b in zip(one, other, strict=True)]


def _lifted(traced: fx.GraphModule) -> list[Tensor]:
    """The constants of a traced program, which become inputs after those that it has: code for one graph then fits the next."""
    constants: list[Tensor] = []
    last = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in traced.graph.nodes if node.op == "get_attr"]:
        with traced.graph.inserting_after(last):
            last = traced.graph.placeholder(f"constant_{len(constants)}")
        constants.append(getattr(traced, node.target).detach())
        node.replace_all_uses_with(last)
        traced.graph.erase_node(node)
    traced.recompile()
    return constants
