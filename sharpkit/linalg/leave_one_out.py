"""What random probes and their images tell of a matrix, each probe's error being judged with what all the others tell."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sharpkit.linalg.results import Array

# Shifts in units of an image's length, tried from the largest down: networks' Hessians wanted .5 to 3, spectra of a few outliers 1e-2
# (experiments/diagonal_error.py). The steps and the patience by judgement: a step of 3 costs up to 3 % of an error, a refined one 0.5 %.
_LARGEST, _STEP, _PATIENCE = 10.0, 10.0**0.5, 2


class LeaveOneOut:
    """Estimates of a symmetric A from probes Z = (z_1 .. z_m) of +-1 and their images Y = A Z, by Nystrom approximations with a shift.

    With S = Z^T Y = Z^T A Z and all probes but the i-th, Y_i Re (S_i + i mu)^-1 Y_i^T approximates A: for mu = 0 this is Nystrom's
    approximation, which breaks down where S_i is nearly singular; with the shift an eigenvalue s counts as s / (s^2 + mu^2) instead of
    1 / s, so that A may have both signs. What the approximation leaves is told by probe i, which knows nothing of it, so that each of the
    m estimates is unbiased. From C = (S + i mu)^-1 alone, by Schur complements, with c = diag(C) and u_i = Y C e_i:

        approximation without i:  Y Re(C) Y^T - Re(u_i u_i^T / c_i),     what it leaves of A z_i:  Re(u_i / c_i).

    An infinite shift stands for no approximation: the plain estimates z_i * (A z_i).

    Args:
        inner: S, (m, m).
        gram: Y^T Y, (m, m).

    Attributes:
        unit: root mean square length of the images, in which shifts are measured.
    """

    def __init__(self, inner: Array, gram: Array) -> None:
        self.gram = gram
        self._values, self._vectors = np.linalg.eigh((inner + inner.T) / 2)
        self._plain = np.diag(inner)
        self.unit = math.sqrt(max(0.0, float(np.trace(gram)) / len(gram)))

    def __len__(self) -> int:
        return len(self.gram)

    def resolvent(self, shift: float) -> tuple[Array, Array]:
        """C and 1 / diag(C), complex."""
        inverse = (self._vectors / (self._values + 1j * shift)) @ self._vectors.T
        return inverse, 1 / np.diag(inverse)

    def best_shift(self, spread: Callable[[float], float], rounding: float) -> float:
        """The shift that makes ``spread`` smallest; inf where no approximation is better.

        Args:
            spread: of the estimates, given a shift.
            rounding: of the products, relative; its root is the smallest shift, below which rounding would be all that is left.
        """
        best, least = math.inf, spread(math.inf)
        if not 0.0 < self.unit < math.inf or not least > 0.0:
            return best
        tried, shift, missed = math.inf, _LARGEST, 0
        while missed < _PATIENCE and shift >= rounding**0.5:
            now = spread(shift * self.unit)
            missed = 0 if now < tried else missed + 1
            tried = min(tried, now)
            if now < least:
                best, least = shift, now
            shift /= _STEP
        if math.isinf(best):
            return best
        finer = [(spread(shift * self.unit), shift) for shift in (best * _STEP**0.5, best / _STEP**0.5)]
        return float(min((least, best), *finer)[1]) * self.unit

    def diagonals(self, probes: Tensor, images: Tensor, shift: float) -> Tensor:
        """The m estimates of some entries of diag(A), (entries, m).

        Args:
            probes, images: those entries of Z and Y, (entries, m).
            shift: mu.
        """
        if math.isinf(shift):
            return probes * images
        inverse, inverted = self.resolvent(shift)
        real, imaginary = (images @ torch.from_numpy(part.copy()).to(images) for part in (inverse.real, inverse.imag))
        a, b = (torch.from_numpy(part.copy()).to(images) for part in (inverted.real, inverted.imag))
        known = (images * real).sum(dim=1, keepdim=True)
        return known - a * (real**2 - imaginary**2) + 2 * b * real * imaginary + probes * (a * real - b * imaginary)
