"""What a batch weighs: what one process saw of its data, what all settle on, and the weighted pieces of the objective."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor

from sharpkit._errors import ObjectiveError, ObjectiveWarning
from sharpkit.objective.batches import (
    Batch,
    BatchSource,
    batch_form,
    batch_length,
    check_passes,
    check_repeatable,
    fingerprint,
    holds_samples,
    join_batches,
    moved_ahead,
    slice_batch,
    tensors_of,
    to_device,
)
from sharpkit.objective.counting import CountRule, one, rules_for, rules_seen, samples_in
from sharpkit.objective.distributed import Ranks
from sharpkit.objective.loss import KnownLoss
from sharpkit.objective.trials import Counts, Evaluator, Part, Rule, Showcase, Verdict, Watched, check_repeats, try_rules

_SAME = 1e-9  # relative differences between weights that count as rounding of their quotients, by judgement


# -- one process looks at its data ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Opinion:
    """What one process knows of its data; the processes exchange these.

    Attributes:
        names: of the rules by which all its batches may be counted, the likeliest first.
        rules: the rules themselves, for processes without data; the user's own count= is not sent.
        seen: those that the loss follows for certain, since it was seen to be a standard one (None: that sums); empty if none was seen.
        parts: samples of some of its batches.
        longest: samples in its longest batch.
        draws: whether the loss draws random numbers.
        num_batches: batches that count something.
        num_samples: samples in all batches.
        totals: counts of all batches by rule.
        ratios: by two rules, the range over batches of the second's count over the first's: rules of one ratio give the same weights.
        parameters: their number and a checksum of their values.
    """

    names: tuple[str, ...]
    rules: tuple[CountRule, ...]
    seen: tuple[Rule, ...]
    parts: tuple[Part, ...]
    longest: int
    draws: bool
    num_batches: int
    num_samples: int
    totals: Counts
    ratios: dict[tuple[str, str], tuple[float, float]]
    parameters: tuple[int, float]


@dataclass(frozen=True)
class Look:
    """What one process saw: rules, counts and samples of each batch, batches to cut in two, and what it tells the others."""

    rules: tuple[CountRule, ...]
    rows: tuple[Counts, ...]
    lengths: tuple[int, ...]
    cuts: tuple[tuple[Part, int], ...]
    opinion: Opinion


@dataclass
class _FirstLook:
    """What the first batches tell before all are counted."""

    rules: list[CountRule] = field(default_factory=list)
    seen: tuple[Rule, ...] = ()
    draws: bool = False
    marks: list[str] = field(default_factory=list)  # fingerprints: a loader that shuffles or augments shows it within two batches


def look_at(source: BatchSource, evaluator: Evaluator, *, reduction: str) -> Look:
    """Go through this process's data once, after an evaluation of the first batch that counts something.

    Args:
        source: the batches.
        evaluator: how to count and evaluate.
        reduction: ``"auto"``, ``"mean"`` or ``"sum"``.
    """
    _check_reduction(evaluator.known, reduction)
    first = _first_look(source, evaluator)
    rules, showcase = first.rules, Showcase(first.rules, evaluator.pair)
    rows: list[Counts] = []
    lengths: list[int] = []
    marks = list[str]()
    for index, batch in enumerate(source):
        if source.is_seeded:
            marks.append(fingerprint(batch))
        elif index < len(first.marks):
            check_repeatable(batch, index, first.marks[index])
        check_batch(batch, index, pair=evaluator.pair)
        rows.append({rule.name: n for rule in rules if (n := rule.count(batch)) is not None})
        lengths.append(samples_in(batch, evaluator.pair))
        if evaluator.check and _tells(rows[-1], rules):
            showcase.add(index, batch, rows[-1])
    if source.is_seeded:
        check_passes(source, marks)
    # only rules that every batch knows can weigh them all
    rules = [rule for rule in rules if all(rule.name in row for row in rows)]
    if rows and not rules:  # batches of different kinds
        rules, rows = [CountRule("batches", one)], [{"batches": 1.0} for _ in rows]
    names = tuple(rule.name for rule in rules)
    opinion = Opinion(
        names=names,
        rules=() if evaluator.count is not None else tuple(rules),
        seen=tuple(rule for rule in first.seen if rule is None or rule in names),
        parts=tuple(showcase.parts),
        longest=showcase.longest,
        draws=first.draws,
        num_batches=sum(any(row.values()) for row in rows),
        num_samples=sum(lengths),
        totals={name: sum(row[name] for row in rows) for name in names},
        ratios=_ratios(rows, names),
        parameters=evaluator.parameters,
    )
    return Look(tuple(rules), tuple(rows), tuple(lengths), tuple(showcase.cuts), opinion)


def _first_look(source: BatchSource, evaluator: Evaluator) -> _FirstLook:
    first, evaluated = _FirstLook(draws=evaluator.draws), not evaluator.check
    for index, batch in enumerate(source):
        check_batch(batch, index, pair=evaluator.pair)
        if source.is_loader and index < 2:
            first.marks.append(fingerprint(batch))
        if not evaluated or not first.rules:
            first.rules = [evaluator.count] if evaluator.count else rules_for(batch, evaluator.known, evaluator.pair)
            row = {rule.name: n for rule in first.rules if (n := rule.count(batch)) is not None}
            if not evaluated and _tells(row, first.rules):
                evaluated, watch = True, check_repeats(batch, index, evaluator)
                first.draws = watch.draws
                if evaluator.count is None and evaluator.known is None:
                    _add_seen(first, watch, batch)
        if evaluated and (index >= 1 or not source.is_loader):
            break
    if evaluator.check and not evaluated:
        first.draws = False
    return first


def _add_seen(first: _FirstLook, watch: Watched, batch: Batch) -> None:
    """Put the rules of seen losses before the general ones."""
    certain = list(rules_seen(watch.behind, batch)) if watch.behind is not None else []
    others = [rule for each in watch.seen if each is not watch.behind for rule in rules_seen(each, batch)]
    first.rules = list({rule.name: rule for rule in [*certain, *others, *first.rules]}.values())
    sums = watch.behind is not None and watch.behind.known.reduction == "sum"
    first.seen = (None,) if sums else tuple(rule.name for rule in certain)


def _tells(row: Counts, rules: Sequence[CountRule]) -> bool:
    """Whether a batch counts something by every rule, so that its loss is no 0/0."""
    needed = [rule.name for rule in rules if not rule.may_vanish]
    return any(row.values()) and all(row.get(name, 1.0) > 0 for name in needed)


def check_batch(batch: Batch, index: int, *, pair: bool) -> None:
    """Refuse a batch that is not (input, target) where it must be, and one whose tensors hold no numbers."""
    if any(t.is_meta for t in tensors_of(batch)):
        raise ObjectiveError(
            f"batch {index} has tensors on the meta device, which hold no numbers: make the data on 'cpu' or another device"
        )
    if pair and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
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


def _ratios(rows: list[Counts], names: Sequence[str]) -> dict[tuple[str, str], tuple[float, float]]:
    counting, ranges = [row for row in rows if any(row.values())], {}
    for first, second in itertools.combinations(names, 2):
        ratios = [row[second] / row[first] if row[first] else math.inf for row in counting if row[first] or row[second]] or [1.0]
        ranges[first, second] = (min(ratios), max(ratios))
    return ranges


# -- what all processes settle on ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Survey:
    """What is known of the data once all processes have looked.

    Attributes:
        counts: per batch of this process.
        lengths: samples per batch of this process.
        reduction: ``"mean"`` or ``"sum"``.
        rule: the weighting rule.
        additive: whether the loss is a mean or sum over samples.
        draws: whether the loss draws random numbers.
        total: counts over all processes.
        num_samples: samples over all processes.
    """

    counts: tuple[float, ...]
    lengths: tuple[int, ...]
    reduction: str
    rule: CountRule
    additive: bool
    draws: bool
    total: float
    num_samples: int


def conclude(look: Look, ranks: Ranks, *, evaluator: Evaluator, reduction: str, device: torch.device) -> Survey:
    """Settle with the other processes how the loss averages, and what all batches count together.

    Raises:
        ObjectiveError: nothing counts anywhere, the processes disagree, or the weights of batches are unknown.
    """
    sent = replace(look.opinion, parts=tuple(replace(p, batch=to_device(p.batch, torch.device("cpu"))) for p in look.opinion.parts))
    opinions = ranks.gather(look.opinion if ranks.size == 1 else sent)
    _check_same_parameters(opinions)
    having = [o for o in opinions if o.num_batches]  # a process without data adopts the others' opinion
    if not having:
        raise ObjectiveError("the data holds nothing that counts: no batches, only empty ones, or all targets masked (ignore_index)")
    names = [name for name in having[0].names if all(name in o.names for o in having)]
    names = [name for name in names if sum(o.totals[name] for o in having) > 0] or names[:1]
    if not names:
        raise ObjectiveError(f"the processes count their batches by different rules: {_by_rank(opinions)}. {_SAY_IT}")
    own = {rule.name: rule for o in (*having, look.opinion) for rule in o.rules} | {rule.name: rule for rule in look.rules}
    rules = [own[name] for name in names]
    possible = _candidates(evaluator.known, names, reduction)
    verdict = Verdict(tuple(possible), tried=False, linked=False)
    if evaluator.check:
        parts = [part for o in having for part in o.parts]
        longest = max(o.longest for o in having)
        verdict = ranks.run_together(lambda: try_rules(look.cuts, parts, evaluator, rules, possible, longest=longest), device=device)
    verdicts = [v for v, o in zip(ranks.gather(verdict), opinions, strict=True) if o.num_batches]
    settled, name, separable = _decide(having, verdicts, names, possible, evaluator=evaluator, reduction=reduction)
    return Survey(
        counts=tuple(row.get(name, 0.0) for row in look.rows),
        lengths=look.lengths,
        reduction=settled,
        rule=own[name],
        additive=separable,
        draws=any(o.draws for o in opinions),
        total=sum(o.totals.get(name, 0.0) for o in opinions),
        num_samples=sum(o.num_samples for o in opinions),
    )


_SAY_IT = (
    "Pass count=lambda batch: ... returning what the loss of a batch averages over (and reduction='sum' if it sums), or one batch instead "
    "of several"
)


def _candidates(known: KnownLoss | None, names: list[str], reduction: str) -> list[Rule]:
    if known is not None:
        return [None] if known.reduction == "sum" else [names[0]]
    return [*(names if reduction != "sum" else []), *([None] if reduction != "mean" else [])]


def _decide(
    having: Sequence[Opinion], verdicts: Sequence[Verdict], names: list[str], possible: list[Rule], *, evaluator: Evaluator, reduction: str
) -> tuple[str, str, bool]:
    """``"mean"`` or ``"sum"``, over what, and whether the loss is one over samples; all processes know all, and agree."""
    num_batches, given = sum(o.num_batches for o in having), evaluator.count is not None
    tried, fits = any(v.tried for v in verdicts), all(v.possible for v in verdicts)
    left = [rule for rule in possible if all(rule in v.possible for v in verdicts)]
    if evaluator.known is not None:  # says itself how it averages: a misfit means that the model mixes the samples of a batch
        single = all(o.longest <= 1 for o in having)  # one sample a batch has none to mix with
        separable = (fits and (tried or single)) if evaluator.check else names[0] != "batches"
        return evaluator.known.reduction, names[0], separable
    if not evaluator.check:
        return "sum" if possible[0] is None else "mean", names[0], names[0] != "batches"
    if not left:
        problem = f"the loss of a batch is neither the sum nor the mean of its parts' losses, counting {' or '.join(names)}"
        if fits:
            problem = f"the processes disagree on how the loss averages: {_by_rank(verdicts)}"
        _refuse_unless_one_or_given(problem, num_batches, given)
        return "sum" if reduction == "sum" else "mean", names[0], False
    certain = [rule for rule in left if all(rule in o.seen for o in having)]
    left = certain or left
    if num_batches > 1 and not given:
        ways = " or ".join("its sum" if r is None else f"a mean over {r}" for r in left)
        if not _same_weights(left, having):
            problem = f"the loss may be {ways}, which weigh batches differently, and the data does not tell"
            _refuse_unless_one_or_given(problem, num_batches, given)
        if not certain and not all(v.linked for v in verdicts):
            problem = f"the loss may be {ways}, and parts of different batches could not be joined and evaluated to find out"
            _refuse_unless_one_or_given(problem, num_batches, given)
    return "sum" if left[0] is None else "mean", names[0] if left[0] is None else left[0], tried


def _refuse_unless_one_or_given(problem: str, num_batches: int, given_count: bool) -> None:
    if num_batches == 1:  # a single batch weighs 1 by any rule
        return
    if not given_count:
        raise ObjectiveError(f"{problem}, so it is unknown how much each of the {num_batches} batches weighs. {_SAY_IT}")
    warnings.warn(
        f"{problem}. count= was given and is used; the numbers depend on how the data was cut into batches", ObjectiveWarning, stacklevel=5
    )


def _same_weights(left: Sequence[Rule], having: Sequence[Opinion]) -> bool:
    """Whether the rules left give every batch the same share, so that it does not matter which is right."""
    for pair in itertools.combinations(left, 2):
        ranges = [o.ratios[pair[0], pair[1]] for o in having if pair[0] is not None and pair[1] is not None]
        low, high = min((r[0] for r in ranges), default=0.0), max((r[1] for r in ranges), default=math.inf)  # a sum against a mean
        if not high - low <= _SAME * high:
            return False
    return True


def _by_rank(views: Sequence[Opinion | Verdict]) -> str:
    def told(view: Opinion | Verdict) -> str:
        rules: Sequence[Rule] = view.names if isinstance(view, Opinion) else view.possible
        return " or ".join("a sum" if rule is None else f"a mean over {rule}" for rule in rules) or "no data"

    return "; ".join(f"rank {rank} {told(view)}" for rank, view in enumerate(views))


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
        parts: batches that are joined in it, of which the first gives the key.
    """

    key: tuple[int, int]
    batch: Batch
    count: float
    weight: float
    parts: int = 1


def cut_batches(
    source: BatchSource, survey: Survey, count_of: Callable[[Batch], float], *, size: int | None, device: torch.device
) -> Iterator[Piece]:
    """Every batch whole, or in slices of ``size`` samples; pieces that count nothing are left out.

    Raises:
        ObjectiveError: the source gives another number of batches than were surveyed.
    """
    seen = 0
    for index, moved in enumerate(moved_ahead(source, device)):
        seen += 1
        if index >= len(survey.counts) or not survey.counts[index]:
            continue
        length = survey.lengths[index]
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


def join_pieces(pieces: Iterable[Piece], survey: Survey, count_of: Callable[[Batch], float], *, most: int) -> Iterator[Piece]:
    """Neighbouring pieces of like form joined while they hold at most so many samples; those that cannot be joined come as they are."""
    waiting: list[tuple[Piece, int]] = []
    form: Any = None
    for piece in pieces:
        length = batch_length(piece.batch)
        own = None if length is None else batch_form(piece.batch, length)
        if waiting and (own != form or sum(n for _, n in waiting) + (length or 0) > most):
            yield from _joined(waiting, survey, count_of)
            waiting = []
        if length is None:
            yield piece
        else:
            waiting.append((piece, length))
            form = own
    yield from _joined(waiting, survey, count_of)


def _joined(waiting: list[tuple[Piece, int]], survey: Survey, count_of: Callable[[Batch], float]) -> list[Piece]:
    pieces = [piece for piece, _ in waiting]
    whole = join_batches([piece.batch for piece in pieces], [n for _, n in waiting]) if len(pieces) > 1 else None
    if whole is None:
        return pieces
    count = sum(piece.count for piece in pieces)
    if abs(count_of(whole) - count) > _SAME * count:  # a count that is no sum over samples
        return pieces
    return [replace(_piece(pieces[0].key, whole, count, survey), parts=len(pieces))]


class Samples(Sequence[Piece]):
    """The single samples of a piece, cut when they are asked for; those that count nothing are left out.

    Args:
        piece: of ``length`` samples.
        counts: what each counts.
    """

    def __init__(self, piece: Piece, survey: Survey, counts: Sequence[float], *, rows: Sequence[int] | None = None) -> None:
        self._piece, self._survey, self._all = piece, survey, counts
        self._rows = [i for i, count in enumerate(counts) if count] if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Piece | Samples:
        if isinstance(index, slice):
            return Samples(self._piece, self._survey, self._all, rows=self._rows[index])
        row = self._rows[index]
        number, first = self._piece.key
        part = slice_batch(self._piece.batch, row, row + 1, length=len(self._all))
        return _piece((number, first + row), part, self._all[row], self._survey)

    @property
    def counts(self) -> list[float]:
        """What each of them counts."""
        return [self._all[row] for row in self._rows]

    def stacked(self) -> tuple[list[Tensor], list[bool]]:
        """As :func:`stacked`, without cutting: rows of the piece's own tensors."""
        start, stop = self._rows[0], self._rows[-1] + 1
        without_gaps = stop - start == len(self._rows)

        def rows_of(t: Tensor) -> Tensor:
            return t[start:stop] if without_gaps else t[torch.tensor(self._rows, device=t.device)]

        tensors = tensors_of(self._piece.batch)
        own = [holds_samples(t, len(self._all)) for t in tensors]
        return [rows_of(t)[:, None] if each else t for t, each in zip(tensors, own, strict=True)], own


def stacked(pieces: Sequence[Piece]) -> tuple[list[Tensor], list[bool]]:
    """The tensors of pieces of one form in order, stacked but for those that are the same in all, and which are stacked."""
    if isinstance(pieces, Samples):
        return pieces.stacked()
    columns = list(zip(*(tensors_of(piece.batch) for piece in pieces), strict=True))
    own = [any(t is not column[0] for t in column) for column in columns]
    return [torch.stack(column) if each else column[0] for column, each in zip(columns, own, strict=True)], own


def _piece(key: tuple[int, int], batch: Batch, count: float, survey: Survey) -> Piece:
    return Piece(key, batch, count, count / survey.total if survey.reduction == "mean" else 1.0)
