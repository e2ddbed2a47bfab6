"""Orthonormal vectors in memory, the Krylov space they span, its Ritz pairs with their errors, and the Lanczos run that grows it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_path
from sharpkit._checkpoint import step
from sharpkit._errors import NonFiniteError, NotSymmetricError, OutOfMemoryError
from sharpkit.linalg.results import Array, Budget
from sharpkit.objective.memory import Promise, human_bytes, is_limited
from sharpkit.operators.base import SymmetricOperator

_FIRST_CHUNK = 16  # rows of the first chunk, by judgement: most iterations end within one or two chunks
_PASSES = 2  # "twice is enough": Giraud, Langou, Rozloznik and van den Eshof, Numerische Mathematik 101 (2005)
# A second pass is needed where the first leaves less than half of a squared norm: Daniel, Gragg, Kaufman and Stewart (1976). Coefficients
# known from earlier products are subtracted before, if at most two lie above the rounding of float32 (as in Lanczos): by judgement.
_KEPT_SHARE, _NEAR, _MOST_NEAR = 0.5, 1e-6, 2
_MIXING_BLOCK = 2**22  # numbers mixed at a time when the basis is replaced, 32 MB in float64: by judgement
_SHARE = 0.5  # of the free memory may hold a basis: by judgement, the rest is for graphs, products and what else runs on the machine
_LIMITED_SHARE = 0.8  # of a memory_limit: by judgement, a limit is there to be used, and ten vectors of work fit beside forty
_WORKING = 3  # vectors beside each basis that grows: its product, the next vector, a probe; by judgement
_LEAST_WORKING = 4  # vectors that a product needs besides, its result and what it is made of: measured 3 to 4 (experiments/growth.py)
_STREAMED = 4  # rows that are brought to the operator's device at a time: by judgement
_UNKNOWN_MEMORY = 4e9  # bytes taken to be free where the system does not tell: by judgement, what any machine with torch has
_FIRST_SIZE = 16  # rows of the projected matrix before it first grows: by judgement, as for the chunks
_USUAL = (1e-6, 1e6)  # entries of products that are left as they are, by judgement: float32 squares reach from 1e-38 to 1e38
_DRIFT = 3.0  # times what a value moved lately is left to go: 2 by the law of 1 / m^2, more by judgement
_LEAST_DRIFT = 3  # products that count as lately: by judgement, no fewer than the checks before a single pair is accepted
_TRUST = 10.0  # the most by which an error may be believed to lie below its residual on such evidence alone: by judgement
_NOISE = 4.0  # times what products are off by may two of them contradict each other: by judgement, as errors of two add up
_BREAKDOWN = 20  # a remainder below so many roundings is nothing but rounding: by judgement, ten for each Gram-Schmidt pass


def working_dtype(operator: SymmetricOperator) -> torch.dtype:
    """The type recurrences run in: the operator's own, but never below float32."""
    return operator.dtype if operator.dtype in (torch.float32, torch.float64) else torch.float32


def affordable_rows(operator: SymmetricOperator, *, host: bool = False) -> int:
    """How many basis vectors fit into the memory meant for them, the same on every process.

    That is half of what is free, or most of what a ``memory_limit`` leaves.
    """
    where = "in host memory" if host else "there"

    def fitting() -> int:
        return int(operator.agree(_share(operator, host=host) * _available(operator, host=host) / row_bytes(operator)))

    return step(f"vectors that fit {where}", fitting)


def row_bytes(operator: SymmetricOperator) -> int:
    """Memory of one basis vector."""
    return operator.length * working_dtype(operator).itemsize


def _available(operator: SymmetricOperator, *, host: bool) -> float:
    free = operator.free_memory(host=host)
    return free if math.isfinite(free) else _UNKNOWN_MEMORY


def _share(operator: SymmetricOperator, *, host: bool) -> float:
    return _LIMITED_SHARE if not host and is_limited(operator.device) else _SHARE


def abreast(operator: SymmetricOperator, rows: int) -> int:
    """How many bases of so many rows fit beside each other."""
    return affordable_rows(operator) // (rows + _WORKING)


Offload = bool | str | os.PathLike[str]


def checked_offload(offload: Offload) -> Offload:
    """``offload`` as an argument: False, True for host memory, or the folder of a file.

    Raises:
        TypeError, ValueError: it is none of these, or no folder.
    """
    if isinstance(offload, (bool, int, np.bool_)) and offload in (0, 1):
        return bool(offload)
    if not isinstance(offload, (str, os.PathLike)):
        raise TypeError(f"offload must be True for host memory, False, or the path of a folder, got {type(offload).__name__}")
    folder = as_path("offload", offload)
    if not os.path.isdir(folder):
        raise ValueError(f"offload must be a folder that exists, to keep the basis in a file there; {folder!r} is none")
    return folder


def where(offload: Offload) -> str:
    """A place in words, "" beside the operator."""
    return "" if offload is False else "in host memory" if offload is True else f"in a file in {os.fspath(offload)}"


def place_for(operator: SymmetricOperator, rows: int, offload: Offload) -> Offload:
    """Where a basis of so many rows goes, which cannot do with fewer: where the caller says, else beside the operator or to the host.

    Raises:
        OutOfMemoryError: it fits nowhere.
    """
    if offload is not False or rows <= affordable_rows(operator):
        return offload
    if operator.device.type != "cpu" and rows <= affordable_rows(operator, host=True):
        return True
    # more than its share, but no more than there is
    kept_back = _LEAST_WORKING * row_bytes(operator) if is_limited(operator.device) else 0
    room = max(0.0, operator.agree(_available(operator, host=False)) - kept_back)
    if rows * row_bytes(operator) <= room:
        return False
    raise OutOfMemoryError(
        f"a basis of {rows} vectors takes {human_bytes(rows * row_bytes(operator))}, and {human_bytes(room)} may be taken for it on "
        f"{operator.device}: ask for fewer steps, allow more (memory_limit=), select fewer parameters (params=), or keep the basis in a "
        "file (offload='some/folder')"
    )


class Products:
    """Products in the type that recurrences run in, in units of the matrix, so that squares neither overflow nor vanish.

    Attributes:
        unit: what a product is to be multiplied by, a power of 2; 1 for matrices of usual size.
        underflow: how far a product may be off because its terms are as small as numbers get.
    """

    def __init__(self, operator: SymmetricOperator) -> None:
        self.operator, self.dtype = operator, working_dtype(operator)
        self.unit, self.underflow = 1.0, 0.0
        self._known = False

    def __call__(self, vector: Tensor) -> Tensor:
        """A v / unit for a (n,) vector."""
        return self.in_units(self.operator.multiply(vector.to(self.operator.dtype)))

    def in_units(self, product: Tensor) -> Tensor:
        """A v / unit of a product A v, (n,)."""
        product = product.to(self.dtype)
        if not self._known:  # the one time that it costs a synchronisation
            size = self.operator.agree(float(product.abs().max()))
            self._known = size > 0.0  # a product of 0 tells nothing about the others
            if self._known and math.isfinite(size) and not _USUAL[0] < size < _USUAL[1]:
                info, given = torch.finfo(self.dtype), torch.finfo(self.operator.dtype)
                most = int(-math.log2(info.tiny))  # 1 / unit has to be a number too
                self.unit = 2.0 ** min(max(round(math.log2(size)), -most), most)
                self.underflow = given.smallest_normal * given.eps * self.operator.size
        return product if self.unit == 1.0 else product / self.unit


class BasisRows:
    """Orthonormal vectors as the rows of contiguous chunks, on the operator's device, in host memory or in a file.

    Chunks double in size, so that growing never copies and a short iteration allocates little.

    Args:
        operator: where the vectors are needed.
        offload: True keeps them in host memory; a folder in a file there, which is gone with them.
        most: rows that are kept at most, if that is known: memory for so many is promised, and no more is taken.
    """

    def __init__(self, operator: SymmetricOperator, *, offload: Offload = False, most: int | None = None) -> None:
        self.operator = operator
        self.dtype = working_dtype(operator)
        self.storage_device = torch.device("cpu") if offload else operator.device
        self.size = 0
        self._folder = None if isinstance(offload, bool) else offload
        self._most, self._promise = most, Promise(self.storage_device, 0.0)
        if most is not None and self._folder is None:
            self._promise.nbytes = most * row_bytes(operator)
        self._chunks: list[Tensor] = []

    def _slot(self, index: int) -> Tensor:
        """Where vector ``index`` is stored, (n,)."""
        for chunk in self._chunks:
            if index < len(chunk):
                return chunk[index]
            index -= len(chunk)
        raise IndexError(index)

    def row(self, index: int) -> Tensor:
        """Vector ``index`` on the operator's device, (n,)."""
        return self._slot(index).to(self.operator.device)

    def append(self, vector: Tensor) -> None:
        """Store one more (n,) vector."""
        capacity = sum(map(len, self._chunks))
        if self.size == capacity:
            rows = max(_FIRST_CHUNK, self.size)
            if self._most is not None and capacity < self._most:
                rows = min(rows, self._most - capacity)
            self._chunks.append(self._chunk(rows))
            if self.storage_device.type != "cpu":  # taken at once
                self._keep_promise(capacity + rows)
        self._slot(self.size).copy_(vector)
        self.size += 1
        if self.storage_device.type == "cpu":  # taken when it is written to
            self._keep_promise(self.size)

    def _keep_promise(self, rows: int) -> None:
        if self._promise.nbytes:
            self._promise.nbytes = min(self._promise.nbytes, max(0, (self._most or 0) - rows) * row_bytes(self.operator))

    def _chunk(self, rows: int) -> Tensor:
        """Room for (rows, n) numbers, not zeros: a row is written before it is read."""
        if self._folder is None:
            return torch.empty(rows, self.operator.length, dtype=self.dtype, device=self.storage_device)
        nbytes = rows * row_bytes(self.operator)
        with tempfile.TemporaryFile(dir=self._folder, prefix="sharpkit-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, nbytes)  # a disk that is full shows now, not as a bus error later
            except AttributeError:  # systems without it
                file.truncate(nbytes)
            except OSError as error:
                raise OutOfMemoryError(
                    f"the folder {os.fspath(self._folder)!r} has no room for {human_bytes(nbytes)} of basis vectors ({error.strerror}): "
                    "give offload= another folder, or ask for fewer steps"
                ) from error
            # the system holds as much of it in memory as is free, and writes the rest
            mapped = np.memmap(file, dtype=str(self.dtype).removeprefix("torch."), mode="r+", shape=(rows, self.operator.length))
        return torch.from_numpy(mapped)

    def _stored(self) -> Iterator[Tensor]:
        """The stored vectors as (rows, n) tensors, in order, where they are stored."""
        left = self.size
        for chunk in self._chunks:
            if left > 0:
                yield chunk[:left]
            left -= len(chunk)

    def parts(self) -> Iterator[Tensor]:
        """The stored vectors as (rows, n) tensors, in order, on the operator's device: a few at a time where they come from elsewhere."""
        for chunk in self._stored():
            if chunk.device == self.operator.device:
                yield chunk
            else:
                for block in torch.split(chunk, _STREAMED):
                    yield block.to(self.operator.device)

    def coefficients(self, vectors: Tensor) -> Tensor:
        """Inner products with every stored vector: (size,) or (size, k)."""
        products = [self.operator.dot(part.T, vectors) for part in self.parts()]
        return torch.cat(products) if products else vectors.new_zeros((0, *vectors.shape[1:]))

    def combine(self, coefficients: Tensor) -> Tensor:
        """The linear combinations with (size,) or (size, k) coefficients: (n,) or (n, k)."""
        if not self.size:
            raise ValueError("the basis is empty")
        total = torch.zeros(self.operator.length, *coefficients.shape[1:], dtype=self.dtype, device=self.operator.device)
        self._add_combination_(total, coefficients, 1.0)
        return total

    def subtract_(self, vectors: Tensor, coefficients: Tensor) -> None:
        """``vectors -= combine(coefficients)``, without a second set of vectors."""
        self._add_combination_(vectors, coefficients, -1.0)

    def _add_combination_(self, total: Tensor, coefficients: Tensor, factor: float) -> None:
        first, add = 0, total.addmv_ if total.ndim == 1 else total.addmm_
        weights = coefficients.to(self.operator.device, self.dtype)
        for part in self.parts():
            add(part.T, weights[first : first + len(part)], alpha=factor)
            first += len(part)

    def orthogonalise(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Remove the basis from (n,) or (n, k) vectors by two passes of classical Gram-Schmidt.

        Returns:
            the remainder, a new tensor, and the coefficients removed, (size,) or (size, k).
        """
        total = vectors.new_zeros((self.size, *vectors.shape[1:]))
        rest = vectors.clone()
        if self.size:
            for _ in range(_PASSES):  # the second takes out what the first one's rounding has left inside
                inside = self.coefficients(rest)
                self.subtract_(rest, inside)
                total += inside
        return rest, total

    def replace(self, mixing: Array) -> None:
        """Replace the basis by mixing^T times it, ``mixing`` (size, new size) with orthonormal columns, in place."""
        weights = torch.as_tensor(mixing.T, dtype=self.dtype, device=self.storage_device)
        parts = list(self._stored())
        length = parts[0].shape[1]
        block = max(1, min(length, _MIXING_BLOCK // max(1, self.size)))  # columns, so that no second basis is ever in memory
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


@dataclass(frozen=True)
class Ritz:
    """Eigenpairs of the projected matrix.

    Attributes:
        values: (m,), ascending.
        coordinates: (m, m), column j is pair j in the multiplied vectors.
        outward: (m,), how far the products lead out of the space: the residuals in exact arithmetic.
        errors: (m,), how far an eigenvalue may lie from the value: the residual, or its square over the gap around (Kato and Temple).
        floor: what rounding and the noise of the products leave uncertain in a residual.
        noise: what they leave uncertain in a value: the part of the floor along one vector.
        zero: the size below which a value is 0 as far as rounding tells.
    """

    values: Array
    coordinates: Array
    outward: Array
    errors: Array
    floor: float
    noise: float
    zero: float

    @property
    def residuals(self) -> Array:
        """||A v - theta v||, (m,): some eigenvalue lies within it of theta."""
        return np.asarray(np.hypot(self.outward, self.floor))

    def tolerances(self, tol: float) -> Array:
        """What the error of each value has to fall below, (m,): ``tol`` of the value itself, or rounding where that is more."""
        size = np.abs(self.values)
        return np.maximum(tol * size, np.where(size <= self.zero, self.floor, self.noise))

    def settled(self, tol: float) -> Array:
        """Whether more products would not help, (m,): the value within its tolerance, the residual within that of the largest one."""
        return (self.errors <= self.tolerances(tol)) & (self.outward <= max(tol * self.scale, self.floor))

    def converged(self, tol: float) -> Array:
        """Whether each is settled and ``tol`` is no finer than rounding, (m,); a value that is 0 to rounding has converged."""
        size = np.abs(self.values)
        reached = (self.noise <= tol * size) | (size <= self.zero)
        return np.asarray(self.settled(tol) & reached & (self.floor <= tol * self.scale))

    @property
    def scale(self) -> float:
        """The largest magnitude, 0 if there are none."""
        return float(np.abs(self.values).max(initial=0.0))

    def pick(self, order: Array) -> Ritz:
        """Some of the pairs, in this order."""
        arrays = self.values[order], self.coordinates[:, order], self.outward[order], self.errors[order]
        return Ritz(*arrays, self.floor, self.noise, self.zero)


def value_errors(values: Array, residuals: Array) -> Array:
    """Bounds of |theta - lambda| for ascending Ritz values, (m,).

    An eigenvalue lies within the residual r of theta. Where no interval theta -+ r of the others comes nearer than a gap, one lies within
    r^2 / gap (Parlett, "The Symmetric Eigenvalue Problem", 11.7). Of values that overlap, unseen eigenvalues may lie in between.
    """
    upper = np.maximum.accumulate(values + residuals)
    lower = np.minimum.accumulate((values - residuals)[::-1])[::-1]
    between = lower[1:] - upper[:-1]
    gaps = np.minimum(np.append(between, np.inf), np.insert(between, 0, np.inf))  # the nearer of both sides
    apart = (gaps > residuals) & np.isfinite(gaps)  # alone, a value has nothing to be apart from
    return np.where(apart, residuals**2 / np.where(apart, gaps, 1.0), residuals)


class KrylovSpace:
    """A growing orthonormal basis Q, its expanded vectors E and the products A Q_E = Q H, H in float64 on the host.

    A vector is *pending* until it has been multiplied. The projected matrix is H[E, E]; a Ritz pair (theta, y) has the residual
    ||H[pending, E] y||, whatever mixture of starts, restarts and breakdowns made the basis.

    Args:
        operator: A.
        offload, most: of the basis, as for :class:`BasisRows`.

    Attributes:
        expanded, pending: basis indices already multiplied, and still to be.
        scale: largest ||A q|| seen, a lower bound of ||A||.
        asymmetry: largest violation of q_i.(A q_j) = q_j.(A q_i) seen: the noise of the products.
    """

    def __init__(self, operator: SymmetricOperator, *, offload: Offload = False, most: int | None = None) -> None:
        self.operator = operator
        self.products, self.rows = Products(operator), BasisRows(operator, offload=offload, most=most)
        self.dtype = self.rows.dtype
        self.eps = float(torch.finfo(self.dtype).eps)
        self.expanded: list[int] = []
        self.pending: list[int] = []
        self.scale = self.asymmetry = self._dropped = 0.0
        self._course: dict[int, Array] = {}  # the Ritz values by the number of products made
        self._made = 0
        self._forgetful = False
        self._matrix = np.zeros((_FIRST_SIZE, _FIRST_SIZE))

    @property
    def size(self) -> int:
        """Number of basis vectors, expanded and pending."""
        return self.rows.size

    @property
    def num_products(self) -> int:
        """Vectors multiplied since the beginning, with those that restarts have dropped."""
        return self._made

    @property
    def is_complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.size >= self.operator.size

    def add_start(self, vector: Tensor) -> bool:
        """Orthogonalise a vector and add it as pending; False where nothing of it is left."""
        if self.is_complete:
            return False
        vector = vector.to(self.dtype)
        before = float(self.operator.dot(vector, vector)) ** 0.5
        if not np.isfinite(before):
            raise NonFiniteError("a start vector contains NaN or infinity")
        if before == 0.0:
            return False
        rest, _ = self.rows.orthogonalise(vector / before)
        norm = float(self.operator.dot(rest, rest)) ** 0.5
        if norm <= _BREAKDOWN * self.eps:  # it lay in the span already
            return False
        rest, _ = self.rows.orthogonalise(rest.div_(norm))  # what was left may be small, and its rounding large
        self._append_pending(rest.div_(self.operator.dot(rest, rest).sqrt()))
        return True

    def add_random(self, generator: torch.Generator, distribution: str = "normal") -> bool:
        """Add a random direction orthogonal to the basis; False where the basis is complete."""
        return self.add_start(self.operator.random_vectors(1, generator=generator, distribution=distribution)[:, 0])

    def expand(self, index: int, product: Tensor | None = None) -> bool:
        """Multiply a pending vector, with one device synchronisation; False on breakdown (nothing new came out).

        Args:
            index: of the vector.
            product: with it, where it has been made together with others.

        Raises:
            NonFiniteError: the product is not finite.
            NotSymmetricError: the product contradicts earlier ones.
        """
        rest = self.products(self.rows.row(index)) if product is None else self.products.in_units(product)
        before, removed = self._subtract_known(index, rest)
        for _ in range(_PASSES):
            inside = self.rows.coefficients(rest)
            self.rows.subtract_(rest, inside)
            removed = removed + inside
            squares = torch.stack([self.operator.dot(rest, rest), before])
            host = torch.cat([removed, squares]).cpu().double().numpy()  # the one synchronisation, as a rule
            if host[-2] > _KEPT_SHARE * host[-1]:  # else the rounding of what was subtracted is left inside
                break
        if not np.isfinite(host).all():
            raise NonFiniteError(
                f"a product with {self.operator!r} contains NaN or infinity: the loss has no finite second derivative here, or half "
                "precision overflowed; check the loss on this data, or use float32"
            )
        grown, unit = float(host[-2]) ** 0.5, self.products.unit  # the rest has this length in units of the products
        beta, column = grown * unit, host[:-2] * unit
        self.scale = max(self.scale, float(np.hypot(np.linalg.norm(column), beta)))
        self._ensure(self.size + 1)
        if self._forgetful:  # the row is not known yet: both halves are written from this product
            self._matrix[index, : self.size] = column
        else:
            self._check_symmetry(index, column)
        self._matrix[: self.size, index] = column
        # what the new vector contributes to later rows is known only when it is multiplied: H is written column by column
        self.pending.remove(index)
        self.expanded.append(index)
        self._made += 1
        if self.is_complete or beta <= _BREAKDOWN * self.eps * self.scale:
            self._dropped = max(self._dropped, beta)
            return False
        self._matrix[self.size, index] = beta
        self._append_pending(rest.div_(grown))
        return True

    def _subtract_known(self, index: int, product: Tensor) -> tuple[Tensor, Tensor]:
        """Subtract from a product, in place, its part along its own vector and along those whose coefficients are known by symmetry.

        Returns:
            the squared norm of what remains, and the coefficients subtracted, (size,).
        """
        subtracted = product.new_zeros(self.size)
        known = self._matrix[index, self.expanded] / self.products.unit
        near = np.flatnonzero(np.abs(known) > _NEAR * self.scale / self.products.unit)
        if len(near) > _MOST_NEAR or self._forgetful:
            return self.operator.dot(product, product), subtracted
        for j in near:
            product.sub_(self.rows.row(self.expanded[j]), alpha=float(known[j]))
            subtracted[self.expanded[j]] = float(known[j])
        own = self.rows.row(index)
        subtracted[index] = self.operator.dot(own, product)
        product.sub_(own * subtracted[index])
        return self.operator.dot(product, product), subtracted

    def projected(self, indices: list[int] | None = None) -> Array:
        """The projected matrix over some expanded vectors (default all), symmetrised."""
        chosen = self.expanded if indices is None else indices
        block = self._matrix[np.ix_(chosen, chosen)]
        return (block + block.T) / 2

    def ritz(self, indices: list[int] | None = None) -> Ritz:
        """The Ritz pairs over some expanded vectors (default all), ascending."""
        chosen = self.expanded if indices is None else indices
        values, coordinates = np.linalg.eigh(self.projected(chosen))
        outward = np.linalg.norm(self._matrix[np.ix_(self.pending, chosen)] @ coordinates, axis=0)  # 0 where nothing is pending
        errors, rounding = value_errors(values, outward), self._rounding()
        if indices is None:
            errors = np.minimum(errors, self._drift(values, outward))
        noise = max(rounding / max(1.0, len(self.expanded)) ** 0.5, 2 * self.operator.rounding * self.scale)
        # 2: the products round, and so did A; and where a breakdown dropped more than rounding, nothing so small is known
        zero = 2 * noise if self._dropped <= rounding else 0.0
        return Ritz(values, coordinates, outward, errors, self.floor(), noise, zero)

    def _drift(self, values: Array, outward: Array) -> Array:
        """What is left to go judging by the last quarter of the products, (m,): at the edge of a bulk no gap is ever seen.

        There a value is off by c / m^2 after m products, of which the last quarter made two thirds of what is left to go.
        """
        self._course[self._made] = values
        before = self._course.get(self._made - max(_LEAST_DRIFT, self._made // 4))
        moved = np.full(len(values), np.inf)
        if before is not None and (half := min(len(values), len(before)) // 2):  # each half as seen from its own end
            moved[:half], moved[-half:] = np.abs(values[:half] - before[:half]), np.abs(values[-half:] - before[-half:])
        # the next product alone gains about outward^2 / width
        gain = outward**2 / max(values.max(initial=0.0) - values.min(initial=0.0), 1e-300)
        return np.asarray(np.maximum(_DRIFT * moved + gain, outward / _TRUST))

    def outward(self) -> Array:
        """H: the products of the expanded vectors in the basis, (size, len(expanded))."""
        return self._matrix[: self.size, self.expanded]

    def couplings(self) -> Array:
        """H[pending, E]: how the expanded vectors lead out of their span, (len(pending), len(expanded))."""
        return self._matrix[np.ix_(self.pending, self.expanded)]

    def floor(self) -> float:
        """What rounding and the noise of the products leave uncertain in a residual."""
        return max(self._dropped, self._rounding())

    def _rounding(self) -> float:
        # Under autocast, eigenvalues were off by up to twice the rounding of its type (tests/linalg/test_tracking.py; where data is fitted
        # to large logits by more), while products with float32 vectors agree with each other far better than that.
        relative = 2 * max(self.eps * max(1.0, len(self.expanded)) ** 0.5, self.operator.rounding) * self.scale
        return float(max(self.asymmetry, relative, self.products.underflow))

    def vectors(self, coordinates: Array) -> Tensor:
        """Combinations of the expanded vectors, (n, k) for (len(expanded), k) coordinates, in the operator's dtype."""
        full = np.zeros((self.size, coordinates.shape[1]))
        full[self.expanded] = coordinates
        return self.rows.combine(torch.from_numpy(full)).to(self.operator.dtype)

    def compress(self, values: Array, coordinates: Array) -> None:
        """Thick restart: keep the given Ritz pairs and the pending vectors only."""
        kept, pending = len(values), len(self.pending)
        mixing = np.zeros((self.size, kept + pending))
        mixing[np.ix_(self.expanded, range(kept))] = coordinates
        mixing[self.pending, range(kept, kept + pending)] = 1.0
        outward = self.couplings() @ coordinates  # before the basis changes under it
        self.rows.replace(mixing)
        self._matrix = np.zeros_like(self._matrix)
        self._matrix[range(kept), range(kept)] = values
        self._matrix[kept : kept + pending, :kept] = outward
        self.expanded, self.pending = list(range(kept)), list(range(kept, kept + pending))

    def forget_pending(self) -> None:
        """Drop the pending vectors, which must be the last ones: the basis is what has been multiplied.

        From then on the projected matrix is right, but H no longer tells the residuals and the symmetry.
        """
        self._forgetful = True
        while self.pending and max(self.pending) == self.size - 1:
            self._matrix[self.size - 1, :] = 0.0  # the next vector takes this index, and must not inherit the row
            self.pending.remove(self.size - 1)
            self.rows.size -= 1

    def _append_pending(self, vector: Tensor) -> None:
        self._ensure(self.size + 1)
        self.pending.append(self.size)
        self.rows.append(vector)

    def _ensure(self, size: int) -> None:
        if size > len(self._matrix):  # doubled, so that growing to m rows copies no more than m^2 numbers in all
            grown = np.zeros((2 * size, 2 * size))
            grown[: len(self._matrix), : len(self._matrix)] = self._matrix
            self._matrix = grown

    def _check_symmetry(self, index: int, column: Array) -> None:
        if not self.expanded:
            return
        there, back = column[self.expanded], self._matrix[index, self.expanded]
        worst = int(np.argmax(np.abs(there - back)))
        violation = float(np.linalg.norm(there - back))
        self.asymmetry = max(self.asymmetry, violation)
        # Rounding leaves about eps, products under bfloat16 autocast a few 1e-3; a matrix that is not symmetric leaves order 1.
        allowed = max(1e-5 if self.operator.dtype == torch.float64 else 2e-2, _NOISE * self.operator.rounding)
        if violation > allowed * self.scale:
            raise NotSymmetricError(
                f"products contradict each other: u.(A v) = {there[worst]:.6g} but v.(A u) = {back[worst]:.6g} where ||A v|| reaches "
                f"{self.scale:.6g}; {self.operator!r} is not symmetric, or its products are not deterministic. Pass (A + A^T) / 2 if the "
                "matrix is not symmetric; fix the data, put dropout into eval mode if it changes between products."
            )


def lanczos_run(
    space: KrylovSpace,
    budget: Budget,
    enough: Callable[[], bool],
    progress: Callable[[], tuple[int, str]],
    *,
    choose: Callable[[], int] | None = None,
    refill: Callable[[], bool] | None = None,
    least: int = 0,
) -> bool:
    """Multiply pending vectors one after another: the Lanczos iteration that eigenpairs, quadrature and tracking share.

    Args:
        space: with a start pending; it grows.
        budget: stops the run when exhausted.
        enough: asked after each product, whether to stop.
        progress: products expected in all, and what is being done, for the budget's callback.
        choose: picks the pending vector to multiply next, by its basis index; by default the first.
        refill: adds a pending vector where none is left, and says whether there was one to add; by default the run ends there.
        least: products made whatever the budget says.

    Returns:
        False if the budget ended it.
    """
    while space.pending or (refill is not None and refill()):
        if len(space.expanded) >= least and not budget.allows():
            return False
        space.expand(choose() if choose is not None else space.pending[0])
        done = enough()
        budget.report(*progress())
        if done:
            break
    return True


def lanczos_abreast(spaces: Sequence[KrylovSpace], budget: Budget, steps: int, progress: tuple[int, str]) -> None:
    """Lanczos in several spaces at once, each with its start pending: a step in every space, then the next, its products made together."""
    operator = spaces[0].operator
    for _ in range(steps):
        growing = [space for space in spaces if space.pending]
        if not growing:
            return
        vectors = torch.stack([space.rows.row(space.pending[0]) for space in growing]).T.to(operator.dtype)
        for space, product in zip(growing, operator.multiply(vectors).T, strict=True):
            space.expand(space.pending[0], product)
        budget.report(*progress)
