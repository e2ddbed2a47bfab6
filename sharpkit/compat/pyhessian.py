"""PyHessian's class and its density plot, with the same constructor, methods and shapes: change the import, keep the script.

    from sharpkit.compat.pyhessian import hessian, get_esd_plot

What differs in the numbers: docs/coming_from.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit._arguments import real, whole
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.results import probe_error
from sharpkit.linalg.slq import spectral_density
from sharpkit.objective.objective import Objective
from sharpkit.operators.hessian import HessianOperator

_LEAST = 4  # probes before a standard error is believed, by judgement


class hessian:
    """Top eigenvalues, trace and spectral density of the Hessian of a loss, in eval mode.

    The data is averaged by what each batch counts, products are exact on any device, the model is left as it was: mode, gradients and
    buffers too. Random numbers follow ``torch.manual_seed``.

    Args:
        model: on the device to measure on.
        criterion: ``criterion(output, target)``.
        data: one (inputs, targets) batch.
        dataloader: instead, a loader that gives the same batches twice.
        cuda: taken and not needed: the model's own device is measured on, and the data brought there.

    Raises:
        ValueError: both data and dataloader, or neither.
        ObjectiveError, UnsupportedError: as :class:`sharpkit.Objective`.

    Attributes:
        params: trainable parameters, in the order of the vectors.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> measured = hessian(model, torch.nn.MSELoss(), data=(torch.eye(2), torch.zeros(2, 1)), cuda=False)
        >>> [round(value, 4) for value in measured.eigenvalues(top_n=2)[0]], round(sum(measured.trace()) / len(measured.trace()), 4)
        ([1.0, 1.0], 2.0)

    References:
        Yao, Gholami, Keutzer and Mahoney (2020), arXiv 1912.07145.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        data: Any = None,
        dataloader: Iterable[Any] | None = None,
        cuda: bool = True,
    ) -> None:
        if (data is None) == (dataloader is None):
            raise ValueError("pass either data=, one batch of inputs and targets, or dataloader=")
        self.model, self.criterion, self.full_dataset = model, criterion, dataloader is not None
        batches = tuple(data) if data is not None else dataloader
        self._objective = Objective(model, batches, loss=criterion, mode="eval")
        self._operator = HessianOperator(self._objective)
        self.params: list[nn.Parameter] = list(self._objective.layout.params)
        self.device = str(self._objective.device)

    @property
    def gradsH(self) -> list[Tensor]:
        """The gradient, a tensor for each parameter."""
        return self._objective.layout.split(self._objective.gradient()[1])

    def dataloader_hv_product(self, v: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """v . H v, and H v, for a vector given as a tensor for each parameter."""
        flat = self._objective.layout.flatten(list(v))
        product = self._operator @ flat
        return float(self._operator.dot(flat, product)), self._objective.layout.split(product)

    def eigenvalues(self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1) -> tuple[list[float], list[list[Tensor]]]:
        """The ``top_n`` eigenvalues of largest magnitude, each with its vector as a tensor for each parameter.

        Args:
            maxIter: products for each at most; where they do not do, a warning says so.
            tol: relative error of each, judged by its residual.
            top_n: how many.
        """
        most, count = whole("maxIter", maxIter), whole("top_n", top_n)
        tol = real("tol", tol, above=0)
        # Lanczos needs a few more products than pairs, however few maxIter allows
        pairs = eigenpairs(
            self._operator, k=count, which="magnitude", tol=tol, seed=_drawn_seed(), max_matvecs=max(most * count, count + 2)
        )
        return pairs.values.tolist(), [self._objective.layout.split(vector) for vector in pairs.vectors.T]

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """v . H v of random sign vectors, whose mean is the trace: until its standard error is below ``tol`` of it, ``maxIter`` at most."""
        most, tol = whole("maxIter", maxIter), real("tol", tol, above=0)
        generator, forms = torch.Generator().manual_seed(_drawn_seed()), list[float]()
        while len(forms) < most:
            v = self._operator.random_vectors(1, generator=generator, distribution="rademacher")[:, 0].contiguous()
            forms.append(float(self._operator.dot(v, self._operator @ v)))
            if len(forms) >= _LEAST and probe_error(np.array(forms)) <= tol * abs(float(np.mean(forms))):
                break
        return forms

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Nodes and weights of ``n_v`` quadratures of ``iter`` Lanczos steps each, for :func:`get_esd_plot`.

        Each list of nodes is ascending, and its weights sum to 1; there are fewer of them where the matrix has fewer rows.
        """
        found = spectral_density(self._operator, num_probes=whole("n_v", n_v), num_steps=whole("iter", iter), seed=_drawn_seed())
        return found.nodes.tolist(), (found.weights * len(found.weights)).tolist()  # there they sum to 1 over all probes


def _drawn_seed() -> int:
    """From torch's global generator, as PyHessian's vectors are."""
    return int(torch.randint(2**31 - 1, ()))


def density_generate(
    eigenvalues: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
    num_bins: int = 10000,
    sigma_squared: float = 1e-5,
    overhead: float = 0.01,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The density that quadratures stand for, as Gaussians around their nodes.

    Args:
        eigenvalues, weights: from :meth:`hessian.density`.
        num_bins: points.
        sigma_squared: variance of the Gaussians, over the width of the spectrum but at least 1, as PyHessian has it.
        overhead: by which the grid goes beyond the outermost nodes.

    Returns:
        the density and the grid, (num_bins,) each; the density integrates to 1.
    """
    nodes, shares = np.asarray(eigenvalues, dtype=float), np.asarray(weights, dtype=float)
    low, high = float(nodes.min(axis=1).mean()) - overhead, float(nodes.max(axis=1).mean()) + overhead
    grid = np.linspace(low, high, whole("num_bins", num_bins, least=2))
    variance = real("sigma_squared", sigma_squared, above=0) * max(1.0, high - low)
    density = np.zeros_like(grid)
    for node, share in zip(nodes.ravel(), shares.ravel(), strict=True):  # one after another: all at once would take nodes x bins numbers
        if share > 0:
            density += share * np.exp(-((grid - node) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    return density / (density.sum() * (grid[1] - grid[0])), grid


def get_esd_plot(eigenvalues: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], path: str = "example.pdf") -> None:
    """Draw the density on a logarithmic axis into a file, by default PyHessian's."""
    from matplotlib.figure import Figure

    from sharpkit.plots import BLUE, finish

    density, grid = density_generate(eigenvalues, weights)
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    axes.semilogy(grid, density + 1e-7, color=BLUE)
    finish(axes, x="eigenvalue (loss / parameter²)", y="density (share / unit eigenvalue)")
    figure.savefig(path)
