"""Random probes z^T P A P z on the complement of a growing basis, P = 1 - Q Q^T; probes made early are reused as Q grows."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sharpkit._errors import NonFiniteError
from sharpkit.linalg.krylov import Array, KrylovSpace
from sharpkit.operators.base import SymmetricOperator


@lru_cache(maxsize=None)
def student_factor(count: int) -> float:
    """What widens the standard error of ``count`` samples so that two of it hold the usual 95 %."""
    from scipy.stats import norm, t

    return float(t.ppf(norm.cdf(2.0), count - 1) / 2.0) if count > 1 else math.inf


class DeflatedProbes:
    """Samples of tr(P A P), each from one product, and the exact remainder tr(Q^T A Q).

    A probe keeps c = Q^T z and d = Q^T A z, so a larger basis needs no new product:
    z^T P A P z = z^T A z - 2 c.d + c^T (Q^T A Q) c. The probes drawn before the basis grew are kept for that (two vectors each); those
    drawn later are projected first and need not be.
    """

    def __init__(self, operator: SymmetricOperator, generator: torch.Generator) -> None:
        self.operator, self.generator = operator, generator
        self.space = KrylovSpace(operator)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._plain: list[float] = []
        self._inside: list[list[float]] = []  # c of each kept probe, one entry per expanded vector
        self._outside: list[list[float]] = []  # d of each kept probe
        self._late: list[float] = []

    def __len__(self) -> int:
        return len(self._plain) + len(self._late)

    @property
    def known(self) -> float:
        """tr Q^T A Q."""
        return float(np.trace(self.space.projected())) if self.space.expanded else 0.0

    def draw(self, *, keep: bool) -> None:
        """One more probe, one product.

        Args:
            keep: hold on to the probe, because the basis will still grow; otherwise it is projected first.
        """
        probe = self.operator.random_vectors(1, generator=self.generator, distribution="rademacher")[:, 0].to(self.space.dtype)
        if self.space.expanded and not keep:
            coefficients = self.space.rows.coefficients(probe)
            inside = torch.zeros_like(coefficients)
            inside[self.space.expanded] = coefficients[self.space.expanded]
            probe = probe - self.space.rows.combine(inside)
        product = self.operator.multiply(probe.to(self.operator.dtype)).to(self.space.dtype)
        value = float(self.operator.dot(probe, product))
        if not math.isfinite(value):
            raise NonFiniteError(f"a product with {self.operator!r} contains NaN or infinity; check the loss on this data")
        if not keep:
            self._late.append(value)
            return
        self._plain.append(value)
        self._kept.append((probe, product.clone()))
        c, d = (self.space.rows.coefficients(vector).cpu().double().numpy()[self.space.expanded].tolist() for vector in (probe, product))
        self._inside.append(c)
        self._outside.append(d)

    def deflate_one(self) -> None:
        """Expand the pending Krylov vector: the basis grows by one."""
        index = self.space.pending[0]
        self.space.expand(index)
        self._record(index)

    def sketch_one(self) -> bool:
        """Add the direction A s of a random s, and expand it: two products; False where the space is exhausted."""
        sketch = self.operator.random_vectors(1, generator=self.generator, distribution="normal")[:, 0]
        image = self.operator.multiply(sketch)
        known = self.space.size
        if not self.space.add_start(image):
            return False
        self.space.expand(known)
        self.space.forget_pending()
        self._record(known)
        return True

    def _record(self, index: int) -> None:
        if not self._kept:
            return
        row = self.space.rows.row(index)
        pairs = torch.stack([vector for pair in self._kept for vector in pair], dim=1)
        inner = self.operator.dot(row, pairs).cpu().double().numpy().reshape(-1, 2)
        for c, d, (new_c, new_d) in zip(self._inside, self._outside, inner.tolist(), strict=True):
            c.append(new_c)
            d.append(new_d)

    def samples(self) -> Array:
        """z^T P A P z of every probe."""
        early = np.array(self._plain)
        if self.space.expanded and len(early):
            c, d = np.array(self._inside), np.array(self._outside)
            early = early - 2 * (c * d).sum(axis=1) + np.einsum("pi,ij,pj->p", c, self.space.projected(), c)
        return np.concatenate([early, self._late])

    def release(self) -> None:
        """The basis is final: turn the kept probes into numbers and free them."""
        self._late = self.samples().tolist()
        self._plain, self._kept, self._inside, self._outside = [], [], [], []

    def mean_and_spread(self) -> tuple[float, float]:
        """The trace estimate and the standard deviation of one probe."""
        samples = self.samples()
        if len(samples) < 2:
            return self.known + float(samples.sum()), math.inf
        return self.known + float(samples.mean()), float(samples.std(ddof=1))

    def estimate(self) -> tuple[float, float]:
        """The trace and its standard error, widened for few probes."""
        value, spread = self.mean_and_spread()
        count = len(self)
        return value, spread / math.sqrt(count) * student_factor(count) if count > 1 else math.inf
