"""What a batch weighs: how the loss averages, found out on the data or known from the loss, and the pieces it is cut into."""

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

CountFunction = Callable[[Batch], float]


def candidate_counts(batch: Batch, known: KnownLoss | None, pair: bool) -> dict[str, float]:
    """What this batch may count, by every rule that applies, the likeliest first.

    Args:
        batch: whole or sliced.
        known: if given, its rule alone.
        pair: the batch is (input, target).
    """
    target = _find_target(batch, pair)
    if known is not None and target is not None:
        return {"targets": known.count(target)}
    counts: dict[str, float] = {}
    if target is not None and target.ndim > 0:
        labels = not target.is_floating_point() and not target.is_complex()
        if labels and not pair and target.ndim > 1:
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
    target = _find_target(batch, pair)
    return int(target.shape[0]) if target is not None and target.ndim > 0 else 1


def _find_target(batch: Batch, pair: bool) -> Tensor | None:
    if pair:
        target = batch[1]
        return target if isinstance(target, Tensor) else (tensors_of(target) or [None])[0]  # type: ignore[list-item]
    if isinstance(batch, Mapping):
        for key in ("labels", "label", "target", "targets", "y"):
            if isinstance(found := batch.get(key), Tensor):
                return found
        return None
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def additive(whole: float, parts: tuple[float, float], counts: tuple[float, float] | None, *, rtol: float, atol: float = 0.0) -> bool:
    """Whether the loss of a batch is the (weighted) sum of its parts' losses.

    Args:
        whole: loss of the batch.
        parts: losses of its two parts.
        counts: what the parts count, for a mean; None for a sum.
        rtol: rounding of one loss, relative.
        atol: rounding of one loss, absolute: a small loss is a difference of larger logits.
    """
    scale = max(abs(whole), abs(parts[0]), abs(parts[1]))
    if counts is None:
        return abs(whole - sum(parts)) <= 2 * (rtol * scale + atol)
    total = sum(counts)
    return total > 0 and abs(whole - (counts[0] * parts[0] + counts[1] * parts[1]) / total) <= rtol * scale + atol


def machine_rtol(dtype: torch.dtype) -> float:
    """Relative rounding to allow in a loss of this type; in float64 for layers that compute in float32 all the same (RMSNorm)."""
    return {torch.float64: 1e-6, torch.float32: 3e-5}.get(dtype, 2e-2)


def machine_atol(dtype: torch.dtype) -> float:
    """Absolute rounding to allow in a loss of this type, from logits of some tens."""
    return {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1e-2)


Rule = str | None  # what a mean counts; None: the loss sums


@dataclass(frozen=True)
class Opinion:
    """What one process found.

    Attributes:
        rules: what its batches may count, the likeliest first.
        possible: those, and None for a sum, that its trials left.
        fits: whether a trial found the loss of a batch to be the mean or sum of its parts'.
        tried: whether there was a trial.
        draws: whether the loss draws random numbers.
        num_batches: batches that count something.
        num_samples: samples in all batches.
        totals: counts of all batches by rule.
        ratios: by rule, the range of its counts relative to the first rule's.
        parameters: their number and a checksum of their values.
    """

    rules: tuple[str, ...]
    possible: tuple[Rule, ...]
    fits: bool
    tried: bool
    draws: bool
    num_batches: int
    num_samples: int
    totals: dict[str, float]
    ratios: dict[str, tuple[float, float]]
    parameters: tuple[int, float]


@dataclass(frozen=True)
class Verdict:
    """``"mean"`` or ``"sum"``, over what, and whether the loss falls apart into samples."""

    reduction: str
    rule: str
    additive: bool


def decide(opinions: Sequence[Opinion], *, reduction: str, given_count: bool, check: bool) -> Verdict:
    """The same answer on every process, since all know all opinions. A process without data adopts the others'.

    Args:
        opinions: one per process, in the order of ranks.
        reduction: as asked for.
        given_count: what a batch counts was given by the user.
        check: whether trials were to be made.

    Raises:
        ObjectiveError: nothing counts, the processes disagree, or it is unknown how much a batch weighs.
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
    fallback = "sum" if reduction == "sum" else "mean"
    if not possible:
        _refuse_unless_one_or_given(
            f"the loss of a batch is neither the sum nor the mean of its parts' losses, counting {' or '.join(rules)}",
            num_batches,
            given_count,
        )
        return Verdict(fallback, rules[0], False)
    tried = any(o.tried for o in having)
    best = possible[0]
    if check and num_batches > 1 and not given_count and not _same_weights(possible, having):
        ways = " or ".join("its sum" if r is None else f"a mean over {r}" for r in possible)
        if not tried:
            _refuse_unless_one_or_given(f"the loss may be {ways}, and no batch could be cut in two to find out", num_batches, given_count)
        warnings.warn(
            f"the loss may be {ways}: all fit, and weigh batches differently. The first is taken; pass count=lambda batch: ... (and "
            "reduction=) "
            "to say which is meant",
            ObjectiveWarning,
            stacklevel=4,
        )
    separates = (tried and all(o.fits for o in having)) if check else rules[0] != "batches"
    return Verdict("sum" if best is None else "mean", rules[0] if best is None else best, separates)


def _refuse_unless_one_or_given(problem: str, num_batches: int, given_count: bool) -> None:
    if num_batches == 1:
        return
    message = (
        f"{problem}, so it is unknown how much each of the {num_batches} batches weighs. Pass count=lambda batch: ... returning what "
        "the loss "
        "averages over (and reduction='sum' if it sums), or one batch instead of several"
    )
    if not given_count:
        raise ObjectiveError(message)
    warnings.warn(
        f"{problem}. count= was given and is used; the numbers depend on how the data was cut into batches", ObjectiveWarning, stacklevel=5
    )


def _same_weights(possible: Sequence[Rule], having: Sequence[Opinion]) -> bool:
    """Whether the rules left give every batch the same share, so that it does not matter which is right."""
    if None in possible:
        return len(possible) == 1
    ranges = [[o.ratios[rule] for o in having] for rule in possible if rule is not None]
    return all(max(high for _, high in seen) - min(low for low, _ in seen) <= 1e-9 * max(high for _, high in seen) for seen in ranges)


def _disagreement(opinions: Sequence[Opinion]) -> str:
    found = []
    for rank, o in enumerate(opinions):
        if o.num_batches:
            ways = (
                " or ".join("a sum" if r is None else f"a mean over {r}" for r in o.possible) or f"neither, counting {', '.join(o.rules)}"
            )
            found.append(f"rank {rank} {ways}")
    return (
        f"the processes disagree on how the loss averages: {'; '.join(found)}. Give every process the same loss and the same kind of "
        "batches, "
        "or say it by count= and reduction="
    )


def _check_same_parameters(opinions: Sequence[Opinion]) -> None:
    size, checksum = opinions[0].parameters
    others = [r for r, o in enumerate(opinions) if o.parameters[0] != size or abs(o.parameters[1] - checksum) > 1e-6 * abs(checksum)]
    if others:
        raise ObjectiveError(
            f"the parameters on rank {', '.join(map(str, others))} are not those of rank 0, so there is no one function to measure: "
            "broadcast them "
            "first (DistributedDataParallel does), or pass process_group=False to measure each process's own model"
        )


_MAX_TRIALS = 5


@dataclass(frozen=True)
class Probe:
    """How the survey evaluates and counts.

    Attributes:
        count: what a batch may count, by rule, the likeliest first.
        loss: (batch, number) -> loss in eval mode, for trying out additivity.
        loss_in_mode: (batch, number) -> loss in the mode to measure in, and whether random numbers were drawn.
        known: the standard loss behind it all, if it is one.
        given_count: ``count`` is the user's own.
        pair: batches are (input, target).
        check: whether to evaluate at all.
        draws: whether random numbers are to be expected, if not evaluated.
        parameters: their number and a checksum of their values.
    """

    count: Callable[[Batch], dict[str, float]]
    loss: Callable[[Batch, int], Tensor]
    loss_in_mode: Callable[[Batch, int], tuple[Tensor, bool]]
    known: KnownLoss | None
    given_count: bool
    pair: bool
    check: bool
    draws: bool
    parameters: tuple[int, float]


@dataclass(frozen=True)
class Survey:
    """What was found out about the data.

    Attributes:
        counts: per batch of this process.
        lengths: samples per batch of this process.
        reduction: ``"mean"`` or ``"sum"``.
        rule: what is counted, in words.
        additive: whether the loss falls apart into samples.
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


@dataclass(frozen=True)
class Look:
    """What one process saw: per batch counts by rule and samples, and its opinion on how the loss averages."""

    rows: tuple[dict[str, float], ...]
    lengths: tuple[int, ...]
    opinion: Opinion


def look_at(source: BatchSource, probe: Probe, *, reduction: str) -> Look:
    """Go through this process's data once.

    Args:
        source: the batches.
        probe: how to count and evaluate.
        reduction: ``"auto"``, ``"mean"`` or ``"sum"``.
    """
    _check_reduction(probe.known, reduction)
    rows, lengths, marks = [], [], []
    shown: list[tuple[int, Batch]] = []
    cuttable = False
    for index, batch in enumerate(source):
        if probe.pair and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            came = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise TypeError(
                f"with loss=, batches are (input, target), but batch {index} is a {came}: pass closure=lambda model, batch: ... "
                "instead, or a "
                "list of (input, target) batches"
            )
        row = probe.count(batch)
        if min(row.values()) < 0:
            raise ValueError(f"count(batch) returned {min(row.values())} for batch {index}; it must not be negative")
        rows.append(row)
        lengths.append(samples_in(batch, probe.pair))
        if source.is_loader and index < 2:
            marks.append(fingerprint(batch))
        if min(row.values()) > 0 and len(shown) < _MAX_TRIALS:
            cut, spread = _cut(batch, probe)
            if spread > 0 or not shown or (cut and not cuttable):
                shown.append((index, batch))
                cuttable = cuttable or cut > 0
    source.check_repeatable(marks)
    rules = [rule for rule in (rows[0] if rows else {}) if all(rule in row for row in rows)]
    if rows and not rules:
        rules, rows = ["batches"], [{"batches": 1.0} for _ in rows]
    draws = probe.draws
    if probe.check:
        draws = _check_repeats(shown[0], probe.loss_in_mode) if shown else False
    possible, tried, fits = _try_rules(shown, probe, rules, reduction)
    totals = {rule: sum(row[rule] for row in rows) for rule in rules}
    opinion = Opinion(
        tuple(rules),
        possible,
        fits,
        tried,
        draws,
        sum(any(row.values()) for row in rows),
        sum(lengths),
        totals,
        _ratios(rows, rules),
        probe.parameters,
    )
    return Look(tuple(rows), tuple(lengths), opinion)


def conclude(look: Look, ranks: Ranks, *, probe: Probe, reduction: str) -> Survey:
    """Settle with the other processes how the loss averages, and what all batches count together.

    Raises:
        ObjectiveError: nothing counts anywhere, the processes disagree, or the weights of batches are unknown.
    """
    opinions = ranks.gather(look.opinion)
    verdict = decide(opinions, reduction=reduction, given_count=probe.given_count, check=probe.check)
    return Survey(
        tuple(row.get(verdict.rule, 0.0) for row in look.rows),
        look.lengths,
        verdict.reduction,
        verdict.rule,
        verdict.additive,
        any(o.draws for o in opinions),
        sum(o.totals.get(verdict.rule, 0.0) for o in opinions),
        sum(o.num_samples for o in opinions),
    )


def _check_reduction(known: KnownLoss | None, asked: str) -> None:
    if known is None:
        return
    if known.reduction not in ("mean", "sum"):
        raise ObjectiveError(f"the loss has reduction={known.reduction!r} and returns one number per target: use reduction='mean'")
    if asked not in ("auto", known.reduction):
        raise ValueError(f"reduction={asked!r} was asked for, but the loss itself has reduction={known.reduction!r}: make them the same")


def _check_repeats(shown: tuple[int, Batch], loss_in_mode: Callable[[Batch, int], tuple[Tensor, bool]]) -> bool:
    """Evaluate a batch twice; whether random numbers were drawn."""
    index, batch = shown
    (first, draws), (again, _) = loss_in_mode(batch, index), loss_in_mode(batch, index)
    a, b = float(first), float(again)
    if abs(a - b) > machine_rtol(first.dtype) * max(abs(a), abs(b)) + machine_atol(first.dtype):
        raise NonDeterministicError(
            f"the same batch gave the losses {a:.9g} and {b:.9g}: the model or the closure draws from a random generator of its own, "
            "or carries "
            "state from call to call. Seed that generator inside the closure, reset the state, or use mode='eval'"
        )
    return draws


# -- trying out how the loss averages -------------------------------------------------------------------------------------
def _try_rules(shown: list[tuple[int, Batch]], probe: Probe, rules: list[str], reduction: str) -> tuple[tuple[Rule, ...], bool, bool]:
    """(rules that make the loss of a batch the mean, or the sum, of its parts'; whether that was tried; whether one did)."""
    known = probe.known
    if known is not None:
        possible: list[Rule] = [None] if known.reduction == "sum" else [*rules[:1]]
    elif reduction == "auto":
        possible = [*rules, None]
    else:
        possible = [None] if reduction == "sum" else [*rules]
    left, tried = possible, False
    for index, batch in shown if probe.check else []:
        if (trial := _try_out(index, batch, probe, rules)) is not None:
            tried = True
            left = [rule for rule in left if trial.fits(rule, loose=known is not None)]
    # a known loss says itself how it averages: a misfit means that the model mixes the samples of a batch
    return tuple(possible if known is not None else left), tried, bool(left)


@dataclass(frozen=True)
class _Trial:
    """One batch evaluated whole and in two parts."""

    whole: float
    parts: tuple[float, float]
    counts: tuple[dict[str, float], dict[str, float]]
    dtype: torch.dtype

    def fits(self, rule: Rule, *, loose: bool) -> bool:
        pair = None if rule is None else (self.counts[0][rule], self.counts[1][rule])
        rtol = machine_rtol(self.dtype) ** (0.5 if loose else 1.0)
        return additive(self.whole, self.parts, pair, rtol=rtol, atol=machine_atol(self.dtype))


def _cut(batch: Batch, probe: Probe) -> tuple[int, float]:
    """Where to cut the batch in two so that the rules' shares of the first part differ most, and by how much; (0, 0) where they cannot."""
    length = samples_in(batch, probe.pair)
    best = (0, 0.0)
    for cut in {max(1, length // 3), length // 2, 2 * length // 3} if length >= 2 else ():
        first, second = _parts_counts(batch, cut, length, probe)
        if all(first.get(rule, 0) > 0 and n > 0 for rule, n in second.items()):
            shares = [first[rule] / (first[rule] + n) for rule, n in second.items()]
            best = max(best, (cut, max(shares) - min(shares)), key=lambda found: (found[1], found[0]))
    return best


def _parts_counts(batch: Batch, cut: int, length: int, probe: Probe) -> tuple[dict[str, float], dict[str, float]]:
    return probe.count(slice_batch(batch, 0, cut, length=length)), probe.count(slice_batch(batch, cut, length, length=length))


def _try_out(index: int, batch: Batch, probe: Probe, rules: list[str]) -> _Trial | None:
    """None where the batch cannot be cut, or its parts cannot be evaluated."""
    cut, _ = _cut(batch, probe)
    length = samples_in(batch, probe.pair)
    if not cut:
        return None
    counts = _parts_counts(batch, cut, length, probe)
    if any(rule not in c for rule in rules for c in counts):
        return None
    whole = probe.loss(batch, index)
    try:
        parts = [float(probe.loss(slice_batch(batch, *span, length=length), index)) for span in ((0, cut), (cut, length))]
    except Exception:  # the closure may insist on whole batches in any way it likes
        return None
    return _Trial(float(whole), (parts[0], parts[1]), counts, whole.dtype)


def _ratios(rows: list[dict[str, float]], rules: list[str]) -> dict[str, tuple[float, float]]:
    """Per rule, the range over batches of its count relative to the first rule's: rules of the same ratio give the same weights."""
    counting = [row for row in rows if any(row[rule] for rule in rules)]
    found = {}
    for rule in rules:
        ratios = [row[rule] / row[rules[0]] if row[rules[0]] else float("inf") for row in counting] or [1.0]
        found[rule] = (min(ratios), max(ratios))
    return found


CountOf = Callable[[Batch], float]


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


def cut_batches(source: BatchSource, survey: Survey, count_of: CountOf, *, size: int | None, device: torch.device) -> Iterator[Piece]:
    """Every batch whole, or in slices of ``size`` samples; pieces that count nothing are left out.

    Raises:
        ObjectiveError: the source gives another number of batches than were surveyed.
    """
    seen = 0
    for index, batch in enumerate(source):
        seen += 1
        if index < len(survey.counts) and survey.counts[index]:
            yield from _cut_batch(to_device(batch, device), index, survey, count_of, size)
    if seen != len(survey.counts):
        raise ObjectiveError(
            f"the data gave {seen} batches, {len(survey.counts)} when the objective was made: it changed, make a new Objective"
        )


def _cut_batch(batch: Batch, index: int, survey: Survey, count_of: CountOf, size: int | None) -> Iterator[Piece]:
    length = survey.lengths[index]
    if size is None or size >= length:
        yield weighed((index, 0), batch, survey.counts[index], survey)
        return
    for start in range(0, length, size):
        part = slice_batch(batch, start, start + size, length=length)
        if count := count_of(part):
            yield weighed((index, start), part, count, survey)


def cut_samples(piece: Piece, survey: Survey, count_of: CountOf, *, length: int) -> list[Piece]:
    """A piece of ``length`` samples cut into single ones, those that count nothing left out."""
    index, first = piece.key
    slices = [slice_batch(piece.batch, i, i + 1, length=length) for i in range(length)]
    return [weighed((index, first + i), part, count, survey) for i, part in enumerate(slices) if (count := count_of(part))]


def weighed(key: tuple[int, int], batch: Batch, count: float, survey: Survey) -> Piece:
    """A piece with its share of the objective."""
    return Piece(key, batch, count, count / survey.total if survey.reduction == "mean" else 1.0)
