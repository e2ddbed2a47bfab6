"""Operators made from matrices, callables and other operators: wrap, add, scale, shift, deflate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpkit.operators.base import SymmetricOperator, check_symmetric


class MatrixOperator(SymmetricOperator):
    """A dense symmetric tensor as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        self.matrix = matrix

    def _multiply_vector(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def _multiply_columns(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns


class CallableOperator(SymmetricOperator):
    """A function v -> A v on flat vectors as an operator."""

    def __init__(self, function: Callable[[Tensor], Tensor], size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(size, dtype=dtype, device=device)
        self.function = function

    def _multiply_vector(self, vector: Tensor) -> Tensor:
        product = self.function(vector)
        if not isinstance(product, Tensor) or product.shape != vector.shape:
            came = f"shape {tuple(product.shape)}" if isinstance(product, Tensor) else type(product).__name__
            raise ValueError(f"the function must return a tensor of shape {tuple(vector.shape)}, it returned {came}")
        return product.detach().to(dtype=self.dtype, device=self.device, copy=product.data_ptr() == vector.data_ptr())


class _DerivedOperator(SymmetricOperator):
    """An operator computed from another one, sharing its inner products, agreement and random vectors."""

    def __init__(self, base: SymmetricOperator) -> None:
        super().__init__(base.size, dtype=base.dtype, device=base.device)
        self.base = base

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        return self.base.dot(left, right)

    def agree(self, value: float) -> float:
        return self.base.agree(value)

    def random_vectors(self, k: int, *, generator: torch.Generator, distribution: str = "normal") -> Tensor:
        return self.base.random_vectors(k, generator=generator, distribution=distribution)


class ScaledOperator(_DerivedOperator):
    """factor * A + shift * I."""

    def __init__(self, base: SymmetricOperator, factor: float = 1.0, shift: float = 0.0) -> None:
        super().__init__(base)
        self.factor, self.shift = factor, shift

    def _multiply_vector(self, vector: Tensor) -> Tensor:
        return self._combine(self.base.multiply(vector), vector)

    def _multiply_columns(self, columns: Tensor) -> Tensor:
        return self._combine(self.base.multiply(columns), columns)

    def _combine(self, product: Tensor, vectors: Tensor) -> Tensor:
        scaled = product * self.factor
        return scaled.add_(vectors, alpha=self.shift) if self.shift else scaled

    def block(self, pattern: str | Callable[[str, Tensor], bool]) -> SymmetricOperator:
        return ScaledOperator(self.base.block(pattern), self.factor, self.shift)


class SumOperator(_DerivedOperator):
    """A + B."""

    def __init__(self, first: SymmetricOperator, second: SymmetricOperator) -> None:
        for what, a, b in (
            ("size", first.size, second.size),
            ("dtype", first.dtype, second.dtype),
            ("device", first.device, second.device),
        ):
            if a != b:
                raise ValueError(f"cannot add operators of different {what}: {a} and {b}")
        super().__init__(first)
        self.second = second

    def _multiply_vector(self, vector: Tensor) -> Tensor:
        return self.base.multiply(vector) + self.second.multiply(vector)

    def _multiply_columns(self, columns: Tensor) -> Tensor:
        return self.base.multiply(columns) + self.second.multiply(columns)

    def block(self, pattern: str | Callable[[str, Tensor], bool]) -> SymmetricOperator:
        return SumOperator(self.base.block(pattern), self.second.block(pattern))


class DeflatedOperator(_DerivedOperator):
    """A - V diag(values) V^T."""

    def __init__(self, base: SymmetricOperator, vectors: Tensor, values: Tensor) -> None:
        super().__init__(base)
        if vectors.ndim != 2 or vectors.shape[0] != base.size or values.shape != vectors.shape[1:]:
            raise ValueError(
                f"deflation needs vectors ({base.size}, k) and values (k,), got {tuple(vectors.shape)} and {tuple(values.shape)}"
            )
        self.vectors = vectors.to(dtype=base.dtype, device=base.device)
        self.values = values.to(dtype=base.dtype, device=base.device)

    def _multiply_vector(self, vector: Tensor) -> Tensor:
        return self.base.multiply(vector) - self.vectors @ (self.values * self.base.dot(self.vectors, vector))

    def _multiply_columns(self, columns: Tensor) -> Tensor:
        return self.base.multiply(columns) - self.vectors @ (self.values[:, None] * self.base.dot(self.vectors, columns))


def add(operator: SymmetricOperator, other: SymmetricOperator | float) -> SymmetricOperator:
    """operator + other, a number meaning that multiple of the identity."""
    if isinstance(other, SymmetricOperator):
        return SumOperator(operator, other)
    return ScaledOperator(operator, shift=_number(other))


def scale(operator: SymmetricOperator, factor: float) -> SymmetricOperator:
    """factor * operator."""
    return ScaledOperator(operator, factor=_number(factor))


def deflate(operator: SymmetricOperator, vectors: Tensor, values: Tensor) -> SymmetricOperator:
    """operator - V diag(values) V^T."""
    return DeflatedOperator(operator, vectors, values)


def _number(value: Any) -> float:
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, Tensor) and value.numel() == 1):
        raise TypeError(f"expected a real number or another operator, got {type(value).__name__}")
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"expected a finite number, got {number}")
    return number


def as_operator(
    matrix: Any, *, size: int | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None, check: bool = True
) -> SymmetricOperator:
    """Anything that multiplies a vector as a :class:`SymmetricOperator`.

    Args:
        matrix: a square torch tensor or NumPy array, a SciPy sparse matrix or ``LinearOperator``, a callable on flat (n,) tensors, or an
            operator (returned as it is).
        size: n; needed for a callable.
        dtype: of the vectors; a tensor keeps its own, everything else defaults to float64.
        device: of the vectors; a tensor keeps its own, everything else defaults to the CPU.
        check: test symmetry with two products, not counted.

    Raises:
        TypeError: not something that multiplies vectors.
        ValueError: not square, not real floating point, or ``size`` missing.
        NotSymmetricError: not symmetric.

    Example:
        >>> import torch, sharpkit as sk
        >>> A = sk.as_operator(lambda v: 3 * v, size=4)
        >>> (A @ torch.ones(4, dtype=torch.float64)).tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    if isinstance(matrix, SymmetricOperator):
        return matrix
    if isinstance(matrix, np.ndarray):
        matrix = torch.from_numpy(np.ascontiguousarray(matrix, dtype=None if matrix.dtype.kind in "fc" else np.float64))
        dtype = dtype or torch.float64
    if isinstance(matrix, Tensor):
        operator: SymmetricOperator = MatrixOperator(_checked_matrix(matrix, size, dtype, device))
    else:
        operator = _wrap_callable(matrix, size, dtype or torch.float64, torch.device(device or "cpu"))
    if check:
        check_symmetric(operator)
        operator.num_matvecs = 0
    return operator


def _checked_matrix(matrix: Tensor, size: int | None, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or (size is not None and size != matrix.shape[0]):
        expected = f"({size}, {size})" if size is not None else "square"
        raise ValueError(f"expected a {expected} matrix, got shape {tuple(matrix.shape)}")
    if matrix.is_complex():
        raise ValueError(
            "expected a real matrix, got a complex one; a Hermitian n x n matrix is the real 2n x 2n one [[Re, -Im], [Im, Re]]"
        )
    target = dtype or (matrix.dtype if matrix.is_floating_point() else torch.float64)
    if not target.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {target}")
    return matrix.detach().to(dtype=target, device=device if device is not None else matrix.device)


def _wrap_callable(matrix: Any, size: int | None, dtype: torch.dtype, device: torch.device) -> SymmetricOperator:
    shape = getattr(matrix, "shape", None)
    if shape is not None and hasattr(matrix, "__matmul__"):
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"expected a square matrix, got shape {tuple(shape)}")

        def through_numpy(vector: Tensor) -> Tensor:
            return torch.as_tensor(np.asarray(matrix @ vector.cpu().numpy()))

        return CallableOperator(through_numpy, shape[0], dtype=dtype, device=device)
    if not callable(matrix):
        raise TypeError(f"expected a matrix, a SciPy operator or a function of a vector, got {type(matrix).__name__}")
    if size is None:
        raise ValueError("a function does not say how long its vectors are: pass size=n")
    return CallableOperator(matrix, size, dtype=dtype, device=device)
