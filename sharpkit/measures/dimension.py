"""The effective dimension: how many directions the curvature determines, against a prior's or damping's."""

from __future__ import annotations

from typing import Any

import numpy as np

from sharpkit._arguments import as_seed, real, whole
from sharpkit._calls import public_call
from sharpkit.linalg.results import Array, Estimate, SpectralDensity
from sharpkit.linalg.slq import spectral_density


@public_call
def effective_dimension(
    spectrum: Any, damping: float, *, num_probes: int = 10, num_steps: int = 80, seed: int = 0, name: str = ""
) -> Estimate:
    """sum_i lambda_i / (lambda_i + damping) over the eigenvalues, negative ones counted as 0.

    A direction counts as 1 where its curvature is far above the damping, as 0 where it is far below. From the nodes of stochastic Lanczos
    quadrature, with the standard error over their probes.

    Invariant under permutations of neurons, up to the probes; not under layer rescaling or scaling of filters, which change eigenvalues of
    Hessian and Gauss-Newton matrix alike. Those of ``AdaptiveOperator`` stay the same under both, and so does its effective dimension.

    Args:
        spectrum: a :class:`sharpkit.SpectralDensity`, which costs nothing more, or an operator whose density is to be measured.
        damping: in units of the eigenvalues, positive: the precision of a Gaussian prior over the number of samples, a weight decay.
        num_probes, num_steps, seed: of the density, if it is measured: num_probes x num_steps products.
        name: of the result, which pages and comparisons show.

    Returns:
        between 0 and the number of parameters.

    Raises:
        ValueError: the damping is not positive.
        TypeError: spectrum is neither.

    Example:
        >>> import torch, sharpkit as sk
        >>> round(sk.measures.effective_dimension(torch.diag(torch.tensor([3.0, 1.0, 0.0])), 1.0).value, 4)  # 3/4 + 1/2
        1.25

    References:
        MacKay (1992), "Bayesian interpolation"; Maddox, Benton and Wilson (2020), arXiv 2003.02139.
    """
    damping = real("damping", damping, above=0)
    if not isinstance(spectrum, SpectralDensity):
        num_probes, num_steps = whole("num_probes", num_probes), whole("num_steps", num_steps)
        spectrum = spectral_density(spectrum, num_probes=num_probes, num_steps=num_steps, seed=as_seed(seed))

    def share(eigenvalues: Array) -> Array:
        positive = np.maximum(eigenvalues, 0.0)
        return np.asarray(positive / (positive + damping))

    density: SpectralDensity = spectrum
    return density.total(share)
