"""Fisher matrices and the gradient covariance: averages of outer products of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sharpkit._arguments import as_seed, choice, whole
from sharpkit._errors import ObjectiveError, UnsupportedError
from sharpkit.objective.counting import samples_in
from sharpkit.objective.logits import LazyLogits
from sharpkit.objective.loss import KnownLoss, recognise_loss
from sharpkit.objective.memory import GraphCost
from sharpkit.objective.objective import Objective
from sharpkit.objective.reduction import Piece
from sharpkit.objective.sample_gradients import SampleGradients
from sharpkit.operators.blocks import PieceProduct, Pieces
from sharpkit.operators.curvature import all_equal
from sharpkit.operators.gauss_newton import OutputJacobian, OutputOperator, output_gradient
from sharpkit.operators.head import product_in_chunks, sample_product_in_chunks
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.probe import look_into_doubts

_LIKELIHOODS = ("categorical", "gaussian", "bernoulli")


class FisherOperator(OutputOperator):
    """F = E over labels drawn from the model of (1/C) sum of s s^T, s the gradient of one target's loss (type-2, Monte Carlo).

    Its expectation over draws is the Gauss-Newton matrix for cross-entropy, squared error and binary cross-entropy with logits.

    Args:
        objective: made with ``loss=``, or with dict batches of a model whose own loss is one cross-entropy, as of Hugging Face's.
        num_draws: labels drawn per target; the Monte Carlo noise falls as 1 / sqrt(num_draws).
        likelihood: ``"categorical"``, ``"gaussian"`` or ``"bernoulli"``; by default the one that belongs to a standard loss.
        seed: seeds the draws; the same seed is the same matrix.
        retain: as in :class:`~sharpkit.operators.curvature.CurvatureOperator`.

    Raises:
        ObjectiveError: the loss is no standard negative log-likelihood and ``likelihood`` was not given, or it has class weights or
            label smoothing, with which it is none.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        num_draws: int = 1,
        likelihood: str | None = None,
        seed: int = 0,
        retain: bool | str = "auto",
        memory_limit: float | None = None,
    ) -> None:
        super().__init__(objective, retain=retain, memory_limit=memory_limit)
        if likelihood is not None:
            choice("likelihood", likelihood, _LIKELIHOODS)
        self.num_draws, self.seed = whole("num_draws", num_draws), as_seed(seed)
        self._known = recognise_loss(objective.loss) if objective.loss is not None else None
        self.likelihood = likelihood or _likelihood_of(objective, self._known)

    _joins = False

    def _settings(self) -> dict[str, Any]:  # a block draws the same labels as the whole
        return {**super()._settings(), "num_draws": self.num_draws, "likelihood": self.likelihood, "seed": self.seed}

    def _build(self, piece: Piece) -> PieceProduct:
        index, first = piece.key
        seed = hash((self.seed, self.objective.ranks.rank, index)) % 2**63  # other labels for each batch, the same for its pieces
        if self.likelihood == "categorical":
            product = product_in_chunks(self.objective, piece, "fisher", lambda output: self._labels(output, piece, seed=seed))
            if product is not None:
                return product
        jacobian = self._jacobian(piece)
        error: ObjectiveError | None = None
        for class_dim in self._class_dims(jacobian):  # the first under which the loss is the likelihood's
            draws = _Draws(
                self.likelihood, jacobian, self._known, whole=self.objective.batch_lengths[index], first=first, class_dim=class_dim
            )
            try:
                residuals, slopes = self._scores(jacobian, draws, number=index, seed=seed)
            except ObjectiveError as refused:
                error = error or refused
                continue
            return PieceProduct(_outer_products(jacobian, draws, residuals, slopes), piece.weight, jacobian.cost, may_batch=False)
        raise error or ObjectiveError(
            f"outputs of shape {tuple(jacobian.output.shape)} do not fit labels of shape {tuple(getattr(jacobian.target, 'shape', ()))}: "
            "labels have the output's shape without the classes, which come second or last"
        )

    def _look_into_doubts(self) -> None:
        look_into_doubts(self.objective, HessianOperator, first_alone=True)

    def _class_dims(self, jacobian: OutputJacobian) -> list[int]:
        """Where the classes may lie, counted from the end; F.cross_entropy has them second, a user's own loss perhaps last."""
        shape, target = jacobian.output.shape, jacobian.target
        if self.likelihood != "categorical" or len(shape) < 2:
            return [-1]
        if self._known is not None or not isinstance(target, Tensor) or target.is_floating_point():
            return [1 - len(shape)]
        return [d for d in dict.fromkeys((1 - len(shape), -1)) if target.shape == shape[:d] + (shape[d + 1 :] if d != -1 else ())]

    def _labels(self, output: LazyLogits, piece: Piece, *, seed: int) -> list[Tensor]:
        """For logits that are not held whole, the labels that :class:`_Draws` would draw."""
        generator, (index, first) = torch.Generator().manual_seed(seed), piece.key
        shape, whole = output.hidden.shape[:-1], self.objective.batch_lengths[index]
        each = max(1, shape[0] // samples_in(piece.batch, self.objective.loss is not None))  # rows of a sample: its tokens, if flattened
        return [
            output.draw(_noise(shape, generator, whole=whole * each, first=first * each, like=output.hidden)) for _ in range(self.num_draws)
        ]

    def _scores(self, jacobian: OutputJacobian, draws: _Draws, *, number: int, seed: int) -> tuple[Tensor, Tensor]:
        """For labels drawn from the model, d(-log p)/dz, and the loss's own gradient: the same times each target's share of the mean.

        Returns:
            Both (num_draws, *output shape).
        """
        generator = torch.Generator().manual_seed(seed)
        residuals, slopes = [], []
        for _ in range(self.num_draws + 1):  # one more, to see that the shares do not depend on the label
            target, residual = draws.next(generator)
            residuals.append(residual)
            # the loss's gradient, not the residual alone, carries how it averages: masks, divisors, label shapes
            slopes.append(output_gradient(self.objective, jacobian.output, target, number=number)[0])
        _check_likelihood(self.likelihood, draws, (residuals[0], slopes[0]), (residuals[-1], slopes[-1]))
        return torch.stack(residuals[:-1]), torch.stack(slopes[:-1])


def _outer_products(
    jacobian: OutputJacobian, draws: _Draws, residuals: Tensor, slopes: Tensor
) -> Callable[[Sequence[Tensor], bool], Pieces]:
    def multiply(vectors: Sequence[Tensor], batched: bool) -> Pieces:
        along = draws.sum_units(residuals * jacobian.forward(vectors))
        return jacobian.transpose((slopes * along).mean(dim=0))

    return multiply


def _check_likelihood(likelihood: str, draws: _Draws, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    """The loss's gradient must be d(-log p)/dz times a share that does not depend on the label drawn."""
    shares = []
    for residual, slope in (first, second):
        squares = draws.sum_units(residual * residual)
        share = draws.sum_units(residual * slope) / squares.clamp_min(torch.finfo(squares.dtype).tiny)
        # 1e-3 and 1e-2, by judgement: above the rounding of half precision logits, far below the differences between likelihoods
        off = float((slope - share * residual).abs().max()) > 1e-3 * float(slope.abs().max())
        shares.append(torch.where(squares > 1e-6, share, torch.nan))  # a residual near 0 says nothing of its share
        if off:
            raise ObjectiveError(
                f"the loss is not the negative log-likelihood of a {likelihood} model: its gradient is not that. {_INSTEAD}"
            )
    if float((shares[0] - shares[1]).abs().nan_to_num().max()) > 1e-2 * float(shares[0].abs().nan_to_num().max()):
        raise ObjectiveError(
            f"the loss is not the negative log-likelihood of a {likelihood} model: it weighs targets by their label. {_INSTEAD}"
        )


_INSTEAD = "Use GaussNewtonOperator, which needs no likelihood, or EmpiricalFisherOperator"


class _Draws:
    """Labels drawn from the model, the same for a sample however its batch is cut into pieces."""

    def __init__(
        self, likelihood: str, jacobian: OutputJacobian, known: KnownLoss | None, *, whole: int, first: int, class_dim: int
    ) -> None:
        self._likelihood, self._output, self._target = likelihood, jacobian.output, jacobian.target
        self._ignored = known.ignore_index if known is not None else -100  # PyTorch's default, which a user's own loss calls
        self._whole, self._first, self._class_dim = whole, first, class_dim

    def sum_units(self, entries: Tensor) -> Tensor:
        """Sum over the entries that describe one target: all classes for a label, one entry for a real or binary target."""
        return entries.sum(dim=self._class_dim, keepdim=True) if self._likelihood == "categorical" else entries

    def next(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(target, d(-log p)/dz at it)."""
        z = self._output
        if self._likelihood == "gaussian":
            noise = self._noise(z.shape, generator, normal=True)
            return z + noise, -noise
        if self._likelihood == "bernoulli":
            p = z.double().sigmoid()
            drawn = (self._noise(z.shape, generator) < p).double()  # compared in float64, as the draws are
            return drawn.to(z.dtype), (p - drawn).to(z.dtype)
        p = z.double().softmax(dim=self._class_dim).movedim(self._class_dim, -1)  # float64: the draws must not depend on the device
        drawn = (p.cumsum(-1) < self._noise(p.shape[:-1], generator).unsqueeze(-1)).sum(-1).clamp_max(p.shape[-1] - 1)
        residual = (p - F.one_hot(drawn, p.shape[-1])).movedim(-1, self._class_dim)
        if isinstance(self._target, Tensor) and not self._target.is_floating_point() and self._target.shape == drawn.shape:
            drawn = torch.where(self._target == self._ignored, self._target, drawn)  # masked targets stay masked
        return drawn, residual.to(z.dtype)

    def _noise(self, shape: torch.Size, generator: torch.Generator, *, normal: bool = False) -> Tensor:
        return _noise(shape, generator, whole=self._whole, first=self._first, like=self._output, normal=normal)


def _noise(shape: torch.Size, generator: torch.Generator, *, whole: int, first: int, like: Tensor, normal: bool = False) -> Tensor:
    """Uniform or normal numbers for the samples of a piece, which starts at sample ``first`` of a batch of ``whole``."""
    samples = shape[0] if shape else 1
    whole = max(whole, first + samples)  # drawn for the whole batch, so that a piece gets the same ones
    draw = torch.randn if normal else torch.rand
    noise = draw((whole, *shape[1:]), generator=generator, dtype=torch.float64)[first : first + samples]
    return noise.reshape(shape).to(device=like.device, dtype=like.dtype if normal else torch.float64)


def _likelihood_of(objective: Objective, known: KnownLoss | None) -> str:
    if objective.has_own_loss:  # of a language model, as a rule; what it is shows in the first product
        return "categorical"
    if known is not None and known.weight is None and known.label_smoothing == 0.0:
        standard = {F.cross_entropy: "categorical", F.mse_loss: "gaussian", F.binary_cross_entropy_with_logits: "bernoulli"}
        if known.function in standard:
            return standard[known.function]
    raise ObjectiveError(
        "the Fisher matrix needs the likelihood that labels are drawn from. Plain cross_entropy, mse_loss and "
        "binary_cross_entropy_with_logits tell it; for another loss that is a negative log-likelihood pass likelihood='categorical', "
        "'gaussian' or 'bernoulli'. With class weights or label smoothing it is none: use GaussNewtonOperator"
    )


class EmpiricalFisherOperator(OutputOperator):
    """(1/N) sum_i g_i g_i^T with g_i the gradient of sample i's own loss at its given label (uncentred second moment).

    g_i is scaled so that the mean of the g_i is the gradient of the objective. With ``loss=``, and for Hugging Face language models, one
    product costs about two gradients; with ``closure=`` the per-sample gradients are computed, several at a time where that works, and kept
    if they fit into memory.

    Raises:
        ObjectiveError: the loss is not a mean or sum over samples, or batch statistics couple them (mode="train").
    """

    def _build(self, piece: Piece) -> PieceProduct:
        if self.objective.may_separate and not self.objective.draws_random_numbers:
            scale, weight = _sample_scale(self.objective, piece.count), self._sample_weight()
            if (product := sample_product_in_chunks(self.objective, piece, scale=scale, weight=weight)) is not None:
                return product
        if self.objective.loss is None:
            return self._build_one_by_one(piece)
        if not self.objective.may_separate:
            raise ObjectiveError(
                "per-sample gradients need a loss that is a mean or sum over the samples of a batch, and no batch statistics: use "
                "mode='eval', or another loss"
            )
        try:
            jacobian = self._jacobian(piece)
        except UnsupportedError:  # the pass over all samples at once differentiates twice, those over single ones once
            return self._build_one_by_one(piece)
        # rows of the loss's gradient in the output are those of each sample's own loss, since the samples do not mix
        score = output_gradient(self.objective, jacobian.output, jacobian.target, number=piece.key[0])[0]
        score = score * _sample_scale(self.objective, piece.count)
        samples, expected = jacobian.output.shape[0] if jacobian.output.ndim else 1, samples_in(piece.batch, True)
        if samples != expected:
            raise ObjectiveError(
                f"the model's output has shape {tuple(jacobian.output.shape)}, but the batch {expected} samples: per-sample gradients "
                f"need outputs of shape ({expected}, ...)"
            )

        def multiply(vectors: Sequence[Tensor], batched: bool) -> Pieces:
            lead = (len(vectors[0]), samples) if batched else (samples,)
            along = (score * jacobian.forward(vectors, batched)).reshape(*lead, -1).sum(dim=-1)  # g_i . v of every sample, from one pass
            return jacobian.transpose(score * along.view(*lead, *[1] * (score.ndim - 1)), batched)

        return PieceProduct(multiply, self._sample_weight(), jacobian.cost)

    def _build_one_by_one(self, piece: Piece) -> PieceProduct:
        objective, layout = self.objective, self.layout  # not the operator, which keeps the product: a cycle, which would keep the data
        samples, gradients = objective.samples_of(piece), SampleGradients(objective)
        bytes_needed = len(samples) * self.size * self.dtype.itemsize

        def chunks() -> Iterator[Tensor]:
            for some, rows in gradients.of(samples):
                scales = torch.tensor([_sample_scale(objective, count) for count in samples.counts[some]], dtype=torch.float64)
                yield rows.mul_(scales.to(rows)[:, None])

        matrix = None  # (samples, n)
        # a quarter of what is free, by judgement: the gradients of some samples are there besides
        if samples and bytes_needed < 0.25 * self.free_memory():
            matrix = torch.empty(len(samples), self.size, dtype=self.dtype, device=self.device)
            start = 0
            for rows in chunks():
                matrix[start : (start := start + len(rows))] = rows

        def multiply(vectors: Sequence[Tensor], batched: bool) -> Pieces:
            flat = layout.flatten(vectors)
            some = chunks() if matrix is None else [matrix]
            return list(layout.split(sum((rows.T @ (rows @ flat) for rows in some), torch.zeros_like(flat))))

        return PieceProduct(
            multiply,
            self._sample_weight(),
            GraphCost(bytes_needed if matrix is not None else 0, closed=matrix is not None),
            may_batch=False,
        )

    def _sample_weight(self) -> float:
        return 1.0 / self.objective.num_samples if self.objective.reduction == "mean" else 1.0


# A sum of g_i g_i^T for reduction="sum", a mean of them with gradients scaled to a mean for "mean".
def _sample_scale(objective: Objective, count: float) -> float:
    """From the gradient of the loss of a piece with this count to gradients whose mean (sum) over samples is the objective's."""
    return count * objective.num_samples / objective.num_targets if objective.reduction == "mean" else 1.0


class GradientCovarianceOperator(EmpiricalFisherOperator):
    """Sigma = (1/N) sum_i (g_i - g)(g_i - g)^T, the covariance of per-sample gradients; its trace drives the gradient noise scale.

    The factor is 1/N, not 1/(N-1). For a loss with reduction="sum" it is N times that.
    """

    def _product(self, vectors: Tensor) -> Tensor:
        second_moment = super()._product(vectors)
        mean = self._mean_gradient()
        # of a sum, sum_i (g_i - G/N)(g_i - G/N)^T = sum_i g_i g_i^T - G G^T / N with G the gradient of the sum
        weight = 1.0 if self.objective.reduction == "mean" else 1.0 / self.objective.num_samples
        along = (mean @ vectors) * weight
        return second_moment - (mean * along if vectors.ndim == 1 else torch.outer(mean, along))

    def _mean_gradient(self) -> Tensor:
        """The gradient, computed again when the model has changed; all processes decide together, since it is summed over them."""
        now = self._watched()
        stale = self._mean is None or not all_equal(now, self._mean[0])
        if self.objective.ranks.sum_numbers([float(stale)], device=self.device)[0] or self._mean is None:
            self._mean = ([t.detach().clone() for t in now], self.objective.gradient()[1])
        return self._mean[1]

    _mean: tuple[list[Tensor], Tensor] | None = None
