"""Finished steps of a long call, kept in a folder: the same call goes on after the last of them and computes none of them again.

A long call is deterministic but for a few things: products with a matrix, training runs, and decisions by clock or free memory. Each of
these is a *step*: :func:`step` computes it, or hands out its kept value. Everything between steps is computed again, from the same values,
so that a call that was killed takes the same course to the same bits. Steps nest; when an outer one is done, those inside it are dropped.

On disk a step is an entry of a NumPy archive (``.npz``, read without pickle; its check sums tell damage), written aside, synchronised and
renamed. NumPy is needed anyway, and PyTorch's own format would have pickle inside. A step that costs less than writing it is left out, and
computed again. Of several processes the first one writes and reads, and sends what it has read to the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import logging
import math
import os
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_path
from sharpkit._errors import DocumentError, SharpkitWarning

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Key = tuple[int, ...]  # the numbers of a step and of those around it

_VERSION = 1  # of the folder, by definition: another number for files that this version does not read
_HEAD, _LOCK, _FILE = "checkpoint.json", "lock", "steps-{:06d}.npz"
_SHARE = 0.05  # of the time of a call may go into writing: by judgement, what nobody notices
_LATENCY, _PER_BYTE = 0.01, 1 / 200e6  # seconds of a write and of a byte before one was timed: by judgement, a slow disk
_SMALL = 2**20  # bytes from which on a write tells the disk's speed, below its latency: by judgement
_WORTH = 2e-4  # seconds of a product from which on it is kept: by judgement, twice what keeping takes beside writing
_WAITING, _WAITING_SHARE = 2**26, 0.05  # bytes of steps that may wait in memory to be written together, and of what is free: by judgement
# A loss or product is known again to within a thousand roundings: by judgement, what another number of processes or another device leaves
# of one, and far below what a step of training changes; in half precision a twentieth, where check sums of the parameters tell more.
_KNOWN_AGAIN, _KNOWN_IN_HALF = 1e3, 0.05
_LOOKED_AT = 64  # entries of a vector by which it is known again: by judgement
_ALIKE = 16.0  # roundings by which they may differ where another number of processes has computed them: by judgement


class Processes(Protocol):
    """What is asked of the processes that make a call together."""

    @property
    def size(self) -> int: ...
    @property
    def rank(self) -> int: ...
    def agree(self, value: float, *, device: torch.device) -> float: ...
    def broadcast_(self, tensor: Tensor) -> Tensor: ...
    def gather(self, item: Any) -> list[Any]: ...
    def run_together(self, work: Callable[[], T], *, device: torch.device) -> T: ...


class Subject(NamedTuple):
    """What a call is about.

    Attributes:
        texts: what has to be the same for the numbers to be, in words by name.
        numbers: the same, up to rounding.
        rounding: of the numbers, relative to the largest.
        processes: that make the call together; None for one.
        device: of the vectors.
        free: bytes of host memory that the call may take.
    """

    texts: Mapping[str, str]
    numbers: Mapping[str, list[float]]
    rounding: float
    processes: Processes | None
    device: torch.device
    free: float = math.inf


class Counted(Protocol):
    """An operator, as far as its products are kept."""

    num_matvecs: int
    rounding: float

    def skip(self, columns: int) -> None: ...
    def way(self) -> dict[str, Any]: ...
    def take_way(self, way: Mapping[str, Any]) -> None: ...


class _Entry(NamedTuple):
    name: str
    seconds: float
    tree: Any  # the value, its tensors by number
    arrays: list[Any]  # those tensors, or the names of the members that hold them


class _Waiting(NamedTuple):
    entry: _Entry
    nbytes: int


_current: ContextVar[Checkpoint | None] = ContextVar("checkpoint", default=None)
_replayed: ContextVar[float] = ContextVar("replayed", default=0.0)


# -- what algorithms call --------------------------------------------------------------------------------------------
def step(name: str, compute: Callable[[], T], *, whole: bool = False) -> T:
    """What ``compute`` returns, or has returned in a call that was ended before.

    Args:
        name: of the step, with all that it depends on besides what came before.
        compute: what it does; its value is made of numbers, texts, tensors, arrays, tuples, lists, dicts and dataclasses of this package.
        whole: whether nothing inside is a step of its own, since it could not go on from there.
    """
    checkpoint = _current.get()
    return compute() if checkpoint is None else checkpoint.step(name, compute, whole=whole)


def counted_step(operator: Counted, name: str, compute: Callable[[], T], *, whole: bool = False) -> T:
    """The same, with products of an operator inside, which count although they were made before."""
    if _current.get() is None:
        return compute()
    before = operator.num_matvecs
    value, made = step(name, lambda: (compute(), operator.num_matvecs - before), whole=whole)
    if missing := before + made - operator.num_matvecs:
        operator.num_matvecs += missing
        operator.skip(missing)
    return value


def product_step(operator: Counted, vectors: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """The product that ``compute`` makes of (n,) or (n, k) vectors, as a step."""
    checkpoint = _current.get()
    return compute() if checkpoint is None else checkpoint.product(operator, vectors, compute)


def keeps_steps() -> bool:
    """Whether there is a checkpoint that keeps steps."""
    return _current.get() is not None


@contextlib.contextmanager
def without_steps() -> Iterator[None]:
    """Inside, nothing is kept: for what belongs to the user, as a callback does."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def clock() -> float:
    """Seconds, of which only differences mean something; with those that steps had taken which were not computed again."""
    return time.perf_counter() + _replayed.get()


def resumable(describe: Callable[..., tuple[Any, Subject]]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function with an argument ``checkpoint``, the path of a folder: killed and called again, it goes on where it was.

    Args:
        describe: what the call is about, from its first argument and all arguments by name; with that argument as it is passed on.
    """

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        signature, name = inspect.signature(function), function.__name__

        @functools.wraps(function)
        def resuming(*args: P.args, **kwargs: P.kwargs) -> T:
            folder: Any = kwargs.get("checkpoint")
            if folder is None and _current.get() is None:
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            if folder is None:  # inside a call that has one, it is a step of that
                return _step_about(next(iter(bound.arguments.values())), name, lambda: function(*args, **kwargs))
            where = Path(as_path("checkpoint", folder))
            (first, subject), *rest = bound.arguments.items()
            bound.arguments[first], about = describe(name, subject, dict(rest))
            said = {key: in_words(value) for key, value in rest if key not in _FREE}
            with _opened(where, name, said, about):
                return _step_about(bound.arguments[first], name, lambda: function(*bound.args, **bound.kwargs))

        return resuming

    return wrap


def _step_about(subject: Any, name: str, compute: Callable[[], T]) -> T:
    return counted_step(subject, name, compute) if hasattr(subject, "num_matvecs") else step(name, compute)


_FREE = ("checkpoint", "callback", "name", "memory_limit", "offload", "store")  # arguments that change no number


def in_words(value: Any) -> str:
    """An argument in words that another process would use too."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} with the check sum {checksum([value])}"
    if isinstance(value, torch.optim.Optimizer):
        held = value.state_dict()
        tensors = [t for state in held.pop("state").values() for t in state.values() if isinstance(t, Tensor)]
        groups = [{key: in_words(item) for key, item in group.items()} for groups in held.values() for group in groups]
        return f"{type(value).__name__} {groups!r}" + (f" with the check sum {checksum(tensors)}" if tensors else "")
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return repr(value) if _is_plain(value) else type(value).__qualname__


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (type(None), bool, int, float, str, range))


def known_again(rounding: float) -> float:
    """What a number that identifies a subject may be off by, relative: its rounding is given."""
    return min(_KNOWN_AGAIN * rounding, _KNOWN_IN_HALF)


def checksum(tensors: Any) -> str:
    """Of the bytes of tensors, in order."""
    total = 0
    for t in tensors:
        plain = (t.detach() if t.layout is torch.strided else t.detach().to_dense()).cpu().contiguous()
        total = zlib.crc32(f"{tuple(plain.shape)}{plain.dtype}".encode(), total)
        total = zlib.crc32(plain.reshape(-1).view(torch.uint8).numpy(), total) if plain.numel() else total
    return f"{total:08x}"


# -- the folder ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _opened(folder: Path, call: str, arguments: Mapping[str, str], subject: Subject) -> Iterator[Checkpoint]:
    ranks = subject.processes
    alone = ranks is None or ranks.size == 1

    def begin() -> _Folder | None:
        return _Folder(folder, call, arguments, subject) if ranks is None or ranks.rank == 0 else None

    kept = begin() if alone or ranks is None else ranks.run_together(begin, device=subject.device)
    checkpoint = Checkpoint(kept, None if alone else ranks, subject.device)
    token, replayed = _current.set(checkpoint), _replayed.set(0.0)
    try:
        yield checkpoint
    finally:
        _replayed.reset(replayed)
        _current.reset(token)
        if kept is not None:
            kept.close()


class _Folder:
    """Entries by key: those on disk, and those that wait to be written.

    Args:
        path: of the folder, which is made where there is none.
        call, arguments, subject: what it belongs to.

    Raises:
        DocumentError: it holds another call, or the same on other parameters or data; or it is damaged, or in use.
    """

    def __init__(self, path: Path, call: str, arguments: Mapping[str, str], subject: Subject) -> None:
        self.path, self.index = path, dict[Key, tuple[str, _Entry]]()  # file and entry
        self._number, self._waiting, self._bytes, self._broken = 0, dict[Key, _Waiting](), 0, False
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"checkpoint must be the path of a folder, but {str(path)!r} is a file") from error
        self._most_waiting = min(_WAITING, _WAITING_SHARE * subject.free)
        self._lock = _locked(path)
        try:
            self._open(call, arguments, subject)
        except BaseException:
            self._unlock()
            raise
        self._began, self._spent, self._latency, self._per_byte = time.perf_counter(), 0.0, _LATENCY, _PER_BYTE

    def _open(self, call: str, arguments: Mapping[str, str], subject: Subject) -> None:
        names = {name for name in os.listdir(self.path) if not name.endswith(".tmp")} - {_LOCK}
        if _HEAD not in names:
            if names:
                raise DocumentError(
                    f"checkpoint={str(self.path)!r} holds other things ({min(names)!r}): give an empty folder, or a new name"
                )
            head = {"kind": "sharpkit checkpoint", "version": _VERSION, "call": call, "arguments": dict(arguments)}
            _write(self.path / _HEAD, json.dumps({**head, "texts": dict(subject.texts), "numbers": dict(subject.numbers)}).encode())
        else:
            self._check(call, arguments, subject)
        for name in sorted(names - {_HEAD}):
            self._read_index(name)
        inside = [key for key in self.index if any(key[:i] in self.index for i in range(1, len(key)))]
        self._drop(inside)  # killed between writing the outer one and dropping these

    def _check(self, call: str, arguments: Mapping[str, str], subject: Subject) -> None:
        try:
            head = json.loads((self.path / _HEAD).read_text(encoding="utf-8"))
            kind, version = head["kind"], head["version"]
            then, before, texts, numbers = head["call"], head["arguments"], head["texts"], head["numbers"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(_HEAD, error) from error
        mine = f"checkpoint={str(self.path)!r}"
        if kind != "sharpkit checkpoint" or version != _VERSION:
            raise DocumentError(
                f"{mine} is of version {version}, this is {_VERSION}: finish it with the sharpkit that began it, or begin anew"
            )
        if then != call:
            raise DocumentError(f"{mine} holds a call of {then}, this one is of {call}: give each call a folder of its own")
        if differing := [key for key in {**before, **arguments} if before.get(key) != arguments.get(key)]:
            said = "; ".join(f"{key} was {before.get(key)} and is {arguments.get(key)}" for key in differing)
            raise DocumentError(f"{mine} was begun with other arguments: {said}. Make the same call, or give another folder")
        if differing := [key for key in {**texts, **subject.texts} if texts.get(key) != subject.texts.get(key)]:
            said = "; ".join(f"{key}: {texts.get(key)} then, {subject.texts.get(key)} now" for key in differing)
            raise DocumentError(f"{mine} was begun on another model, at other parameters or on other data ({said}). {_REMEDY}")
        for key, now in subject.numbers.items():
            was = numbers.get(key, [])
            scale = max((abs(x) for x in (*was, *now) if math.isfinite(x)), default=0.0)
            if len(was) != len(now) or any(
                not (a == b or abs(a - b) <= subject.rounding * scale or (math.isnan(a) and math.isnan(b)))
                for a, b in zip(was, now, strict=True)
            ):
                raise DocumentError(f"{mine} was begun with {key} {was}, which now is {now}: model, data or loss differ. {_REMEDY}")

    def _damaged(self, name: str, error: Exception) -> DocumentError:
        return DocumentError(
            f"the file {name!r} of checkpoint={str(self.path)!r} is damaged, or none of a checkpoint "
            f"({type(error).__name__}: {str(error)[:200]}): delete the folder and begin anew"
        )

    # -- reading ------------------------------------------------------------------------------------------------------
    def _read_index(self, name: str) -> None:
        try:
            number = int(name.removeprefix("steps-").removesuffix(".npz"))
            with np.load(self.path / name, allow_pickle=False) as archive:
                entries = json.loads(archive["entries"].tobytes())
            for key, *entry in entries:
                self.index[tuple(key)] = (name, _Entry(*entry))
        except _UNREADABLE as error:
            raise self._damaged(name, error) from error
        self._number = max(self._number, number + 1)

    def read(self, key: Key, device: torch.device) -> Any:
        """The value of an entry on disk."""
        name, entry = self.index[key]
        try:
            with np.load(self.path / name, allow_pickle=False) as archive:
                return _decoded(entry.tree, [archive[member] for member in entry.arrays], device)
        except _UNREADABLE as error:
            raise self._damaged(name, error) from error

    def forget_from(self, key: Key) -> None:
        """Drop all entries from a key on: they belong to another course."""
        self._drop([other for other in self.index if other >= key])

    def _drop(self, keys: list[Key]) -> None:
        names = {self.index.pop(key)[0] for key in keys}
        for name in names - {name for name, _ in self.index.values()}:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path / name)

    # -- writing ------------------------------------------------------------------------------------------------------
    def add(self, key: Key, name: str, seconds: float, value: Any, *, last: bool = False) -> None:
        """Keep an entry: at once where writing has cost little so far, else it waits, or is left out where it is too large for that."""
        arrays: list[Tensor] = []
        try:
            entry = _Entry(name, seconds, _encoded(value, arrays), arrays)
        except TypeError as error:  # it will be computed again
            logger.warning("the step %r of checkpoint=%r is not kept: %s", name, str(self.path), error)
            return
        nbytes = sum(t.numel() * t.element_size() for t in arrays)
        total = nbytes + self._bytes
        now = last or self._may_write(total)
        if not now:
            if total > self._most_waiting:
                return
            arrays[:] = [t.detach().to("cpu", copy=True) for t in arrays]  # the call may go on to change them
        while self._waiting and (other := next(reversed(self._waiting)))[: len(key)] == key:  # those inside came last
            self._bytes -= self._waiting.pop(other).nbytes
        self._waiting[key] = _Waiting(entry, nbytes)
        self._bytes += nbytes
        if now:
            self.flush()

    def _may_write(self, nbytes: int) -> bool:
        expected = self._latency + nbytes * self._per_byte
        return self._spent + expected <= _SHARE * (time.perf_counter() - self._began)

    def flush(self) -> None:
        """Write what waits, and drop from disk what that stands for."""
        if not self._waiting or self._broken:
            return
        began, name = time.perf_counter(), _FILE.format(self._number)
        members: dict[str, Any] = {}
        listed = []
        for key, (entry, _) in self._waiting.items():
            names = [f"a{len(members) + i}" for i in range(len(entry.arrays))]
            members.update(zip(names, map(_as_array, entry.arrays), strict=True))
            listed.append((key, entry._replace(arrays=names)))
        entries = np.frombuffer(json.dumps([(key, *entry) for key, entry in listed]).encode(), dtype=np.uint8)
        try:
            nbytes = _write(self.path / name, lambda file: np.savez(file, entries=entries, **members))
        except OSError as error:
            self._broken = True  # the numbers are worth more than the copy of them
            text = f"checkpoint={str(self.path)!r} cannot be written ({error.strerror or error}): the call goes on without"
            warnings.warn(text, SharpkitWarning, stacklevel=2)
            return
        self._waiting, self._bytes, self._number = {}, 0, self._number + 1
        self._drop([key for key in self.index if any(key[: len(done)] == done for done, _ in listed)])
        self.index.update({key: (name, entry) for key, entry in listed})
        took = time.perf_counter() - began
        self._spent += took
        if nbytes > _SMALL:
            self._per_byte = took / nbytes
        else:
            self._latency = (self._latency + took) / 2  # one write may have to wait for others

    def close(self) -> None:
        """Write what waits; the folder may be opened by others."""
        self.flush()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)


_REMEDY = "Give the model the parameters and the data that it was begun with, or another folder"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, AttributeError, ImportError, zipfile.BadZipFile, zlib.error)


def _locked(path: Path) -> int | None:
    """A file that this process alone holds, until it ends in whatever way; None on systems without such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise DocumentError(f"checkpoint={str(path)!r} is in use by another call: wait until that ends, or give another folder") from error
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


def _write(path: Path, content: bytes | Callable[[Any], None]) -> int:
    """A file that is there whole or not at all, also after a power failure; its bytes."""
    aside = path.with_name(f"{path.name}.tmp")
    with open(aside, "wb") as file:
        file.write(content) if isinstance(content, bytes) else content(file)
        file.flush()
        os.fsync(file.fileno())
        nbytes = os.fstat(file.fileno()).st_size
    os.replace(aside, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return nbytes


# -- the course of a call --------------------------------------------------------------------------------------------
class Checkpoint:
    """The steps of one call, in the order in which they are asked for.

    Args:
        folder: where they are kept; None on all processes but the first.
        processes: that make the call together; None for one.
        device: of the vectors.
    """

    def __init__(self, folder: _Folder | None, processes: Processes | None, device: torch.device) -> None:
        self._folder, self._processes, self._device = folder, processes, device
        self._path: list[int] = [0]  # numbers of the steps under way, and of the next one
        self._replaying = True  # whether entries are left, as far as this process knows
        self._way: dict[str, Any] | None = None  # of the last product that was not computed again

    def step(self, name: str, compute: Callable[[], T], *, whole: bool = False) -> T:
        """See :func:`step`."""
        key = self._next()
        if (kept := self._kept(key, name)) is not None:
            return self._sent(kept[0])  # type: ignore[no-any-return]
        began = clock()
        self._path = [*key, 0]
        try:
            with without_steps() if whole else contextlib.nullcontext():
                value = compute()
        finally:
            self._path = [*key[:-1], key[-1] + 1]
        if self._folder is not None:
            self._folder.add(key, name, clock() - began, value, last=len(key) == 1)
        return value

    def product(self, operator: Counted, vectors: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """See :func:`product_step`."""
        columns = 1 if vectors.ndim == 1 else vectors.shape[1]
        key, name, looked_at = self._next(), f"product of {tuple(vectors.shape)}", _look_at(vectors)
        if (kept := self._kept(key, name, looked_at, operator.rounding)) is not None:
            operator.skip(columns)
            return self._received(kept[0], vectors)
        if self._way is not None:
            ways = self._sent(self._way)["ways"]
            operator.take_way(ways[min(self._processes.rank if self._processes is not None else 0, len(ways) - 1)])
            self._way = None
        began = time.perf_counter()
        with without_steps():
            value = compute()
        seconds = time.perf_counter() - began
        # several at once are made in ways that each process has timed for itself
        ways = [operator.way()] if self._processes is None or columns == 1 else self._processes.gather(operator.way())
        if self._folder is not None and seconds >= _WORTH:
            self._folder.add(key, name, seconds, {"of": looked_at, "product": value, "ways": ways})
        return value

    def _next(self) -> Key:
        key = tuple(self._path)
        self._path[-1] += 1
        return key

    def _kept(self, key: Key, name: str, looked_at: Tensor | None = None, rounding: float = 0.0) -> tuple[Any] | None:
        """The value of a step that is on disk, in a tuple, which holds None on processes without the folder; None where it is not."""
        if not self._replaying:
            return None
        value, status, damage = None, 0.0, None
        if (folder := self._folder) is not None:
            status = 1.0 if any(other >= key for other in folder.index) else 0.0
            if key in folder.index:
                try:
                    value, status = folder.read(key, self._device), 2.0
                except DocumentError as error:
                    damage, status = error, 3.0
                if damage is None and not (folder.index[key][1].name == name and _is_alike(value, looked_at)):
                    # as where rounding on another number of processes has led elsewhere
                    logger.warning("the kept steps belong to another course from %r on: they are computed again", name)
                    folder.forget_from(key)
                    value, status = None, 0.0
        if self._processes is not None:
            status = self._processes.agree(status, device=self._device)
        if damage is not None:
            raise damage
        if status == 3.0:
            raise DocumentError("the checkpoint cannot be read: see the error on rank 0")
        self._replaying = status > 0.0
        if status != 2.0:
            return None
        if folder is not None:
            _replayed.set(_replayed.get() + folder.index[key][1].seconds)
        return (value,)

    def _sent(self, value: Any) -> Any:
        """The first process's value, on all."""
        if self._processes is None:
            return value
        tensors: list[Tensor] = []
        sent = None if self._folder is None else (_encoded(value, tensors), list(map(_as_array, tensors)))
        tree, arrays = self._processes.gather(sent)[0]
        return _decoded(tree, arrays, self._device)

    def _received(self, value: Any, vectors: Tensor) -> Tensor:
        if self._processes is None:
            self._way = {"ways": value["ways"]}
            return value["product"]  # type: ignore[no-any-return]
        turned = self._folder is not None and _is_turned(value["product"])
        about = self._sent({"ways": value["ways"], "turned": turned} if self._folder is not None else None)
        self._way = {"ways": about["ways"]}
        shape = vectors.shape[::-1] if about["turned"] else vectors.shape
        held = torch.empty(shape, dtype=vectors.dtype, device=vectors.device)
        if self._folder is not None:
            held.copy_(value["product"].mT if about["turned"] else value["product"])
        self._processes.broadcast_(held)
        return held.mT if about["turned"] else held


def _look_at(vectors: Tensor) -> Tensor:
    """Some entries of vectors, (m,), by which they are known again."""
    flat = vectors if vectors.ndim == 1 else vectors[:, -1]
    return flat[:: max(1, len(flat) // _LOOKED_AT)].detach().clone()


def _is_alike(value: Any, looked_at: Tensor | None) -> bool:
    """Whether a kept product is that of the present vector, up to its rounding."""
    if looked_at is None:
        return True
    before = value["of"]
    gap, size = float((before - looked_at).abs().max()), float(looked_at.abs().max())
    return gap <= _ALIKE * float(torch.finfo(looked_at.dtype).eps) * size


# -- values as trees of plain things, their tensors apart ------------------------------------------------------------
def _is_turned(t: Tensor) -> bool:
    """Whether a matrix lies in memory by columns: sums over it round by how it lies."""
    return t.ndim == 2 and not t.is_contiguous() and t.mT.is_contiguous()


def _as_array(t: Tensor) -> np.ndarray[Any, Any]:
    plain = (t.mT if _is_turned(t) else t).detach().cpu().contiguous()
    # NumPy has no bfloat16
    return plain.view(torch.int16).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()  # type: ignore[no-any-return]


def _encoded(value: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON has it: dicts with one key stand for what JSON has not."""
    if isinstance(value, (Tensor, np.ndarray)):
        t = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        tensors.append(t)
        where = "array" if not isinstance(value, Tensor) else "cpu" if t.device.type == "cpu" else "device"
        return {"tensor": [len(tensors) - 1, where, _is_turned(t), str(t.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (type(None), bool, int, float, str):
        return value
    if isinstance(value, float) and _is_own(type(value).__module__):  # a number that knows more, such as its interval
        held = {name: _encoded(item, tensors) for name, item in vars(value).items()}
        return {"number": [type(value).__module__, type(value).__qualname__, float(value), held]}
    if isinstance(value, Mapping):
        return {"dict": [[_encoded(key, tensors), _encoded(item, tensors)] for key, item in value.items()]}
    kind = type(value)
    if dataclasses.is_dataclass(value):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        held = value._asdict()
    elif isinstance(value, (tuple, list, set)):
        return {kind.__name__: [_encoded(item, tensors) for item in value]}
    else:
        raise TypeError(f"a {kind.__name__} is no result that can be written")
    if not _is_own(kind.__module__):
        raise TypeError(f"a {kind.__name__} of {kind.__module__} is no result of this package")
    return {"object": [kind.__module__, kind.__qualname__, {name: _encoded(item, tensors) for name, item in held.items()}]}


def _is_own(module: str) -> bool:
    """Whether objects of a module may be made: those of this package alone."""
    return module.partition(".")[0] == __name__.partition(".")[0]


_SEVERAL: dict[str, Callable[[Iterator[Any]], Any]] = {"tuple": tuple, "list": list, "set": set}


def _decoded(tree: Any, arrays: list[Any], device: torch.device) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((what, held),) = tree.items()
    if what == "tensor":
        number, where, turned, dtype, shape = held
        if where == "array":
            return arrays[number].reshape(shape)
        t = torch.from_numpy(np.ascontiguousarray(arrays[number]).reshape(shape[::-1] if turned else shape))
        t = t.view(torch.bfloat16) if dtype == "bfloat16" else t
        t = t.to(device) if where == "device" else t
        return t.mT if turned else t
    if what in _SEVERAL:
        return _SEVERAL[what](_decoded(item, arrays, device) for item in held)
    if what == "dict":
        return {_decoded(key, arrays, device): _decoded(item, arrays, device) for key, item in held}
    module, name, *number, fields = held
    if not _is_own(module):
        raise ValueError(f"an object of {module}")
    kind: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    inside = {key: _decoded(item, arrays, device) for key, item in fields.items()}
    if what == "number" and issubclass(kind, float):
        known = float.__new__(kind, *number)
        vars(known).update(inside)
        return known
    if not (isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"))):
        raise ValueError(f"{name} of {module}, which is no result")
    return kind(**inside)
