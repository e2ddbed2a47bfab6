"""The function whose curvature is meant: a model, a loss and fixed data, averaged with the right weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._counting import KnownLoss, candidate_counts, recognise_loss, samples_in
from sharpkit._batches import Batch, BatchSource
from sharpkit._distributed import Ranks, find_ranks
from sharpkit._errors import ObjectiveError
from sharpkit._guard import loader_generators, seed_everything, undisturbed, unwrap
from sharpkit._loss import call_model, check_arguments, check_loss, own_loss
from sharpkit._params import ParamSelector, select_params
from sharpkit._pieces import Piece, cut_batches, cut_samples
from sharpkit._probing import make_probe
from sharpkit._survey import Look, Probe, Survey, conclude, look_at

Closure = Callable[[nn.Module, Batch], Tensor]


class Objective:
    """f(w) = (1/C) sum over batches of c_b L_b(w): one fixed function of the parameters, the same however the data is cut into batches.

    A batch weighs what it counts (c_b): its targets, masked ones left out, or their class weights; a loss that sums is summed. How the
    loss averages is read off a standard PyTorch loss and tried out on any other. Making an objective goes through the data once to count,
    evaluates the first batch twice to see that the answer repeats, once more in two parts, and changes nothing in the model.

    Args:
        model: any module; wrappers (DistributedDataParallel, torch.compile) are taken off.
        data: one batch, a list of batches, or a re-iterable loader. A tuple, a dict or a tensor is one batch; a list is a list of
            batches, but with ``loss=`` a list of two tensors is one (input, target) batch.
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
        process_group: None sums over the default group where torch.distributed runs, each process holding its own batches (or none);
            False measures on this process alone.
        seed: of the randomness inside the model.
        check: evaluate the first batch twice and try out how the loss averages; False skips both and trusts ``count`` and ``reduction``.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, nothing to differentiate.
        ObjectiveError: no data, a one-shot iterator, a loss that is not one number or does not depend on the parameters, weights of
            batches that cannot be found out, processes that disagree.
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
        self,
        model: nn.Module,
        data: Any,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        closure: Closure | None = None,
        count: Callable[[Batch], float] | None = None,
        params: ParamSelector = None,
        reduction: str = "auto",
        mode: str = "eval",
        autocast: torch.dtype | None = None,
        micro_batch_size: int | str | None = "auto",
        process_group: Any = None,
        seed: int = 0,
        check: bool = True,
    ) -> None:
        check_arguments(
            model=model, loss=loss, closure=closure, count=count, reduction=reduction, mode=mode, micro_batch_size=micro_batch_size
        )
        self.loss, self.mode, self.seed, self.autocast = loss, mode, seed, autocast
        self._closure: Closure = closure or (self._pair_loss if loss is not None else own_loss)
        self._count = count
        self.micro_batch_size: int | None = None
        self.ranks = find_ranks(process_group)
        self.ranks.run_together(lambda: self._prepare(model, data, params), device=_device_of(model))
        probe = make_probe(self, check=check)
        look = self.ranks.run_together(lambda: self._look(probe, reduction), device=self.device)
        self._survey: Survey = conclude(look, self.ranks, probe=probe, reduction=reduction)
        self.may_split = micro_batch_size is not None and self.may_separate and not self._survey.draws
        if isinstance(micro_batch_size, int):
            if not self.may_split:
                raise ValueError(
                    f"micro_batch_size={micro_batch_size} would change the function: {self._why_whole()}. Pass None, or mode='eval'"
                )
            self.micro_batch_size = micro_batch_size

    def _prepare(self, model: nn.Module, data: Any, params: ParamSelector) -> None:
        self.model = unwrap(model)
        self.layout = select_params(self.model, params)
        self._data_device = _device_of(self.model)
        self._source = BatchSource(data, pair=self.loss is not None)

    def _why_whole(self) -> str:
        if self.couples_samples:
            return "batch statistics are computed over whole batches"
        if self._survey.draws:
            return "it draws random numbers (dropout), others for every cut"
        return "the loss of a batch is not the mean or sum over its samples"

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
        """Whether a sample's loss depends on the rest of its batch, through batch statistics."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return any(self.mode == "train" or m.running_mean is None for m in norms)

    @property
    def may_separate(self) -> bool:
        """Whether the objective falls apart into samples, so that pieces and per-sample gradients mean something."""
        return self._survey.additive and not self.couples_samples

    def __repr__(self) -> str:
        world = f", {self.ranks.size} processes" if self.ranks.size > 1 else ""
        return (
            f"Objective({type(self.model).__name__}, {self.num_parameters:,} parameters, {self.reduction} over {self.num_targets:g} "
            f"{self.counted} "
            f"in {self.num_batches} batch{'' if self.num_batches == 1 else 'es'}, {self.mode} mode, {self.dtype}, {self.device}{world})"
        )

    def with_params(self, params: ParamSelector) -> Objective:
        """The same function of fewer parameters, the others held fixed."""
        other = copy.copy(self)
        picked, own = select_params(self.model, params), set(self.layout.names)
        both = [name for name in picked.names if name in own]
        if not both:
            raise ValueError(
                f"params= picks {', '.join(picked.names[:4])}, none of the objective's own parameters: {', '.join(self.layout.names[:8])}"
            )
        other.layout = select_params(self.model, lambda name, _: name in both)
        return other

    def with_data(self, batches: list[Batch], *, ranks: Ranks | None = None) -> Objective:
        """The same function of the parameters over other batches, weighed by the rule found at the start; nothing is evaluated.

        Args:
            batches: of the same kind; may be empty on some processes.
            ranks: the processes whose batches make up the objective, by default this objective's.

        Raises:
            ObjectiveError: no batch holds anything that counts.
        """
        other = copy.copy(self)
        other.ranks = self.ranks if ranks is None else ranks
        counts = tuple(self.count_of(batch) for batch in batches)
        lengths = tuple(samples_in(batch, self.loss is not None) for batch in batches)
        total, samples = other.ranks.sum_numbers([sum(counts), float(sum(lengths))], device=self.device)
        if total <= 0:
            raise ObjectiveError("a batch holds no counted target: all are masked, or it is empty; pass larger ones")
        other._survey = replace(self._survey, counts=counts, lengths=lengths, total=total, num_samples=round(samples))
        other._source = BatchSource(batches, pair=False)
        return other

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def undisturbed(self) -> AbstractContextManager[None]:
        """The guard to evaluate under: the model is left bit for bit as found.

        Raises:
            ObjectiveError: parameters were replaced or frozen since the objective was made.
        """
        self.layout.check_live(self.model)
        return self._guard(training=self.mode == "train")

    def _guard(self, *, training: bool) -> AbstractContextManager[None]:
        return undisturbed(self.model, training=training, generators=loader_generators(self._source.data))

    def pieces(self) -> Iterator[Piece]:
        """The data, batch by batch or in slices of ``micro_batch_size``, with weights; pieces that count nothing are left out."""
        return cut_batches(self._source, self._survey, self.count_of, size=self.micro_batch_size, device=self._data_device)

    def samples_of(self, piece: Piece) -> list[Piece]:
        """A piece cut into single samples, those that count nothing left out.

        Raises:
            ObjectiveError: the loss does not fall apart into samples.
        """
        if not self.may_separate or self._survey.draws:
            raise ObjectiveError(
                f"per-sample gradients would not add up to the gradient: {self._why_whole()}. Use mode='eval', or another loss"
            )
        return cut_samples(piece, self._survey, self.count_of, length=samples_in(piece.batch, self.loss is not None))

    def count_of(self, batch: Batch) -> float:
        """What a batch counts, by the rule found at the start."""
        if self._count is not None:
            return float(self._count(batch))
        return self._candidate_counts(batch)[self._survey.rule]

    def predict(self, batch: Batch) -> Tensor:
        """The model's output on an (input, target) batch, as the loss receives it. To be called under :meth:`undisturbed`."""
        with self._precision():
            output: Tensor = call_model(self.model, batch[0])
        return output

    def output_loss(self, output: Tensor, target: Any) -> Tensor:
        """The loss of a model output, in the objective's precision."""
        if self.loss is None:
            raise ObjectiveError(
                "this needs the loss as a function of the model's output: make the Objective with loss= and (input, target) batches"
            )
        with self._precision():
            return self.loss(output, target)

    def evaluate(self, piece: Piece) -> Tensor:
        """The loss of one piece, unweighted, with its graph. To be called under :meth:`undisturbed`.

        Raises:
            ObjectiveError: not one real number, or without a gradient.
            NonFiniteError: NaN or infinite.
        """
        return self._evaluate(piece.batch, piece.key[0])

    def _evaluate(self, batch: Batch, number: int) -> Tensor:
        self.seed_for(number)
        with self._precision():
            loss = self._closure(self.model, batch)
        return check_loss(loss, number)

    def seed_for(self, number: int) -> None:
        """Fix the randomness inside the model for a batch of this number. To be called under :meth:`undisturbed`."""
        seed_everything(self.seed + number, self._data_device)

    def _pair_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.output_loss(self.predict(batch), batch[1])

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        # without its cache: it may hold weights cast by the user under no_grad, cut off from the graph
        return torch.autocast(self._data_device.type, dtype=self.autocast, cache_enabled=False)

    def value(self) -> float:
        """f(w)."""

        def local() -> float:
            with self.undisturbed(), torch.no_grad():
                return sum(float(self.evaluate(piece)) * piece.weight for piece in self.pieces())

        total = self.ranks.run_together(local, device=self.device)
        return self.ranks.sum_numbers([total], device=self.device)[0]

    def gradient(self) -> tuple[float, Tensor]:
        """f(w) and its gradient, a flat vector of shape (num_parameters,)."""

        def local() -> tuple[float, Tensor]:
            with self.undisturbed():
                total, flat = 0.0, torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
                for piece in self.pieces():
                    loss = self.evaluate(piece)
                    total += float(loss.detach()) * piece.weight
                    self.layout.add_flat_(flat, torch.autograd.grad(loss, self.layout.params, allow_unused=True), piece.weight)
            return total, flat

        total, flat = self.ranks.run_together(local, device=self.device)
        return self.ranks.sum_numbers([total], device=self.device)[0], self.ranks.sum_(flat)

    # -- counting -----------------------------------------------------------------------------------------------------
    def _candidate_counts(self, batch: Batch) -> dict[str, float]:
        if self._count is not None:
            return {"counts": float(self._count(batch))}
        return candidate_counts(batch, self._known_loss, self.loss is not None)

    @property
    def _known_loss(self) -> KnownLoss | None:
        return recognise_loss(self.loss) if self.loss is not None else None

    def _look(self, probe: Probe, reduction: str) -> Look:
        with self.undisturbed():
            return look_at(self._source, probe, reduction=reduction)


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
