"""The symmetric linear operator that every algorithm works on, and its algebra: wrap, add, scale, shift, deflate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import choice, flag, real, shown, whole
from sharpkit._checkpoint import Processes, Subject, known_again, product_step
from sharpkit._errors import NonFiniteError, NotSymmetricError, UnsupportedError
from sharpkit.objective.memory import available_memory

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


Dot = Callable[[Tensor, Tensor], Tensor]  # an inner product

_DISTRIBUTIONS = ("normal", "rademacher")
_LOOKS, _LOOKS_SEED = 3, 20_26  # random vectors that a product is seen along, by judgement, and what draws them
_REAL_FORM = "A Hermitian n x n matrix is the real 2n x 2n one [[Re, -Im], [Im, Re]]."


class SymmetricOperator(ABC):
    """A real symmetric n x n matrix known only through its products with vectors.

    A subclass writes one method, :meth:`matvec`. Products are asked for as ``A @ v``, which checks and counts them, with flat tensors of
    shape (n,), or (n, k) for k at once.

    A subclass may write more: :meth:`matmat` where k products at once are cheaper than one by one; :meth:`block` where the matrix belongs
    to named parameters; and, where vectors are replicated over processes or sharded, :meth:`dot` and :meth:`agree`, through which all
    inner products and all decisions go.

    Args:
        size: number of rows, n.
        dtype: floating-point type of the vectors.
        device: where the vectors live.

    Attributes:
        size, dtype, device: as given.
        length: entries of a vector on this process: n, unless vectors are sharded over processes.
        num_matvecs: products made so far, one per column.

    Example:
        >>> import torch, sharpkit as sk
        >>> class Averaging(sk.SymmetricOperator):
        ...     def matvec(self, vector):
        ...         return vector.mean().expand_as(vector)
        >>> A = Averaging(5)
        >>> round(sk.eigenpairs(A, k=1).values.item(), 6), round(sk.trace(A, num_matvecs=5).value, 6)
        (1.0, 1.0)
    """

    def __init__(self, size: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> None:
        self.size = whole("size", size, hint="it is the number of rows")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            came = dtype if isinstance(dtype, torch.dtype) else shown(dtype)
            raise ValueError(f"an operator multiplies real vectors, so its dtype must be a floating-point type; got {came}. {_REAL_FORM}")
        self.dtype, self.device = dtype, _device(device)
        self.length = self.size
        self.num_matvecs = 0
        self.processes: Processes | None = None  # that make each product together
        self._rounding = float(torch.finfo(dtype).eps)

    @property
    def rounding(self) -> float:
        """Error of a product, relative to the largest one: the rounding of its type, more where it is computed in a less exact one."""
        return self._rounding

    @rounding.setter
    def rounding(self, value: float) -> None:
        self._rounding = value

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.size, self.size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size} x {self.size}, {self.dtype}, {self.device})"

    # -- products -----------------------------------------------------------------------------------------------------
    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """The product with one vector: the method that a subclass writes. To use an operator, write ``A @ v``, which checks and counts.

        Args:
            vector: (n,), of this operator's dtype and device; not to be written to.

        Returns:
            (n,).
        """

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products with k vectors, (n, k) as the argument; a subclass overrides this where k at once are cheaper than one by one."""
        product = torch.empty_like(vectors)
        for j in range(vectors.shape[1]):
            column = vectors[:, j].contiguous()  # a subclass may reshape it by .view()
            product[:, j] = self._accepted(self.matvec(column), column)
        return product

    def multiply(self, vectors: Tensor) -> Tensor:
        """``A @ v`` as a new tensor, but without checking it for NaN; algorithms check their scalars instead."""
        self._check_vectors(vectors)
        vectors = vectors.detach()  # a graph that reaches into the vector would grow with every product
        single = vectors.ndim == 1
        self.num_matvecs += 1 if single else vectors.shape[1]
        return product_step(self, vectors, lambda: self._accepted(self.matvec(vectors) if single else self.matmat(vectors), vectors))

    def _accepted(self, product: Tensor, vectors: Tensor) -> Tensor:
        """What a subclass returned, checked, as a tensor that algorithms may write to: it shares no memory with the vectors."""
        if not isinstance(product, Tensor) or product.shape != vectors.shape:
            came = f"shape {tuple(product.shape)}" if isinstance(product, Tensor) else type(product).__name__
            raise ValueError(
                f"a product must be a tensor of the vector's shape {tuple(vectors.shape)}, but that of {type(self).__name__} was {came}"
            )
        if product.is_complex():  # the imaginary part would be dropped with no more than a warning
            raise ValueError(f"a product must be real, but that of {type(self).__name__} was {product.dtype}. {_REAL_FORM}")
        product = product.detach()
        # A subclass may hand its argument back, or a tensor expanded from one entry (stride 0), which cannot be written to.
        shared = product.untyped_storage().data_ptr() == vectors.untyped_storage().data_ptr() or 0 in product.stride()
        return product.to(dtype=self.dtype, device=self.device, copy=shared)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product ``A @ v`` with v of shape (n,) or (n, k).

        Raises:
            ValueError: wrong shape, dtype or device.
            NonFiniteError: the product contains NaN or infinity.
        """
        product = self.multiply(vectors)
        # the sum alone is cheaper, but may overflow
        if self.length != self.size:
            unbounded = not math.isfinite(float(self.dot(product, torch.zeros_like(vectors)).sum()))  # on any process
        else:
            unbounded = not math.isfinite(product.sum().item()) and not bool(torch.isfinite(product).all())
        if unbounded:
            cause = "the function has no second derivative here (a square root at 0, a norm of a zero vector), or half precision overflowed"
            if not bool(torch.isfinite(vectors).all()):
                cause = "the vector itself is not finite"
            raise NonFiniteError(f"the product with {self!r} contains NaN or infinity: {cause}")
        return product

    def _check_vectors(self, vectors: Tensor) -> None:
        if not isinstance(vectors, Tensor):
            raise TypeError(f"expected a torch.Tensor of shape ({self.length},) or ({self.length}, k), got {shown(vectors)}")
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.length:
            raise ValueError(f"expected shape ({self.length},) or ({self.length}, k), got {tuple(vectors.shape)}")
        # No silent conversion: rounding float64 vectors to float32 would cost a Krylov method its orthogonality unnoticed.
        if vectors.dtype != self.dtype:
            raise ValueError(f"this operator multiplies {self.dtype} vectors, got {vectors.dtype}: use v.to({self.dtype})")
        if vectors.device != self.device:
            raise ValueError(f"this operator lives on {self.device}, the vector on {vectors.device}: use v.to({str(self.device)!r})")

    # -- the one place for inner products, decisions and random vectors -------------------------------------------------
    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products ``left^T right`` of (n,) or (n, j) with (n,) or (n, k), over all processes where vectors are sharded."""
        return left.T @ right if left.ndim == 2 else torch.tensordot(left, right, dims=1) if right.ndim == 1 else left @ right

    def check_alike(self, call: str, settings: Mapping[str, Any]) -> None:
        """Raise on every process of a distributed run unless all make this call with the same arguments.

        Args:
            call: the function's name.
            settings: its arguments; the operator and a callback, which one process alone may have, are left out.
        """
        return None

    def agree(self, value: float) -> float:
        """The same number on every process (the first one's), for decisions such as a time budget running out."""
        return value

    def free_memory(self, *, host: bool = False) -> float:
        """Bytes that can still be allocated where the vectors live, or in host memory; inf if the system does not tell."""
        return available_memory(torch.device("cpu") if host else self.device)

    def bytes_needed(self) -> float:
        """Memory that products take besides the vectors they are made with, as far as the products so far have shown; 0 by default."""
        return 0.0

    def choices(self) -> Mapping[str, str]:
        """How products are made, in words by what was chosen; nothing by default."""
        return {}

    # -- what a checkpoint asks ---------------------------------------------------------------------------------------------
    def made_of(self) -> tuple[SymmetricOperator, ...]:
        """The operators that each product multiplies once with."""
        return ()

    def skip(self, columns: int) -> None:
        """Count products of the operators inside that were not made, since this one's was at hand."""
        for inner in self.made_of():
            inner.num_matvecs += columns
            inner.skip(columns)

    def way(self) -> dict[str, Any]:
        """How products are made where that was chosen by time or memory, to be taken up again by :meth:`take_way`: sums round by it."""
        return {}

    def take_way(self, way: Mapping[str, Any]) -> None:
        """Make products as another process has."""
        return None

    def identity(self) -> dict[str, str]:
        """What tells this matrix from others, in words by name, besides its products."""
        return {"matrix": f"{type(self).__name__} of {self.size} rows, {self.dtype}"}

    def subject(self) -> Subject:
        """This matrix as the subject of a call that may be resumed: known again by one product, which is not counted."""
        looks = self.random_vectors(_LOOKS, generator=torch.Generator().manual_seed(_LOOKS_SEED))
        product = self @ looks[:, 0].contiguous()
        self.num_matvecs -= 1
        self.skip(-1)
        seen = [float(self.dot(product, product)) ** 0.5, *self.dot(looks, product).tolist()]
        rounding = known_again(max(self.rounding, float(torch.finfo(self.dtype).eps)))
        return Subject(self.identity(), {"a product": seen}, rounding, self.processes, self.device, self.free_memory(host=True))

    def random_vectors(self, k: int, *, generator: torch.Generator, distribution: str = "normal") -> Tensor:
        """Independent random probes of shape (n, k), drawn on the CPU so that a seed means the same on every device.

        Args:
            k: number of columns.
            generator: a CPU generator; it advances.
            distribution: ``"normal"`` (standard Gaussian) or ``"rademacher"`` (+-1).
        """
        choice("distribution", distribution, _DISTRIBUTIONS)
        draw_type = self.dtype if self.dtype in (torch.float32, torch.float64) else torch.float32  # half precision: drawn, then rounded
        if distribution == "normal":
            return torch.randn(k, self.size, generator=generator, dtype=draw_type).to(device=self.device, dtype=self.dtype).T
        # A sign is a bit. 64 of them travel as one number and are spread where the vectors live, eight by one look into a table: drawn one
        # by one on the host, the signs of 124 M parameters took 0.95 s where a Hessian product on an H200 takes 0.11 s.
        words = torch.randint(-(2**63), 2**63 - 1, (k, -(-self.size // 64)), generator=generator, dtype=torch.int64).to(self.device)
        signs = 1 - 2 * (torch.arange(256)[:, None] >> torch.arange(8) & 1)  # (256, 8): the signs of each byte
        spread = signs.to(device=self.device, dtype=self.dtype).index_select(0, words.view(torch.uint8).int().view(-1))
        return spread.view(k, -1)[:, : self.size].T

    # -- conversions --------------------------------------------------------------------------------------------------
    def to_dense(self) -> Tensor:
        """The whole matrix, (n, n), by n products. For small n: tests and teaching.

        Raises:
            UnsupportedError: vectors are sharded over processes.
        """
        if self.length != self.size:
            raise UnsupportedError("a matrix whose vectors are sharded over processes is not written out: multiply by single vectors")
        return self @ torch.eye(self.size, dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """A :class:`scipy.sparse.linalg.LinearOperator` over NumPy vectors on the host."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return (self @ torch.as_tensor(np.ascontiguousarray(array), dtype=self.dtype, device=self.device)).cpu().numpy()

        def matvec(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return matmat(array.reshape(-1))  # SciPy passes (n,) or (n, 1)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=matvec, matmat=matmat, rmatvec=matvec, rmatmat=matmat, dtype=dtype)

    def block(self, pattern: str | Callable[[str, Tensor], bool]) -> SymmetricOperator:
        """The diagonal block of a named parameter group; curvature operators implement it."""
        raise TypeError(f"{type(self).__name__} has no named parameters, so it has no blocks; restrict the matrix before wrapping it")

    # -- algebra ------------------------------------------------------------------------------------------------------------
    def __add__(self, other: SymmetricOperator | float) -> SymmetricOperator:
        """``A + B``, or ``A + s`` meaning A + s I."""
        return SumOperator(self, other) if isinstance(other, SymmetricOperator) else ScaledOperator(self, shift=_number(other))

    __radd__ = __add__

    def __mul__(self, factor: float) -> SymmetricOperator:
        return ScaledOperator(self, factor=_number(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SymmetricOperator:
        return self * (1.0 / divisor)

    def __neg__(self) -> SymmetricOperator:
        return self * -1.0

    def __sub__(self, other: SymmetricOperator | float) -> SymmetricOperator:
        return self + (-other)

    def __rsub__(self, other: float) -> SymmetricOperator:
        return (-self) + other

    def deflate(self, vectors: Tensor, values: Tensor) -> SymmetricOperator:
        """``A - V diag(values) V^T`` with orthonormal V of shape (n, k) and values of shape (k,)."""
        return DeflatedOperator(self, vectors, values)


def check_symmetric(operator: SymmetricOperator, *, seed: int = 0, rtol: float | None = None) -> None:
    """Raise unless u.(A v) = v.(A u) for two random vectors, up to rounding.

    Args:
        operator: what to test; two products are made.
        seed: seeds the two random vectors.
        rtol: tolerance, relative to ||A v|| ||u||; by default 1e-8 in float64 and 1e-3 otherwise.

    Raises:
        NotSymmetricError: it is not symmetric.
    """
    probes = operator.random_vectors(2, generator=torch.Generator().manual_seed(seed))
    products = operator @ probes
    size = float(products.abs().max()) or 1.0
    products = products / size  # squares of products neither overflow nor vanish
    left, right = float(operator.dot(probes[:, 0], products[:, 1])), float(operator.dot(probes[:, 1], products[:, 0]))
    norms = [float(operator.dot(x, x)) ** 0.5 for x in (probes[:, 0], products[:, 0], probes[:, 1], products[:, 1])]
    scale = max(norms[0] * norms[3], norms[2] * norms[1])  # Cauchy-Schwarz bounds either side by it, so rounding is relative to it
    # By judgement: far above the rounding of a float64 or float32 sum over a large model, far below the asymmetry of a wrong derivative.
    tolerance = rtol if rtol is not None else (1e-8 if operator.dtype == torch.float64 else 1e-3)
    if abs(left - right) > tolerance * scale:
        raise NotSymmetricError(
            f"u.(A v) = {left * size:.9g} but v.(A u) = {right * size:.9g}: {operator!r} is not symmetric, and every algorithm here needs "
            "a symmetric one. If the matrix itself is meant to be symmetric, its product is wrong; otherwise pass (A + A^T) / 2 or A^T A."
        )


class MatrixOperator(SymmetricOperator):
    """A dense symmetric tensor as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        self.matrix = matrix

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors


class CallableOperator(SymmetricOperator):
    """A function v -> A v on flat vectors as an operator."""

    def __init__(self, function: Callable[[Tensor], Tensor], size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(size, dtype=dtype, device=device)
        self.function = function

    def matvec(self, vector: Tensor) -> Tensor:
        return self.function(vector)


def check_operator(value: Any) -> None:
    """TypeError unless it is an operator."""
    if not isinstance(value, SymmetricOperator):
        raise TypeError(f"the base must be an operator, such as HessianOperator(objective) or as_operator(matrix), got {shown(value)}")


def real_tensor(name: str, value: Any) -> Tensor:
    """A tensor of real numbers.

    Raises:
        TypeError: it is none, is complex, or is on the meta device, which holds no numbers.
    """
    if not isinstance(value, Tensor) or value.is_complex() or value.is_meta:
        where = " on the meta device" if isinstance(value, Tensor) and value.is_meta else ""
        raise TypeError(f"{name} must be a tensor of real numbers, got {shown(value)}{where}")
    return value


class _DerivedOperator(SymmetricOperator):
    """An operator computed from another one, sharing its inner products, agreement and random vectors."""

    def __init__(self, base: SymmetricOperator) -> None:
        check_operator(base)
        super().__init__(base.size, dtype=base.dtype, device=base.device)
        self.base, self.length, self.processes = base, base.length, base.processes

    @property
    def rounding(self) -> float:
        return self.base.rounding

    @rounding.setter
    def rounding(self, value: float) -> None:
        raise AttributeError("the rounding of a derived operator is that of its base")

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.matvec(vectors)  # written for (n,) and (n, k) alike, so that a base with a cheap matmat is asked for k at once

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        return self.base.dot(left, right)

    def agree(self, value: float) -> float:
        return self.base.agree(value)

    def made_of(self) -> tuple[SymmetricOperator, ...]:
        return (self.base,)

    def way(self) -> dict[str, Any]:
        return self.base.way()

    def take_way(self, way: Mapping[str, Any]) -> None:
        self.base.take_way(way)

    def identity(self) -> dict[str, str]:
        inner = self.base.identity()
        return {**inner, "matrix": f"{type(self).__name__} of {inner['matrix']}"}

    def check_alike(self, call: str, settings: Mapping[str, Any]) -> None:
        self.base.check_alike(call, settings)

    def bytes_needed(self) -> float:
        return self.base.bytes_needed()

    def choices(self) -> Mapping[str, str]:
        return self.base.choices()

    def random_vectors(self, k: int, *, generator: torch.Generator, distribution: str = "normal") -> Tensor:
        return self.base.random_vectors(k, generator=generator, distribution=distribution)


class ScaledOperator(_DerivedOperator):
    """factor * A + shift * I."""

    def __init__(self, base: SymmetricOperator, factor: float = 1.0, shift: float = 0.0) -> None:
        super().__init__(base)
        self.factor, self.shift = factor, shift

    def matvec(self, vector: Tensor) -> Tensor:
        scaled = self.base.multiply(vector) * self.factor
        return scaled.add_(vector, alpha=self.shift) if self.shift else scaled

    def block(self, pattern: str | Callable[[str, Tensor], bool]) -> SymmetricOperator:
        return ScaledOperator(self.base.block(pattern), self.factor, self.shift)


class SumOperator(_DerivedOperator):
    """A + B."""

    def __init__(self, first: SymmetricOperator, second: SymmetricOperator) -> None:
        for what in ("size", "dtype", "device"):
            a, b = getattr(first, what), getattr(second, what)
            if a != b:
                raise ValueError(f"cannot add operators of different {what}: {a} and {b}")
        super().__init__(first)
        self.second = second

    def matvec(self, vector: Tensor) -> Tensor:
        return self.base.multiply(vector) + self.second.multiply(vector)

    def made_of(self) -> tuple[SymmetricOperator, ...]:
        return (self.base, self.second)

    def block(self, pattern: str | Callable[[str, Tensor], bool]) -> SymmetricOperator:
        return SumOperator(self.base.block(pattern), self.second.block(pattern))


class DeflatedOperator(_DerivedOperator):
    """A - V diag(values) V^T."""

    def __init__(self, base: SymmetricOperator, vectors: Tensor, values: Tensor) -> None:
        super().__init__(base)
        vectors, values = real_tensor("vectors", vectors), real_tensor("values", values)
        if vectors.ndim != 2 or vectors.shape[0] != base.length or values.shape != vectors.shape[1:]:
            raise ValueError(
                f"deflation needs vectors ({base.length}, k) and values (k,), got {tuple(vectors.shape)} and {tuple(values.shape)}"
            )
        self.vectors = vectors.to(dtype=base.dtype, device=base.device)
        self.values = values.to(dtype=base.dtype, device=base.device)

    def matvec(self, vector: Tensor) -> Tensor:
        return self.base.multiply(vector) - self.vectors @ scale_rows(self.values, self.base.dot(self.vectors, vector))


def scale_rows(diagonal: Tensor, vectors: Tensor) -> Tensor:
    """diag(diagonal) times (n,) or (n, k)."""
    return diagonal * vectors if vectors.ndim == 1 else diagonal[:, None] * vectors


def _number(value: Any) -> float:
    return real("the other operand of an operator", value, other="an operator")


def _device(device: Any) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
        return place
    except (TypeError, RuntimeError, AssertionError) as error:  # the last where torch was built without it
        raise ValueError(
            f"device must be a device of this machine, such as 'cpu' or 'cuda', got {shown(device)} ({str(error).splitlines()[0]})"
        ) from None


def as_operator(
    matrix: Any, *, size: int | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None, check: bool = True
) -> SymmetricOperator:
    """Anything that multiplies a vector as a :class:`SymmetricOperator`.

    Args:
        matrix: a square torch tensor or NumPy array, a SciPy sparse matrix or ``LinearOperator``, a callable on flat (n,) tensors, or an
            operator (returned as it is).
        size: n; needed for a callable.
        dtype: floating-point type of the vectors; a tensor keeps its own, everything else defaults to float64.
        device: where the vectors live; a tensor stays where it is, everything else defaults to the CPU.
        check: test symmetry with two products, which are not counted.

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
    size, check = None if size is None else whole("size", size), flag("check", check)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a real floating-point type such as torch.float64, got {shown(dtype)}")
    device = None if device is None else _device(device)
    if isinstance(matrix, np.ndarray):
        if matrix.dtype.kind not in "fciub":
            raise TypeError(f"expected a matrix of real numbers, got {shown(matrix)}")
        # contiguous, since from_numpy refuses negative strides
        matrix = torch.from_numpy(np.ascontiguousarray(matrix, dtype=None if matrix.dtype.kind in "fc" else np.float64))
        dtype = dtype or torch.float64
    if isinstance(matrix, Tensor):
        operator: SymmetricOperator = MatrixOperator(_checked_matrix(matrix, size, dtype, device))
    else:
        operator = _wrap_callable(matrix, size, dtype or torch.float64, torch.device(device or "cpu"))
    if check:
        check_symmetric(operator)
        operator.num_matvecs = 0  # the check is no part of what a user counts
    return operator


def operator_call(call: str, matrix: Any, arguments: Mapping[str, Any]) -> tuple[SymmetricOperator, Subject]:
    """What a call on a matrix is about, for :func:`sharpkit._checkpoint.resumable`."""
    operator = as_operator(matrix)
    operator.check_alike(call, arguments)  # before the product that is made to know it again
    return operator, operator.subject()


def _checked_matrix(matrix: Tensor, size: int | None, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or (size is not None and size != matrix.shape[0]):
        expected = f"({size}, {size})" if size is not None else "square"
        raise ValueError(f"expected a {expected} matrix, got shape {tuple(matrix.shape)}")
    if matrix.is_complex():
        raise ValueError(f"expected a real matrix, got a complex one. {_REAL_FORM}")
    if matrix.is_meta or not matrix.numel():
        came = "one on the meta device, which holds no numbers" if matrix.is_meta else "one of shape (0, 0)"
        raise ValueError(f"expected a matrix with entries, got {came}")
    target = dtype or (matrix.dtype if matrix.is_floating_point() else torch.float64)
    return matrix.detach().to(dtype=target, device=device if device is not None else matrix.device)


def _wrap_callable(matrix: Any, size: int | None, dtype: torch.dtype, device: torch.device) -> SymmetricOperator:
    if isinstance(matrix, type):
        raise TypeError(f"expected a matrix, a SciPy operator or a function of a vector, got {shown(matrix)}")
    shape = getattr(matrix, "shape", None)
    if shape is not None and hasattr(matrix, "__matmul__"):
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"expected a square matrix, got shape {tuple(shape)}")
        if np.issubdtype(getattr(matrix, "dtype", None) or np.float64, np.complexfloating):
            raise ValueError(f"expected a real operator, got one of {matrix.dtype}. {_REAL_FORM}")

        def through_numpy(vector: Tensor) -> Tensor:
            return torch.as_tensor(np.asarray(matrix @ vector.cpu().numpy()))

        return CallableOperator(through_numpy, shape[0], dtype=dtype, device=device)
    if not callable(matrix):
        raise TypeError(
            f"expected a matrix, a SciPy operator or a function of a vector, got {shown(matrix)}; of an Objective, pass "
            "HessianOperator(objective) or another of its matrices"
        )
    if size is None:
        raise ValueError("a function does not say how long its vectors are: pass size=n")
    return CallableOperator(matrix, size, dtype=dtype, device=device)
