"""A finite-difference probe along one direction: is the gradient that of the loss, and the product the derivative of the gradient?"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpkit._errors import NonFiniteError, ObjectiveError, UnsupportedError
from sharpkit.objective.batches import Batch
from sharpkit.objective.distributed import Ranks
from sharpkit.objective.guard import turn
from sharpkit.objective.memory import available_memory, graph_nodes
from sharpkit.objective.objective import Objective
from sharpkit.objective.params import moved
from sharpkit.objective.second_order import coarsest_rounding
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.differences import Differences

logger = logging.getLogger(__name__)

_AGREE = 1e-3  # by judgement: a wrong derivative is off by far more, a central difference in float64 by far less
_CLEAR = 5.0  # a gap counts as one from so many times the uncertainty of the differences themselves, by judgement
_MOST_NOISE = 0.1  # differences that are less sure than this decide nothing, by judgement
# Steps relative to |w| / |v|, as multiples of eps^(1/3), where truncation and rounding of a central difference are alike; the smaller ones
# cross fewer kinks. Factors by judgement: two neighbours differ by what the coarser is off.
_STEPS, _MORE_STEPS = (1.0, 1 / 20, 1 / 400), (3.0, 1.0, 1 / 5, 1 / 20, 1 / 100, 1 / 400)
_FINE = 1e-10  # by judgement, rounding from which on the steps are small enough to pass between kinks: float64 has 2e-16, float32 1e-7
_KINKS = ("Relu", "LeakyRelu", "Prelu", "Rrelu", "Hard", "Threshold", "Clamp", "Abs", "Max", "Min", "Amax", "Sort", "Topk", "Sgn", "Median")
_COPY = 6.0  # bytes that a copy, its graph and gradients take over those of its parameters, by judgement
_MAX_BATCHES = 2  # that are copied, by judgement: a check, not a measurement


@dataclass(frozen=True)
class Agreement:
    """A derivative against finite differences.

    Attributes:
        gap: the least relative distance.
        noise: what the differences are uncertain by, from two neighbouring steps; inf where no two could be made.
        decisive: whether a gap can be told from rounding and kinks.
    """

    gap: float
    noise: float
    decisive: bool

    @property
    def right(self) -> bool:
        return self.gap <= _AGREE

    @property
    def wrong(self) -> bool:
        return not self.right and self.decisive


@dataclass(frozen=True)
class Probe:
    """What the probe saw.

    Attributes:
        gradient: the gradient against differences of the loss.
        product: the Hessian product against differences of the gradient; None if there was no product.
        kinked: whether operations with kinks are in the graph.
        copied: whether a float64 copy was probed, else the model itself in its own precision.
        num_gradients: gradients taken.
    """

    gradient: Agreement
    product: Agreement | None
    kinked: bool
    copied: bool
    num_gradients: int


MakeOperator = Callable[[Objective], SymmetricOperator]


def look_into_doubts(objective: Objective, operator: MakeOperator, *, first_alone: bool = False) -> None:
    """Probe an objective if something seen in it gives reason to, once; what it shows is kept with the objective.

    A network of ordinary operations costs nothing. Else it takes 3 to 7 gradients and a product on the first batch, counted in
    ``objective.second_order.probe_gradients``.

    Args:
        objective: its graph has been looked at.
        operator: makes the product that is to be the gradient's derivative.
        first_alone: refuse only if the gradient itself is not that of the loss.

    Raises:
        ObjectiveError: the gradient is not that of the loss.
        UnsupportedError: products are not the derivative of the gradient.
    """
    known = objective.second_order
    if objective.shards is not None and not known.probed:  # on all processes, whose models may show different things
        known.doubts = set().union(*objective.ranks.gather(known.doubts))
        known.probed = not known.doubts
    if known.doubts and not known.probed:
        known.probed = True  # before: the probe multiplies, too
        try:
            known.refusal = _refusal(objective, operator)
        except BaseException:
            known.probed = False
            raise
    if known.refusal is not None and not (first_alone and isinstance(known.refusal, UnsupportedError)):
        raise known.refusal


def _refusal(objective: Objective, operator: MakeOperator) -> ObjectiveError | UnsupportedError | None:
    known = objective.second_order
    try:
        probe = _probe_sharded(objective, operator) if objective.shards else probe_derivatives(objective, operator, max_batches=1)
    except Exception as error:
        logger.warning("derivatives could not be compared with finite differences: %s", error)
        return None
    known.probe_gradients += probe.num_gradients
    seen = ", ".join(sorted(known.doubts))
    if probe.gradient.wrong:
        return ObjectiveError(
            f"the gradient is not that of the loss: it differs from finite differences by {probe.gradient.gap:.2g} of its length, so no "
            f"Hessian is defined. Something in the model or the loss cuts or changes derivatives ({seen}): a straight-through estimator, "
            "gradient reversal, a detached target. Compute what is to be held fixed beforehand and pass it within the batch, or pass "
            "check=False to measure as if it were constant"
        )
    if probe.product is not None and probe.product.wrong:
        return UnsupportedError(
            f"products with the Hessian are no derivatives of the gradient: finite differences differ by {probe.product.gap:.2g}. "
            f"Something in the model or the loss has no right second derivative ({seen}): write the backward of a custom function in "
            "torch operations, without no_grad and detach; or use GaussNewtonOperator or EmpiricalFisherOperator, which need none"
        )
    return None


def probe_derivatives(
    objective: Objective, operator: MakeOperator, *, seed: int = 0, patient: bool = False, max_batches: int = _MAX_BATCHES
) -> Probe:
    """Compare gradient and product with finite differences along one direction: in float64 on a copy where the model allows it.

    Args:
        objective: is left as it was.
        operator: makes the product of an objective.
        seed: seeds the direction.
        patient: take all steps, and more of them.
        max_batches: batches that are looked at.

    Raises:
        Exception: whatever the model raises where it cannot be evaluated.
    """
    with turn():  # a copy is of the model as it is, not as another thread's measurement has it for a moment
        batches = first_batches(objective, max_batches)
        twin = float64_copy(objective, batches)
    if twin is not None:
        with contextlib.suppress(Exception):  # a model that cannot run in float64, or a closure that calls the original
            return _probe(twin, operator, seed=seed, patient=patient, copied=True)
    return _probe(objective.with_data(batches, ranks=Ranks()), operator, seed=seed, patient=patient, copied=False)


def first_batches(objective: Objective, most: int = _MAX_BATCHES) -> list[Batch]:
    """The first batches of this process that count something."""
    with objective.undisturbed():  # a DataLoader draws from the global generator
        counting = (batch for batch, count in zip(objective.batches(), objective.batch_counts, strict=False) if count)
        return list(itertools.islice(counting, most))


def float64_copy(objective: Objective, batches: list[Batch]) -> Objective | None:
    """The same objective on a float64 copy of the model and of some batches; None where it cannot be copied or does not fit."""
    if _COPY * 8 * sum(p.numel() for p in objective.model.parameters()) > available_memory(objective.device):
        return None
    try:
        return objective.copy(batches, dtype=torch.float64)
    except Exception:  # locks, generators, file handles: much cannot be copied, and says so in its own words
        return None


def _probe(subject: Objective, operator: MakeOperator, *, seed: int, patient: bool, copied: bool) -> Probe:
    eps, kinked = precision_of(subject)
    gradient = subject.gradient()[1]
    direction = _direction(subject, gradient, seed)
    slope = gradient @ direction
    product: Tensor | None = None
    with contextlib.suppress(UnsupportedError):
        product = operator(subject) @ direction
    reach = float(subject.layout.current().norm()) or 1.0
    slopes: list[Tensor] = []
    bends: list[Tensor] = []
    first = second = None
    steps = [factor * eps ** (1 / 3) * reach for factor in (_MORE_STEPS if patient else _STEPS)]
    taken = 1
    for step in steps:
        try:
            (up, up_gradient), (down, down_gradient) = (_at(subject, direction, sign * step) for sign in (1.0, -1.0))
        except NonFiniteError:  # too large a step for this function
            continue
        taken += 2
        slopes.append(slope.new_tensor((up - down) / (2 * step)))
        bends.append((up_gradient - down_gradient) / (2 * step))
        may_tell = eps < _FINE or not kinked
        first = _agreement(slope, slopes, may_tell)
        second = None if product is None else _agreement(product, bends, may_tell)
        if not patient and first.right and (second is None or second.right):
            break
    if first is None:
        raise NonFiniteError("the loss is NaN or infinite in the neighbourhood of the parameters")
    return Probe(first, second, kinked, copied, taken)


def _probe_sharded(objective: Objective, operator: MakeOperator) -> Probe:
    """The same on all processes together, over all the data, with one step and its double; kinks and rounding may hide a fault from it."""
    subject, gradient = operator(objective), objective.gradient()[1]
    length = math.sqrt(float(subject.dot(gradient, gradient))) or 1.0
    noise = subject.random_vectors(1, generator=torch.Generator().manual_seed(0))[:, 0]
    direction = gradient / length + noise / math.sqrt(float(subject.dot(noise, noise)))
    differences = Differences(objective, subject.dot)
    expected, error, _ = differences.with_error(direction)
    product, slope, step = subject.multiply(direction), float(subject.dot(gradient, direction)), differences.step(direction)
    rises = []
    for factor in (step, 2 * step):
        ends = []
        for sign in (1.0, -1.0):
            with moved(objective.layout, objective.layout.split(direction), sign * factor):
                ends.append(objective.value())
        rises.append((ends[0] - ends[1]) / (2 * factor))

    def told(gap: float, unsure: float, *sizes: float) -> Agreement:
        size = max(map(abs, sizes)) or 1.0
        return Agreement(gap / size, unsure / size, unsure <= _MOST_NOISE * size and gap > _CLEAR * unsure)

    gap, sizes = product - expected, [math.sqrt(float(subject.dot(v, v))) for v in (product, expected)]
    second = told(math.sqrt(float(subject.dot(gap, gap))), error, *sizes)
    return Probe(told(abs(slope - rises[0]), abs(rises[0] - rises[1]), slope, rises[0]), second, False, False, 9)


def _at(objective: Objective, direction: Tensor, step: float) -> tuple[float, Tensor]:
    with moved(objective.layout, objective.layout.split(direction), step):
        return objective.gradient()


def _direction(objective: Objective, gradient: Tensor, seed: int) -> Tensor:
    """A unit vector half along the gradient, so that the slope is no small difference; without entries that nothing trains."""
    vector = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vector = vector.to(device=gradient.device, dtype=gradient.dtype)
    free = gradient != 0  # the function may depend on an entry without a gradient: the padding row of an embedding, by definition
    padded = {
        id(m.weight): m.padding_idx
        for m in objective.model.modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.padding_idx is not None
    }
    for p, part in zip(objective.layout.params, torch.split(free, list(objective.layout.sizes)), strict=True):
        if id(p) in padded:  # tied to an output layer, it has a gradient, but not all of it
            part.view(p.shape)[padded[id(p)]] = False
    vector, gradient = vector * free, gradient * free
    mixed = vector / vector.norm().clamp_min(1e-300) + gradient / gradient.norm().clamp_min(1e-300)
    unit: Tensor = mixed / mixed.norm().clamp_min(1e-300)
    return unit


def precision_of(objective: Objective) -> tuple[float, bool]:
    """(rounding of the coarsest type in the loss's graph, whether it has kinks): a loss may be cast to float32 inside a float64 model."""
    eps, kinked = torch.finfo(objective.dtype).eps, False
    with objective.undisturbed():
        for piece in objective.pieces():
            loss = objective.evaluate(piece)
            eps = max(eps, coarsest_rounding(loss))
            kinked = any(node.name().startswith(_KINKS) for node in graph_nodes([loss]))
            break
    return eps, kinked


def _agreement(exact: Tensor, differences: Sequence[Tensor], may_tell: bool) -> Agreement:
    """The derivative against its differences, coarse to fine: wrong where two neighbours agree with each other, and not with it."""
    gaps = [_relative(d - exact, exact, d) for d in differences]
    best, decisive = min(gaps), False
    noises = [_relative(a - b, a, b, exact) for a, b in itertools.pairwise(differences)]
    for noise, gap in zip(noises, itertools.pairwise(gaps), strict=True):
        decisive = decisive or (may_tell and noise <= _MOST_NOISE and min(gap) > _CLEAR * noise)
    return Agreement(best, min(noises, default=math.inf), decisive)


def _relative(difference: Tensor, *sizes: Tensor) -> float:
    size = max(float(s.norm()) for s in sizes)
    return float(difference.norm()) / size if size > 0 else 0.0
