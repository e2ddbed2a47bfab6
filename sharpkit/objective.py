"""The function whose curvature is meant: a model, a loss and fixed data, averaged with the right weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit import _counting
from sharpkit._batches import Batch, BatchSource, slice_batch, to_device
from sharpkit._distributed import find_ranks
from sharpkit._errors import NonFiniteError, ObjectiveError
from sharpkit._guard import loader_generators, undisturbed, unwrap
from sharpkit._params import ParamSelector, select_params
from sharpkit._survey import Survey, survey

Closure = Callable[[nn.Module, Batch], Tensor]
_MODES = ("eval", "train")


@dataclass(frozen=True)
class Piece:
    """A batch or a slice of one, on the model's device.

    Attributes:
        key: (batch number, first sample): the same piece has the same key in every pass.
        batch: the data.
        count: what it counts (targets, or the sum of their class weights).
        weight: its share of the objective: count / total for a mean, 1 for a sum.
    """

    key: tuple[int, int]
    batch: Batch
    count: float
    weight: float


class Objective:
    """f(w) = (1/C) sum over batches of c_b L_b(w): one fixed function of the parameters, the same however the data is cut into batches.

    A batch weighs what it counts (c_b): its targets, masked ones left out, or their class weights; a loss that sums is summed. How the loss
    averages is read off a standard PyTorch loss and tried out on any other. Making an objective goes through the data once to count, evaluates
    the first batch twice to see that the answer repeats, and changes nothing in the model.

    Args:
        model: any module; wrappers (DistributedDataParallel, torch.compile) are taken off.
        data: one batch, a list of batches, or a re-iterable loader. A tuple, a dict or a tensor is one batch.
        loss: ``loss(output, target)`` on (input, target) batches. A dict input is passed as keywords, a tuple as positions; an output with
            ``.logits`` is replaced by them. Without loss and closure, ``model(**batch).loss`` of dict batches is taken.
        closure: ``closure(model, batch)`` returning the scalar loss, for everything else.
        count: ``count(batch)`` -> what the loss of that batch averages over, when it cannot be found out.
        params: which parameters; None for all trainable ones, a shell pattern such as ``"blocks.*.attn.*"``, several, or a predicate.
        reduction: ``"mean"``, ``"sum"``, or ``"auto"`` to find out.
        mode: ``"eval"`` or ``"train"``: dropout and batch statistics as in that mode. In train mode the random masks are fixed by ``seed``
            and batch statistics make the function depend on the batches. Their Hessians differ widely; the mode is part of every result.
        autocast: e.g. ``torch.bfloat16`` to run the forward pass under autocast; vectors stay in float32.
        micro_batch_size: split batches into pieces of so many samples; ``"auto"`` splits only when memory asks for it; None never.
        process_group: None sums over the default group where torch.distributed runs, each process holding its own batches; False does not.
        seed: of the randomness inside the model.
        check: evaluate the first batch twice and try out unknown losses; False skips both and trusts ``count`` and ``reduction``.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, nothing to differentiate.
        ObjectiveError: no data, a one-shot iterator, a loss that is not one number or does not depend on the parameters.
        NonDeterministicError: the loader shuffles or augments, or the loss does not repeat.
        NonFiniteError: the loss is NaN or infinite.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> objective = sk.Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
        >>> objective.num_parameters, objective.num_samples
        (4, 8)
    """

    def __init__(
        self, model: nn.Module, data: Any, *, loss: Callable[[Any, Any], Tensor] | None = None, closure: Closure | None = None,
        count: Callable[[Batch], float] | None = None, params: ParamSelector = None, reduction: str = "auto", mode: str = "eval",
        autocast: torch.dtype | None = None, micro_batch_size: int | str | None = "auto", process_group: Any = None, seed: int = 0, check: bool = True,
    ) -> None:
        _check_arguments(model, loss, closure, reduction, mode, micro_batch_size)
        self.model = unwrap(model)
        self.layout = select_params(self.model, params)
        self.loss, self.mode, self.seed, self.autocast = loss, mode, seed, autocast
        self._closure: Closure = closure or (self._pair_loss if loss is not None else _own_loss)
        self.ranks = find_ranks(process_group)
        self._source = BatchSource(data, pair=loss is not None)
        self._count = count
        self.micro_batch_size = micro_batch_size if isinstance(micro_batch_size, int) else None
        self._survey = self._take_survey(reduction, check)
        self.may_split = micro_batch_size is not None and self.may_separate
        if isinstance(micro_batch_size, int) and not self.may_split:
            cause = "batch statistics are computed over whole batches (mode='train')" if self.couples_samples else "the loss is not a mean or sum over samples"
            raise ValueError(f"micro_batch_size={micro_batch_size} would change the function: {cause}")

    # -- what it is ---------------------------------------------------------------------------------------------------
    @property
    def num_parameters(self) -> int:
        """Length of the flat parameter vector."""
        return self.layout.size

    @property
    def num_targets(self) -> float:
        """What the objective averages over, on all processes: counted targets (or the sum of their class weights)."""
        return self._survey.total

    @property
    def num_samples(self) -> int:
        """Samples in all batches of all processes."""
        return self._survey.num_samples

    @property
    def num_batches(self) -> int:
        """Batches on this process."""
        return len(self._survey.counts)

    @property
    def reduction(self) -> str:
        """``"mean"`` or ``"sum"``."""
        return self._survey.reduction

    @property
    def counted(self) -> str:
        """What a batch is weighed by, in words."""
        return self._survey.rule

    @property
    def device(self) -> torch.device:
        return self.layout.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of parameter-space vectors, at least float32."""
        return self.layout.dtype

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's loss depends on the rest of its batch (batch statistics in train mode)."""
        return self.mode == "train" and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())

    @property
    def may_separate(self) -> bool:
        """Whether the objective falls apart into samples, so that pieces and per-sample gradients mean something."""
        return self._survey.additive and not self.couples_samples

    def __repr__(self) -> str:
        world = f", {self.ranks.size} processes" if self.ranks.size > 1 else ""
        return (
            f"Objective({type(self.model).__name__}, {self.num_parameters:,} parameters, {self.reduction} over {self.num_targets:g} {self.counted} "
            f"in {self.num_batches} batch{'' if self.num_batches == 1 else 'es'}, {self.mode} mode, {self.dtype}, {self.device}{world})"
        )

    def with_params(self, params: ParamSelector) -> Objective:
        """The same function of fewer parameters, the others held fixed."""
        other = copy.copy(self)
        names = set(self.layout.names)
        picked = select_params(self.model, params)
        other.layout = select_params(self.model, [n for n in picked.names if n in names] or ["<none of the objective's parameters>"])
        return other

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def undisturbed(self) -> AbstractContextManager[None]:
        """The guard to evaluate under: the model is left bit for bit as found."""
        return undisturbed(self.model, training=self.mode == "train", generators=loader_generators(self._source.data))

    def pieces(self) -> Iterator[Piece]:
        """The data, batch by batch or in slices of ``micro_batch_size``, with weights; pieces that count nothing are left out."""
        for index, batch in enumerate(self._source):
            if index >= self.num_batches:
                raise ObjectiveError(f"the loader gave more than the {self.num_batches} batches it gave at first: its data changed, make a new Objective")
            if self._survey.counts[index]:
                yield from self._slices(index, to_device(batch, self.device))

    def _slices(self, index: int, batch: Batch) -> Iterator[Piece]:
        length = self._survey.lengths[index]
        if self.micro_batch_size is None or self.micro_batch_size >= length:
            yield self._piece((index, 0), batch, self._survey.counts[index])
            return
        for start in range(0, length, self.micro_batch_size):
            part = slice_batch(batch, start, start + self.micro_batch_size)
            if count := self.count_of(part):
                yield self._piece((index, start), part, count)

    def _piece(self, key: tuple[int, int], batch: Batch, count: float) -> Piece:
        return Piece(key, batch, count, count / self.num_targets if self.reduction == "mean" else 1.0)

    def samples_of(self, piece: Piece) -> list[Piece]:
        """A piece cut into single samples, those that count nothing left out.

        Raises:
            ObjectiveError: the loss does not fall apart into samples.
        """
        if not self.may_separate:
            raise ObjectiveError("per-sample gradients need a loss that is a mean or sum over samples; use mode='eval' or another loss")
        index, first = piece.key
        slices = [slice_batch(piece.batch, i, i + 1) for i in range(_counting.samples_in(piece.batch, self.loss is not None))]
        return [self._piece((index, first + i), part, count) for i, part in enumerate(slices) if (count := self.count_of(part))]

    def count_of(self, batch: Batch) -> float:
        """What a batch counts, by the rule found at the start."""
        if self._count is not None:
            return float(self._count(batch))
        return self._candidate_counts(batch)[self._survey.rule]

    def predict(self, batch: Batch) -> Tensor:
        """The model's output on an (input, target) batch, as the loss receives it. To be called under :meth:`undisturbed`."""
        inputs = batch[0]
        with self._precision():
            output = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(*inputs) if isinstance(inputs, (tuple, list)) else self.model(inputs)
        if not isinstance(output, Tensor) and isinstance(logits := getattr(output, "logits", None), Tensor):
            return logits
        return output  # type: ignore[no-any-return]

    def output_loss(self, output: Tensor, target: Any) -> Tensor:
        """The loss of a model output, in the objective's precision."""
        if self.loss is None:
            raise ObjectiveError("this needs the loss as a function of the model's output: make the Objective with loss= and (input, target) batches")
        with self._precision():
            return self.loss(output, target)

    def evaluate(self, piece: Piece) -> Tensor:
        """The loss of one piece, unweighted, with its graph. To be called under :meth:`undisturbed`.

        Raises:
            ObjectiveError: not one real number, or without a gradient.
            NonFiniteError: NaN or infinite.
        """
        return self._evaluate(piece.batch, piece.key)

    def _evaluate(self, batch: Batch, key: tuple[int, int]) -> Tensor:
        torch.manual_seed(self.seed + key[0])
        with self._precision():
            loss = self._closure(self.model, batch)
        _check_loss(loss, key)
        return loss

    def _pair_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.output_loss(self.predict(batch), batch[1])

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.autocast) if self.autocast is not None else nullcontext()

    def value(self) -> float:
        """f(w)."""
        with self.undisturbed(), torch.no_grad():
            total = sum(float(self._evaluate_no_graph(piece)) * piece.weight for piece in self.pieces())
        return self.ranks.sum_numbers([total], device=self.device)[0]

    def _evaluate_no_graph(self, piece: Piece) -> Tensor:
        torch.manual_seed(self.seed + piece.key[0])
        with self._precision():
            return self._closure(self.model, piece.batch)

    def gradient(self) -> tuple[float, Tensor]:
        """f(w) and its gradient, a flat vector of shape (num_parameters,)."""
        total, flat = 0.0, torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        with self.undisturbed():
            for piece in self.pieces():
                loss = self.evaluate(piece)
                total += float(loss.detach()) * piece.weight
                self.layout.add_flat_(flat, torch.autograd.grad(loss, self.layout.params, allow_unused=True), piece.weight)
        self.ranks.sum_(flat)
        return self.ranks.sum_numbers([total], device=self.device)[0], flat

    # -- counting -----------------------------------------------------------------------------------------------------
    def _candidate_counts(self, batch: Batch) -> dict[str, float]:
        if self._count is not None:
            return {"counts": float(self._count(batch))}
        return _counting.candidate_counts(batch, self._known_loss, self.loss is not None)

    @property
    def _known_loss(self) -> _counting.KnownLoss | None:
        return _counting.recognise_loss(self.loss) if self.loss is not None else None

    def _take_survey(self, reduction: str, check: bool) -> Survey:
        def loss_of(batch: Batch, index: int) -> float:
            with undisturbed(self.model, training=False):
                return float(self._evaluate(to_device(batch, self.device), (index, 0)).detach())

        def loss_in_mode(batch: Batch) -> float:
            with self.undisturbed():
                return float(self._evaluate(to_device(batch, self.device), (0, 0)).detach())

        with self.undisturbed():
            error, found = None, None
            try:
                found = survey(
                    self._source, self._candidate_counts, loss_of, loss_in_mode, known=self._known_loss, reduction=reduction, given_count=self._count is not None,
                    pair=self.loss is not None, ranks=self.ranks, check=check, dtype=self.autocast or self.layout.params[0].dtype,
                )
            except Exception as exception:
                error = exception
            self.ranks.raise_together(error, device=self.device)
        if found is None:
            raise ObjectiveError("the data could not be surveyed")
        return found.over(self.ranks, self.device)


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(f"without loss= or closure=, batches must be dicts for model(**batch).loss; this one is a {type(batch).__name__}: pass loss= or closure=")
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ObjectiveError("model(**batch) returned no .loss: give the batch its labels, or pass loss= or closure=")
    return loss


def _check_arguments(model: Any, loss: Any, closure: Any, reduction: str, mode: str, micro_batch_size: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if loss is not None and closure is not None:
        raise ValueError("pass loss= or closure=, not both")
    if any(f is not None and not callable(f) for f in (loss, closure)):
        raise TypeError("loss and closure must be callable: loss(output, target), closure(model, batch)")
    if reduction not in ("auto", "mean", "sum"):
        raise ValueError(f"reduction must be 'auto', 'mean' or 'sum', got {reduction!r}")
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {_MODES}, got {mode!r}")
    if not (micro_batch_size is None or micro_batch_size == "auto" or (isinstance(micro_batch_size, int) and micro_batch_size > 0)):
        raise ValueError(f"micro_batch_size must be a positive integer, 'auto' or None, got {micro_batch_size!r}")


def _check_loss(loss: Any, key: tuple[int, int]) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        came = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ObjectiveError(f"the loss must be one real number as a tensor, got {came}; use reduction='mean' and return the tensor itself, not .item()")
    if not loss.requires_grad and torch.is_grad_enabled():
        raise ObjectiveError("the loss does not depend on any trainable parameter: it was detached, or computed under torch.no_grad() or from frozen parameters alone")
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"the loss of batch {key[0]} is {float(loss.detach())}: curvature is undefined there; look at that batch and at the parameters")
