"""What a batch weighs: the rules it may be counted by, how the loss averages, what all processes settle on, and the weighted pieces."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit._errors import NonDeterministicError, ObjectiveError, ObjectiveWarning
from sharpkit.objective.batches import Batch, BatchSource, batch_length, fingerprint, slice_batch, tensors_of, to_device
from sharpkit.objective.distributed import Ranks
from sharpkit.objective.loss import KnownLoss

Counts = dict[str, float]  # what a batch counts, by rule, the likeliest rule first
Rule = str | None  # what a mean counts; None: the loss sums

_MAX_TRIALS = 5  # batches tried out in two parts: by judgement, rules that five telling batches cannot tell apart hardly differ


# -- what a batch may count -------------------------------------------------------------------------------------------------
def candidate_counts(batch: Batch, known: KnownLoss | None, pair: bool) -> Counts:
    """What this batch may count, by every rule that applies, the likeliest first.

    Args:
        batch: whole or sliced.
        known: if given, its rule alone.
        pair: the batch is (input, target).
    """
    target = _target_of(batch, pair)
    if known is not None and target is not None:
        return {"targets": known.count(target)}
    counts: Counts = {}
    if target is not None and target.ndim > 0:
        labels = not target.is_floating_point() and not target.is_complex()
        if labels and not pair and target.ndim > 1:  # causal language models shift the labels inside, so the first predicts nothing
            counts["next tokens"] = float((target[..., 1:] != -100).sum())
        if labels:
            counts["labels other than -100"] = float((target != -100).sum())
        counts["target entries"] = float(target.numel())
    if isinstance(batch, Mapping) and isinstance(mask := batch.get("attention_mask"), Tensor):
        counts["attended tokens"] = float(mask.sum())
    length = batch_length(batch)
    if length is None and target is not None and target.ndim > 0:
        length = target.shape[0]
    if length is not None:
        counts["samples"] = float(length)
    return counts or {"batches": 1.0}


def samples_in(batch: Batch, pair: bool) -> int:
    """Samples in a batch: its common leading dimension, else the target's, else 1."""
    if (length := batch_length(batch)) is not None:
        return length
    target = _target_of(batch, pair)
    return int(target.shape[0]) if target is not None and target.ndim > 0 else 1


def _target_of(batch: Batch, pair: bool) -> Tensor | None:
    if pair:
        target = batch[1]
        return target if isinstance(target, Tensor) else next(iter(tensors_of(target)), None)
    if isinstance(batch, Mapping):
        values = (batch.get(key) for key in ("labels", "label", "target", "targets", "y"))
        return next((value for value in values if isinstance(value, Tensor)), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) >= 2 and isinstance(batch[1], Tensor) else None


# -- one process looks at its data ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Evaluator:
    """How batches are counted and evaluated while it is not known yet what they weigh.

    Attributes:
        count: what a batch may count.
        loss: (batch, number) -> loss in eval mode, for trying out additivity.
        loss_in_mode: (batch, number) -> loss in the mode to measure in, and whether random numbers were drawn.
        known: the standard loss behind it all, if it is one.
        given_count: ``count`` is the user's own.
        pair: batches are (input, target).
        check: whether to evaluate at all.
        draws: whether random numbers are to be expected, if not evaluated.
        parameters: their number and a checksum of their values.
    """

    count: Callable[[Batch], Counts]
    loss: Callable[[Batch, int], Tensor]
    loss_in_mode: Callable[[Batch, int], tuple[Tensor, bool]]
    known: KnownLoss | None
    given_count: bool
    pair: bool
    check: bool
    draws: bool
    parameters: tuple[int, float]


@dataclass(frozen=True)
class Opinion:
    """How the loss averages as far as one process can tell; the processes exchange these.

    Attributes:
        rules: what its batches may count, the likeliest first.
        possible: those of them, and None for a sum, that its trials left.
        fits: whether a trial showed the loss of a batch to be the mean or sum of its parts'.
        tried: whether there was a trial.
        draws: whether the loss draws random numbers.
        num_batches: batches that count something.
        num_samples: samples in all batches.
        totals: counts of all batches by rule.
        ratios: by rule, the range over batches of its count relative to the first rule's: rules of one ratio give the same weights.
        parameters: their number and a checksum of their values.
    """

    rules: tuple[str, ...]
    possible: tuple[Rule, ...]
    fits: bool
    tried: bool
    draws: bool
    num_batches: int
    num_samples: int
    totals: Counts
    ratios: dict[str, tuple[float, float]]
    parameters: tuple[int, float]


@dataclass(frozen=True)
class Look:
    """What one process saw: counts and samples of each batch, and its opinion on how the loss averages."""

    rows: tuple[Counts, ...]
    lengths: tuple[int, ...]
    opinion: Opinion


@dataclass(frozen=True)
class _Shown:
    """A batch to try out: its number, and where to cut it in two (0: nowhere)."""

    index: int
    batch: Batch
    cut: int


def look_at(source: BatchSource, evaluator: Evaluator, *, reduction: str) -> Look:
    """Go through this process's data once.

    Args:
        source: the batches.
        evaluator: how to count and evaluate.
        reduction: ``"auto"``, ``"mean"`` or ``"sum"``.
    """
    _check_reduction(evaluator.known, reduction)
    rows, lengths, marks = [], [], []
    shown: list[_Shown] = []
    for index, batch in enumerate(source):
        if evaluator.pair:
            check_pair(batch, index)
        row = evaluator.count(batch)
        if min(row.values()) < 0:
            raise ValueError(f"count(batch) returned {min(row.values())} for batch {index}; it must not be negative")
        rows.append(row)
        lengths.append(samples_in(batch, evaluator.pair))
        if source.is_loader and index < 2:  # a loader that shuffles or augments shows it within two batches
            marks.append(fingerprint(batch))
        if min(row.values()) > 0 and len(shown) < _MAX_TRIALS:
            # A batch is worth trying if its rules disagree about the parts, or else if it is the first, or the first that can be cut.
            cut, spread = _cut(batch, evaluator)
            if spread > 0 or not shown or (cut and not any(each.cut for each in shown)):
                shown.append(_Shown(index, batch, cut))
    source.check_repeatable(marks)
    # only rules that every batch knows can weigh them all
    rules = [rule for rule in (rows[0] if rows else {}) if all(rule in row for row in rows)]
    if rows and not rules:  # batches of different kinds
        rules, rows = ["batches"], [{"batches": 1.0} for _ in rows]
    draws = evaluator.draws
    if evaluator.check:
        draws = _check_repeats(shown[0], evaluator) if shown else False
    possible, tried, fits = _try_rules(shown, evaluator, rules, reduction)
    opinion = Opinion(
        rules=tuple(rules),
        possible=possible,
        fits=fits,
        tried=tried,
        draws=draws,
        num_batches=sum(any(row.values()) for row in rows),
        num_samples=sum(lengths),
        totals={rule: sum(row[rule] for row in rows) for rule in rules},
        ratios=_ratios(rows, rules),
        parameters=evaluator.parameters,
    )
    return Look(tuple(rows), tuple(lengths), opinion)


def check_pair(batch: Batch, index: int) -> None:
    """Refuse a batch that is not (input, target)."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        came = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(
            f"with loss=, batches are (input, target), but batch {index} is a {came}: pass closure=lambda model, batch: ... instead, or a "
            "list of (input, target) batches"
        )


def _check_reduction(known: KnownLoss | None, asked: str) -> None:
    if known is None:
        return
    if known.reduction not in ("mean", "sum"):
        raise ObjectiveError(f"the loss has reduction={known.reduction!r} and returns one number per target: use reduction='mean'")
    if asked not in ("auto", known.reduction):
        raise ValueError(f"reduction={asked!r} was asked for, but the loss itself has reduction={known.reduction!r}: make them the same")


def _check_repeats(shown: _Shown, evaluator: Evaluator) -> bool:
    """Evaluate a batch twice; whether random numbers were drawn."""
    (first, draws), (again, _) = (evaluator.loss_in_mode(shown.batch, shown.index) for _ in range(2))
    a, b = float(first), float(again)
    if abs(a - b) > _rtol(first.dtype) * max(abs(a), abs(b)) + _atol(first.dtype):
        raise NonDeterministicError(
            f"the same batch gave the losses {a:.9g} and {b:.9g}: the model or the closure draws from a random generator of its own, or "
            "carries state from call to call. Seed that generator inside the closure, reset the state, or use mode='eval'"
        )
    return draws


# -- trying out how the loss averages -----------------------------------------------------------------------------------------
def _rtol(dtype: torch.dtype) -> float:
    """Relative rounding to allow in a loss of this type, by judgement; in float64 for layers that use float32 all the same (RMSNorm)."""
    return {torch.float64: 1e-6, torch.float32: 3e-5}.get(dtype, 2e-2)


def _atol(dtype: torch.dtype) -> float:
    """Absolute rounding to allow in a loss of this type: a small loss is a difference of logits, taken to be some tens."""
    return {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1e-2)


def _try_rules(shown: list[_Shown], evaluator: Evaluator, rules: list[str], reduction: str) -> tuple[tuple[Rule, ...], bool, bool]:
    """(rules that make the loss of a batch the mean, or the sum, of its parts'; whether that was tried; whether one did)."""
    known = evaluator.known
    if known is not None:
        possible: list[Rule] = [None] if known.reduction == "sum" else [*rules[:1]]
    elif reduction == "auto":
        possible = [*rules, None]
    else:
        possible = [None] if reduction == "sum" else [*rules]
    left, tried = possible, False
    for each in shown if evaluator.check else []:
        if (fitting := _fitting(each, evaluator, rules, left)) is not None:
            tried, left = True, fitting
    # a known loss says itself how it averages: a misfit means that the model mixes the samples of a batch
    return tuple(possible if known is not None else left), tried, bool(left)


def _fitting(shown: _Shown, evaluator: Evaluator, rules: list[str], candidates: list[Rule]) -> list[Rule] | None:
    """The rules under which the loss of a batch is that of its two parts; None if it cannot be cut, or its parts not evaluated."""
    if not shown.cut:
        return None
    length = samples_in(shown.batch, evaluator.pair)
    parts = [slice_batch(shown.batch, *span, length=length) for span in ((0, shown.cut), (shown.cut, length))]
    counts = [evaluator.count(part) for part in parts]
    if any(rule not in count for rule in rules for count in counts):
        return None
    whole = evaluator.loss(shown.batch, shown.index)
    try:
        losses = [float(evaluator.loss(part, shown.index)) for part in parts]
    except Exception:  # the closure may insist on whole batches in any way it likes
        return None
    # A known loss need not be told from others: only a gross misfit, from mixed samples, counts against it.
    rtol: float = _rtol(whole.dtype) ** (0.5 if evaluator.known is not None else 1.0)
    total = float(whole)
    rounding = rtol * max(abs(total), *map(abs, losses)) + _atol(whole.dtype)

    def fits(rule: Rule) -> bool:
        if rule is None:  # a sum of two rounded numbers
            return abs(total - sum(losses)) <= 2 * rounding
        n = [count[rule] for count in counts]
        return sum(n) > 0 and abs(total - (n[0] * losses[0] + n[1] * losses[1]) / sum(n)) <= rounding

    return [rule for rule in candidates if fits(rule)]


def _cut(batch: Batch, evaluator: Evaluator) -> tuple[int, float]:
    """Where to cut the batch in two so that the rules' shares of the first part differ most, and by how much; (0, 0) if nowhere."""
    length = samples_in(batch, evaluator.pair)
    best = (0, 0.0)
    # three cuts, by judgement: masked tokens are seldom spread so evenly that all three give the rules equal shares
    for cut in {max(1, length // 3), length // 2, 2 * length // 3} if length >= 2 else ():
        first, second = (evaluator.count(slice_batch(batch, *span, length=length)) for span in ((0, cut), (cut, length)))
        if all(first.get(rule, 0) > 0 and n > 0 for rule, n in second.items()):
            shares = [first[rule] / (first[rule] + n) for rule, n in second.items()]
            best = max(best, (cut, max(shares) - min(shares)), key=lambda each: (each[1], each[0]))
    return best


def _ratios(rows: list[Counts], rules: list[str]) -> dict[str, tuple[float, float]]:
    counting = [row for row in rows if any(row[rule] for rule in rules)]
    ranges = {}
    for rule in rules:
        ratios = [row[rule] / row[rules[0]] if row[rules[0]] else float("inf") for row in counting] or [1.0]
        ranges[rule] = (min(ratios), max(ratios))
    return ranges


# -- what all processes settle on ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Survey:
    """What is known of the data once all processes have looked.

    Attributes:
        counts: per batch of this process.
        lengths: samples per batch of this process.
        reduction: ``"mean"`` or ``"sum"``.
        rule: name of the weighting rule.
        additive: whether the loss is a mean or sum over samples.
        draws: whether the loss draws random numbers.
        total: counts over all processes.
        num_samples: samples over all processes.
    """

    counts: tuple[float, ...]
    lengths: tuple[int, ...]
    reduction: str
    rule: str
    additive: bool
    draws: bool
    total: float
    num_samples: int


def conclude(look: Look, ranks: Ranks, *, evaluator: Evaluator, reduction: str) -> Survey:
    """Settle with the other processes how the loss averages, and what all batches count together.

    Raises:
        ObjectiveError: nothing counts anywhere, the processes disagree, or the weights of batches are unknown.
    """
    opinions = ranks.gather(look.opinion)
    settled, rule, separable = _decide(opinions, reduction=reduction, given_count=evaluator.given_count, check=evaluator.check)
    return Survey(
        counts=tuple(row.get(rule, 0.0) for row in look.rows),
        lengths=look.lengths,
        reduction=settled,
        rule=rule,
        additive=separable,
        draws=any(o.draws for o in opinions),
        total=sum(o.totals.get(rule, 0.0) for o in opinions),
        num_samples=sum(o.num_samples for o in opinions),
    )


def _decide(opinions: Sequence[Opinion], *, reduction: str, given_count: bool, check: bool) -> tuple[str, str, bool]:
    """``"mean"`` or ``"sum"``, over what, and whether the loss is one over samples: the same answer on every process, since all know all.

    A process without data adopts the others' opinion.
    """
    _check_same_parameters(opinions)
    having = [o for o in opinions if o.num_batches]
    if not having:
        raise ObjectiveError("the data holds nothing that counts: no batches, only empty ones, or all targets masked (ignore_index)")
    num_batches = sum(o.num_batches for o in having)
    rules = [r for r in having[0].rules if all(r in o.rules for o in having)]
    possible = [r for r in having[0].possible if all(r in o.possible for o in having)]
    if not rules or (not possible and all(o.possible for o in having)):
        raise ObjectiveError(_disagreement(opinions))
    if not possible:
        problem = f"the loss of a batch is neither the sum nor the mean of its parts' losses, counting {' or '.join(rules)}"
        _refuse_unless_one_or_given(problem, num_batches, given_count)
        return "sum" if reduction == "sum" else "mean", rules[0], False
    tried, best = any(o.tried for o in having), possible[0]
    if check and num_batches > 1 and not given_count and not _same_weights(possible, having):
        ways = " or ".join("its sum" if r is None else f"a mean over {r}" for r in possible)
        if not tried:
            _refuse_unless_one_or_given(f"the loss may be {ways}, and no batch could be cut in two to find out", num_batches, given_count)
        warnings.warn(
            f"the loss may be {ways}: all fit, and weigh batches differently. The first is taken; pass count=lambda batch: ... (and "
            "reduction=) to say which is meant",
            ObjectiveWarning,
            stacklevel=4,
        )
    separable = (tried and all(o.fits for o in having)) if check else rules[0] != "batches"
    return "sum" if best is None else "mean", rules[0] if best is None else best, separable


def _refuse_unless_one_or_given(problem: str, num_batches: int, given_count: bool) -> None:
    if num_batches == 1:  # a single batch weighs 1 by any rule
        return
    if not given_count:
        raise ObjectiveError(
            f"{problem}, so it is unknown how much each of the {num_batches} batches weighs. Pass count=lambda batch: ... returning what "
            "the loss averages over (and reduction='sum' if it sums), or one batch instead of several"
        )
    warnings.warn(
        f"{problem}. count= was given and is used; the numbers depend on how the data was cut into batches", ObjectiveWarning, stacklevel=5
    )


def _same_weights(possible: Sequence[Rule], having: Sequence[Opinion]) -> bool:
    """Whether the rules left give every batch the same share, so that it does not matter which is right."""
    if len(possible) == 1 or None in possible:
        return len(possible) == 1
    ranges = [[o.ratios[rule] for o in having] for rule in possible if rule is not None]
    return all(max(high for _, high in seen) - min(low for low, _ in seen) <= 1e-9 * max(high for _, high in seen) for seen in ranges)


def _disagreement(opinions: Sequence[Opinion]) -> str:
    views = []
    for rank, o in enumerate(opinions):
        if o.num_batches:
            ways = " or ".join("a sum" if r is None else f"a mean over {r}" for r in o.possible)
            views.append(f"rank {rank} {ways or 'neither, counting ' + ', '.join(o.rules)}")
    return (
        f"the processes disagree on how the loss averages: {'; '.join(views)}. Give every process the same loss and the same kind of "
        "batches, or say it by count= and reduction="
    )


def _check_same_parameters(opinions: Sequence[Opinion]) -> None:
    size, checksum = opinions[0].parameters
    # 1e-6: sums of absolute values in another order on another device differ by rounding
    others = [r for r, o in enumerate(opinions) if o.parameters[0] != size or abs(o.parameters[1] - checksum) > 1e-6 * abs(checksum)]
    if others:
        raise ObjectiveError(
            f"the parameters on rank {', '.join(map(str, others))} are not those of rank 0, so there is no one function to measure: "
            "broadcast them first (DistributedDataParallel does), or pass process_group=False to measure each process's own model"
        )


# -- pieces -------------------------------------------------------------------------------------------------------------------
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


def cut_batches(
    source: BatchSource, survey: Survey, count_of: Callable[[Batch], float], *, size: int | None, device: torch.device
) -> Iterator[Piece]:
    """Every batch whole, or in slices of ``size`` samples; pieces that count nothing are left out.

    Raises:
        ObjectiveError: the source gives another number of batches than were surveyed.
    """
    seen = 0
    for index, batch in enumerate(source):
        seen += 1
        if index >= len(survey.counts) or not survey.counts[index]:
            continue
        moved, length = to_device(batch, device), survey.lengths[index]
        if size is None or size >= length:
            yield _piece((index, 0), moved, survey.counts[index], survey)
            continue
        for start in range(0, length, size):
            part = slice_batch(moved, start, start + size, length=length)
            if count := count_of(part):
                yield _piece((index, start), part, count, survey)
    if seen != len(survey.counts):
        raise ObjectiveError(
            f"the data gave {seen} batches, {len(survey.counts)} when the objective was made: it changed, make a new Objective"
        )


def cut_samples(piece: Piece, survey: Survey, count_of: Callable[[Batch], float], *, length: int) -> list[Piece]:
    """A piece of ``length`` samples cut into single ones, those that count nothing left out."""
    index, first = piece.key
    slices = [slice_batch(piece.batch, i, i + 1, length=length) for i in range(length)]
    return [_piece((index, first + i), part, count, survey) for i, part in enumerate(slices) if (count := count_of(part))]


def _piece(key: tuple[int, int], batch: Batch, count: float, survey: Survey) -> Piece:
    return Piece(key, batch, count, count / survey.total if survey.reduction == "mean" else 1.0)
