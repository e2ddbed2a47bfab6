"""Batches of any nesting: move, measure, slice and compare them; and re-iterable sources of them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from sharpkit._arguments import as_seed
from sharpkit._errors import NonDeterministicError, ObjectiveError
from sharpkit.objective.guard import RandomStates, loader_generators, random_states_kept, seed_everything

Batch = Any

_END = object()
_MOST_BATCHES = 20_000  # of a loader without a length, by judgement: each product goes through all of them
_HOW_TO_FIX = "Pass one batch, a list of batches (list(loader) fixes what was drawn), SeededPasses(loader), or a DataLoader(shuffle=False)"


def map_tensors(function: Callable[[Tensor], Any], batch: Batch, *, other: Callable[[Any], Any] = lambda leaf: leaf) -> Batch:
    """The same nesting with ``function`` applied to every tensor and ``other`` to every other leaf."""
    # by itself, with no function inside: one that calls itself is a cycle, which would keep what ``function`` holds until it is collected
    inside = partial(map_tensors, function, other=other)
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, PackedSequence):  # a named tuple whose fields belong together
        return other(batch)
    if isinstance(batch, Mapping):
        return _like(batch, {key: inside(value) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(inside, batch))
    if isinstance(batch, (tuple, list)):  # after the named tuples, whose constructors take their fields one by one
        return type(batch)(map(inside, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{f.name: inside(getattr(batch, f.name)) for f in dataclasses.fields(batch) if f.init})
    return other(batch)


def _like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """The items in the mapping's own type where that can be copied (a closure may read ``batch.input_ids``), else a dict."""
    if type(mapping) is dict or not isinstance(mapping, (dict, UserDict)):
        return items
    twin = copy.copy(mapping)  # keeps attributes and the class, whatever its constructor takes
    for key, value in items.items():
        twin[key] = value
    return twin


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor in the nesting, in order."""
    tensors: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        tensors.append(t)
        return t  # a data class may refuse anything else in its place

    map_tensors(keep, batch)
    return tensors


def named_tensors(batch: Batch, *, path: str = "") -> dict[str, Tensor]:
    """Every tensor by its path, such as ``"1"`` or ``"inputs.mask"``, in the order of :func:`tensors_of`; those of graph objects, too."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(batch, Tensor):
        return {path: batch}
    if isinstance(batch, PackedSequence):
        return {}
    if isinstance(batch, Mapping):
        items = batch.items()
    elif isinstance(batch, (tuple, list)):
        items = zip(getattr(batch, "_fields", range(len(batch))), batch, strict=True)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        items = [(f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch) if f.init]
    elif hasattr(batch, "to"):  # torch_geometric keeps its tensors in a store of their own
        items = batch.to_dict().items() if hasattr(batch, "to_dict") else getattr(batch, "__dict__", {}).items()
    inside = [named_tensors(value, path=f"{path}.{key}" if path else str(key)) for key, value in items]
    return {name: tensor for tensors in inside for name, tensor in tensors.items()}


def join_batches(batches: Sequence[Batch], lengths: Sequence[int], *, ragged: str = "refuse", padding: Mapping[str, float] = {}) -> Batch:
    """Several batches as one, or None if they cannot be joined: other nesting, other leaves, or tensors of other shapes.

    Args:
        batches: at least one.
        lengths: samples in each.
        ragged: trailing sizes that differ, as sequence lengths do: ``"refuse"``, or ``"crop"`` to the least or ``"pad"`` to the largest.
        padding: value to pad with by the tensor's path, 0 elsewhere.
    """
    columns, rest = [tensors_of(batch) for batch in batches], [_other_leaves(batch) for batch in batches]
    if any(len(c) != len(columns[0]) for c in columns) or any(r != rest[0] for r in rest) or not columns[0]:
        return None
    joined = []
    for name, tensors in zip(named_tensors(batches[0]), zip(*columns, strict=True), strict=True):
        if len({(t.ndim, t.dtype) for t in tensors}) > 1 or any(t.layout is not torch.strided for t in tensors):
            return None
        if all(t.ndim > 0 and len(t) == n for t, n in zip(tensors, lengths, strict=True)):
            sizes = list(zip(*(t.shape[1:] for t in tensors), strict=True))
            if any(len(set(size)) > 1 for size in sizes):
                if ragged == "refuse":
                    return None
                wanted = [min(size) if ragged == "crop" else max(size) for size in sizes]
                tensors = tuple(_fitted(t, wanted, padding.get(name, 0)) for t in tensors)
            joined.append(torch.cat(tensors))
        elif all(t.shape == tensors[0].shape and torch.equal(t, tensors[0]) for t in tensors):  # shared by all samples
            joined.append(tensors[0])
        else:
            return None
    columns_left = iter(joined)
    return map_tensors(lambda _: next(columns_left), batches[0])


def _fitted(t: Tensor, sizes: Sequence[int], value: float) -> Tensor:
    """A tensor with its trailing sizes cut or padded at the end."""
    new = t.new_full((len(t), *sizes), value)
    common = (slice(None), *(slice(min(a, b)) for a, b in zip(t.shape[1:], sizes, strict=True)))
    new[common] = t[common]
    return new


def _other_leaves(batch: Batch) -> list[Any]:
    leaves: list[Any] = []

    def keep(leaf: Any) -> Any:
        leaves.append(leaf if isinstance(leaf, (str, bytes, int, float)) else id(leaf))  # other objects count as equal where they are one
        return leaf

    map_tensors(lambda t: t, batch, other=keep)
    return leaves


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; objects with their own ``.to(device)`` (packed sequences, graphs) are asked to move."""

    def move(t: Tensor) -> Tensor:
        moved = t.to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() else moved  # made under inference_mode, it cannot be saved for a backward pass

    return map_tensors(move, batch, other=lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf)


def moved_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Each batch on a device; on a GPU the next one is on its way (if its memory is pinned) while one is worked on."""
    if device.type == "cpu":
        yield from (to_device(batch, device) for batch in batches)
        return
    waiting: Any = _END
    for batch in batches:
        moving = to_device(batch, device)
        if waiting is not _END:
            yield waiting
        waiting = moving
    if waiting is not _END:
        yield waiting


def batch_length(batch: Batch) -> int | None:
    """Number of samples: the leading dimension that all tensors share, None where they share none."""
    lengths = {t.shape[0] for t in tensors_of(batch) if t.ndim > 0}
    return lengths.pop() if len(lengths) == 1 else None


def batch_form(batch: Batch, length: int) -> tuple[Any, ...]:
    """What batches that may be joined have in common: nesting, types and sizes but for the number of samples, and all other leaves."""
    tensors = tuple(
        (name, t.dtype, t.shape[1:] if t.ndim > 0 and len(t) == length else ("shared", t.shape)) for name, t in named_tensors(batch).items()
    )
    return (type(batch), tensors, tuple(map(repr, _other_leaves(batch))))


def slice_batch(batch: Batch, start: int, stop: int, *, length: int) -> Batch:
    """Samples ``start:stop`` of every tensor whose leading dimension is the batch's ``length``."""
    return map_tensors(lambda t: t[start:stop] if holds_samples(t, length) else t, batch)


def holds_samples(t: Tensor, length: int) -> bool:
    """Whether a tensor of a batch of ``length`` samples has one row for each."""
    # a sparse tensor cannot be sliced by rows; it is an adjacency matrix, as a rule, and belongs to the whole
    return t.ndim > 0 and t.shape[0] == length and t.layout is torch.strided


def fingerprint(batch: Batch) -> str:
    """A digest of every tensor, array, string and number in the batch."""
    digest = hashlib.blake2b(digest_size=16)  # 16 bytes, by judgement: against accidents, not against attacks

    def add_tensor(t: Tensor) -> Tensor:
        dense = t.detach() if t.layout is torch.strided else t.detach().to_dense()
        plain = dense.cpu().contiguous()  # bytes, since NumPy knows no bfloat16
        digest.update(f"{tuple(plain.shape)}{plain.dtype}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        return t

    def add_other(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            add_tensor(leaf.data)
        elif isinstance(leaf, np.ndarray):
            digest.update(f"{leaf.shape}{leaf.dtype}".encode() + leaf.tobytes())
        elif isinstance(leaf, (str, bytes, int, float)):
            digest.update(repr(leaf).encode())
        return leaf

    map_tensors(add_tensor, batch, other=add_other)
    return digest.hexdigest()


class SeededPasses:
    """A loader each of whose passes begins from the same random state, so that one that shuffles or augments gives the same batches again.

    For data that do not fit into memory: a product goes through them batch by batch, and an :class:`sharpkit.Objective` compares the check
    sums of two passes when it is made. What draws from a generator of its own that lives on from pass to pass is refused there.

    Args:
        data: a re-iterable loader of batches with a length, such as ``DataLoader(dataset, batch_size=256, shuffle=True)``.
        seed: of each pass: torch's, Python's and NumPy's generators and the DataLoader's own are seeded by it, and put back afterwards.

    Raises:
        TypeError: no iterable of batches, or one without a length.
        ObjectiveError: an iterator, which can be gone through only once.

    Example:
        >>> import torch, sharpkit as sk
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(6.0)), batch_size=2, shuffle=True)
        >>> passes = sk.SeededPasses(loader, seed=1)
        >>> [batch[0].tolist() for batch in passes] == [batch[0].tolist() for batch in passes], len(passes)
        (True, 3)
    """

    def __init__(self, data: Any, *, seed: int = 0) -> None:
        _check_reiterable(data, seeded=True)
        if not hasattr(data, "__len__"):
            raise TypeError(
                f"a {type(data).__name__} without a length cannot be gone through in passes: give it a __len__, its number of batches"
            )
        self.data, self.seed = data, as_seed(seed)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        generators, batches, stream = loader_generators(self.data), None, None
        while True:
            with random_states_kept(generators):
                if batches is None or stream is None:
                    seed_everything(self.seed, torch.device("cuda" if _cuda_is_used() else "cpu"))
                    for generator in generators:
                        generator.manual_seed(self.seed)
                    batches = iter(self.data)
                else:
                    stream.restore()
                batch = next(batches, _END)
                stream = RandomStates(generators)
            if batch is _END:
                return
            yield batch


def _cuda_is_used() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class BatchSource:
    """The data as something that can be gone through again and again, giving the same batches each time."""

    def __init__(self, data: Any, *, pair: bool) -> None:
        """
        Args:
            data: a batch, a list of batches, or a re-iterable loader.
            pair: batches are (input, target), so a list of two tensors is one batch.
        """
        self.data = data
        self._generators = loader_generators(data)
        self._stream: RandomStates | None = None
        self._batches: list[Batch] | None = None
        if _is_batch(data, pair):
            self._batches = [data]
        elif isinstance(data, list):
            self._batches = list(data)
        else:
            _check_reiterable(data)

    @property
    def is_seeded(self) -> bool:
        """Whether passes are the same by their seed alone, which is to be seen."""
        return isinstance(self.data, SeededPasses)

    @property
    def is_loader(self) -> bool:
        """Whether batches are made anew on each pass."""
        return self._batches is None

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches) if self._batches is not None else self._pass()

    def _pass(self) -> Iterator[Batch]:
        """A pass over a loader that leaves the random states alone: iterating a DataLoader draws a seed, whatever it does with it.

        What the loader draws goes on from pass to pass, as it would in training; so augmentation makes two passes differ, and is noticed.
        """
        batches: Iterator[Batch] | None = None
        counted, most = 0, math.inf if hasattr(self.data, "__len__") else _MOST_BATCHES
        while True:
            with random_states_kept(self._generators):
                if self._stream is not None:
                    self._stream.restore()
                batches = iter(self.data) if batches is None else batches
                batch = next(batches, _END)
                self._stream = RandomStates(self._generators)
            if batch is _END:
                return
            if (counted := counted + 1) > most:
                raise ObjectiveError(
                    f"a {type(self.data).__name__} without a length gave {most:,} batches and did not end: pass a list of as many as are "
                    "meant, as by list(itertools.islice(loader, 100)), or give it a __len__"
                )
            yield batch


def check_passes(source: BatchSource, marks: Sequence[str]) -> None:
    """Compare all batches of another pass with the fingerprints of an earlier one.

    Raises:
        NonDeterministicError: they differ.
    """
    again = list(map(fingerprint, source))
    if again != list(marks):
        where = next((i for i, (a, b) in enumerate(zip(again, marks, strict=False)) if a != b), min(len(again), len(marks)))
        raise NonDeterministicError(
            f"batch {where} differed between two passes of {len(marks)} and {len(again)} batches although both began from the same seed: "
            "the loader draws from a generator of its own, which goes on from pass to pass. Seed that in its __iter__, or draw from torch's"
        )


def check_repeatable(batch: Batch, index: int, before: str) -> None:
    """Compare a batch of a second pass with the first one's fingerprint.

    Raises:
        NonDeterministicError: they differ.
    """
    if fingerprint(batch) != before:
        raise NonDeterministicError(
            f"batch {index} differed between two passes over the data: the loader shuffles or augments, so every product would be with a "
            f"different matrix. {_HOW_TO_FIX} without random augmentation"
        )


def _is_batch(data: Any, pair: bool) -> bool:
    if isinstance(data, (Tensor, Mapping, tuple)) or (dataclasses.is_dataclass(data) and not isinstance(data, type)):
        return True
    if isinstance(data, list):  # as DataLoader collates an (input, target) batch
        return pair and len(data) == 2 and all(isinstance(x, Tensor) for x in data)
    if not isinstance(data, Iterable):
        return hasattr(data, "to")  # a graph, for instance
    holds = hasattr(data, "to") or any(isinstance(value, Tensor) for value in getattr(data, "__dict__", {}).values())
    if not holds or isinstance(data, (Iterator, Dataset, DataLoader)):
        return False
    first = next(iter(data), None)  # graphs that can be gone through give their names and tensors, loaders give batches
    return isinstance(first, tuple) and len(first) == 2 and isinstance(first[0], str)


def _check_reiterable(data: Any, *, seeded: bool = False) -> None:
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"data is a {type(data).__name__}, which gives single samples, not batches: pass DataLoader(dataset, batch_size=...)"
        )
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a batch, a list of batches or a re-iterable loader, got {type(data).__name__}")
    if isinstance(data, Iterator):  # a generator: the second product would see nothing
        raise ObjectiveError(
            f"data is a {type(data).__name__}, which can be gone through only once, but every product needs a pass. {_HOW_TO_FIX}"
        )
    if isinstance(data, DataLoader) and not seeded:
        samplers = (data.sampler, getattr(data.batch_sampler, "sampler", None))
        if any(isinstance(s, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)) for s in samplers):
            raise NonDeterministicError(f"the DataLoader shuffles, so every pass would be over other batches. {_HOW_TO_FIX}")
