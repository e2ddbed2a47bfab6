"""The few collectives that data-parallel measurements need, and nothing when there is one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sharpkit._errors import SharpkitError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that share one objective, each with its own batches.

    Attributes:
        group: the process group, or None for the default one.
        size: number of processes; 1 makes every method a no-op.
        rank: this process, from 0.
    """

    group: Any = None
    size: int = 1
    rank: int = 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_numbers(self, numbers: list[float], *, device: torch.device) -> list[float]:
        """Sum a few Python numbers over the processes, in float64."""
        if self.size == 1:
            return numbers
        # float64: counts of tokens beyond 2^24 would lose their last digits in float32
        return [float(x) for x in self.sum_(torch.tensor(numbers, dtype=torch.float64, device=self._device(device)))]

    def gather(self, item: Any) -> list[Any]:
        """Every process's item, in the order of ranks, on every process."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite with the first process's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=0)  # the group's own rank 0, which need not be the world's
        return tensor

    def agree(self, value: float, *, device: torch.device) -> float:
        """The first process's number, on every process."""
        if self.size == 1:
            return value
        return float(self.broadcast_(torch.tensor([value], dtype=torch.float64, device=self._device(device))))

    def run_together(self, work: Callable[[], T], *, device: torch.device) -> T:
        """Do this process's share; if it fails on one, raise on all. No collectives inside ``work``."""
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as exception:  # KeyboardInterrupt is not caught: whoever presses it stops every process
            error = exception
        self.raise_together(error, device=device)
        return result  # type: ignore[no-any-return]

    def raise_together(self, error: Exception | None, *, device: torch.device) -> None:
        """Raise on every process if one failed, so that none waits for ever in the next collective.

        Raises:
            Exception: this process's own error.
            SharpkitError: another process failed.
        """
        if self.size > 1:
            failed = torch.zeros(self.size, device=self._device(device))  # one entry a process: a sum says who failed
            failed[self.rank] = error is not None
            others = self.sum_(failed).nonzero().flatten().tolist()
            if error is None and others:
                where = ", ".join(map(str, others))
                raise SharpkitError(f"the measurement failed on rank {where}: see the error there; this is rank {self.rank} of {self.size}")
        if error is not None:
            raise error

    def _device(self, device: torch.device) -> torch.device:
        return device if device.type == "cuda" else torch.device("cpu")  # gloo and nccl know no other devices


def find_ranks(process_group: Any = None) -> Ranks:
    """The processes to measure with.

    Args:
        process_group: None takes the default group where torch.distributed is initialised; False measures on this process alone.
    """
    # is_available first: a build without distributed has no is_initialized
    if process_group is False or not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    size = dist.get_world_size(process_group)
    if size < 1:  # torch says -1 to a process outside the group
        raise ValueError("this process is not a member of process_group; measure on its members only, or pass process_group=False")
    return Ranks(process_group, size, dist.get_rank(process_group)) if size > 1 else Ranks()
