"""The Fisher-Rao norm of the weights, by its definition and in the closed form of homogeneous networks."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit._arguments import choice, whole
from sharpkit._calls import public_call
from sharpkit._errors import ObjectiveError
from sharpkit._results import Result
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.operators.fisher import EmpiricalFisherOperator
from sharpkit.operators.gauss_newton import output_gradient

_FORMS = ("fisher", "homogeneous")


@dataclass(frozen=True)
class FisherRaoNorm(Result, kind="fisher_rao_norm", saved=("value", "stderr", "form", "depth", "num_matvecs", "seconds", "findings")):
    """||w||_fr = sqrt(w^T F w), F the second moment of the samples' gradients.

    Attributes:
        value: in units of the loss.
        stderr: 0: exact over the objective's data, up to rounding.
        form: ``"fisher"`` or ``"homogeneous"``.
        depth: degree of homogeneity that the closed form was given; None for the definition.
        num_matvecs: products with F; the closed form takes a forward pass instead.
        seconds: wall time spent.
    """

    value: float
    form: str
    depth: int | None
    num_matvecs: int
    seconds: float = 0.0

    @property
    def stderr(self) -> float:
        return 0.0

    def __float__(self) -> float:
        return self.value

    def findings(self) -> list[str]:
        """What the number says, in a sentence."""
        how = "sqrt(w^T F w)" if self.depth is None else f"the closed form of a network homogeneous of degree {self.depth}"
        return [f"The Fisher-Rao norm of the weights is {self.value:.4g}, by {how}."]


@public_call
def fisher_rao_norm(objective: Objective, *, form: str = "fisher", depth: int | None = None, name: str = "") -> FisherRaoNorm:
    """sqrt(w^T F w) with F = (1/N) sum g_i g_i^T, the samples' gradients at their given labels; or its closed form.

    ``form="fisher"`` is the definition, sqrt((1/N) sum (w . g_i)^2), for any network, by one product with the empirical Fisher matrix.
    ``form="homogeneous"`` uses that w . grad z_i = L z_i where the outputs z are homogeneous of degree L in the selected weights, as
    those of a ReLU network of L layers without biases: L sqrt((1/N) sum <dl_i/dz_i, z_i>^2), a forward pass. The two differ where the
    network is not homogeneous (biases, norms). Of a loss with reduction="sum", F is a sum too.

    Invariant under layer rescaling of a ReLU network, permutations of neurons, and scaling of filters before a batch norm whose statistics
    go with them.

    Args:
        objective: a mean or sum over samples; the closed form needs ``loss=``.
        form: ``"fisher"`` or ``"homogeneous"``.
        depth: L, of the closed form.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: arguments out of range, or a depth missing or not used.
        ObjectiveError: the loss is not a mean or sum over samples, or for the closed form no function of an output.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> objective = sk.Objective(model, (torch.ones(4, 1), torch.zeros(4, 1)), loss=torch.nn.functional.mse_loss)
        >>> sk.measures.fisher_rao_norm(objective).value  # each g_i is 2 w, so w . g_i = 8
        8.0
        >>> sk.measures.fisher_rao_norm(objective, form="homogeneous", depth=1).value
        8.0

    References:
        Liang, Poggio, Rakhlin and Stokes (2019), arXiv 1711.01530.
    """
    check_objective(objective, "fisher_rao_norm")
    choice("form", form, _FORMS)
    started = time.perf_counter()
    if form == "fisher":
        if depth is not None:
            raise ValueError(f"depth={depth} belongs to form='homogeneous'; the definition needs none: leave it out")
        operator, weights = EmpiricalFisherOperator(objective), objective.layout.current()
        value = math.sqrt(max(float(operator.dot(weights, operator @ weights)), 0.0))
        return FisherRaoNorm(value, form, None, operator.num_matvecs, time.perf_counter() - started)
    if depth is None:
        raise ValueError("form='homogeneous' needs depth=, the degree to which the outputs are homogeneous: layers of weights, as a rule")
    depth = whole("depth", depth)
    if objective.loss is None or not objective.may_separate:
        raise ObjectiveError("the closed form needs an Objective made with loss= and (input, target) batches, a mean or sum over samples")

    averages = objective.reduction == "mean"

    def local() -> float:
        total = 0.0
        with objective.undisturbed():
            for piece in objective.pieces():
                objective.seed_for(piece.key[0])
                with torch.no_grad():
                    output: Tensor = objective.predict(piece.batch)
                slope, leaf = output_gradient(objective, output, piece.batch[1], number=piece.key[0])
                along = (
                    (slope.double() * leaf.detach().double()).flatten(1).sum(dim=1) if output.ndim > 1 else slope.double() * leaf.double()
                )
                scale = piece.weight * objective.num_samples if averages else 1.0  # gradients whose mean is the objective's
                total += float(along.square().sum()) * scale**2
        return total

    total = objective.ranks.run_together(local, device=objective.device)
    square = objective.ranks.sum_numbers([total], device=objective.device)[0] / (objective.num_samples if averages else 1.0)
    return FisherRaoNorm(depth * math.sqrt(square), form, depth, 0, time.perf_counter() - started)
