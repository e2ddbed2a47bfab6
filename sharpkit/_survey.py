"""The first look at the data: what every batch counts, how the loss averages, and whether a second look sees the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sharpkit._batches import Batch, BatchSource, fingerprint, slice_batch
from sharpkit._counting import KnownLoss, additive, machine_rtol, samples_in
from sharpkit._distributed import Ranks
from sharpkit._errors import NonDeterministicError, ObjectiveError, ObjectiveWarning

_SUM = "sum"
_MAX_TRIALS = 5


@dataclass(frozen=True)
class Survey:
    """What was found out about the data.

    Attributes:
        counts: per batch of this process.
        lengths: samples per batch of this process.
        reduction: ``"mean"`` or ``"sum"``.
        rule: what is counted, in words.
        additive: whether the loss falls apart into samples.
        total: counts over all processes.
        num_samples: samples over all processes.
    """

    counts: tuple[float, ...]
    lengths: tuple[int, ...]
    reduction: str
    rule: str
    additive: bool
    total: float = 0.0
    num_samples: int = 0

    def over(self, ranks: Ranks, device: torch.device) -> Survey:
        """With the totals of all processes filled in.

        Raises:
            ObjectiveError: nothing counts anywhere.
        """
        local = [float(sum(self.counts)), float(sum(self.lengths))]
        total, samples = ranks.sum_numbers(local, device=device)
        if total <= 0:
            raise ObjectiveError("the data holds nothing that counts: no batches, only empty ones, or all targets masked (ignore_index)")
        return replace(self, total=total, num_samples=int(samples))


@dataclass(frozen=True)
class _Trial:
    """One batch evaluated whole and in two parts."""

    whole: float
    parts: tuple[float, float]
    counts: tuple[dict[str, float], dict[str, float]]

    def fits(self, rule: str | None, rtol: float) -> bool:
        pair = None if rule is None else (self.counts[0][rule], self.counts[1][rule])
        return additive(self.whole, self.parts, pair, rtol)


def survey(
    source: BatchSource, count: Callable[[Batch], dict[str, float]], loss_of: Callable[[Batch, int], float], loss_in_mode: Callable[[Batch], float], *,
    known: KnownLoss | None, reduction: str, given_count: bool, pair: bool, ranks: Ranks, check: bool, dtype: torch.dtype,
) -> Survey:
    """Go through the data once.

    Args:
        source: the batches.
        count: what a batch may count, by rule.
        loss_of: loss of a batch in eval mode, for trying out additivity.
        loss_in_mode: loss in the mode to measure in, for checking that it repeats.
        known: the standard loss behind it all, if it is one.
        reduction: ``"auto"`` or as given.
        given_count: ``count`` is the user's own.
        pair: batches are (input, target).
        ranks: processes that share the objective.
        check: whether to evaluate at all.
        dtype: in which the loss is computed, for its rounding.
    """
    table: list[dict[str, float]] = []
    lengths: list[int] = []
    marks: list[str] = []
    shown: list[tuple[int, Batch]] = []
    for index, batch in enumerate(source):
        if pair and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError(f"with loss=, batches are (input, target); batch {index} is a {type(batch).__name__}: use closure=lambda model, batch: ... instead")
        table.append(count(batch))
        lengths.append(samples_in(batch, pair))
        if source.is_loader and index < 2:
            marks.append(fingerprint(batch))
        if len(shown) < _MAX_TRIALS:
            shown.append((index, batch))
    source.check_repeatable(marks)
    rules = [rule for rule in (table[0] if table else {}) if all(rule in row for row in table)] or ["batches"]
    rows = [row if rules[0] in row else {"batches": 1.0} for row in table]
    if min((row[r] for row in rows for r in rules), default=0.0) < 0:
        raise ValueError("count(batch) returned a negative number")
    if check:
        _check_repeats([batch for index, batch in shown if rows[index][rules[0]] > 0][:1], loss_in_mode, dtype)
    if known is not None and known.reduction not in ("mean", "sum"):
        raise ObjectiveError(f"the loss has reduction={known.reduction!r} and returns one number per target: use reduction='mean'")
    if known is not None:
        kind, rule, splits = known.reduction if reduction == "auto" else reduction, rules[0], True
    elif not check:
        kind, rule, splits = "mean" if reduction == "auto" else reduction, rules[0], True
    else:
        kind, rule, splits = _find_rule(rows, shown, count, loss_of, rules, reduction, given_count, ranks, machine_rtol(dtype), pair)
    return Survey(tuple(row[rule] for row in rows), tuple(lengths), kind, rule, splits)


def _check_repeats(batches: list[Batch], loss_in_mode: Callable[[Batch], float], dtype: torch.dtype) -> None:
    for batch in batches:
        first, second = loss_in_mode(batch), loss_in_mode(batch)
        if abs(first - second) > machine_rtol(dtype) * max(abs(first), abs(second)):
            raise NonDeterministicError(
                f"the same batch gave the losses {first:.9g} and {second:.9g}: something in the model or the closure is random beyond torch's own seeded "
                "generators, or carries state from call to call. Fix its seed inside the closure, or use mode='eval'"
            )


def _find_rule(
    rows: list[dict[str, float]], shown: list[tuple[int, Batch]], count: Callable[[Batch], dict[str, float]], loss_of: Callable[[Batch, int], float],
    rules: list[str], reduction: str, given_count: bool, ranks: Ranks, rtol: float, pair: bool,
) -> tuple[str, str, bool]:
    """(reduction, rule, additive) by trying out which rules make the loss of a batch the mean, or the sum, of its parts'."""
    possible: list[str | None] = [*rules] if reduction != "sum" else []
    if reduction != "mean":
        possible.append(None)
    tried = False
    for index, batch in shown:
        if tried and _all_agree(rows, possible):
            break
        if samples_in(batch, pair) >= 2 and (trial := _try_out(index, batch, count, loss_of, rules, pair)) is not None:
            tried = True
            possible = [rule for rule in possible if trial.fits(rule, rtol)]
    if possible:
        best = possible[0]
        return ("mean", best, tried) if best is not None else ("sum", rules[0], tried)
    fallback = "mean" if reduction == "auto" else reduction
    if len(rows) == 1 and ranks.size == 1:
        return fallback, rules[0], False
    message = (
        f"the loss of a batch is neither the sum nor the mean of its parts' losses, counting {' or '.join(rules)}, so it is unknown how much a batch weighs. "
        "Pass count=lambda batch: ... returning what the loss averages over, or one batch instead of several"
    )
    if not given_count:
        raise ObjectiveError(message)
    warnings.warn(f"{message} (count= was given and is used; the numbers depend on how the data was cut into batches)", ObjectiveWarning, stacklevel=5)
    return fallback, rules[0], False


def _all_agree(rows: list[dict[str, float]], possible: list[str | None]) -> bool:
    """Whether the rules left give every batch the same share, so that it does not matter which is right."""
    if None in possible and len(possible) > 1:
        return False
    shares = [[row[r] / max(sum(other[r] for other in rows), 1e-300) for row in rows] for r in possible if r is not None]
    return all(abs(a - b) <= 1e-6 for share in shares for a, b in zip(share, shares[0], strict=True))


def _try_out(
    index: int, batch: Batch, count: Callable[[Batch], dict[str, float]], loss_of: Callable[[Batch, int], float], rules: list[str], pair: bool
) -> _Trial | None:
    length = samples_in(batch, pair)
    cut = max(1, length // 3)
    parts = slice_batch(batch, 0, cut), slice_batch(batch, cut, length)
    counts = count(parts[0]), count(parts[1])
    if any(rule not in c or c[rule] <= 0 for rule in rules for c in counts):
        return None
    try:
        return _Trial(loss_of(batch, index), (loss_of(parts[0], index), loss_of(parts[1], index)), counts)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
