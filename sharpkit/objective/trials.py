"""Trying out how a loss averages: batches cut in two, and parts of several batches joined, must have the loss that a rule predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit._errors import NonDeterministicError
from sharpkit.objective.batches import Batch, join_batches, slice_batch
from sharpkit.objective.counting import CountRule, SeenLoss, samples_in, target_path
from sharpkit.objective.loss import KnownLoss

Counts = dict[str, float]  # what a batch counts, by the rule's name, the likeliest rule first
Rule = str | None  # name of what a mean counts; None: the loss sums
Measured = tuple[Tensor, Tensor]  # the loss as one number in its own type, and entries of its gradient, float64 on the CPU

_MAX_CUTS = 5  # batches cut in two: by judgement, rules that five telling batches cannot tell apart hardly differ
_MAX_PARTS = 16  # batches that give a part to be joined with others', evenly spread over the data: by judgement
_MAX_PART = 4  # samples in such a part: by judgement; what differs between batches shows in few


@dataclass(frozen=True)
class Watched:
    """One evaluation: the loss, whether random numbers were drawn, the standard losses seen, and that of them which the loss is."""

    loss: Tensor
    draws: bool
    seen: tuple[SeenLoss, ...]
    behind: SeenLoss | None


@dataclass(frozen=True)
class Evaluator:
    """How batches are evaluated while it is not known yet what they weigh.

    Attributes:
        measure: (batch, number, whether with the gradient) -> loss in eval mode, without dropout, which would hide that parts add up.
        watch: (batch, number) -> the loss in the mode to measure in, and what was seen on the way.
        known: the standard loss behind it all, if it is one.
        count: the user's own ``count=``, or None.
        pair: batches are (input, target).
        check: whether to evaluate at all.
        draws: whether random numbers are to be expected, if not evaluated.
        parameters: their number and a checksum of their values.
    """

    measure: Callable[[Batch, int, bool], Measured]
    watch: Callable[[Batch, int], Watched]
    known: KnownLoss | None
    count: CountRule | None
    pair: bool
    check: bool
    draws: bool
    parameters: tuple[int, float]


def rtol(dtype: torch.dtype) -> float:
    """Relative rounding to allow in a loss of this type, by judgement; in float64 for layers that use float32 all the same (RMSNorm)."""
    return {torch.float64: 1e-6, torch.float32: 3e-5}.get(dtype, 2e-2)


def atol(dtype: torch.dtype) -> float:
    """Absolute rounding to allow in a loss of this type: a small loss is a difference of logits, taken to be some tens."""
    return {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1e-2)


def check_repeats(batch: Batch, number: int, evaluator: Evaluator) -> Watched:
    """Evaluate a batch twice.

    Raises:
        NonDeterministicError: two values.
    """
    first = evaluator.watch(batch, number)
    a, b, dtype = float(first.loss), float(evaluator.watch(batch, number).loss), first.loss.dtype
    if abs(a - b) > rtol(dtype) * max(abs(a), abs(b)) + atol(dtype):
        raise NonDeterministicError(
            f"the same batch gave the losses {a:.9g} and {b:.9g}: the model or the closure draws from a random generator of its own, or "
            "carries state from call to call. Seed that generator inside the closure, reset the state, or use mode='eval'"
        )
    return first


# -- what to try ----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """A batch, or some samples of one, with the number of its batch."""

    number: int
    batch: Batch
    length: int


class Showcase:
    """Picks what to try as the data goes by: batches worth cutting in two, and a part of each of some batches, evenly spread.

    Args:
        rules: what a batch may count.
        pair: batches are (input, target).
    """

    def __init__(self, rules: Sequence[CountRule], pair: bool) -> None:
        self._rules, self._pair = rules, pair
        self.cuts: list[tuple[Part, int]] = []  # and where
        self._parts: dict[int, Part] = {}
        self._extremes: dict[tuple[str, int], tuple[float, Part]] = {}  # by rule and sign: where it differs most from the others
        self._stride = 1
        self.longest = 0

    def add(self, number: int, batch: Batch, row: Counts) -> None:
        """Look at one batch that counts something."""
        length = samples_in(batch, self._pair)
        self.longest = max(self.longest, length)
        if len(self.cuts) < _MAX_CUTS:
            cut, spread = self._best_cut(batch, length)
            # A batch is worth cutting if its rules disagree about the halves, or if it is the first that can be cut.
            if cut and (spread > 0 or not self.cuts):
                self.cuts.append((Part(number, batch, length), cut))
        most = max(row.values())
        ratios = {(name, sign): sign * n / most for name, n in row.items() for sign in (1, -1)}
        telling = [key for key, ratio in ratios.items() if key not in self._extremes or ratio > self._extremes[key][0]]
        if number % self._stride and not telling:
            return
        if (part := self._part(number, batch, length, row)) is None:
            return
        for key in telling:
            self._extremes[key] = (ratios[key], part)
        if number % self._stride == 0:
            self._parts[number] = part
        if len(self._parts) > _MAX_PARTS:  # every second one goes: what is left is spread evenly, however long the data is
            self._stride *= 2
            self._parts = {n: p for n, p in self._parts.items() if n % self._stride == 0}

    @property
    def parts(self) -> list[Part]:
        """A part of each picked batch, in the order of batches."""
        picked = {**self._parts, **{part.number: part for _, part in self._extremes.values()}}
        return [picked[n] for n in sorted(picked)]

    def _counts(self, batch: Batch, start: int, stop: int, length: int) -> Counts | None:
        return counts_of(slice_batch(batch, start, stop, length=length), self._rules)

    def _best_cut(self, batch: Batch, length: int) -> tuple[int, float]:
        """Where to cut so that the rules' shares of the first part differ most, and by how much; (0, 0) if nowhere."""
        best = (False, 0.0, 0)
        # three cuts, by judgement: masked tokens are seldom spread so evenly that all three give the rules equal shares
        for cut in {max(1, length // 3), length // 2, 2 * length // 3} if length >= 2 else ():
            first, second = self._counts(batch, 0, cut, length), self._counts(batch, cut, length, length)
            if first is not None and second is not None:
                best = max(best, (*_telling(first, second), cut))
        return best[2], best[1]

    def _part(self, number: int, batch: Batch, length: int, row: Counts) -> Part | None:
        """Of three slices the one whose rules' shares differ most; the batch itself if it is short; None if nothing can be cut."""
        size = min(length, max(1, min(_MAX_PART, length // 4)))
        if size == length:
            return Part(number, batch, length)
        slices = {}
        for start in (0, (length - size) // 2, length - size):
            counts = self._counts(batch, start, start + size, length)
            if counts is not None and counts != row:  # of a batch that cannot be cut, any slice is the whole
                slices[start] = _telling(counts, row)
        if not slices:
            return None
        start = max(slices, key=lambda s: slices[s])
        return Part(number, slice_batch(batch, start, start + size, length=length), size)


def counts_of(batch: Batch, rules: Sequence[CountRule]) -> Counts | None:
    """The batch counted by every rule; None where one does not apply."""
    counts = {rule.name: n for rule in rules if (n := rule.count(batch)) is not None}
    return counts if len(counts) == len(rules) else None


def _telling(first: Counts, second: Counts) -> tuple[bool, float]:
    """How much two parts tell of the rules: whether each counts something by every rule (else the loss may be 0/0), spread of shares."""
    shares = [first[name] / (first[name] + n) for name, n in second.items() if first[name] + n > 0]
    return min(*first.values(), *second.values()) > 0, max(shares, default=0.0) - min(shares, default=0.0)


# -- trying ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Verdict:
    """What trials showed.

    Attributes:
        possible: rules that every trial left.
        tried: whether there was a trial.
        linked: whether all parts of batches were joined with others'.
    """

    possible: tuple[Rule, ...]
    tried: bool
    linked: bool


def try_rules(
    cuts: Sequence[tuple[Part, int]],
    parts: Sequence[Part],
    evaluator: Evaluator,
    rules: Sequence[CountRule],
    possible: Sequence[Rule],
    *,
    longest: int,
) -> Verdict:
    """Which rules make the loss of a batch the mean, or the sum, of its parts'.

    Args:
        cuts: batches and where to cut them in two.
        parts: of several batches, on all processes.
        evaluator: evaluates them.
        rules: what a batch may count.
        possible: their names, and None for a sum.
        longest: samples in the longest batch; no more are joined.
    """
    left, tried = list(possible), False
    for part, cut in cuts:
        halves = [slice_batch(part.batch, *span, length=part.length) for span in ((0, cut), (cut, part.length))]
        if (fitting := _fitting(part.batch, halves, part.number, evaluator, rules, left)) is not None:
            tried, left = True, fitting
    if evaluator.known is not None and tried:  # says itself how it averages; one trial shows whether the model mixes samples
        return Verdict(tuple(left), True, False)
    # a part that is all masked has no loss, which says nothing of the others
    usable = [part for part in parts if _measured(part.batch, part.number, evaluator) is not None] if len(parts) > 1 else []
    linked = len(usable) > 1
    for group in _groups(usable, max(2, longest)):
        fitting = _joined(group, evaluator, rules, left)
        linked = linked and fitting is not None
        if fitting is not None:
            tried, left = True, fitting
    return Verdict(tuple(left), tried, linked)


def _measured(batch: Batch, number: int, evaluator: Evaluator) -> Measured | None:
    try:
        return evaluator.measure(batch, number, evaluator.known is None)
    except Exception:  # the closure may insist on whole batches in any way it likes
        return None


def _groups(parts: Sequence[Part], most: int) -> list[list[Part]]:
    """Parts in groups of at most so many samples (but two parts), each with the last part of the group before, so that all are linked."""
    groups: list[list[Part]] = []
    for part in parts[1:]:
        if not groups or sum(p.length for p in groups[-1]) + part.length > most:
            groups.append([groups[-1][-1] if groups else parts[0]])
        groups[-1].append(part)
    return groups


def _joined(group: Sequence[Part], evaluator: Evaluator, rules: Sequence[CountRule], left: list[Rule]) -> list[Rule] | None:
    """The rules that fit a group joined as it is, or with its trailing sizes cropped and padded; None if it cannot be joined."""
    batches, lengths, number = [p.batch for p in group], [p.length for p in group], group[0].number
    if (whole := join_batches(batches, lengths)) is not None:
        return _fitting(whole, batches, number, evaluator, rules, left)
    label, fitting = target_path(batches[0], evaluator.pair), None
    for ragged in ("crop", "pad"):
        if (whole := join_batches(batches, lengths, ragged=ragged, padding={label: -100} if label else {})) is None:
            continue
        spans = [(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]
        pieces = [slice_batch(whole, *span, length=sum(lengths)) for span in spans]
        result = _fitting(whole, pieces, number, evaluator, rules, left if fitting is None else fitting)
        # padding is a guess: where it fits no rule, the loss may know another value for it
        if result or (result is not None and ragged == "crop"):
            fitting = result
    return fitting


def _fitting(
    whole: Batch, parts: Sequence[Batch], number: int, evaluator: Evaluator, rules: Sequence[CountRule], candidates: Sequence[Rule]
) -> list[Rule] | None:
    """The rules under which the loss of a batch is that of its parts; None if the parts cannot be counted or evaluated."""
    counts = [counts_of(part, rules) for part in parts]
    if any(row is None for row in counts):
        return None
    measured = [m for batch in (whole, *parts) if (m := _measured(batch, number, evaluator)) is not None]
    if len(measured) <= len(parts):
        return None
    dtype = measured[0][0].dtype
    losses, slopes = torch.stack([m[0].double().reshape(()) for m in measured]), [m[1] for m in measured]
    # A known loss need not be told from others: only a gross misfit, from mixed samples, counts against it.
    tolerance = rtol(dtype) ** (0.5 if evaluator.known is not None else 1.0)
    rounding = tolerance * float(losses.abs().max()) + atol(dtype)
    # Gradients tell rules apart where losses are alike, as under a last layer of zeros. They round worse: gross misfits count, and those of
    # a loss near 0, a difference of nearly equal numbers, none.
    with_slopes = float(losses.abs().max()) > 1e3 * atol(dtype) and all(len(s) == len(slopes[0]) > 0 for s in slopes)
    slope_rounding = rtol(dtype) ** 0.5 * max((float(s.norm()) for s in slopes), default=0.0)

    def fits(rule: Rule) -> bool:
        weights = [1.0 if rule is None else row[rule] for row in counts if row is not None]
        divisor = 1.0 if rule is None else sum(weights)
        if divisor <= 0:
            return False
        off = float(losses[0]) - sum(w * float(x) for w, x in zip(weights, losses[1:], strict=True)) / divisor
        if abs(off) > rounding * (len(parts) if rule is None else 1):  # a sum of rounded numbers
            return False
        if not with_slopes:
            return True
        slope = slopes[0] - sum((s * (w / divisor) for w, s in zip(weights, slopes[1:], strict=True)), torch.zeros_like(slopes[0]))
        return bool(slope.norm() <= slope_rounding * (len(parts) if rule is None else 1))

    return [rule for rule in candidates if fits(rule)]
