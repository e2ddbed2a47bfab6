"""Gram resampling: the top eigenvalue of the Gauss-Newton matrix of every batch size, with its whole distribution, from one pass."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from sharpkit._errors import ObjectiveError
from sharpkit._results import Bounded, standard_error
from sharpkit.objective.memory import available_memory, human_bytes
from sharpkit.objective.objective import Objective
from sharpkit.objective.samples import SamplePool
from sharpkit.operators.gauss_newton import output_gradient

logger = logging.getLogger(__name__)

_DENSE = 300  # rows
_MEMORY_SHARE = 0.25  # of what is free


@dataclass(frozen=True)
class GramResampling:
    """Pool of M samples whose Gram matrix holds the Gauss-Newton spectrum of each of its subsets.

    Attributes:
        gram: (M C, M C) K = R R^T in float64, R = S^1/2 J with the C rows of a sample side by side, unweighted.
        num_samples: M.
        num_outputs: C, rows per sample.
        num_draws: subsets drawn per batch size.
        seed: of the draws.
        gradients: cost, in full-data gradients.
        seconds: wall time.
    """

    gram: NDArray[np.float64] = field(repr=False)
    num_samples: int
    num_outputs: int
    num_draws: int
    seed: int
    gradients: float
    seconds: float

    def draws(self, batch_size: int) -> NDArray[np.float64]:
        """(num_draws,) lambda_max(G_B) of random subsets without replacement; a single one where B = M.

        Args:
            batch_size: B, from 1 to M.
        """
        if not 1 <= batch_size <= self.num_samples:
            raise ValueError(f"batch_size must lie between 1 and the {self.num_samples} samples of the pool, got {batch_size}")
        rng, found = np.random.default_rng([self.seed, batch_size]), []
        for _ in range(1 if batch_size == self.num_samples else self.num_draws):
            found.append(self.of_subset(rng.permutation(self.num_samples)[:batch_size]))
        return np.array(found)

    def of_subset(self, indices: NDArray[np.int64]) -> float:
        """lambda_max(G) of the mean loss over some of the pool's samples.

        Args:
            indices: (B,) positions in 0..M-1.
        """
        rows = (np.asarray(indices)[:, None] * self.num_outputs + np.arange(self.num_outputs)).ravel()
        block = torch.from_numpy(self.gram[np.ix_(rows, rows)])
        return _top(block) / len(indices)

    def lambda_max(self, batch_size: int) -> Bounded:
        """The expected top eigenvalue of a batch of B, with a 95 % interval of that mean.

        The interval takes in the chance of the draws and of the pool: subsets of a pool of M share samples, so that the mean over all of
        them still scatters from pool to pool as that of about M / B independent batches does, whose scatter is that of the draws enlarged
        by 1 / sqrt(1 - B / M). The scatter itself is known from num_draws draws only (Student's t). A curvature that rests on samples
        rarer than one in M is not in it.
        """
        values = self.draws(batch_size)
        mean = float(values.mean())
        if len(values) == 1:
            return Bounded(mean, mean, mean)
        spread = float(values.std(ddof=1))
        share = batch_size / self.num_samples
        half = float(stdtrit(len(values) - 1, 0.975)) * math.hypot(standard_error(values), spread * math.sqrt(share / (1 - share)))
        return Bounded(mean, mean - half, mean + half)

    def quantiles(self, batch_size: int, q: float | list[float]) -> NDArray[np.float64]:
        """Quantiles of lambda_max(G_B) over batches.

        Args:
            batch_size: B.
            q: from 0 to 1.
        """
        return np.asarray(np.quantile(self.draws(batch_size), q))


def gram_resampling(objective: Objective, *, max_samples: int = 400, num_draws: int = 30, seed: int = 0) -> GramResampling:
    """The distribution of lambda_max(G_B) for every batch size B up to the pool, from one pass over the pool.

    G_B has the nonzero eigenvalues of the Gram matrix of its rows, R R^T / B with R = S^1/2 J: J the Jacobian of the samples' outputs,
    S the Hessian of the loss in the output. All subsets' Gram matrices are blocks of the pool's. It costs about a gradient of the pool per
    output and holds M C rows of n numbers; the pool is made smaller where that exceeds a quarter of the free memory.

    Args:
        objective: made with ``loss=`` and (input, target) batches, a mean over samples; output (samples, classes). Only read.
        max_samples: M at most.
        num_draws: subsets per batch size.
        seed: of the pool and the draws.

    Raises:
        ObjectiveError: no output to look at, an output of another shape, targets that count differently, a loss not convex in the output.
        MemoryError: not even 8 samples fit.
        ValueError: max_samples or num_draws below 2.

    Example:
        >>> import torch, sharpkit as sk
        >>> from experiments._gram import gram_resampling
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
        >>> gram = gram_resampling(sk.Objective(model, (x, torch.zeros(2, 1).double()), loss=torch.nn.functional.mse_loss))
        >>> round(float(gram.lambda_max(2)), 6), sorted(round(float(v), 6) for v in set(gram.draws(1)))
        (4.0, [2.0, 8.0])
    """
    if max_samples < 2 or num_draws < 2:
        raise ValueError(f"max_samples and num_draws must be at least 2, got {max_samples} and {num_draws}")
    if objective.loss is None:
        raise ObjectiveError("Gram resampling needs the output and the loss apart: make the Objective with loss= instead of closure=")
    if objective.reduction != "mean":
        raise ObjectiveError(f"Gram resampling needs a loss that is a mean over samples, this one is reduced by {objective.reduction!r}")
    started = time.perf_counter()
    whole = SamplePool(objective)
    num_outputs = _num_outputs(whole)
    count = _affordable(objective, min(max_samples, whole.size), num_outputs)
    pool = whole if count == whole.size else whole.limited(count, seed=seed)
    rows = torch.cat([_root_rows(pool.objective(torch.tensor([i])), num_outputs) for i in range(pool.size)])
    matrix = (rows @ rows.T).cpu().double().numpy()
    cost = (1 + num_outputs) * pool.size / objective.num_samples
    return GramResampling(matrix, pool.size, num_outputs, num_draws, seed, cost, time.perf_counter() - started)


def _num_outputs(pool: SamplePool) -> int:
    """C of one sample's output, checked."""
    sample = pool.objective(torch.arange(1))
    with sample.undisturbed(), torch.no_grad():
        (piece,) = list(sample.pieces())
        output = sample.predict(piece.batch)
    if not isinstance(output, Tensor) or output.ndim not in (1, 2):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ObjectiveError(f"Gram resampling needs an output of shape (samples, classes), one sample gave {shape}")
    if not math.isclose(sample.num_targets * pool.size, pool.parent.num_targets, rel_tol=1e-6):
        raise ObjectiveError("Gram resampling needs samples that count alike: leave class weights and masked targets out")
    return output.numel()


def _affordable(objective: Objective, wanted: int, num_outputs: int) -> int:
    """How many samples' rows and Gram matrix fit into a share of the free memory."""
    free, item = _MEMORY_SHARE * available_memory(objective.device), objective.dtype.itemsize
    count = wanted
    while count > 8 and _bytes(count * num_outputs, objective.num_parameters, item) > free:
        count = max(8, int(0.9 * count))
    needed = _bytes(count * num_outputs, objective.num_parameters, item)
    if needed > free:
        raise MemoryError(
            f"Gram resampling of {count} samples needs {human_bytes(needed)}, more than a quarter of the free memory; use fewer "
            f"parameters (params=), or measure_batch_curvature, which draws batches"
        )
    logger.info("Gram resampling: %d samples of %d outputs, %s", count, num_outputs, human_bytes(needed))
    return count


def _bytes(rows: int, size: int, item: int) -> float:
    return rows * size * item + 2 * 8.0 * rows**2


def _root_rows(sample: Objective, num_outputs: int) -> Tensor:
    """(C, n) S^1/2 J of one sample: its Gauss-Newton matrix is R^T R."""
    with sample.undisturbed():
        (piece,) = list(sample.pieces())
        sample.seed_for(piece.key[0])
        output = sample.predict(piece.batch)
        slope, leaf = output_gradient(sample, output.detach().double(), piece.batch[1], number=piece.key[0], create_graph=True)
        root = _square_root(_output_hessian(slope, leaf, num_outputs)).to(output.dtype)
        cotangents = root.reshape(num_outputs, *output.shape)
        parts = _batched_gradient(output, sample.layout.params, cotangents)
    shaped = zip(parts, sample.layout.params, strict=True)
    return torch.cat(
        [(torch.zeros_like(p).expand(num_outputs, *p.shape) if g is None else g).reshape(num_outputs, -1) for g, p in shaped], 1
    )


def _batched_gradient(output: Tensor, params: Sequence[Tensor], cotangents: Tensor) -> Sequence[Tensor | None]:
    """J^T u for each of C cotangents, (C, *p.shape) per parameter; one by one where an operation knows no batching rule."""
    if not output.requires_grad:
        return [None] * len(params)
    try:
        return torch.autograd.grad(output, params, cotangents, is_grads_batched=True, retain_graph=True, allow_unused=True)
    except RuntimeError:
        each = [torch.autograd.grad(output, params, u, retain_graph=True, allow_unused=True) for u in cotangents]
        return [None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)]


def _output_hessian(slope: Tensor, leaf: Tensor, num_outputs: int) -> Tensor:
    """(C, C) d^2 loss / d output^2."""
    if not slope.requires_grad:
        return torch.zeros(num_outputs, num_outputs, dtype=slope.dtype, device=slope.device)
    columns = [
        torch.autograd.grad(entry, leaf, retain_graph=True, materialize_grads=True, allow_unused=True)[0].reshape(-1)
        for entry in slope.reshape(-1)
    ]
    return torch.stack(columns)


def _square_root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix, float64; that of a confident sample is rounding alone."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    if float(values.min()) < -1e-6 * float(values.abs().max()) - 1e-12:
        raise ObjectiveError(
            f"the loss is not convex in the output (Hessian eigenvalue {float(values.min()):.3g}): Gram resampling has no square root of it"
        )
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return root


def _top(block: Tensor) -> float:
    """Largest eigenvalue of a positive semi-definite matrix: dense where small, by ARPACK to rounding where that is faster."""
    if len(block) <= _DENSE or not bool(block.any()):
        return float(torch.linalg.eigvalsh(block)[-1])
    from scipy.sparse.linalg import eigsh

    start = np.random.default_rng(0).standard_normal(len(block))
    return float(eigsh(block.numpy(), k=1, which="LA", v0=start, return_eigenvectors=False)[0])
