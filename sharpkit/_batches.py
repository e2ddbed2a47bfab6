"""Batches of any nesting: move, measure, slice and compare them; and re-iterable sources of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from sharpkit._errors import NonDeterministicError, ObjectiveError

Batch = Any

_HOW_TO_FIX = "Pass one batch, a list of batches (list(loader) fixes what was drawn), or a DataLoader(shuffle=False)"


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """The same nesting with ``function`` applied to every tensor; what is not a tensor stays."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, x) for x in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(function, x) for x in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{f.name: map_tensors(function, getattr(batch, f.name)) for f in dataclasses.fields(batch) if f.init})
    return batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor in the nesting, in order."""
    found: list[Tensor] = []
    map_tensors(lambda t: (found.append(t), t)[1], batch)
    return found


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; objects with their own ``.to(device)`` (packed sequences, graphs) are asked to move."""
    if not tensors_of(batch) and not isinstance(batch, (Mapping, tuple, list)) and hasattr(batch, "to"):
        return batch.to(device)
    return map_tensors(lambda t: t.to(device, non_blocking=True), batch)


def batch_length(batch: Batch) -> int | None:
    """Number of samples: the leading dimension that all tensors share, None where they share none."""
    lengths = {t.shape[0] for t in tensors_of(batch) if t.ndim > 0}
    return lengths.pop() if len(lengths) == 1 else None


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Samples ``start:stop`` of every tensor that has a leading dimension."""
    return map_tensors(lambda t: t[start:stop] if t.ndim > 0 else t, batch)


def fingerprint(batch: Batch) -> str:
    """A digest of every value in the batch."""
    digest = hashlib.blake2b(digest_size=16)
    for t in tensors_of(batch):
        plain = t.detach().cpu().contiguous()
        digest.update(f"{tuple(plain.shape)}{plain.dtype}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


class BatchSource:
    """The data as something that can be gone through again and again, giving the same batches each time."""

    def __init__(self, data: Any, *, pair: bool) -> None:
        """
        Args:
            data: a batch, a list of batches, or a re-iterable loader.
            pair: batches are (input, target), so a list of two tensors is one batch.
        """
        self.data = data
        self._batches: list[Batch] | None = None
        if _is_batch(data, pair):
            self._batches = [data]
        elif isinstance(data, list):
            self._batches = list(data)
        else:
            _check_reiterable(data)

    @property
    def is_loader(self) -> bool:
        """Whether batches are made anew on each pass."""
        return self._batches is None

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches if self._batches is not None else self.data)

    def check_repeatable(self, first_pass: list[str]) -> None:
        """Compare the beginning of a second pass with the first one's fingerprints.

        Raises:
            NonDeterministicError: they differ.
        """
        if not self.is_loader:
            return
        for index, (batch, before) in enumerate(zip(self, first_pass, strict=False)):
            if fingerprint(batch) != before:
                raise NonDeterministicError(
                    f"batch {index} differed between two passes over the data: the loader shuffles or augments, so every product would be with a "
                    f"different matrix. {_HOW_TO_FIX} without random augmentation"
                )


def _is_batch(data: Any, pair: bool) -> bool:
    if isinstance(data, (Tensor, Mapping, tuple)) or (dataclasses.is_dataclass(data) and not isinstance(data, type)):
        return True
    if isinstance(data, list):
        return pair and len(data) == 2 and all(isinstance(x, Tensor) for x in data)
    return hasattr(data, "to") and not isinstance(data, Iterable)


def _check_reiterable(data: Any) -> None:
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a batch, a list of batches or a re-iterable loader, got {type(data).__name__}")
    if iter(data) is data:
        raise ObjectiveError(f"data is a {type(data).__name__}, which can be gone through only once; every product needs a pass. {_HOW_TO_FIX}")
    if isinstance(data, DataLoader):
        samplers = (data.sampler, getattr(data.batch_sampler, "sampler", None))
        if any(isinstance(s, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)) for s in samplers):
            raise NonDeterministicError(f"the DataLoader shuffles, so every pass would be over other batches. {_HOW_TO_FIX}")
        if isinstance(data.dataset, Sized) and not isinstance(data.dataset, IterableDataset) and len(data.dataset) == 0:
            raise ObjectiveError("the DataLoader's dataset is empty")
