"""The few collectives that data-parallel measurements need, checked so that processes that disagree all say so; nothing for one process.

Every collective begins with, or is, one exchange of a few numbers that says at which place of the program each process is. Processes at
different places so meet in an exchange all the same, see it, and raise the same error, where mixed collectives would hang, or add up
numbers that do not belong together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sharpkit._arguments import shown
from sharpkit._errors import SharpkitError

T = TypeVar("T")

# Where a process can be; the exchange carries the index, by definition its place in _PLACES.
_BEGIN, _END, _SUM, _DECISION, _DOT, _OBJECTS, _BLOCK = range(7)
_PLACES = (
    "the start of an evaluation",
    "the end of an evaluation",
    "a sum of numbers",
    "a decision",
    "an inner product",
    "a new call",
    "a block of sharded parameters",
)
_ROOM = 7  # numbers beside the place in one exchange, by judgement: the usual sums and inner products fit
# How long the first waits for the last where all should come at once, by judgement: a process that saves a checkpoint before it measures
# comes in time, one that ended or went elsewhere is noticed before the group's own limit of half an hour. A large checkpoint takes longer:
# the environment variable replaces it.
_PATIENCE = timedelta(seconds=25)
_PATIENCE_VARIABLE = "SHARPKIT_RANK_TIMEOUT"
_SCATTERS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # from where on gloo can reduce_scatter


class Service(Protocol):
    """What a process does for others while it has nothing to do itself: it holds shards of what they need.

    Attributes:
        open: whether all processes are within one evaluation, so that they serve each other.
        over: whether it has been ended on all of them, by an error on one.
    """

    open: bool
    over: bool

    def serve(self, kind: int, block: int) -> None:
        """Take part in a request of another process, a collective."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share one objective, each with its own batches.

    Attributes:
        group: the process group, or None for the default one.
        size: number of processes; 1 makes every method a no-op.
        rank: this process, from 0.
        needs_cuda: the group takes no tensors on the CPU (NCCL); then nobody waits with a limit but the group's own.
        patience: how long this process waits for the others where all should come at once.
        service: of sharded parameters, what this process does for others within :meth:`run_together`.
    """

    group: Any = None
    size: int = 1
    rank: int = 0
    needs_cuda: bool = False
    patience: timedelta = _PATIENCE
    service: Service | None = None

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; to follow :meth:`run_together`, which has made sure that all are here."""
        if self.size > 1:
            with self._connected():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_numbers(self, numbers: list[float], *, device: torch.device) -> list[float]:
        """Sum a few Python numbers over the processes, in float64: counts of tokens beyond 2^24 lose their last digits in float32."""
        if self.size == 1:
            return numbers
        rows = self._exchange(_SUM, numbers, device=device)
        return [sum(column) for column in zip(*rows, strict=True)]

    def gather(self, item: Any) -> list[Any]:
        """Every process's item, in the order of ranks, on every process."""
        if self.size == 1:
            return [item]
        self._exchange(_OBJECTS, device=torch.device("cuda" if self.needs_cuda else "cpu"))
        items: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(items, item, group=self.group)
        return items

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite with the first process's values, in place."""
        if self.size == 1:
            return tensor
        if not tensor.is_cuda:  # a check would wait for the GPU, once an inner product
            first = self._exchange(_DOT, tensor.flatten().tolist() if tensor.numel() <= _ROOM else (), device=tensor.device)[0]
            if tensor.numel() <= _ROOM:
                return tensor.copy_(torch.tensor(first, dtype=torch.float64).view_as(tensor))
        with self._connected():
            dist.broadcast(tensor, group=self.group, group_src=0)  # the group's own rank 0, which need not be the world's
        return tensor

    def agree(self, value: float, *, device: torch.device) -> float:
        """The first process's number, on every process."""
        return value if self.size == 1 else self._exchange(_DECISION, [value], device=device)[0][0]

    def run_together(self, work: Callable[[], T], *, device: torch.device) -> T:
        """Do this process's share; if it fails on one, raise on all. No collectives inside ``work`` but those of :meth:`request`."""
        if self.size > 1 and not self.needs_cuda:
            self._exchange(_BEGIN, device=device)  # all come at once, while the shares below may take very different times
        if self.service is not None:
            self.service.open, self.service.over = True, False
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as exception:  # KeyboardInterrupt is not caught: whoever presses it stops every process
            error = exception
        try:
            if error is not None and self.service is not None and self.service.over:  # all have been told
                raise error
            self.raise_together(error, device=device)
        finally:
            if self.service is not None:
                self.service.open = False
        return result  # type: ignore[no-any-return]

    def request(self, service: Service, kind: int, block: int, *, device: torch.device) -> None:
        """Return once all processes are about to take part in what this one needs of a block; until then serve what others need first.

        Within the work of :meth:`run_together`, where processes may need different things, in different order, or nothing any more.

        Raises:
            SharpkitError: the evaluation failed on another process.
        """
        while self.size > 1 and (wanted := self._wanted(service, _BLOCK, [kind, block], device=device)) != (kind, block):
            assert wanted is not None
            service.serve(*wanted)

    def _wanted(self, service: Service, place: int, numbers: Sequence[float], *, device: torch.device) -> tuple[int, int] | None:
        """(kind, block) of the first process that needs one, None where all have ended; a failure anywhere ends it for all."""
        try:
            table = self._table(place, numbers, device=device)
            self._check_places(table, allowed=(_BLOCK, _END))
            failed = [rank for rank, (at, flag, *_) in enumerate(table) if at == _END and flag]
            wanted = next(((int(kind), int(block)) for at, kind, block, *_ in table if at == _BLOCK), None)
            if failed and wanted is not None:
                raise self._error(f"the measurement failed on rank {', '.join(map(str, failed))}: see the error there")
            return wanted
        except SharpkitError:
            service.over = True
            raise

    def all_parts(self, part: Tensor) -> list[Tensor]:
        """Every process's tensor of one shape, in the order of ranks; to follow :meth:`request`."""
        if self.size == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with self._connected():
            dist.all_gather(parts, part, group=self.group)
        return parts

    def sum_of_part(self, parts: Tensor) -> Tensor:
        """This process's row of the sum over processes of (size, m) tensors; to follow :meth:`request`."""
        if self.size == 1:
            return parts[0]
        with self._connected():
            if _SCATTERS:
                row = torch.empty_like(parts[0])
                dist.reduce_scatter_tensor(row, parts.flatten(), group=self.group)
                return row
            dist.all_reduce(parts, group=self.group)
        return parts[self.rank]

    def sum_small(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a few numbers each, in float64, bit for bit the same on all of them."""
        if self.size == 1:
            return tensor
        wide = tensor.detach().double().flatten()
        if not tensor.is_cuda:  # a check would wait for the GPU, once an inner product
            rows = self._exchange(_DOT, wide.tolist() if len(wide) <= _ROOM else (), device=tensor.device)
            if len(wide) <= _ROOM:
                wide = torch.tensor(rows, dtype=torch.float64)[:, : len(wide)].sum(dim=0)
                return wide.view_as(tensor).to(tensor.dtype)
        with self._connected():
            dist.all_reduce(wide, group=self.group)
        return wide.view_as(tensor).to(tensor.dtype)

    def raise_together(self, error: Exception | None, *, device: torch.device) -> None:
        """Raise on every process if one failed, so that none waits for ever in the next collective.

        Raises:
            Exception: this process's own error.
            SharpkitError: another process failed.
        """
        if self.size > 1:
            try:
                while (service := self.service) and (wanted := self._wanted(service, _END, [float(error is not None)], device=device)):
                    service.serve(*wanted)
            except SharpkitError as theirs:
                raise (error or theirs) from None
            failed = self._exchange(_END, [float(error is not None)], device=device)
            others = [rank for rank, (flag,) in enumerate(failed) if flag]
            if error is None and others:
                raise self._error(f"the measurement failed on rank {', '.join(map(str, others))}: see the error there")
        if error is not None:
            raise error

    def check_alike(self, call: str, settings: Mapping[str, Any]) -> None:
        """Raise on every process unless all make the same call; to be made before the arguments are checked, which may fail on one alone.

        Args:
            call: the function's name.
            settings: its arguments.

        Raises:
            SharpkitError: the processes make other calls, or with other arguments.
        """
        if self.size == 1:
            return
        mine = {key: _shown(value) for key, value in settings.items()}
        (first, ours), *others = self.gather((call, mine))
        for rank, (name, theirs) in enumerate(others, start=1):
            if name != first:
                raise self._error(f"the processes make different calls: rank 0 {first}, rank {rank} {name}; make the same ones on all")
            if differing := [key for key in ours if theirs.get(key) != ours[key]]:
                said = "; ".join(f"{key} is {ours[key]} on rank 0 and {theirs.get(key)} on rank {rank}" for key in differing)
                raise self._error(f"the processes call {first} with different arguments: {said}. Pass the same on all")

    def _exchange(self, place: int, numbers: Sequence[float] = (), *, device: torch.device) -> list[list[float]]:
        """Every process's numbers, in the order of ranks.

        Raises:
            SharpkitError: the processes are at different places, or one of them did not come.
        """
        table = self._table(place, numbers, device=device)
        self._check_places(table, allowed=(place,))
        return [each[1 : len(numbers) + 1] for each in table]

    def _check_places(self, table: list[list[float]], *, allowed: Sequence[int]) -> None:
        places = [int(each[0]) for each in table]
        if any(at not in allowed for at in places):
            said = ", ".join(f"rank {rank} at {_PLACES[at]}" for rank, at in enumerate(places))
            raise self._error(f"the processes do different things: {said}. Make the same calls with the same arguments on all of them")

    def _table(self, place: int, numbers: Sequence[float], *, device: torch.device) -> list[list[float]]:
        """The place and the numbers of every process."""
        if self.needs_cuda and device.type != "cuda":
            way = "move it there, or pass a gloo group as process_group="
            raise self._error(
                f"the processes are joined by NCCL, which sends from GPUs alone, but the model is on the {device.type}: {way}"
            )
        row = torch.zeros(1 + max(_ROOM, len(numbers)), dtype=torch.float64, device=device if self.needs_cuda else "cpu")
        row[: len(numbers) + 1] = torch.tensor([place, *numbers], dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        with self._connected(place):
            waiting = dist.all_gather(rows, row, group=self.group, async_op=True)
            # at the end of a share the slowest may take as long as it takes
            limited = not self.needs_cuda and place not in (_END, _BLOCK)
            waiting.wait(self.patience) if limited else waiting.wait()
        table: list[list[float]] = torch.stack(rows).tolist()
        return table

    @contextmanager
    def _connected(self, place: int = _END) -> Iterator[None]:
        """Say in our words that another process ended or did not come."""
        try:
            yield
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                seconds = f"{self.patience.total_seconds():g} s"
                what = (
                    f"a process did not come to {_PLACES[place]} within {seconds}: it raised an error, ended, makes other calls, or was "
                    "busy for longer. Let all wait for one that saves a checkpoint by torch.distributed.barrier() before they measure, or "
                    f"set the environment variable {_PATIENCE_VARIABLE} to more seconds"
                )
            else:
                what = f"the connection to another process was lost, as when it is killed ({str(error).splitlines()[0][:200]})"
            raise self._error(what) from error

    def _error(self, what: str) -> SharpkitError:
        return SharpkitError(f"{what}; this is rank {self.rank} of {self.size}")


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:200]


def find_ranks(process_group: Any = None) -> Ranks:
    """The processes to measure with.

    Args:
        process_group: None takes the default group where torch.distributed is initialised; False measures on this process alone.

    Raises:
        ValueError: this process is no member of the group, or SHARPKIT_RANK_TIMEOUT is no positive number of seconds.
    """
    # is_available first: a build without distributed has no is_initialized
    if process_group is False:
        return Ranks()
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError(
                f"process_group was given, {shown(process_group)}, but torch.distributed is not initialised: pass None or False"
            )
        return Ranks()
    size = dist.get_world_size(process_group)
    if size < 1:  # torch says -1 to a process outside the group
        raise ValueError("this process is not a member of process_group; measure on its members only, or pass process_group=False")
    backend = str(dist.get_backend(process_group))
    return Ranks(process_group, size, dist.get_rank(process_group), backend == "nccl", _patience()) if size > 1 else Ranks()


def _patience() -> timedelta:
    given = os.environ.get(_PATIENCE_VARIABLE)
    if given is None:
        return _PATIENCE
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:  # by judgement, eleven days: far beyond that timedelta overflows
        raise ValueError(f"the environment variable {_PATIENCE_VARIABLE} must be a positive number of seconds, got {given!r}")
    return timedelta(seconds=seconds)
