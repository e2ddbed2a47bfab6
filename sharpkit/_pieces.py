"""Batches cut into the pieces that are evaluated one after another, each with its share of the objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sharpkit._batches import Batch, BatchSource, slice_batch, to_device
from sharpkit._errors import ObjectiveError
from sharpkit._survey import Survey

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
            yield from _cut(to_device(batch, device), index, survey, count_of, size)
    if seen != len(survey.counts):
        raise ObjectiveError(
            f"the data gave {seen} batches, {len(survey.counts)} when the objective was made: it changed, make a new Objective"
        )


def _cut(batch: Batch, index: int, survey: Survey, count_of: CountOf, size: int | None) -> Iterator[Piece]:
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
