"""How the loss averages, settled by all processes from what each of them found on its own data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from sharpkit._errors import ObjectiveError, ObjectiveWarning

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
