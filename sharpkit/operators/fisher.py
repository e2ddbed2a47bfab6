"""Fisher matrices and the gradient covariance: averages of outer products of per-sample gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sharpkit._counting import KnownLoss, recognise_loss, samples_in
from sharpkit._errors import ObjectiveError
from sharpkit._memory import available_memory
from sharpkit.objective import Objective, Piece
from sharpkit.operators._jacobian import OutputJacobian, output_gradient
from sharpkit.operators.curvature import CurvatureOperator, PieceProduct, Pieces

_LIKELIHOODS = ("categorical", "gaussian", "bernoulli")


class FisherOperator(CurvatureOperator):
    """F = E over labels drawn from the model of (1/C) sum of s s^T, s the gradient of one target's loss (type-2, Monte Carlo).

    Its expectation over draws is the Gauss-Newton matrix for cross-entropy, squared error and binary cross-entropy with logits.

    Args:
        objective: made with ``loss=``.
        num_draws: labels drawn per target; the Monte Carlo noise falls as its square root.
        likelihood: ``"categorical"``, ``"gaussian"`` or ``"bernoulli"``; by default the one that belongs to a standard loss.
        seed: of the draws: the same seed is the same matrix.
        retain: as in :class:`~sharpkit.operators.curvature.CurvatureOperator`.

    Raises:
        ObjectiveError: the loss is no standard negative log-likelihood and ``likelihood`` was not given, or it has class weights or
            label smoothing, with which it is none.
    """

    def __init__(
        self, objective: Objective, *, num_draws: int = 1, likelihood: str | None = None, seed: int = 0, retain: bool | str = "auto",
        memory_limit: float | None = None,
    ) -> None:
        super().__init__(objective, retain=retain, memory_limit=memory_limit)
        if num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {num_draws}")
        self.num_draws, self.seed = num_draws, seed
        self._known = recognise_loss(objective.loss) if objective.loss is not None else None
        self.likelihood = likelihood or _likelihood_of(objective, self._known)
        if self.likelihood not in _LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {_LIKELIHOODS}, got {likelihood!r}")

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "num_draws": self.num_draws, "likelihood": self.likelihood, "seed": self.seed}

    def _build(self, piece: Piece) -> PieceProduct:
        jacobian = OutputJacobian(self.objective, piece, self.layout.params)
        generator = torch.Generator().manual_seed(hash((self.seed, self.objective.ranks.rank, *piece.key)) % 2**63)
        scale = piece.count if self.objective.reduction == "mean" else 1.0
        scores = [self._draw_score(jacobian, generator, scale) for _ in range(self.num_draws)]
        # one target is one unit: its score is a column of class entries for labels, one entry for real and binary targets
        unit_dim = 1 if self.likelihood == "categorical" and jacobian.output.ndim > 1 else 0 if self.likelihood == "categorical" else None

        def multiply(vectors: Sequence[Tensor]) -> Pieces:
            pushed = jacobian.forward(vectors)
            pulled = torch.zeros_like(pushed)
            for score in scores:
                along = score * pushed
                pulled += score * (along if unit_dim is None else along.sum(dim=unit_dim, keepdim=True)) / self.num_draws
            return jacobian.transpose(pulled)

        return PieceProduct(multiply, self._weight(), jacobian.bytes_held)

    def _weight(self) -> float:
        return 1.0 / self.objective.num_targets if self.objective.reduction == "mean" else 1.0

    def _draw_score(self, jacobian: OutputJacobian, generator: torch.Generator, scale: float) -> Tensor:
        """d loss_i / d z_i for labels drawn from the model, (output shape)."""
        target = _draw_target(self.likelihood, jacobian.output, jacobian.target, generator, self._known)
        if self.likelihood == "gaussian":
            target = self._scaled_noise(jacobian, target, scale)
        return scale * output_gradient(self.objective, jacobian.output, target)[0]

    def _scaled_noise(self, jacobian: OutputJacobian, unit_draw: Tensor, scale: float) -> Tensor:
        """Gaussian labels with the variance 1/S that the squared error's own scale stands for."""
        slope, leaf = output_gradient(self.objective, jacobian.output, jacobian.output.detach(), create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), leaf)
        return jacobian.output + unit_draw / (scale * curvature).clamp_min(torch.finfo(curvature.dtype).tiny).sqrt()


def _likelihood_of(objective: Objective, known: KnownLoss | None) -> str:
    if known is not None and known.weight is None and getattr(objective.loss, "label_smoothing", 0.0) == 0.0:
        if known.function is F.cross_entropy:
            return "categorical"
        if known.function is F.mse_loss:
            return "gaussian"
        if known.function is F.binary_cross_entropy_with_logits:
            return "bernoulli"
    raise ObjectiveError(
        "the Fisher matrix needs the likelihood that labels are drawn from. Plain cross_entropy, mse_loss and binary_cross_entropy_with_logits tell it; for "
        "another loss that is a negative log-likelihood pass likelihood='categorical', 'gaussian' or 'bernoulli'. With class weights or label smoothing it "
        "is none: use GaussNewtonOperator"
    )


def _draw_target(likelihood: str, output: Tensor, target: Any, generator: torch.Generator, known: KnownLoss | None) -> Tensor:
    if likelihood == "gaussian":
        return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    if likelihood == "bernoulli":
        uniform = torch.rand(output.shape, generator=generator, dtype=torch.float64).to(output.device)
        return (uniform < output.double().sigmoid()).to(output.dtype)
    class_dim = 1 if output.ndim > 1 else 0
    probabilities = output.double().softmax(dim=class_dim).movedim(class_dim, -1)
    uniform = torch.rand(probabilities.shape[:-1], generator=generator, dtype=torch.float64).to(output.device)
    labels = (probabilities.cumsum(-1) < uniform.unsqueeze(-1)).sum(-1).clamp_max(probabilities.shape[-1] - 1)
    if isinstance(target, Tensor) and not target.is_floating_point() and target.shape == labels.shape:
        ignored = known.ignore_index if known is not None else -100
        labels = torch.where(target == ignored, target, labels)
    return labels


class EmpiricalFisherOperator(CurvatureOperator):
    """(1/N) sum_i g_i g_i^T with g_i the gradient of sample i's own loss at its given label (uncentred second moment).

    g_i is scaled so that the mean of the g_i is the gradient of the objective. With ``loss=`` one product costs about two gradients. With
    ``closure=`` the per-sample gradients are made one by one, and kept where they fit in memory.

    Raises:
        ObjectiveError: the loss is not a mean or sum over samples, or batch statistics couple them (mode="train").
    """

    def _build(self, piece: Piece) -> PieceProduct:
        if self.objective.loss is None:
            return self._build_one_by_one(piece)
        if not self.objective.may_separate:
            raise ObjectiveError("per-sample gradients need a loss that is a mean or sum over samples; use mode='eval' or another loss")
        jacobian = OutputJacobian(self.objective, piece, self.layout.params)
        score = output_gradient(self.objective, jacobian.output, jacobian.target)[0] * self._sample_scale(piece)
        samples = jacobian.output.shape[0]
        if samples != samples_in(piece.batch, True):
            raise ObjectiveError(f"the output's first dimension ({samples}) is not the samples ({samples_in(piece.batch, True)}): return (batch, ...) outputs")

        def multiply(vectors: Sequence[Tensor]) -> Pieces:
            along = (score * jacobian.forward(vectors)).reshape(samples, -1).sum(dim=1)
            return jacobian.transpose(score * along.view(-1, *[1] * (score.ndim - 1)))

        return PieceProduct(multiply, self._sample_weight(), jacobian.bytes_held)

    def _build_one_by_one(self, piece: Piece) -> PieceProduct:
        samples = self.objective.samples_of(piece)
        bytes_needed = len(samples) * self.size * self.dtype.itemsize

        def gradients() -> list[Tensor]:
            return [self._sample_gradient(sample) for sample in samples]

        matrix = torch.stack(gradients()) if bytes_needed < 0.25 * available_memory(self.device) and samples else None

        def multiply(vectors: Sequence[Tensor]) -> Pieces:
            flat = self.layout.flatten(vectors)
            if matrix is not None:
                return list(self.layout.split(matrix.T @ (matrix @ flat)))
            total = torch.zeros_like(flat)
            for sample in samples:
                gradient = self._sample_gradient(sample)
                total.add_(gradient * torch.dot(gradient, flat))
            return list(self.layout.split(total))

        return PieceProduct(multiply, self._sample_weight(), bytes_needed if matrix is not None else 0)

    def _sample_gradient(self, sample: Piece) -> Tensor:
        loss = self.objective.evaluate(sample)
        return self.layout.flatten(torch.autograd.grad(loss, self.layout.params, allow_unused=True), self._sample_scale(sample))

    def _sample_scale(self, piece: Piece) -> float:
        """From the gradient of the piece's loss to gradients whose mean (sum) over samples is the objective's."""
        objective = self.objective
        return piece.count * objective.num_samples / objective.num_targets if objective.reduction == "mean" else 1.0

    def _sample_weight(self) -> float:
        return 1.0 / self.objective.num_samples if self.objective.reduction == "mean" else 1.0


class GradientCovarianceOperator(EmpiricalFisherOperator):
    """Sigma = (1/N) sum_i (g_i - g)(g_i - g)^T, the covariance of per-sample gradients; its trace drives the gradient noise scale.

    The factor is 1/N, not 1/(N-1). For a loss that sums it is N times that.
    """

    def _multiply_vector(self, vector: Tensor) -> Tensor:
        self._drop_if_stale()
        second_moment = super()._multiply_vector(vector)
        mean = self._mean_gradient()
        return second_moment - mean * (torch.dot(mean, vector) * self._mean_weight())

    def _mean_weight(self) -> float:
        return 1.0 if self.objective.reduction == "mean" else 1.0 / self.objective.num_samples

    def _mean_gradient(self) -> Tensor:
        versions = self._current_versions()
        if self._mean is None or self._mean[0] != versions or not self._kept:
            self._mean = (versions, self.objective.gradient()[1])
        return self._mean[1]

    _mean: tuple[list[tuple[int, int]], Tensor] | None = None

