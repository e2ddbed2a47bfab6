"""Random probes z^T P A P z on the complement of a growing basis, P = 1 - Q Q^T; probes made early are reused as Q grows."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sharpkit._errors import NonFiniteError
from sharpkit.linalg.basis import Array
from sharpkit.linalg.krylov import KrylovSpace
from sharpkit.linalg.results import standard_error
from sharpkit.operators.base import SymmetricOperator


class DeflatedProbes:
    """Samples of the part of tr A, or of ||A||_F^2, that a growing basis Q does not hold; one product each.

    A kept probe z stores c = Q^T z and d = Q^T A z, so that a larger basis needs no new product. With A Q_E = Q H,

        tr A      = tr Q^T A Q + E z^T P A P z,   z^T P A P z = z^T A z - 2 c.d + c^T (Q^T A Q) c,
        ||A||_F^2 = ||H||_F^2  + E ||A P z||^2,   ||A P z||^2 = ||A z||^2 - 2 d.H c + ||H c||^2.

    Probes that are not kept are projected before they are multiplied; they belong to the basis they were drawn with.

    Args:
        squared: estimate ||A||_F^2 = tr A^2 instead of tr A.
    """

    def __init__(self, operator: SymmetricOperator, generator: torch.Generator, *, squared: bool = False) -> None:
        self.operator, self.generator, self.squared = operator, generator, squared
        self.space = KrylovSpace(operator)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._plain: list[float] = []
        self._inner = np.zeros((0, 0, 2))  # (basis row, kept probe, c and d)
        self._late: list[float] = []

    def __len__(self) -> int:
        return len(self._plain) + len(self._late)

    @property
    def num_kept(self) -> int:
        """Probes that a growing basis can still use."""
        return len(self._kept)

    @property
    def num_late(self) -> int:
        """Probes drawn for the present basis alone."""
        return len(self._late)

    @property
    def known(self) -> float:
        """What the basis holds exactly."""
        if not self.space.expanded:
            return 0.0
        return float((self.space.outward() ** 2).sum()) if self.squared else float(np.trace(self.space.projected()))

    def draw(self, *, keep: bool) -> None:
        """One more probe, one product.

        Args:
            keep: hold on to the probe, because the basis may still grow.
        """
        probe = self.operator.random_vectors(1, generator=self.generator, distribution="rademacher")[:, 0].to(self.space.dtype)
        if self.space.expanded and not keep:
            coefficients = self.space.rows.coefficients(probe)
            inside = torch.zeros_like(coefficients)
            inside[self.space.expanded] = coefficients[self.space.expanded]
            probe = probe - self.space.rows.combine(inside)
        product = self.operator.multiply(probe.to(self.operator.dtype)).to(self.space.dtype)
        value = float(self.operator.dot(product if self.squared else probe, product))
        if not math.isfinite(value):
            raise NonFiniteError(f"a product with {self.operator!r} contains NaN or infinity; check the loss on this data")
        if not keep:
            self._late.append(value)
            return
        self._plain.append(value)
        self._kept.append((probe, product.clone()))
        inner = self.space.rows.coefficients(torch.stack([probe, product], dim=1)).cpu().double().numpy()
        self._inner = np.concatenate([self._inner, inner[:, None, :]], axis=1)

    def deflate_one(self) -> None:
        """Expand the pending Krylov vector: the basis grows by one. Late probes, made for the smaller basis, are dropped."""
        self.space.expand(self.space.pending[0])
        self._record()

    def sketch_one(self) -> bool:
        """Add the direction A s of a random s, and expand it: two products; False where the space is exhausted."""
        sketch = self.operator.random_vectors(1, generator=self.generator, distribution="normal")[:, 0]
        image = self.operator.multiply(sketch)
        known = self.space.size
        if not self.space.add_start(image):
            return False
        self.space.expand(known)
        self.space.forget_pending()
        self._record()
        return True

    def _record(self) -> None:
        """Inner products of the kept probes with the basis vectors that are new."""
        self._late = []
        kept = len(self._kept)
        if not kept:
            self._inner = np.zeros((self.space.size, 0, 2))
            return
        pairs = torch.stack([vector for pair in self._kept for vector in pair], dim=1)
        new = [
            self.operator.dot(self.space.rows.row(index), pairs).cpu().double().numpy().reshape(1, kept, 2)
            for index in range(len(self._inner), self.space.size)
        ]
        self._inner = np.concatenate([self._inner, *new])

    def samples(self) -> Array:
        """The samples of every probe, for the present basis."""
        early = np.array(self._plain)
        expanded = self.space.expanded
        if expanded and len(early):
            c, d = self._inner[expanded, :, 0], self._inner[..., 1]
            if self.squared:
                image = self.space.outward() @ c
                early = early - 2 * (d * image).sum(axis=0) + (image**2).sum(axis=0)
            else:
                early = early - 2 * (c * d[expanded]).sum(axis=0) + (c * (self.space.projected() @ c)).sum(axis=0)
        return np.concatenate([early, self._late])

    def mean_and_spread(self) -> tuple[float, float]:
        """The trace estimate and the standard deviation of one probe."""
        samples = self.samples()
        if len(samples) < 2:
            return self.known + float(samples.sum()), math.inf
        return self.known + float(samples.mean()), float(samples.std(ddof=1))

    def estimate(self) -> tuple[float, float]:
        """The trace and its standard error, widened for few probes."""
        return self.mean_and_spread()[0], standard_error(self.samples())
