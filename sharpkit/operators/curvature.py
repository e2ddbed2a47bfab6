"""What all curvature operators share: pieces of data multiplied one after another, graphs kept while memory lasts, ranks summed."""

from __future__ import annotations

import logging
import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from sharpkit._arguments import real
from sharpkit._errors import OutOfMemoryError, UnsupportedError
from sharpkit.objective.guard import TURN
from sharpkit.objective.logits import bytes_of_chunks
from sharpkit.objective.memory import human_bytes, is_limited, is_out_of_memory
from sharpkit.objective.objective import Objective
from sharpkit.objective.params import ModelTensors, ParamSelector
from sharpkit.objective.reduction import Piece
from sharpkit.objective.second_order import ONCE, REENTRANT
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.blocks import Blocks, PieceProduct
from sharpkit.operators.differences import Differences

logger = logging.getLogger(__name__)

_GRAPH_SHARE = 0.5  # of the free memory may hold retained graphs; by judgement: the rest is for the product and the basis
_PEAK = 1.5  # memory of a product over that of its graph: the second backward's own; by judgement
_JOIN_SHARE = 0.25  # of the memory for graphs may be taken by one that joins small batches, by judgement: the next one is made beside it
_MOST_JOINED = 4096  # samples in a joined piece, by judgement: a batch of so many keeps two cores busy, and a GPU
_FORECAST_FROM = 64  # samples, by judgement: a slice of 1/32 of a smaller batch would be one sample, and forecast too little

_COMPILED = "compiled code cannot be differentiated twice: pass the module from before torch.compile"
_UNSUPPORTED = {  # what PyTorch says (part of it), and what to do: the first that matches is shown
    "scaled_dot_product": "attention ran a fused kernel without second derivatives although the math kernel was asked for: set "
    "attn_implementation='eager' (Hugging Face), or call F.scaled_dot_product_attention without choosing a kernel",
    "does not currently support double backward": _COMPILED,
    "donated buffers": _COMPILED,
    "mixed torch.Tensor and DTensor": "a module computes with sharded parameters outside the forward pass of the one that fully_shard was "
    "called on, as a checkpoint around that module does: put the checkpoint inside, or call fully_shard on the module around it",
    "use_reentrant=True": REENTRANT,
    "Checkpointing is not compatible": REENTRANT,
    "once_differentiable": ONCE,
    "_cudnn_rnn_backward": "the cuDNN RNN kernel has no second derivative: run the model's RNN under "
    "torch.backends.cudnn.flags(enabled=False)",
    "modified by an inplace operation": "a tensor that the backward pass needs was changed in place: by the model itself (training fails, "
    "too: use operations that are not in place there), or in the batches between two products (leave them alone, or make a new operator)",
}


@dataclass(frozen=True)
class _Situation:
    """What graphs are made for: sizes of pieces, the model, how often each parameter was written to, values of all that is watched.

    Autograd refuses a graph older than the last write in place, whether values are equal or not; copies of the values are the only way to
    see a change made behind its back, through ``.data``.
    """

    sizes: tuple[int | None, int | None]
    tensors: ModelTensors
    versions: Sequence[int]
    values: Sequence[Tensor]


class CurvatureOperator(SymmetricOperator):
    """A curvature matrix of an objective: a weighted sum over its pieces, summed over processes.

    The autograd graph of each piece is built once and kept while ``memory_limit`` lasts, which makes a product one and a half times as
    fast as building it anew; it is rebuilt when a parameter or buffer of the model has changed. A piece that does not fit is cut in halves
    and tried again.

    Args:
        objective: the function.
        retain: keep graphs between products: ``"auto"`` while memory lasts, True always, False never.
        memory_limit: bytes for retained graphs; by default half of what is free when the first is built.

    Attributes:
        all_kept: whether the graphs of all pieces are retained, so that the next product rebuilds none.
        blocks: how several vectors are multiplied; ``blocks.width`` products are made at once.

    Raises:
        OutOfMemoryError: a single sample does not fit.
        UnsupportedError: PyTorch cannot differentiate this model twice; the message names the remedy.
    """

    def __init__(self, objective: Objective, *, retain: bool | str = "auto", memory_limit: float | None = None) -> None:
        if not isinstance(objective, Objective):
            raise TypeError(f"{type(self).__name__} takes an Objective(model, data, loss=...), got {type(objective).__name__}")
        if retain not in (True, False, "auto"):
            raise ValueError(f"retain must be True, False or 'auto', got {retain!r}")
        memory_limit = None if memory_limit is None else real("memory_limit", memory_limit, least=0, infinite=True, hint="it is in bytes")
        if objective.shards is not None and not self._takes_shards:
            raise UnsupportedError(
                f"{type(self).__name__} is not available for parameters sharded over processes: use HessianOperator, or gather the model "
                "into plain tensors (a full state dict) and measure that copy"
            )
        super().__init__(objective.num_parameters, dtype=objective.dtype, device=objective.device)
        self.objective, self.rounding, self.processes = objective, objective.rounding, objective.ranks
        self.layout = objective.layout
        self.length = self.layout.size
        self._retain, self._memory_limit = retain, memory_limit
        self._kept: dict[tuple[int, int], PieceProduct] = {}  # by the pieces' keys
        self.all_kept = False
        self._largest = 0  # bytes of the largest graph so far
        self._kept_for: _Situation | None = None
        self.blocks = Blocks(self.layout, self.rounding)

    _differences: Differences | None = None  # multiplies in the place of graphs
    _takes_shards = False  # whether products are made of parts of sharded parameters
    _joins = True  # whether small batches may be joined: what is drawn at random by the batch's number would be drawn anew

    def _peak(self) -> float:
        """Memory of building a graph and of a product, over that of the graph."""
        return _PEAK

    @abstractmethod
    def _build(self, piece: Piece) -> PieceProduct:
        """Build the graph of one piece and return its product: the method that a subclass writes."""

    def _may_improve(self) -> bool:
        """Whether another way to multiply is to be tried now, which takes a guard."""
        return False

    def _improve(self) -> None:
        """Try it."""

    def _look_into_doubts(self) -> None:
        """Refuse what the graphs built so far give reason to doubt; by default nothing: first derivatives are what training uses."""

    # -- products -----------------------------------------------------------------------------------------------------
    def matvec(self, vector: Tensor) -> Tensor:
        return self._product(vector)

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products with k vectors, (n, k): several at a time where that is faster here, which the first ones show."""
        if self.objective.shards is not None or self._differences is not None:
            return super().matmat(vectors)  # one vector is what all processes multiply at a time
        # each vector in one piece of memory, so that it is cut into the parameters' shapes without copies
        return self._product(vectors if vectors.mT.is_contiguous() else vectors.mT.contiguous().mT)

    def _product(self, vectors: Tensor) -> Tensor:
        if self._differences is not None:
            product = self._differences(vectors)
            self.rounding = max(self.objective.rounding, self._differences.relative_error)
            return product

        def local() -> Tensor:
            try:
                if (product := self._without_guard(vectors)) is not None:
                    return product
                with self.objective.undisturbed():  # once a product: as much as it costs to set aside and put back a model's state
                    product = self._local_product(vectors)
                if self.objective.shards is None:
                    self._look_into_doubts()
                return product
            except RuntimeError as error:
                if (explained := _explained(error)) is None:
                    raise
                raise explained from error

        ranks, shards = self.objective.ranks, self.objective.shards
        if shards is None:
            return ranks.sum_(ranks.run_together(local, device=self.device))  # each process holds its own batches' share of the sum
        if ranks.sum_numbers([float(bool(self._kept) and not self._is_current())], device=self.device)[0]:
            self.forget_graphs()  # on all: what has changed on one process is part of every process's graph
        shards.set_vector(self.layout.live, self.layout.split(vectors))
        with shards.going("sum"):
            total = ranks.run_together(local, device=self.device)
        self.layout.add_flat_(total, shards.collected(self.layout.live), 1.0)
        self._look_into_doubts()
        return total

    def _without_guard(self, vectors: Tensor) -> Tensor | None:
        """The product over kept graphs alone; None where it needs a guard, or does not fit and is to be tried again with less memory."""
        with TURN:  # a thread that moves the parameters meanwhile would move those that graphs refer to
            if not self._needs_no_guard():
                return None
            try:
                return self._sum_over_kept(vectors)
            except Exception as exception:  # the CPU allocator raises a plain RuntimeError
                if is_out_of_memory(exception):
                    return None
                raise

    def _local_product(self, vectors: Tensor) -> Tensor:
        self._drop_if_stale()
        while True:  # after a failed allocation again, with smaller pieces
            try:
                if self._may_improve():
                    self._improve()
                return self._sum_over_pieces(vectors)
            except Exception as exception:
                if not is_out_of_memory(exception):
                    raise
                self._shrink(exception)  # or raises, so that this ends

    def _sum_over_pieces(self, vectors: Tensor) -> Tensor:
        if self.all_kept:  # the data is not gone through again: loading it may cost more than the products
            return self._sum_over_kept(vectors)
        total = torch.zeros_like(vectors, requires_grad=False)
        every_one_kept = True
        self._forecast()  # before the first graph
        if self._retain is not False and not self._kept:
            tensors = ModelTensors(self.objective.model, self.objective.shards)
            versions = [version_of(p) for p in tensors.parameters]
            self._kept_for = _Situation(self._sizes(), tensors, versions, [t.detach().clone() for t in tensors.now()])
        for piece in self.objective.pieces(join=self._joins):
            product = self._kept.get(piece.key) or self._build(piece)
            self._largest = max(self._largest, product.cost.nbytes)
            self._add_product(total, product, vectors)
            every_one_kept = self._keep(piece.key, product) and every_one_kept
        self.all_kept = every_one_kept
        if not self._kept:
            self._kept_for = None  # copies of values that nothing is compared with
        return total

    def _sum_over_kept(self, vectors: Tensor) -> Tensor:
        if len(self._kept) == 1 and vectors.ndim == 1:  # the usual case: no second vector is needed to add up in
            (product,) = self._kept.values()
            return self.layout.flatten(product.multiply(self.layout.split(vectors), False), product.weight)
        total = torch.zeros_like(vectors, requires_grad=False)
        for product in self._kept.values():
            self._add_product(total, product, vectors)
        return total

    def _add_product(self, total: Tensor, product: PieceProduct, vectors: Tensor) -> None:
        if vectors.ndim == 1:
            self.layout.add_flat_(total, product.multiply(self.layout.split(vectors), False), product.weight)
            return
        plain = not self.objective.second_order.doubts
        self.blocks.add_(total, product, vectors, plain=plain, free_memory=self.free_memory)

    # -- graphs: kept, dropped, forecast ------------------------------------------------------------------------------------
    def _keep(self, key: tuple[int, int], product: PieceProduct) -> bool:
        if key in self._kept:
            return True
        if self._retain is False or (self._retain == "auto" and self.bytes_kept() + product.cost.nbytes > self._limit()):
            return False
        self._kept[key] = product
        return True

    def bytes_needed(self) -> float:
        # the gradient that is differentiated again, and the copies that tell whether parameters have changed; then, of each of the
        # products made at once, a second backward pass and its result in the parameters' shapes and as one vector
        vector = float(self.length * self.dtype.itemsize)
        chunks = bytes_of_chunks(self.device) if self.objective.chunking.in_use else 0
        chunks += self.objective.shards.held_bytes if self.objective.shards is not None else 0
        if self._differences is not None:
            return 5 * vector  # both gradients, the parameters moved and as they were, the direction
        return self.bytes_kept() + 2 * vector + chunks + self.blocks.width * (_PEAK * self._largest + 4 * vector)

    def choices(self) -> Mapping[str, str]:
        if self._differences is not None:
            return {"products": f"differences of gradients, off by {self._differences.relative_error:.1g} of the largest product"}
        joined, cut = self.objective.joining.size, self.objective.micro_batch_size
        batches = f"joined to {joined} samples at most" if joined else f"in pieces of {cut}" if cut else "as they come"
        kept = f"all kept, {human_bytes(self.bytes_kept())}" if self.all_kept else "rebuilt for each product, as far as they do not fit"
        width = self.blocks.width
        told = {"batches": batches, "graphs": kept, "products": f"{width} at once" if width > 1 else "one by one"}
        return {**told, "logits": "of some tokens at a time"} if self.objective.chunking.in_use else told

    def way(self) -> dict[str, Any]:
        return {"cut": self.objective.micro_batch_size, "joined": self.objective.joining.size, "at_once": self.blocks.known()}

    def take_way(self, way: Mapping[str, Any]) -> None:
        if (way["cut"], way["joined"]) != self._sizes():
            self.forget_graphs()
            self.objective.micro_batch_size, self.objective.joining.size = way["cut"], None
            if way["joined"] is not None:
                with self.objective.undisturbed():
                    self.objective.join_up_to(way["joined"])
        self.blocks.take(way["at_once"])

    def identity(self) -> dict[str, str]:
        return {**super().identity(), **self.objective.identity()}

    def bytes_kept(self) -> int:
        """Memory that the retained graphs hold, as far as it is known."""
        return sum(product.cost.nbytes for product in self._kept.values())

    def _limit(self) -> float:
        if is_limited(self.device):  # for as long as somebody says so
            given = math.inf if self._memory_limit is None else self._memory_limit
            return min(given, _GRAPH_SHARE * (self.free_memory() + self.bytes_kept()))
        if self._memory_limit is None:  # once: later, what is free holds the graphs already kept
            self._memory_limit = _GRAPH_SHARE * (self.free_memory() + self.bytes_kept())
        return self._memory_limit

    def _watched(self) -> list[Tensor]:
        """All that the function depends on besides the data: every parameter, also those held fixed, and every buffer."""
        return ModelTensors(self.objective.model, self.objective.shards).now()

    def _sizes(self) -> tuple[int | None, int | None]:
        return self.objective.micro_batch_size, self.objective.joining.size

    def _is_current(self) -> bool:
        """Whether the graphs are of the present pieces and values."""
        made = self._kept_for
        if made is None or made.sizes != self._sizes() or not made.tensors.are_current():
            return False
        written = any(version_of(p) != n for p, n in zip(made.tensors.parameters, made.versions, strict=True))
        return not written and all_equal(made.tensors.now(), made.values)

    def _needs_no_guard(self) -> bool:
        """Whether a product runs over kept graphs alone, whose backward passes call no code but torch's own and draw nothing.

        Setting aside and putting back a model's state costs as much as the product of a small model.
        """
        return (
            self.all_kept
            and not self._may_improve()
            and all(product.cost.closed for product in self._kept.values())
            and not self.objective.second_order.doubts
            and all(p.requires_grad and not p._backward_hooks for p in self.layout.params)
            and not torch.is_inference_mode_enabled()
            and not torch.is_autocast_enabled(self.device.type)
            and self._is_current()
        )

    def _drop_if_stale(self) -> None:
        """Forget graphs of other values or pieces."""
        if self._kept and not self._is_current():
            self.forget_graphs()

    def forget_graphs(self) -> None:
        """Free all retained graphs; the next product builds them anew."""
        self.all_kept = False  # first: an interruption after the next line must not leave "all of nothing is kept", a matrix of zeros
        self._kept.clear()
        self._kept_for = None

    def _shrink(self, cause: BaseException) -> None:
        """After a failed allocation: first drop what is retained, then cut the pieces in halves."""
        if self._kept and self._retain == "auto":
            self.forget_graphs()
            self._retain = False  # for good: kept again, they would fill the memory again
        elif self._joins and self.objective.joining.size is not None:
            self.objective.joining.allowed, self.objective.joining.size = False, None
        elif not self._halve_pieces():
            samples = self._piece_length()
            raise OutOfMemoryError(
                f"a product does not fit: {human_bytes(self.free_memory())} free on {self.device}, {self.size:,} parameters, pieces of "
                f"{samples} sample{'' if samples == 1 else 's'} that {'cannot' if samples == 1 else 'may not'} be cut further. Select "
                "fewer parameters (params=), checkpoint activations (use_reentrant=False), or measure on a smaller batch"
            ) from cause
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks cached for the larger pieces are too fragmented for the smaller ones
        logger.warning("a product ran out of memory; going on with pieces of %s samples", self.objective.micro_batch_size or "all")

    def _piece_length(self) -> int:
        return self.objective.micro_batch_size or max(self.objective.batch_lengths, default=0)

    def _halve_pieces(self) -> bool:
        present = self._piece_length()
        if not self.objective.may_split or present <= 1:
            return False
        self.forget_graphs()  # of pieces that will not come again
        self.objective.micro_batch_size = math.ceil(present / 2)
        return True

    def _forecast(self) -> None:
        """Cut a batch whose graph would not fit *before* building it: an out-of-memory kill on the host cannot be caught. Or join."""
        objective = self.objective
        longest = self._piece_length()
        if self._kept or objective.micro_batch_size is not None or not objective.may_split:
            return
        may_join = self._joins and objective.joining.allowed and objective.joining.size is None and objective.num_batches > 1
        if longest >= _FORECAST_FROM:
            objective.micro_batch_size = sample = max(1, longest // 32)  # by judgement: 3 % of a product's time, once
        elif may_join:
            sample = longest
        else:
            return
        try:
            first = next(objective.pieces(), None)  # None: a process without data
            held = self._build(first).cost.nbytes if first is not None else 0
        finally:
            objective.micro_batch_size = None
        peak = self._peak() * held * longest / sample
        if peak > (free := self.free_memory()):
            objective.micro_batch_size = max(1, int(sample * _GRAPH_SHARE * free / (self._peak() * held)))
            needed = f"{human_bytes(peak)} of {human_bytes(free)} free"
            logger.warning("a batch of %d samples would need about %s; using pieces of %d", longest, needed, objective.micro_batch_size)
        elif may_join and held and (fitting := int(sample * _JOIN_SHARE * self._limit() / (self._peak() * held))) > 1:
            objective.join_up_to(min(_MOST_JOINED, fitting))

    # -- ranks and blocks -----------------------------------------------------------------------------------------------
    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        if self.objective.shards is not None:
            return self.objective.ranks.sum_small(super().dot(left, right))
        # Vectors are the same on all processes up to rounding; the first one's numbers decide, so that all take the same branches.
        return self.objective.ranks.broadcast_(super().dot(left, right).contiguous())

    def agree(self, value: float) -> float:
        return self.objective.ranks.agree(value, device=self.device)

    def check_alike(self, call: str, settings: Mapping[str, Any]) -> None:
        alike = {name: value for name, value in settings.items() if name not in ("operator", "callback")}
        if self.objective.shards is not None:  # parts of vectors, of other lengths
            alike = {name: value for name, value in alike.items() if not isinstance(value, Tensor)}
        self.objective.ranks.check_alike(call, {"size": self.size, **alike})

    def random_vectors(self, k: int, *, generator: torch.Generator, distribution: str = "normal") -> Tensor:
        # drawn whole, so that a seed means the same for any number of processes
        return self.layout.own_rows(super().random_vectors(k, generator=generator, distribution=distribution))

    def block(self, pattern: ParamSelector) -> Self:
        """The diagonal block of a parameter group: the same matrix for fewer parameters, at the cost of those alone."""
        return type(self)(self.objective.with_params(pattern), **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {"retain": self._retain, "memory_limit": self._memory_limit}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size:,} x {self.size:,}, {self.dtype}, {self.device}, {self.objective.mode} mode)"


def version_of(t: Tensor) -> int:
    """How often a tensor was written to in place; -1 where that is not known."""
    return -1 if t.is_inference() else t._version


def all_equal(now: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors hold the same values, shapes, types and devices."""
    if len(now) != len(before):
        return False
    elsewhere: list[Tensor] = []
    for a, b in zip(now, before, strict=True):
        if a.dtype != b.dtype or a.device != b.device:
            return False
        if a.is_cpu:  # torch.equal compares shapes first and stops early, but would synchronise for every tensor on a GPU
            if not torch.equal(a, b):
                return False
        elif a.shape != b.shape:
            return False
        else:
            elsewhere.append((a.detach() != b).any())
    return not (elsewhere and bool(torch.stack([x.to(elsewhere[0].device) for x in elsewhere]).any()))  # one synchronisation


def _explained(error: Exception) -> UnsupportedError | None:
    for sign, remedy in _UNSUPPORTED.items():
        if sign in str(error):
            return UnsupportedError(f"{remedy} (PyTorch said: {str(error).splitlines()[0]})")
    if match := re.search(r"derivative for '?(?:aten::)?_?(\w+?)(?:_backward)?'? is not implemented", str(error)):
        return UnsupportedError(
            f"PyTorch has no second derivative of {match[1]}: write it in elementary torch operations, or use GaussNewtonOperator or "
            f"EmpiricalFisherOperator, which need first derivatives of it alone (PyTorch said: {str(error).splitlines()[0]})"
        )
    return None
