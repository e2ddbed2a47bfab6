"""The symmetric linear operator: what every algorithm in :mod:`sharpkit.linalg` works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sharpkit._errors import NonFiniteError, NotSymmetricError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

_DISTRIBUTIONS = ("normal", "rademacher")


class SymmetricOperator(ABC):
    """A real symmetric n x n matrix known only through its products with vectors.

    Subclasses implement :meth:`_multiply_vector`. Vectors are flat tensors of shape (n,), or (n, k) for k at once.
    Where vectors are replicated over processes or sharded, subclasses override :meth:`dot` and :meth:`agree`, the one
    place through which all inner products and all decisions go.

    Attributes:
        num_matvecs: products made so far, one per column.
    """

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        if size < 1:
            raise ValueError(f"an operator needs at least one row, got size={size}")
        self._size = size
        self._dtype = dtype
        self._device = device
        self.num_matvecs = 0

    # -- what it is ---------------------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        """Number of rows, n."""
        return self._size

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self._size, self._size)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the vectors it multiplies."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors it multiplies live."""
        return self._device

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._size} x {self._size}, {self._dtype}, {self._device})"

    # -- products -----------------------------------------------------------------------------------------------------
    @abstractmethod
    def _multiply_vector(self, vector: Tensor) -> Tensor:
        """The product with one vector of shape (n,), as a new tensor."""

    def _multiply_columns(self, columns: Tensor) -> Tensor:
        """The product with (n, k) vectors. Override where k at once is cheaper than one by one."""
        product = torch.empty_like(columns)
        for j in range(columns.shape[1]):
            product[:, j] = self._multiply_vector(columns[:, j].contiguous())
        return product

    def multiply(self, vectors: Tensor) -> Tensor:
        """The product without checking the answer for NaN; algorithms check their scalars instead.

        Args:
            vectors: (n,) or (n, k), of this operator's dtype and device.

        Returns:
            A new tensor of the same shape.
        """
        self._check_vectors(vectors)
        vectors = vectors.detach()
        if vectors.ndim == 1:
            self.num_matvecs += 1
            return self._multiply_vector(vectors)
        self.num_matvecs += vectors.shape[1]
        return self._multiply_columns(vectors)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product ``A @ v`` with v of shape (n,) or (n, k).

        Raises:
            ValueError: wrong shape, dtype or device.
            NonFiniteError: the product contains NaN or infinity.
        """
        product = self.multiply(vectors)
        if not bool(torch.isfinite(product.sum())) and not bool(
            torch.isfinite(product).all()
        ):  # the sum alone is cheaper, but may overflow
            cause = (
                "the vector itself is not finite"
                if not bool(torch.isfinite(vectors).all())
                else (
                    "the function has no second derivative at this point (a square root at 0, a norm of a zero vector), "
                    "or half precision overflowed"
                )
            )
            raise NonFiniteError(f"the product with {self!r} contains NaN or infinity: {cause}")
        return product

    def _check_vectors(self, vectors: Tensor) -> None:
        if not isinstance(vectors, Tensor):
            raise TypeError(f"expected a torch.Tensor of shape ({self._size},) or ({self._size}, k), got {type(vectors).__name__}")
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self._size:
            raise ValueError(f"expected shape ({self._size},) or ({self._size}, k), got {tuple(vectors.shape)}")
        if vectors.dtype != self._dtype:
            raise ValueError(f"this operator multiplies {self._dtype} vectors, got {vectors.dtype}: use v.to({self._dtype})")
        if vectors.device != self._device:
            raise ValueError(f"this operator lives on {self._device}, the vector on {vectors.device}: use v.to({str(self._device)!r})")

    # -- the one place for inner products, decisions and random vectors -------------------------------------------------
    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products ``left^T right``, over all processes where vectors are sharded.

        Args:
            left: (n,) or (n, j).
            right: (n,) or (n, k).

        Returns:
            (), (j,), (k,) or (j, k).
        """
        return left.T @ right if left.ndim == 2 else torch.tensordot(left, right, dims=1) if right.ndim == 1 else left @ right

    def agree(self, value: float) -> float:
        """The same number on every process (the first one's), for decisions such as a time budget running out."""
        return value

    def random_vectors(self, k: int, *, generator: torch.Generator, distribution: str = "normal") -> Tensor:
        """Independent random probes of shape (n, k), drawn on the CPU so that a seed means the same on every device.

        Args:
            k: number of columns.
            generator: a CPU generator; it advances.
            distribution: ``"normal"`` (standard Gaussian) or ``"rademacher"`` (+-1).
        """
        if distribution not in _DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {_DISTRIBUTIONS}, got {distribution!r}")
        draw_type = self._dtype if self._dtype in (torch.float32, torch.float64) else torch.float32
        if distribution == "normal":
            draws = torch.randn(k, self._size, generator=generator, dtype=draw_type)
        else:
            draws = torch.randint(0, 2, (k, self._size), generator=generator, dtype=torch.int8).to(draw_type).mul_(2).sub_(1)
        return draws.to(device=self._device, dtype=self._dtype).T

    # -- conversions --------------------------------------------------------------------------------------------------
    def to_dense(self) -> Tensor:
        """The whole matrix, (n, n), by n products. For small n: tests and teaching."""
        identity = torch.eye(self._size, dtype=self._dtype, device=self._device)
        return self @ identity

    def to_scipy(self) -> LinearOperator:
        """A :class:`scipy.sparse.linalg.LinearOperator` over NumPy vectors on the host."""
        from scipy.sparse.linalg import LinearOperator

        dtype = torch.empty(0, dtype=self._dtype).numpy().dtype

        def multiply(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            vector = torch.as_tensor(np.ascontiguousarray(array), dtype=self._dtype, device=self._device)
            return (self @ vector).cpu().numpy()

        return LinearOperator(
            self.shape,
            matvec=lambda v: multiply(v.reshape(-1)),
            matmat=multiply,
            rmatvec=lambda v: multiply(v.reshape(-1)),
            rmatmat=multiply,
            dtype=dtype,
        )

    def block(self, pattern: str | Callable[[str, Tensor], bool]) -> SymmetricOperator:
        """The diagonal block of a named parameter group; curvature operators implement it."""
        raise TypeError(f"{type(self).__name__} has no named parameters, so it has no blocks; restrict the matrix before wrapping it")

    # -- algebra (sharpkit.operators.algebra) -----------------------------------------------------------------------------
    def __add__(self, other: SymmetricOperator | float) -> SymmetricOperator:
        """``A + B``, or ``A + s`` meaning A + s I."""

        return add(self, other)

    __radd__ = __add__

    def __mul__(self, factor: float) -> SymmetricOperator:

        return scale(self, factor)

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

        return deflate(self, vectors, values)


def check_symmetric(operator: SymmetricOperator, *, seed: int = 0, rtol: float | None = None) -> None:
    """Raise unless u.(A v) = v.(A u) for two random vectors, up to rounding.

    Args:
        operator: what to test; two products are made.
        seed: of the two vectors.
        rtol: tolerance relative to ||A v|| ||u||; by default 1e-8 in float64, 1e-3 otherwise.

    Raises:
        NotSymmetricError: it is not symmetric.
    """
    probes = operator.random_vectors(2, generator=torch.Generator().manual_seed(seed))
    products = operator @ probes
    left, right = float(operator.dot(probes[:, 0], products[:, 1])), float(operator.dot(probes[:, 1], products[:, 0]))
    norms = [float(operator.dot(x, x)) ** 0.5 for x in (probes[:, 0], products[:, 0], probes[:, 1], products[:, 1])]
    scale = max(norms[0] * norms[3], norms[2] * norms[1])
    tolerance = rtol if rtol is not None else (1e-8 if operator.dtype == torch.float64 else 1e-3)
    if abs(left - right) > tolerance * scale:
        raise NotSymmetricError(
            f"u.(A v) = {left:.9g} but v.(A u) = {right:.9g}: {operator!r} is not symmetric, and every algorithm here needs a symmetric "
            "one. If the matrix itself is meant to be symmetric, its product is wrong; otherwise pass (A + A^T) / 2 or A^T A."
        )
