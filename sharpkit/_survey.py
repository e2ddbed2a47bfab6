"""The first look at the data: what every batch counts, how the loss averages, and whether a second look sees the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit._batches import Batch, BatchSource, fingerprint, slice_batch
from sharpkit._counting import KnownLoss, additive, machine_atol, machine_rtol, samples_in
from sharpkit._distributed import Ranks
from sharpkit._errors import NonDeterministicError, ObjectiveError
from sharpkit._verdict import Opinion, Rule, decide

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
