"""Orthonormal vectors in memory: where they live, how many fit, and Gram-Schmidt against them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpkit.operators.base import SymmetricOperator

Array = np.ndarray[Any, Any]

_FIRST_CHUNK = 16
_PASSES = 2


def working_dtype(operator: SymmetricOperator) -> torch.dtype:
    """The type recurrences run in: the operator's own, but never below float32."""
    return operator.dtype if operator.dtype in (torch.float32, torch.float64) else torch.float32


def affordable_rows(operator: SymmetricOperator, length: int, *, share: float = 0.5, host: bool = False) -> int:
    """How many basis vectors of ``length`` local entries fit into a share of the free memory, the same on every process."""
    if operator.device.type == "cuda" and not host:
        free = float(torch.cuda.mem_get_info(operator.device)[0])
    else:
        free = _free_host_memory()
    itemsize = torch.empty(0, dtype=working_dtype(operator)).element_size()
    return int(operator.agree(share * free / (length * itemsize)))


def _free_host_memory() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return 4e9


class BasisRows:
    """Orthonormal vectors as the rows of contiguous chunks, on the operator's device or in host memory.

    Chunks double in size, so that growing never copies and a short iteration allocates little.
    """

    def __init__(self, operator: SymmetricOperator, *, offload: bool = False) -> None:
        self.operator = operator
        self.dtype = working_dtype(operator)
        self.storage_device = torch.device("cpu") if offload else operator.device
        self.size = 0
        self._chunks: list[Tensor] = []

    def row(self, index: int) -> Tensor:
        """Vector ``index`` on the operator's device, (n,)."""
        for chunk in self._chunks:
            if index < len(chunk):
                return chunk[index].to(self.operator.device)
            index -= len(chunk)
        raise IndexError(index)

    def append(self, vector: Tensor) -> None:
        """Store one more (n,) vector."""
        position = self.size
        for chunk in self._chunks:
            if position < len(chunk):
                break
            position -= len(chunk)
        else:
            rows = max(_FIRST_CHUNK, self.size)
            chunk = torch.empty(rows, len(vector), dtype=self.dtype, device=self.storage_device)
            self._chunks.append(chunk)
            position = 0
        chunk[position].copy_(vector)
        self.size += 1

    def parts(self) -> list[Tensor]:
        """The stored vectors as (rows, n) tensors, in order, where they are stored."""
        parts, left = [], self.size
        for chunk in self._chunks:
            if left > 0:
                parts.append(chunk[:left])
            left -= len(chunk)
        return parts

    def coefficients(self, vectors: Tensor) -> Tensor:
        """Inner products with every stored vector: (size,) or (size, k)."""
        found = [self.operator.dot(part.to(self.operator.device).T, vectors) for part in self.parts()]
        return torch.cat(found) if found else vectors.new_zeros((0, *vectors.shape[1:]))

    def combine(self, coefficients: Tensor) -> Tensor:
        """The linear combinations with (size,) or (size, k) coefficients: (n,) or (n, k)."""
        first, total = 0, None
        for part in self.parts():
            here = part.to(self.operator.device).T @ coefficients[first : first + len(part)].to(self.operator.device, self.dtype)
            total = here if total is None else total.add_(here)
            first += len(part)
        if total is None:
            raise ValueError("the basis is empty")
        return total

    def orthogonalise(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Remove the basis from (n,) or (n, k) vectors by two passes of classical Gram-Schmidt.

        Returns:
            the remainder, a new tensor, and the coefficients removed, (size,) or (size, k).
        """
        total = vectors.new_zeros((self.size, *vectors.shape[1:]))
        rest = vectors
        if self.size:
            for _ in range(_PASSES):
                found = self.coefficients(rest)
                rest = rest - self.combine(found)
                total += found
        return rest, total

    def replace(self, mixing: Array) -> None:
        """Replace the basis by mixing^T times it, ``mixing`` (size, new size) with orthonormal columns, in place."""
        weights = torch.as_tensor(mixing.T, dtype=self.dtype, device=self.storage_device)
        parts = self.parts()
        length = parts[0].shape[1]
        block = max(1, min(length, 2**22 // max(1, self.size)))
        for start in range(0, length, block):
            columns = slice(start, start + block)
            mixed = weights @ torch.cat([part[:, columns] for part in parts])
            first = 0
            for part in parts:
                part[: len(mixed) - first, columns] = mixed[first : first + len(part)]
                first += len(part)
                if first >= len(mixed):
                    break
        self.size = weights.shape[0]
