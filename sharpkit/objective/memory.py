"""How much memory there is, how much of it a call may take, and how much an autograd graph holds."""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkit._arguments import real

P = ParamSpec("P")
R = TypeVar("R")

# Where the kernel keeps the limits of control groups, by the controllers of a line in /proc/self/cgroup ("" for version 2): folder, limit,
# usage, and the line of memory.stat that counts file pages, which are given up before an allocation fails.
_CGROUPS = {
    "": (Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")),
    "memory": (Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
}
_Group = tuple[Path, tuple[str, str, str]]  # folder, and the three names
_saved_names: dict[type, list[str]] = {}  # attributes of each kind of graph node that hold tensors, since dir() is slow


# -- how much there is ------------------------------------------------------------------------------------------------------
def available_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device, inf if the system does not tell.

    On a CPU, the least of what the machine has and what the process's control group and those around it leave (containers, batch systems):
    whoever exceeds the latter is killed, whatever the machine has. What has been promised does not count, and a :func:`limited` call may
    not take more than its limit.
    """
    free, limits = _free(device), [limit for limit in _limits.get() if _same(limit.device, device)]
    if limits:
        _give_back(device)
        used = used_memory(device)  # it may have fallen since: what others have given back is not the call's to take
        free = min(free, *(min(limit.nbytes, limit.ceiling - used) for limit in limits))
    with _promising:
        return max(0.0, free - sum(promise.nbytes for promise in _promises if _same(promise.device, device)))


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch has reserved and not handed out is free to it, though not to others
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "cpu":
        return min([_machine_available(), *map(_group_available, _control_groups())])
    return math.inf


def _give_back(device: torch.device) -> None:
    """Ask the C library for what it has kept of freed tensors below 32 MB, which would count as used."""
    if device.type == "cpu" and (trim := getattr(ctypes.CDLL(None) if os.name == "posix" else None, "malloc_trim", None)) is not None:
        trim(0)  # of glibc


def used_memory(device: torch.device) -> float:
    """Bytes that this process holds on a device: tensors on a GPU; on a CPU all but what files hold, 0 if the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    if device.type == "cpu" and len(pages := _text(Path("/proc/self/statm")).split()) > 2:
        return (float(pages[1]) - float(pages[2])) * os.sysconf("SC_PAGE_SIZE")  # resident, less what is shared or of a file
    return 0.0


# -- how much of it a call may take -------------------------------------------------------------------------------------------
class _Limit(NamedTuple):
    device: torch.device
    nbytes: float
    ceiling: float  # of what the process may hold


_limits: ContextVar[tuple[_Limit, ...]] = ContextVar("limits", default=())


class Promise:
    """Memory that is going to be taken: others may not count on it. It ends with its owner.

    Attributes:
        device: where.
        nbytes: what is still to be taken; to be lowered as that happens.
    """

    def __init__(self, device: torch.device, nbytes: float) -> None:
        self.device, self.nbytes = device, nbytes
        with _promising:
            _promises.add(self)


_promises: weakref.WeakSet[Promise] = weakref.WeakSet()
_promising = threading.RLock()  # a set may not grow while it is gone through; one thread may come back to it, in the garbage collector


@contextmanager
def limited(limit: float | None, device: torch.device) -> Iterator[None]:
    """While it lasts, no more than ``limit`` bytes of a device are available beyond what the process holds now; None changes nothing."""
    if limit is None:
        yield
        return
    token = _limits.set((*_limits.get(), _Limit(device, limit, used_memory(device) + limit)))
    try:
        yield
    finally:
        _limits.reset(token)


def is_limited(device: torch.device) -> bool:
    """Whether somebody has said how much memory may be taken."""
    return any(_same(limit.device, device) for limit in _limits.get())


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one: "cuda" is the GPU in use."""
    return one.type == other.type and (one.type != "cuda" or _index(one) == _index(other))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def keeps_memory_limit(function: Callable[P, R]) -> Callable[P, R]:
    """A function with an argument ``memory_limit``, in bytes, kept on the device of its first argument while it runs."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def keeping(*args: P.args, **kwargs: P.kwargs) -> R:
        limit: Any = kwargs.get("memory_limit")
        if limit is None:
            return function(*args, **kwargs)
        subject = next(iter(signature.bind(*args, **kwargs).arguments.values()))
        limit = real("memory_limit", limit, above=0, infinite=True, hint="it is in bytes")
        with limited(limit, torch.device(getattr(subject, "device", None) or "cpu")):
            return function(*args, **kwargs)

    return keeping


# -- what the system says -------------------------------------------------------------------------------------------------------
def _machine_available() -> float:
    available = _entries(Path("/proc/meminfo")).get("MemAvailable:")
    return math.inf if available is None else available * 1024


def _control_groups() -> Iterator[_Group]:
    """The memory group of this process and all groups around it."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in _CGROUPS:
                root, names = _CGROUPS[controller]
                # In a container the path may be that of the host, which is not there; then the root is the container's own group.
                own = PurePosixPath(path.lstrip("/"))
                yield from ((root / each, names) for each in (own, *own.parents))


def _group_available(group: _Group) -> float:
    folder, (limit, usage, reclaimable) = group
    try:
        free = float(_text(folder / limit)) - float(_text(folder / usage))
    except ValueError:  # no such file, or "max"
        return math.inf
    return max(0.0, free + _entries(folder / "memory.stat").get(reclaimable, 0.0))


def _entries(file: Path) -> dict[str, float]:
    """Lines of a name and a number."""
    return {words[0]: float(words[1]) for line in _text(file).splitlines() if len(words := line.split()) > 1 and words[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def human_bytes(number: float) -> str:
    """``"1.5 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


# -- how much a graph holds ---------------------------------------------------------------------------------------------------
class GraphCost(NamedTuple):
    """What a kept graph costs.

    Attributes:
        nbytes: of the distinct tensors that it keeps alive.
        closed: whether a backward pass runs torch's own operations alone: no custom function, nothing recomputed or brought back by hooks.
    """

    nbytes: int
    closed: bool


def graph_cost(outputs: Iterable[Tensor], *, exclude: Iterable[Tensor] = (), beside: Iterable[Tensor] = ()) -> GraphCost:
    """What the autograd graph behind ``outputs`` costs.

    Args:
        outputs: tensors with a ``grad_fn``.
        exclude: tensors that exist anyway (parameters, data).
        beside: further tensors that are kept with it.
    """
    # by storage: views share one, and the same tensor may be saved by many nodes
    known = {t.untyped_storage().data_ptr() for t in exclude}
    sizes: dict[int, int] = {}
    closed = True

    def add(t: Tensor) -> None:
        if t.layout == torch.strided and (storage := t.untyped_storage()).data_ptr() not in known:  # sparse ones have none
            sizes[storage.data_ptr()] = storage.nbytes()

    for kept in beside:
        add(kept)
    with _NoRecomputation():  # type: ignore[no-untyped-call]
        for node in graph_nodes(outputs):
            closed = closed and not hasattr(node, "_forward_cls")
            for t in _saved_tensors(node):
                if t is None:
                    closed = False
                else:
                    add(t)
    return GraphCost(sum(sizes.values()), closed)


def graph_nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph behind ``outputs``, once."""
    pending: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]  # no recursion: graphs are deeper than Python's stack
    visited: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        pending.extend(parent for parent, _ in node.next_functions)
        yield node


class _Recomputed(RuntimeError):
    """A saved tensor turned out not to be stored but computed on demand."""


class _NoRecomputation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reading a stored tensor runs no operation; reading a checkpointed or offloaded one would run a forward pass or a copy: stop it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, torch would import torch._dynamo, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:  # how a stored one is handed out
            return func(*args, **(kwargs or {}))
        raise _Recomputed


def _saved_tensors(node: Any) -> Iterable[Tensor | None]:
    """The tensors that a node has saved; None for one that is recomputed."""
    kind = type(node)
    if kind not in _saved_names:
        custom = ["saved_tensors"] if hasattr(kind, "saved_tensors") else []
        _saved_names[kind] = [name for name in dir(node) if name.startswith("_saved_")] + custom
    for name in _saved_names[kind]:
        try:
            saved = getattr(node, name)
        except _Recomputed:
            yield None
            continue
        except RuntimeError:  # freed already
            continue
        for value in saved if isinstance(saved, (tuple, list)) else (saved,):
            if isinstance(value, Tensor):
                yield value
