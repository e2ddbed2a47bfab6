"""The function whose curvature is meant: model, loss and data as one weighted mean over batches; and one such for each training batch."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._arguments import as_seed, choice, flag, real, shown, whole
from sharpkit._checkpoint import Subject, checksum, known_again
from sharpkit._errors import ObjectiveError, SharpkitError, UnsupportedError
from sharpkit.objective.batches import Batch, BatchSource, fingerprint, map_tensors, slice_batch, to_device
from sharpkit.objective.counting import CountRule, LossWatch, samples_in
from sharpkit.objective.distributed import Ranks, find_ranks
from sharpkit.objective.guard import calling, modules_in_eval, random_fingerprint, random_states_kept, seed_everything, undisturbed, unwrap
from sharpkit.objective.interrupts import Whole
from sharpkit.objective.logits import Chunked, Chunking
from sharpkit.objective.loss import call_model, check_axes, check_functions, check_loss, own_loss, recognise_loss
from sharpkit.objective.memory import available_memory, is_out_of_memory
from sharpkit.objective.mistakes import refuse_own_backward, refuse_unrelated, telling
from sharpkit.objective.params import ModelTensors, ParamSelector, select_params
from sharpkit.objective.reduction import Look, Piece, Samples, Survey, check_batch, conclude, cut_batches, join_pieces, look_at
from sharpkit.objective.second_order import Replaced, SecondOrder, Watch, coarsest_rounding
from sharpkit.objective.sharding import Shards, has_shards, is_sharded
from sharpkit.objective.trials import Evaluator, Measured, Watched, atol, rtol

logger = logging.getLogger(__name__)

Closure = Callable[[nn.Module, Batch], Tensor]

_MODES = ("eval", "train")
_HALVES = (torch.bfloat16, torch.float16)
_ENTRIES = 64  # of each parameter's gradient, compared between batches: by judgement
_WHOLE = (
    4.0  # bytes that a gradient from whole logits takes over those of the logits: 3.2 in experiments/large_vocabulary.py, with the rest
)
_LEAST_SAMPLES = 32  # a training batch is not cut below: by judgement, fewer samples say little of the batch's curvature


@dataclass
class Joining:
    """Whether small batches are joined; shared by an objective and those made from it.

    Attributes:
        allowed: unless a joined batch turned out to have another loss than its parts.
        size: samples in a joined piece at most; None while nothing is joined.
    """

    allowed: bool = False
    size: int | None = None


class Objective:
    """f(w) = (1/C) sum over batches of c_b L_b(w): one fixed function of the parameters, the same however the data is cut into batches.

    Each batch is weighted by its number of targets c_b (masked ones left out; with class weights, their sum); losses with
    reduction="sum" are added. How the loss averages is read off a standard PyTorch loss, seen inside any function or closure that calls
    one, and tried out: batches in two parts, and parts of up to 16 batches joined, must have the loss that the rule predicts. Making an
    objective goes through the data once to count, and evaluates the first batch twice to see that the answer repeats.
    It changes nothing in the model.

    Args:
        model: any module; wrappers (DistributedDataParallel, torch.compile) are unwrapped. Parameters may be sharded over processes by
            ``fully_shard`` or ``parallelize_module``: then every process holds its own part of each vector (docs/distributed.md).
        data: one batch, a list of batches, or a re-iterable loader. A tuple, a dict or a tensor is one batch; a list is a list of
            batches, but with ``loss=`` a list of two tensors is one (input, target) batch.
        loss: ``loss(output, target)`` on (input, target) batches. A dict input is passed as keywords, a tuple as positions; an output with
            ``.logits`` is replaced by them. Without loss and closure, batches are dicts and the loss is ``model(**batch).loss``.
        closure: ``closure(model, batch)`` returning the scalar loss, for everything else.
        count: ``count(batch)`` -> what the loss of that batch averages over, for a loss that does not show it.
        params: which parameters; None for all trainable ones, a shell pattern such as ``"blocks.*.attn.*"``, several, or a predicate.
        reduction: ``"mean"``, ``"sum"``, or ``"auto"`` to try both.
        mode: ``"eval"`` or ``"train"``: dropout and batch statistics as in that mode. In train mode the random masks are fixed by ``seed``
            and batch statistics make the function depend on the batches; modules that you put into eval (a frozen batch norm), or that
            the model's own ``train()`` keeps there, stay in eval. The Hessians of the two differ widely; the mode is part of every result.
        autocast: e.g. ``torch.bfloat16`` to run the forward pass under autocast; vectors stay in float32.
        micro_batch_size: split batches into pieces of so many samples. ``"auto"`` splits only when memory asks for it, and joins small
            batches of like shape where the loss is a mean or sum over samples; None does neither.
        process_group: None sums over the default group if torch.distributed runs, each process holding its own batches (or none);
            False measures on this process alone.
        seed: fixes the randomness inside the model.
        check: evaluate the first batch twice and try out how the loss averages; False skips both and trusts ``count`` and ``reduction``.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, nothing to differentiate.
        ObjectiveError: no data, a one-shot iterator, a loss that is not one number or does not depend on the parameters, weights of
            batches that remain unknown, processes that disagree.
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
        self.loss, self.mode, self.seed, self.autocast = loss, mode, seed, autocast
        # None for loss=: a method kept on its own object would be a cycle, and data would wait for the cycle collector to be freed
        self._closure: Closure | None = closure or (own_loss if loss is None else None)
        self._count = count
        self.second_order = SecondOrder(check=check)
        self.twice = True  # whether its evaluations may be differentiated twice
        self.micro_batch_size: int | None = None
        self.joining = Joining()
        self.ranks = find_ranks(process_group)
        # What may fail on one process alone runs together, so that the others do not wait for it in the next collective.
        own = {"reduction": reduction, "micro_batch_size": micro_batch_size, "check": check}
        settings = {"closure": closure, "count": count, "mode": mode, "autocast": autocast, "seed": seed}
        self.ranks.run_together(lambda: check_settings(loss=loss, **settings, **own), device=_device_of(model))
        sharded = self.ranks.run_together(lambda: self._unwrap(model), device=_device_of(model))
        self.shards: Shards | None = Shards(self.model, self.ranks) if sharded else None
        self.ranks = self.ranks if self.shards is None else replace(self.ranks, service=self.shards)
        self.ranks.run_together(lambda: self._prepare(data, params, check), device=self._data_device)
        self._check_twins()
        if self.shards is not None:
            if check:
                self._check_parallel(self.shards)
            self._source = self._source if self.shards.counts else BatchSource([], pair=False)
        evaluator = self._evaluator(check)
        look = self.ranks.run_together(lambda: self._look(evaluator, reduction), device=self.device)
        self._survey: Survey = conclude(look, self.ranks, evaluator=evaluator, reduction=reduction, device=self.device)
        self.may_split = micro_batch_size is not None and self.may_separate and not self._survey.draws
        if micro_batch_size is not None and not isinstance(micro_batch_size, str):
            if not self.may_split:
                raise ValueError(
                    f"micro_batch_size={micro_batch_size} would change the function: {self._why_whole()}. Pass None, or mode='eval'"
                )
            self.micro_batch_size = int(micro_batch_size)
        self.joining.allowed = micro_batch_size == "auto" and self.may_split

    def _unwrap(self, model: nn.Module) -> bool:
        """Whether the model is sharded over processes."""
        check_model(model)
        self.model = unwrap(model)
        self.in_eval = modules_in_eval(self.model) if self.mode == "train" else frozenset()  # captured now: the function must stay the same
        self._data_device = _device_of(self.model)
        return has_shards(self.model)

    _source: BatchSource

    def _prepare(self, data: Any, params: ParamSelector, check: bool) -> None:
        self.layout = select_params(self.model, params, shards=self.shards)
        self.chunking = Chunking.of(self.model, check=check)
        self._source = BatchSource(data, pair=self.loss is not None)
        if self.shards is not None:
            self._data_device, self.chunking.allowed = self.shards.compute, False

    def _check_parallel(self, shards: Shards) -> None:
        """Compare the loss of the first batch on whole tensors with that of the model as it stands, on all processes.

        Raises:
            UnsupportedError: the modules were changed to compute with parts, by fewer attention heads say.
        """
        batches = list(itertools.islice(self._source, 1)) if shards.is_parallel else []
        if not all(self.ranks.gather(bool(batches))):
            return
        batch = to_device(batches[0], self._data_device)

        def loss() -> float:
            with torch.no_grad():
                value: Any = self.unchecked_loss(batch, 0)
                return float(value.full_tensor() if is_sharded(value) else value)

        def whole() -> float:
            with self._guard(training=False):
                return loss()

        with undisturbed(self.model, training=False, in_eval=self.in_eval, twice=False):
            parallel = loss()
        gap = abs(self.ranks.run_together(whole, device=self._data_device) - parallel)
        gap = max(self.ranks.gather(gap))
        if not gap <= math.sqrt(self.rounding) * abs(parallel):  # by judgement: far above what another order of sums changes
            raise UnsupportedError(
                f"the model is parallelised by tensors, and its loss on whole tensors differs by {gap:.3g} from the {parallel:.6g} that it "
                "has in parallel: leave its modules as they are on one process (numbers of heads read off the tensors' shapes), or gather "
                "it into plain tensors and measure that copy"
            )

    def _check_twins(self) -> None:
        """Processes that tensor parallelism gives the same batches: the first one's count, and the others' must be the same.

        Raises:
            ObjectiveError: they are not.
        """
        if self.shards is None or self.shards.twins == list(range(self.ranks.size)):
            return

        def look() -> list[str]:
            with random_states_kept():
                return [fingerprint(batch) for batch in itertools.islice(self._source, 2)]

        marks = self.ranks.gather(self.ranks.run_together(look, device=self._data_device))
        if other := next((rank for rank, mark in enumerate(marks) if mark != marks[self.shards.twins[rank]]), None):
            raise ObjectiveError(
                f"ranks {self.shards.twins[other]} and {other} hold parts of the same tensors but other batches: give the processes of one "
                "tensor-parallel group the same batches; for data parallelism besides, shard the model by fully_shard on a second mesh "
                "dimension"
            )

    def _evaluator(self, check: bool) -> Evaluator:
        def measure(batch: Batch, number: int, with_gradient: bool) -> Measured:
            with self._guard(training=False), self.derivatives("alone"):  # dropout would hide that the parts add up
                loss = self._evaluate(to_device(batch, self._data_device), number)
                if not with_gradient:
                    return loss.detach(), torch.empty(0)
                flat = self.layout.flatten(torch.autograd.grad(loss, self.layout.params, allow_unused=True))
            # some entries of each tensor's gradient, evenly spread, tell rules apart as well as all
            entries = [s[:: max(1, len(s) // _ENTRIES)] for s in torch.split(flat, list(self.layout.sizes))]
            return loss.detach(), torch.cat(entries).double().cpu()

        def watch(batch: Batch, number: int) -> Watched:
            with self.undisturbed():
                self.seed_for(number)
                before = random_fingerprint(self._data_device)
                moved = to_device(batch, self._data_device)
                loss, losses = self._watched(moved, number)
                if not self._may_chunk(moved, number):
                    loss, losses = self._watched(moved, number)
                draws = before != random_fingerprint(self._data_device)
                return Watched(loss.detach(), draws, tuple(losses.seen), losses.behind(loss))

        compare = self.ranks.size > 1 and self.shards is None
        return Evaluator(
            measure=measure,
            watch=watch,
            known=recognise_loss(self.loss) if self.loss is not None else None,
            count=None if self._count is None else CountRule("counts", _checked_count(self._count)),
            pair=self.loss is not None,
            check=check,
            draws=self.mode == "train",
            parameters=(self.num_parameters, sum(float(p.detach().double().abs().sum()) for p in self.layout.params) if compare else 0.0),
        )

    def _look(self, evaluator: Evaluator, reduction: str) -> Look:
        with self.undisturbed():
            return look_at(self._source, evaluator, reduction=reduction)

    def _watched(self, batch: Batch, number: int) -> tuple[Tensor, LossWatch]:
        """The loss of a batch with its graph, the standard losses that ran, and a look at what its evaluation does to derivatives."""
        known = self.second_order
        try:
            with Watch(known), LossWatch(batch) as losses:
                loss = self._evaluate(batch, number)
        except SharpkitError as error:
            if error.__cause__ is None:
                raise
            return self._evaluate(batch, number), LossWatch()
        except Exception as error:  # code that cannot run under a torch function mode; if that is not it, the error comes again
            if is_out_of_memory(error):  # and would, with what the error's traceback holds besides
                raise
            return self._evaluate(batch, number), LossWatch()
        refuse_unrelated(loss, self.layout.params)
        if known.takes_gradients:
            known.mend_inner_gradients(loss)
            self.chunking.allowed = False  # a derivative of such a loss is one more than cross-entropies in chunks have
        known.rounding = known.rounding or coarsest_rounding(loss)  # of the first batch: the others are computed alike
        return loss, losses

    def _why_whole(self) -> str:
        if self.couples_samples:
            return "batch statistics are computed over whole batches"
        if self._survey.draws:
            return "it draws random numbers (dropout), others for every cut"
        return "the loss of a batch is not the mean or sum over its samples"

    # -- what it is ---------------------------------------------------------------------------------------------------
    def identity(self) -> dict[str, str]:
        """What tells this function from others, in words by name, besides its loss.

        Raises:
            UnsupportedError: parameters are sharded over processes.
        """
        if self.shards is not None:
            raise UnsupportedError("checkpoint= is not available for parameters sharded over processes: leave it out")
        return {
            "objective": f"{self.num_samples} samples, {self.num_targets:g} targets, {self.mode} mode, {self.autocast}",
            "selected parameters": f"{len(self.layout.names)} tensors, {self.num_parameters} numbers",
            "parameters and buffers": f"check sum {checksum(ModelTensors(self.model).now())}",
        }

    def subject(self) -> Subject:
        """This function as the subject of a call that may be resumed: known again by its loss."""
        free = available_memory(torch.device("cpu"))
        return Subject(self.identity(), {"the loss": [self.value()]}, known_again(self.rounding), self.ranks, self.device, free)

    @property
    def num_parameters(self) -> int:
        """Entries of all parameters: the length of the flat parameter vector, which of a sharded model is divided over the processes."""
        return self.layout.num_entries

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
    def batch_lengths(self) -> tuple[int, ...]:
        """Samples in each batch on this process."""
        return self._survey.lengths

    @property
    def batch_counts(self) -> tuple[float, ...]:
        """What each batch on this process is weighted by: its number of targets, or the sum of their class weights."""
        return self._survey.counts

    @property
    def reduction(self) -> str:
        """``"mean"`` or ``"sum"``."""
        return self._survey.reduction

    @property
    def counted(self) -> str:
        """Name of the weighting rule."""
        return self._survey.rule.name

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss is the model's own, ``model(**batch).loss``."""
        return self._closure is own_loss

    @property
    def device(self) -> torch.device:
        return self.layout.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of parameter-space vectors, at least float32."""
        return self.layout.dtype

    @property
    def rounding(self) -> float:
        """Relative rounding of the least exact type that the loss is computed in: of autocast, some parameter, or a cast inside."""
        types = {self.dtype, *(p.dtype for p in self.layout.params), *([self.autocast] if self.autocast is not None else [])}
        return max(self.second_order.rounding, *(float(torch.finfo(kind).eps) for kind in types))

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's loss depends on the rest of its batch, through batch statistics."""
        # without running statistics the batch's own are used in eval mode, too
        norms = [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return any((self.mode == "train" and name not in self.in_eval) or m.running_mean is None for name, m in norms)

    @property
    def may_separate(self) -> bool:
        """Whether the objective is a mean or sum over samples, so that pieces and per-sample gradients are defined."""
        return self._survey.additive and not self.couples_samples

    @property
    def may_draw(self) -> bool:
        """Whether mini-batches can be drawn as training draws them: it is a mean or sum over samples but for batch statistics."""
        return self._survey.additive

    @property
    def draws_random_numbers(self) -> bool:
        """Whether the loss draws random numbers, as dropout does in train mode."""
        return self._survey.draws

    def __repr__(self) -> str:
        world = f", {self.ranks.size} processes" if self.ranks.size > 1 else ""
        return (
            f"Objective({type(self.model).__name__}, {self.num_parameters:,} parameters, {self.reduction} over {self.num_targets:g} "
            f"{self.counted} in {self.num_batches} batch{'' if self.num_batches == 1 else 'es'}, {self.mode} mode, {self.dtype}, "
            f"{self.device}{world})"
        )

    # -- others like it -------------------------------------------------------------------------------------------------
    def with_params(self, params: ParamSelector) -> Objective:
        """The same function of fewer parameters, the others held fixed."""
        other = copy.copy(self)
        picked, own = select_params(self.model, params, shards=self.shards), set(self.layout.names)
        both = [name for name in picked.names if name in own]
        if not both:
            raise ValueError(
                f"params= picks {', '.join(picked.names[:4])}, none of the objective's own parameters: {', '.join(self.layout.names[:8])}"
            )
        # of the same tensors: an operator of the part sees later changes of the whole
        other.layout = select_params(self.model, lambda name, _: name in both, shards=self.shards)
        return other

    def with_data(self, batches: list[Batch], *, ranks: Ranks | None = None) -> Objective:
        """The same function of the parameters over other batches, weighted by the same rule; nothing is evaluated.

        Args:
            batches: data of the same kind; may be empty on some processes.
            ranks: the processes whose batches make up the objective, by default this objective's.

        Raises:
            ObjectiveError: no batch holds anything that counts.
        """
        other = copy.copy(self)
        other.ranks = self.ranks if ranks is None else ranks
        batches = batches if self.shards is None or self.shards.counts else []
        counts = tuple(self.count_of(batch) for batch in batches)
        lengths = tuple(samples_in(batch, self.loss is not None) for batch in batches)
        total, samples = other.ranks.sum_numbers([sum(counts), float(sum(lengths))], device=self.device)
        if total <= 0:
            raise ObjectiveError("a batch holds no counted target: all are masked, or it is empty; pass larger ones")
        other._survey = replace(self._survey, counts=counts, lengths=lengths, total=total, num_samples=round(samples))
        other._source = BatchSource(batches, pair=False)
        return other

    def with_loss(self, loss: Callable[[Any, Any], Tensor]) -> Objective:
        """The same parameters and data, weighted as they are, under another loss of the model's output; nothing is evaluated.

        Args:
            loss: ``loss(output, target)``, which averages over the same targets as this objective's own.

        Raises:
            ObjectiveError: the objective was not made with ``loss=``, so that no output is known.
        """
        if self.loss is None:
            raise ObjectiveError("another loss of the model's output needs an Objective made with loss= and (input, target) batches")
        other = copy.copy(self)
        other.loss, other.chunking = loss, replace(self.chunking, allowed=False)  # what it does with logits is not known
        return other

    def by_samples(self) -> Objective:
        """The same objective, in eval mode where train mode ties the samples of a batch together or draws random numbers."""
        if self.may_separate and not self._survey.draws:
            return self
        other = copy.copy(self)
        other.mode = "eval"
        other._survey = replace(self._survey, draws=False)
        return other

    def copy(self, batches: list[Batch], *, dtype: torch.dtype | None = None) -> Objective:
        """The same objective over given batches, on a deep copy of the model; weighted by the same rule, nothing is evaluated.

        Args:
            batches: data of the same kind.
            dtype: convert model, data and a loss module to this type. Raises whatever the model raises for it.
        """
        if self.shards is not None:
            raise UnsupportedError("a model sharded over processes cannot be copied")
        # Tensors computed from parameters, as the old weight norm keeps them, refuse to be copied; the next forward pass makes them anew.
        held = (value for m in self.model.modules() for value in vars(m).values())
        computed = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
        model, loss = copy.deepcopy(self.model, computed), self.loss
        for original, copied in zip(self.model.parameters(), model.parameters(), strict=True):
            copied.requires_grad_(original.requires_grad)
        if dtype is not None:
            model = model.to(dtype)
            batches = [map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch) for batch in batches]
            loss = copy.deepcopy(loss).to(dtype) if isinstance(loss, nn.Module) else loss
        twin = Objective(
            model,
            batches,
            loss=loss,
            closure=self._closure,
            count=self.count_of,  # by this objective's rule, on batches that may not show it
            params=list(self.layout.names),
            reduction=self.reduction,
            mode=self.mode,
            autocast=self.autocast if dtype is None else None,
            process_group=False,
            seed=self.seed,  # the same dropout masks
            check=False,
        )
        twin.in_eval = self.in_eval
        twin.chunking = replace(self.chunking)
        twin.second_order.replaced, twin.second_order.takes_gradients = self.second_order.replaced, self.second_order.takes_gradients
        return twin

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def undisturbed(self) -> AbstractContextManager[None]:
        """The guard to evaluate under: the model is left bit for bit as it was.

        Raises:
            ObjectiveError: parameters were replaced or frozen since the objective was made.
        """
        if self.shards is not None:
            self.shards.settle()
        self.layout.check_live(self.model)
        return self._guard(training=self.mode == "train")

    def _guard(self, *, training: bool) -> AbstractContextManager[None]:
        inside = None if self.shards is None else self.shards.present
        return undisturbed(self.model, training=training, in_eval=self.in_eval, inside=inside, twice=self.twice)

    def derivatives(self, way: str) -> AbstractContextManager[None]:
        """What becomes of gradients of a sharded model inside: see :meth:`sharpkit.objective.sharding.Shards.going`."""
        return nullcontext() if self.shards is None else self.shards.going(way)

    def batches(self) -> Iterator[Batch]:
        """This process's batches as they were given."""
        return iter(self._source)

    def pieces(self, *, join: bool = False) -> Iterator[Piece]:
        """The data, batch by batch or in slices of ``micro_batch_size``, with weights; pieces that count nothing are left out.

        Args:
            join: several small batches as one piece, once :meth:`join_up_to` has allowed it.
        """
        pieces = cut_batches(self._source, self._survey, self.count_of, size=self.micro_batch_size, device=self._data_device)
        if not join or self.micro_batch_size is not None or self.joining.size is None:
            return pieces
        return join_pieces(pieces, self._survey, self.count_of, most=self.joining.size)

    def join_up_to(self, samples: int) -> None:
        """From now on, join small batches into pieces of up to so many samples, if the first such piece has the loss of its batches.

        Joined, 200 batches of 16 cost what one of 3,200 does: an eighth, on a small MLP. To be called under :meth:`undisturbed`.
        """
        if not self.joining.allowed or self.joining.size is not None or self.num_batches < 2:
            return
        self.joining.size = samples
        whole = next((piece for piece in self.pieces(join=True) if piece.parts > 1), None)
        if whole is None:
            return
        first, parts = whole.key, list[Piece]()
        for piece in self.pieces():
            if piece.key >= first:
                parts.append(piece)
            if len(parts) == whole.parts:
                break
        value, others = self._value_of(whole) * whole.weight, [self._value_of(part) * part.weight for part in parts]
        if abs(value - sum(others)) > rtol(self.dtype) * max(abs(value), sum(map(abs, others))) + atol(self.dtype) * whole.weight:
            self.joining.allowed, self.joining.size = False, None
            logger.info("small batches are not joined: %d together have a loss that is not that of each", whole.parts)

    def samples_of(self, piece: Piece) -> Samples:
        """The single samples of a piece, those that count nothing left out.

        Raises:
            ObjectiveError: the loss is not a mean or sum over samples.
        """
        if not self.may_separate or self._survey.draws:
            raise ObjectiveError(
                f"per-sample gradients would not add up to the gradient: {self._why_whole()}. Use mode='eval', or another loss"
            )
        length = samples_in(piece.batch, self.loss is not None)
        if (counts := self._survey.rule.counts(piece.batch, length)) is None:
            counts = [self.count_of(slice_batch(piece.batch, i, i + 1, length=length)) for i in range(length)]
        return Samples(piece, self._survey, counts)

    def count_of(self, batch: Batch) -> float:
        """What a batch counts, by the weighting rule.

        Raises:
            ObjectiveError: it is of another kind than the objective's own batches.
        """
        if (count := self._survey.rule.count(batch)) is None:
            raise ObjectiveError(f"the objective's batches are weighted by {self.counted}, which this {type(batch).__name__} does not have")
        return count

    def predict(self, batch: Batch) -> Tensor:
        """The model's output on an (input, target) batch, as the loss receives it. To be called under :meth:`undisturbed`."""
        with telling("model(input)", self.model, batch[0]), calling(self.model), self._precision():
            output: Tensor = call_model(self.model, batch[0])
        return output

    def output_loss(self, output: Tensor, target: Any) -> Tensor:
        """The loss of a model output, in the objective's precision."""
        if self.loss is None:
            raise ObjectiveError(
                "this needs the loss as a function of the model's output: make the Objective with loss= and (input, target) batches"
            )
        with telling("loss(output, target)", self.model, output, target), self._precision():
            if (known := recognise_loss(self.loss)) is not None:
                check_axes(known.function, output, target)
            return self.loss(output, target)

    def evaluate(self, piece: Piece, *, mode: Chunked | None = None) -> Tensor:
        """The loss of one piece, unweighted, with its graph. To be called under :meth:`undisturbed`.

        Args:
            piece: of the data.
            mode: evaluate under this one, whose logits may be cut off, and not under the objective's own.

        Raises:
            ObjectiveError: not one real number, or without a gradient.
            NonFiniteError: NaN or infinite.
        """
        if mode is not None:
            with Whole(mode):
                return self._evaluate_whole(piece.batch, piece.key[0])
        loss = self._evaluate(piece.batch, piece.key[0])
        return loss if self._may_chunk(piece.batch, piece.key[0]) else self._evaluate(piece.batch, piece.key[0])

    def twice_differentiable(self, compute: Callable[[], Tensor], *, once: bool = False) -> Tensor:
        """A loss or an output whose graph is to be differentiated twice. To be called under :meth:`undisturbed`.

        It is computed again, with operations replaced by their definitions, where its graph shows some whose second derivative PyTorch
        gets wrong or lacks.

        Args:
            compute: evaluates it.
            once: custom functions that can be differentiated only once are the caller's concern.

        Raises:
            UnsupportedError: it cannot be differentiated twice; the message names the remedy.
        """
        result = compute()
        while self.second_order.adapt([result], once=once):
            result = compute()
        return result

    def _evaluate(self, batch: Batch, number: int) -> Tensor:
        if not self.chunking.allowed:
            return self._evaluate_whole(batch, number)
        mode = Chunked()
        try:
            with Whole(mode):
                loss = self._evaluate_whole(batch, number)
            self.chunking.used = self.chunking.used or mode.losses > 0
            return loss
        except Exception as error:
            if is_out_of_memory(error) or not mode.heads:
                raise
        loss = self._evaluate_whole(batch, number)  # if it was not that logits were not computed, the error comes again
        self.chunking.allowed = False
        return loss

    def _evaluate_whole(self, batch: Batch, number: int) -> Tensor:
        loss = self.unchecked_loss(batch, number)
        if self._closure is not None and isinstance(loss, Tensor) and loss.requires_grad:
            refuse_own_backward(loss, self.layout.params)
        loss = check_loss(loss, number)
        if self.shards is not None:
            self.shards.check_graph(loss)
        return loss

    def unchecked_loss(self, batch: Batch, number: int) -> Tensor:
        """The loss of a batch, whose value is not looked at: under a transform of ``torch.func`` there is none.

        Args:
            batch: on the model's device.
            number: of the batch, which fixes the randomness inside the model.
        """
        self.seed_for(number)
        if self._closure is None:
            return self.output_loss(self.predict(batch), batch[1])
        what = "model(**batch)" if self._closure is own_loss else "closure(model, batch)"
        with telling(what, self.model, *([] if self._closure is own_loss else [self.model]), batch), calling(self.model), self._precision():
            return self._closure(self.model, batch)

    def _may_chunk(self, batch: Batch, number: int) -> bool:
        """Whether a loss just computed in chunks may be used: the first is compared, by value and gradient, with that from whole logits."""
        if not self.chunking.used or self.chunking.compared:
            return True
        self.chunking.compared = True
        gap = math.inf
        # a sample's logits are small enough to be held; it may be masked, or the model need more than one
        for part in (slice_batch(batch, 0, 1, length=samples_in(batch, self.loss is not None)), batch):
            try:
                gap = self._gap_of_chunks(part, number)
                break
            except Exception as error:
                logger.info("a loss in chunks of tokens could not be compared: %s", error)
        self.chunking.allowed = gap <= math.sqrt(self.rounding)  # by judgement: far above what another order of sums changes
        if not self.chunking.allowed:
            logger.warning("logits are held whole: in chunks of tokens, the loss or its gradient differs by %.2g", gap)
        return self.chunking.allowed

    def _gap_of_chunks(self, batch: Batch, number: int) -> float:
        """Relative distance of a batch's loss and gradient in chunks from those of whole logits, the larger of the two."""
        measured: list[tuple[Tensor, Tensor]] = []
        mode = Chunked(least_bytes=0)
        for context in (Whole(mode), nullcontext()):
            if measured and _WHOLE * mode.nbytes > available_memory(self.device):
                logger.info("a loss in chunks of tokens is used unchecked: whole logits would not fit")
                return 0.0
            with torch.enable_grad():
                with context:
                    loss = self._evaluate_whole(batch, number)
                slope = self.layout.flatten(torch.autograd.grad(loss, self.layout.params, allow_unused=True))
            measured.append((loss.detach(), slope))
        (value, slope), (expected, slope_expected) = measured
        return max(float((value - expected).abs() / expected.abs()), float((slope - slope_expected).norm() / slope_expected.norm()))

    def seed_for(self, number: int) -> None:
        """Fix the randomness inside the model for a batch of this number. To be called under :meth:`undisturbed`."""
        seed_everything(self.seed + number, self._data_device)

    def _precision(self) -> AbstractContextManager[Any]:
        return Whole(self._in_precision()) if self.second_order.replaced or self.autocast is not None else nullcontext()

    @contextmanager
    def _in_precision(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.second_order.replaced:
                stack.enter_context(Replaced(self.second_order.replaced))
            if self.autocast is not None:
                # without its cache: it may hold weights cast by the user under no_grad, cut off from the graph
                stack.enter_context(torch.autocast(self._data_device.type, dtype=self.autocast, cache_enabled=False))
            yield

    def dot(self, left: Tensor, right: Tensor) -> float:
        """The inner product of two vectors in parameter space, over all processes where they are sharded."""
        inner = left @ right
        return float(inner if self.shards is None else self.ranks.sum_small(inner))

    def value(self) -> float:
        """f(w)."""

        def local() -> float:
            with self.undisturbed():
                return sum(self._value_of(piece) * piece.weight for piece in self.pieces(join=True))

        total = self.ranks.run_together(local, device=self.device)
        return self.ranks.sum_numbers([total], device=self.device)[0]

    def _value_of(self, piece: Piece) -> float:
        """The loss of a piece, without a graph unless it takes a gradient inside (a gradient penalty, a physics-informed residual)."""
        if not self.second_order.takes_gradients:
            try:
                with torch.no_grad():
                    return float(self.evaluate(piece))
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self.second_order.takes_gradients = True
        return float(self.evaluate(piece).detach())

    def gradient(self) -> tuple[float, Tensor]:
        """f(w) and its gradient, a flat vector of shape (num_parameters,)."""

        def local() -> tuple[float, Tensor]:
            with self.undisturbed():
                return self.own_gradient()

        total, flat = self.ranks.run_together(local, device=self.device)
        if self.shards is None:
            self.ranks.sum_(flat)
        else:  # what this process's own work has added to its parts, and then that of the others
            self.layout.add_flat_(flat, self.shards.collected(self.layout.live), 1.0)
        return self.ranks.sum_numbers([total], device=self.device)[0], flat

    def own_gradient(self) -> tuple[float, Tensor]:
        """This process's part of :meth:`gradient`. To be called under :meth:`undisturbed`."""
        total, flat = 0.0, torch.zeros(self.layout.size, dtype=self.dtype, device=self.device)
        with self.derivatives("sum"):
            for piece in self.pieces(join=True):
                loss = self.evaluate(piece)
                total += float(loss.detach()) * piece.weight
                loss, weight = (loss, piece.weight) if self.shards is None else (loss * piece.weight, 1.0)  # before it is added up
                self.layout.add_flat_(flat, torch.autograd.grad(loss, self.layout.params, allow_unused=True), weight)
        return total, flat


class ObjectiveMaker:
    """Makes an objective of each training batch: one in full, by which the others are only given their data.

    How the loss averages is tried out on the first batch and again when the set of trained parameters changes.

    Args:
        model: unwrapped.
        held: gives the parameters of every group of an optimizer; asked again for every batch.
        params: selects other parameters than those.
        probe: data of a fixed second objective; None for none.
        max_samples: measure on the first so many samples of a batch.
        settings: further arguments of Objective.
    """

    def __init__(
        self,
        model: nn.Module,
        held: Callable[[], Iterable[Iterable[nn.Parameter]]],
        *,
        params: ParamSelector,
        probe: Any,
        max_samples: int | None,
        settings: dict[str, Any],
    ) -> None:
        self.model, self._trained, self.settings = model, held, settings
        self.params = params
        self._max_samples, self._probe_data = max_samples, probe
        self._held: frozenset[int] = frozenset()
        self._in_eval: frozenset[str] = frozenset()
        self._template: Objective | None = None
        self._of_one = True  # whether the template is of a single batch, which need not tell how several weigh
        self.probe: Objective | None = None

    @property
    def rank(self) -> int:
        """This process's number, once known."""
        return self._template.ranks.rank if self._template is not None else 0

    def over(self, batch: Batch, *, part: float, seed: int) -> tuple[Objective, int]:
        """The objective of one training batch, or of the first samples of it.

        Args:
            batch: one batch, or a list of micro-batches.
            part: share of it that is measured.
            seed: fixes dropout masks.

        Returns:
            the objective, and the samples of the whole batch on all processes.
        """
        batches = self._listed(batch)
        held = frozenset(id(p) for group in self._trained() for p in group if p.requires_grad)  # layers may be unfrozen on the way
        in_eval = modules_in_eval(self.model) if self.settings.get("mode") == "train" else frozenset()  # a batch norm may be frozen later
        first_list = self._of_one and len(batches) > 1
        if self._template is None or held != self._held or in_eval != self._in_eval or first_list:
            self._held, self._in_eval, self._of_one = held, in_eval, len(batches) == 1
            # made here and not kept: a method of this object on it would be a cycle, which keeps the last batch
            params = self.params if self.params is not None else lambda _, parameter: id(parameter) in held
            self._template = Objective(self.model, batches, params=params, **self.settings)
            if self._probe_data is not None:
                self.probe = Objective(self.model, self._probe_data, params=params, **self.settings)
        objective = self._template.with_data(self._cut(batches, part))
        objective.seed = seed
        samples = objective.ranks.sum_numbers([float(self._samples(batches))], device=objective.device)[0]
        return objective, round(samples)

    def samples_of(self, batch: Batch) -> int:
        """Samples of a batch on this process; 0 where they cannot be counted."""
        try:
            return self._samples(self._listed(batch))
        except Exception:  # it is raised when the batch is measured
            return 0

    def agree(self, value: float) -> float:
        """The largest of all processes' numbers, on every process."""
        if self._template is None or self._template.ranks.size == 1:
            return value
        return float(max(self._template.ranks.gather(value)))

    def may_halve(self, batch: Batch, part: float) -> bool:
        """Whether half of what is measured now would still be enough samples."""
        return self.samples_of(batch) * part >= 2 * _LEAST_SAMPLES

    def _listed(self, batch: Batch) -> list[Batch]:
        pairs = self.settings["loss"] is not None
        if not isinstance(batch, list):
            batch = [batch]
        elif pairs and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch):  # as a DataLoader collates (input, target)
            batch = [tuple(batch)]
        for index, each in enumerate(batch):
            check_batch(each, index, pair=pairs)
        return batch  # type: ignore[no-any-return]

    def _length(self, batch: Batch) -> int:
        return samples_in(batch, self.settings["loss"] is not None)

    def _samples(self, batches: list[Batch]) -> int:
        return sum(map(self._length, batches))

    def _cut(self, batches: list[Batch], part: float) -> list[Batch]:
        """The same share of each micro-batch, its first samples."""
        total = self._samples(batches)
        most = total if self._max_samples is None else min(self._max_samples, total)
        wanted = max(min(most, _LEAST_SAMPLES), round(most * part))
        if wanted >= total:
            return batches
        lengths = [self._length(b) for b in batches]
        return [slice_batch(b, 0, max(1, round(n * wanted / total)), length=n) for b, n in zip(batches, lengths, strict=True)]


def _checked_count(count: Callable[[Batch], float]) -> Callable[[Batch], float]:
    def checked(batch: Batch) -> float:
        with telling("count(batch)", None, batch):
            given: Any = count(batch)
        return real("what count(batch) returns", given, least=0, hint="it is what the loss of that batch averages over")

    return checked


def _device_of(model: nn.Module) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())  # it may be anything: it is checked later
    return next((p.device for p in parameters), torch.device("cpu"))


def check_model(model: Any) -> None:
    """TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")


def check_settings(
    *,
    loss: Any = None,
    closure: Any = None,
    count: Any = None,
    mode: Any = "eval",
    autocast: Any = None,
    seed: Any = 0,
    reduction: Any = "auto",
    micro_batch_size: Any = "auto",
    check: Any = True,
) -> None:
    """TypeError or ValueError unless an objective's arguments make sense, apart from model and data."""
    check_functions(loss, closure, count)
    choice("reduction", reduction, ("auto", "mean", "sum"))
    choice("mode", mode, _MODES)
    if autocast is not None and autocast not in _HALVES:
        raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {shown(autocast)}")
    as_seed(seed)
    flag("check", check)
    if micro_batch_size is not None and not (isinstance(micro_batch_size, str) and micro_batch_size == "auto"):
        whole("micro_batch_size", micro_batch_size, other="'auto', None")


def objective_call(call: str, objective: Any, arguments: Mapping[str, Any]) -> tuple[Objective, Subject]:
    """What a call on an objective is about, for :func:`sharpkit._checkpoint.resumable`; costs one pass for the loss."""
    check_objective(objective, call, sharded=True)
    objective.ranks.check_alike(call, {name: value for name, value in arguments.items() if name != "callback"})
    return objective, objective.subject()


def check_objective(value: Any, taker: str, *, sharded: bool = False) -> None:
    """TypeError unless a function that takes an objective was given one; UnsupportedError if its sharded parameters are not for it."""
    if not isinstance(value, Objective):
        raise TypeError(f"{taker} takes an Objective(model, data, loss=...), got {shown(value)}")
    if value.shards is not None and not sharded:
        raise UnsupportedError(
            f"{taker} is not available for parameters sharded over processes: gather the model into plain tensors (a full state dict) and "
            "measure that copy; what is available is listed in docs/distributed.md"
        )
