"""The objective's samples as a pool to draw mini-batches from: each draw is an objective of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sharpkit._arguments import whole
from sharpkit._errors import ObjectiveError, UnsupportedError
from sharpkit.objective.batches import Batch, join_batches, map_tensors, to_device
from sharpkit.objective.distributed import Ranks
from sharpkit.objective.objective import Objective, check_objective


class SamplePool:
    """Every sample of an objective, on the model's device, ready to be drawn from.

    Args:
        objective: a mean or sum over samples.
        coupled: draw also where batch statistics tie the samples of a batch together, as training does: each batch has its own.

    Raises:
        ObjectiveError: its loss is not a mean or sum over samples.
        UnsupportedError: its data lies on several processes.
    """

    def __init__(self, objective: Objective, *, coupled: bool = False) -> None:
        check_objective(objective, "this measurement")
        if not (objective.may_separate or (coupled and objective.may_draw)):
            raise ObjectiveError(
                "mini-batches can only be drawn where the loss is a mean or sum over samples; use mode='eval', or another loss"
            )
        if objective.ranks.size > 1:
            raise UnsupportedError("drawing mini-batches works on one process: make the Objective with process_group=False")
        self.parent, self._coupled = objective, coupled
        counts = objective.batch_counts
        batches = [to_device(batch, objective.device) for batch, count in zip(objective.batches(), counts, strict=True) if count]
        lengths = [length for length, count in zip(objective.batch_lengths, counts, strict=True) if count]
        # one batch where shapes allow it: then a draw is one index operation a tensor
        joined = join_batches(batches, lengths) if len(batches) > 1 else None
        self._batches, self._lengths = (batches, lengths) if joined is None else ([joined], [sum(lengths)])

    @property
    def batches(self) -> list[Batch]:
        """All samples, on the device."""
        return self._batches

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return sum(self._lengths)

    def limited(self, max_samples: int, *, seed: int = 0) -> SamplePool:
        """This pool, or ``max_samples`` samples drawn from it at random if it is larger."""
        if self.size <= max_samples:
            return self
        part = self.objective(torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))[:max_samples])
        return SamplePool(part, coupled=self._coupled)

    def objective(self, indices: Tensor) -> Objective:
        """The same loss over some samples only.

        Args:
            indices: (B,) int64 positions in 0..N-1.
        """
        parts, start = [], 0
        for batch, length in zip(self._batches, self._lengths, strict=True):
            here = indices[(indices >= start) & (indices < start + length)] - start
            start += length
            if len(here):
                parts.append(_take(batch, here, length))
        return self._over(parts)

    def _over(self, batches: list[Batch]) -> Objective:
        """The parent's function over other samples; nothing is evaluated."""
        return self.parent.with_data(batches, ranks=Ranks())

    def draws(self, batch_size: int, *, generator: torch.Generator) -> Iterator[Objective]:
        """Endless mini-batches without replacement within each, fresh for each.

        Args:
            batch_size: B, at most N.
            generator: CPU generator; it advances.
        """
        self._check_size(batch_size)
        while True:
            yield self.objective(torch.randperm(self.size, generator=generator)[:batch_size])

    def epochs(self, batch_size: int, *, generator: torch.Generator) -> Iterator[Objective]:
        """Endless mini-batches as training draws them: every sample once an epoch, in random order, the last short batch left out."""
        self._check_size(batch_size)
        while True:
            if batch_size == self.size:  # every order is the same batch
                yield self._over(self._batches)
                continue
            order = torch.randperm(self.size, generator=generator)
            for i in range(self.size // batch_size):
                yield self.objective(order[i * batch_size : (i + 1) * batch_size])

    def groups(self, batch_size: int, *, generator: torch.Generator, max_groups: int | None = None) -> list[Objective]:
        """Disjoint random groups of ``batch_size`` samples; what is left over is not used."""
        self._check_size(batch_size)
        order = torch.randperm(self.size, generator=generator)
        count = self.size // batch_size if max_groups is None else min(max_groups, self.size // batch_size)
        return [self.objective(order[i * batch_size : (i + 1) * batch_size]) for i in range(count)]

    def _check_size(self, batch_size: int) -> None:
        if not 1 <= whole("batch_size", batch_size, least=None) <= self.size:
            raise ValueError(f"batch_size must lie between 1 and the {self.size} samples of the objective, got {batch_size}")


def _take(batch: Batch, indices: Tensor, length: int) -> Batch:
    return map_tensors(lambda t: t[indices.to(t.device)] if t.ndim > 0 and t.shape[0] == length else t, batch)
