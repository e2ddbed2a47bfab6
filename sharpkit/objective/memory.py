"""How much memory there is, and how much an autograd graph holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_saved_names: dict[type, list[str]] = {}


def available_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device, inf where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "cpu":
        return min(_linux_available(), _cgroup_available())
    return math.inf


def _linux_available() -> float:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return math.inf


def _cgroup_available() -> float:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return math.inf if limit == "max" else float(limit) - float(used)
    except (OSError, ValueError):
        return math.inf


def graph_bytes(outputs: Iterable[Tensor], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct tensors that the autograd graph behind ``outputs`` keeps alive.

    Args:
        outputs: tensors with a ``grad_fn``.
        exclude: tensors that exist anyway (parameters, data).
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    sizes: dict[int, int] = {}
    with _NoRecomputation():  # type: ignore[no-untyped-call]
        for node in graph_nodes(outputs):
            for t in _saved_tensors(node):
                storage = t.untyped_storage()
                if storage.data_ptr() not in known:
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def graph_nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph behind ``outputs``, once."""
    pending: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:  # how a stored one is handed out
            return func(*args, **(kwargs or {}))
        raise _Recomputed


def _saved_tensors(node: Any) -> Iterable[Tensor]:
    kind = type(node)
    if kind not in _saved_names:
        custom = ["saved_tensors"] if hasattr(kind, "saved_tensors") else []
        _saved_names[kind] = [name for name in dir(node) if name.startswith("_saved_")] + custom
    for name in _saved_names[kind]:
        try:
            saved = getattr(node, name)
        except RuntimeError:
            continue
        for value in saved if isinstance(saved, (tuple, list)) else (saved,):
            if isinstance(value, Tensor):
                yield value


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
