"""Gradients of single samples, or of small groups of them: several at a time by vmap where that is right and faster, else one by one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharpkit.objective.batches import map_tensors
from sharpkit.objective.guard import silenced
from sharpkit.objective.memory import available_memory, graph_cost, is_out_of_memory
from sharpkit.objective.objective import Objective
from sharpkit.objective.params import replaced
from sharpkit.objective.reduction import Piece, stacked

logger = logging.getLogger(__name__)

_FEWEST, _MOST = 8, 256  # at a time, by judgement: with fewer there is little to gain, more gain little
_ROWS = 2**22  # bytes of gradients at a time on a CPU, whose cache then holds them (experiments/forward_mode.py)
_MEMORY_SHARE = 0.25  # of what is free may be taken by them, by judgement
_COPIES = 4  # of a gradient, by judgement: the parameters it is taken in, as it comes, laid flat, and what is computed of it
_TRIES = 2  # times that several at a time are timed if they are slower at first, by judgement: the first time loads what they need


class SampleGradients:
    """The gradients of the losses of single samples.

    The first two are computed one by one and compared with what vmap gives; the faster way is kept. What has no batching rule, reads a
    value, keeps tensors by hooks, draws random numbers or does not fit goes one by one.

    Args:
        objective: whose samples they are.

    Attributes:
        at_once: whether several are computed at a time; None before it is known.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.at_once: bool | None = None
        self._width, self._tries, self._seconds = 0, 0, math.inf

    def of(self, samples: Sequence[Piece]) -> Iterator[tuple[slice, Tensor]]:
        """Which of the samples, and their gradients, (c, n), until all are done. To be called under :meth:`Objective.undisturbed`.

        Args:
            samples: of one batch, or pieces of one form.

        Raises:
            ObjectiveError, NonFiniteError: as :meth:`Objective.evaluate`.
        """
        start = 0
        while start < len(samples):
            chunk = samples[start : start + self._at_a_time(samples, len(samples) - start)]
            rows = self._several(chunk) if len(chunk) > 1 else None
            if rows is None:
                if len(chunk) > 1 and self.at_once is not False:
                    continue  # fewer at a time
                chunk, rows = chunk[:1], self._one(chunk[0])[None]
            yield slice(start, start + len(chunk)), rows
            start += len(chunk)

    def _at_a_time(self, samples: Sequence[Piece], left: int) -> int:
        if self.at_once is False or left < _FEWEST:
            return 1
        if not self._width and not self._look(samples[0]):
            self.at_once = False
        return self._width if self.at_once is not False else 1

    def _look(self, piece: Piece) -> bool:
        """Find how many fit; whether several may be tried at all."""
        objective = self._objective
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in objective.model.modules())  # they may keep what is gone afterwards
        if hooked or objective.chunking.used:
            return False
        layout = objective.layout
        row = layout.size * layout.dtype.itemsize
        each = _COPIES * row + 2 * graph_cost([objective.evaluate(piece)], exclude=layout.params).nbytes
        self._width = int(min(_MOST, _MEMORY_SHARE * available_memory(layout.device) / each))
        if layout.device.type == "cpu":
            self._width = min(self._width, _ROWS // row)
        return self._width >= _FEWEST

    def _one(self, piece: Piece) -> Tensor:
        layout = self._objective.layout
        return layout.flatten(torch.autograd.grad(self._objective.evaluate(piece), layout.params, allow_unused=True))

    def _several(self, samples: Sequence[Piece]) -> Tensor | None:
        """The gradients, (c, n); None where that does not work."""
        try:
            if self.at_once:
                return self._mapped(samples)
            began = self._now()
            alone = [self._one(piece) for piece in samples[:2]]
            self._seconds = min(self._seconds, (self._now() - began) / len(alone))
            began = self._now()
            rows = self._mapped(samples)
            self._learn((self._now() - began) / len(samples), right=rows is not None and self._agree(rows, alone))
            return rows if self.at_once is not False else None
        except Exception as error:  # user code may raise anything where a tensor stands for several
            if is_out_of_memory(error) and len(samples) // 2 >= _FEWEST:
                self._width = len(samples) // 2
                return None
            self.at_once = False
            logger.info("gradients of samples are computed one by one: %s", error)
            return None

    def _mapped(self, samples: Sequence[Piece]) -> Tensor | None:
        objective, first = self._objective, samples[0]
        layout = objective.layout
        given, own = stacked(samples)

        def loss_of(values: Sequence[Tensor], *tensors: Tensor) -> Tensor:
            left = iter(tensors)
            batch = map_tensors(lambda _: next(left), first.batch)
            with replaced(objective.model, layout.params, values):
                return objective.unchecked_loss(batch, first.key[0]).reshape(())

        # each sample has the parameters to itself, as views: torch.func.grad inside would import torch._dynamo, which takes seconds
        values = [p.detach().expand(len(samples), *p.shape).requires_grad_() for p in layout.params]
        with silenced(UserWarning):  # of an operation without a batching rule, which is then slow: the clock tells
            losses = torch.vmap(loss_of, in_dims=(0, *(0 if each else None for each in own)))(values, *given)
            parts = torch.autograd.grad(losses.sum(), values, allow_unused=True, materialize_grads=True)
        if not bool(torch.isfinite(losses).all()):  # one by one it is said which
            self.at_once = False
            return None
        rows = torch.empty(len(samples), layout.size, dtype=layout.dtype, device=layout.device)
        for target, part in zip(torch.split(rows, list(layout.sizes), dim=1), parts, strict=True):
            target.view(part.shape).copy_(part)
        return rows

    def _learn(self, seconds: float, *, right: bool) -> None:
        self._tries += 1
        if not right or seconds < self._seconds or self._tries >= _TRIES:
            self.at_once = right and seconds < self._seconds
            took = f"take {seconds / self._seconds:.3g} of the time of one by one" if right else "differ from those one by one"
            logger.info("gradients of several samples at a time %s", took)

    def _agree(self, rows: Tensor, alone: Sequence[Tensor]) -> bool:
        gap = max(float((row - expected).norm()) for row, expected in zip(rows, alone, strict=False))
        # the square root of the rounding, by judgement: far above what another order of sums changes, far below a wrong rule
        return gap <= math.sqrt(self._objective.rounding) * max(float(expected.norm()) for expected in alone)

    def _now(self) -> float:
        if self._objective.device.type == "cuda":
            torch.cuda.synchronize(self._objective.device)
        return time.perf_counter()
