"""Which layers bear few bits: the loss's rise foretold from each layer's curvature, and measured by really rounding it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharpkit._arguments import as_seed, called, check_callable, check_callback, flag, real, shown, whole, wholes
from sharpkit._calls import public_call
from sharpkit._errors import ConvergenceWarning, NonFiniteError
from sharpkit._results import Progress, ProgressCallback, Result
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.results import Estimate
from sharpkit.linalg.trace import trace
from sharpkit.measuring.sharpness import end_of
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.objective.params import moved
from sharpkit.operators.hessian import HessianOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rounding = Callable[[Tensor, int], Tensor]
Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LayerSensitivity(
    Result,
    kind="layer_sensitivity",
    saved=(
        *("names", "num_parameters", "lambda_max", "lambda_min", "trace", "bits", "rounding_error", "slope", "predicted", "quadratic"),
        *("measured", "loss", "num_matvecs", "num_evaluations", "seconds", "converged", "findings"),
    ),
):
    """Curvature of each weight tensor's own block of the Hessian, and what rounding it to few bits does to the loss.

    Attributes:
        names: weight tensors with two axes or more, in the model's order.
        num_parameters: entries of each.
        lambda_max, lambda_min: largest and smallest eigenvalue of each block, with residual bounds; the smallest one counts as converged
            where its bound is small beside the largest one.
        trace: of each block, with its standard error.
        bits: bit widths, ascending.
        rounding_error: ||Q(W) - W||^2 of each layer (rows) at each bit width (columns).
        slope: g . d with d = Q(W) - W, the first-order rise of the loss.
        predicted: mean trace times that over 2: the second-order rise of the loss if rounding errors are as large in all directions. Its
            relative error is the trace's.
        quadratic: g . d + d^T H d / 2: the rise to second order, without that assumption and with the slope.
        measured: the loss with this layer alone rounded, less the loss; None where it was not asked for.
        loss: with no layer rounded.
        num_matvecs: products spent, over the layers' own parameters.
        num_evaluations: forward passes over all the data.
        seconds: wall time spent.
    """

    names: tuple[str, ...]
    num_parameters: tuple[int, ...]
    lambda_max: tuple[Estimate, ...]
    lambda_min: tuple[Estimate, ...]
    trace: tuple[Estimate, ...]
    bits: tuple[int, ...]
    rounding_error: Table
    slope: Table
    predicted: Table
    quadratic: Table
    measured: Table | None
    loss: float
    num_matvecs: int
    num_evaluations: int
    seconds: float = 0.0

    @property
    def converged(self) -> bool:
        """Whether every number reached its tolerance."""
        return all(e.converged for e in (*self.lambda_max, *self.lambda_min, *self.trace))

    @property
    def mean_trace(self) -> tuple[float, ...]:
        """The mean eigenvalue of each block: its trace over its number of entries."""
        return tuple(t.value / n for t, n in zip(self.trace, self.num_parameters, strict=True))

    @property
    def condition_number(self) -> tuple[float, ...]:
        """lambda_max / lambda_min of each block; inf where the smallest eigenvalue is 0 or negative, as far as its error tells.

        Blocks of networks are singular or indefinite as a rule; how far the largest eigenvalue stands above the mean is
        :attr:`peakedness`.
        """
        pairs = zip(self.lambda_max, self.lambda_min, strict=True)
        # 1e-12, by convention: a condition number beyond is infinite in float64
        return tuple(math.inf if low.value <= max(low.stderr, 1e-12 * high.value) else high.value / low.value for high, low in pairs)

    @property
    def peakedness(self) -> tuple[float, ...]:
        """lambda_max over the mean eigenvalue of each block; inf where the mean is not positive."""
        return tuple(top.value / mean if mean > 0 else math.inf for top, mean in zip(self.lambda_max, self.mean_trace, strict=True))

    def ranking(self, bits: int, *, by: str = "quadratic") -> tuple[str, ...]:
        """The layers from the most to the least sensitive at one bit width.

        Args:
            bits: one of :attr:`bits`.
            by: ``"quadratic"``, ``"trace"`` for :attr:`predicted`, as HAWQ-V2 ranks, ``"slope and trace"`` for that with :attr:`slope`
                added, or ``"measured"``.
        """
        values = self._column(by, bits)
        return tuple(self.names[i] for i in sorted(range(len(values)), key=lambda i: -values[i]))

    def rank_correlation(self, bits: int, *, by: str = "quadratic") -> float:
        """Spearman's rank correlation of the foretold with the measured rises over the layers; NaN for fewer than three of them.

        Args:
            bits: one of :attr:`bits`.
            by: ``"quadratic"``, ``"trace"`` or ``"slope and trace"``.
        """
        from scipy.stats import spearmanr  # here: scipy.stats takes half a second to load

        if len(self.names) < 3:
            return math.nan
        return float(spearmanr(self._column(by, bits), self._column("measured", bits)).statistic)

    def _column(self, by: str, bits: int) -> list[float]:
        both = tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(self.slope, self.predicted, strict=True))
        tables = {"quadratic": self.quadratic, "trace": self.predicted, "slope and trace": both, "measured": self.measured}
        if by not in tables:
            raise ValueError(f"by must be one of {', '.join(map(repr, tables))}, got {shown(by)}")
        if bits not in self.bits:
            raise ValueError(f"bits must be one of {', '.join(map(str, self.bits))}, which were asked for, got {shown(bits)}")
        table = tables[by]
        if table is None:
            raise ValueError("the layers were not really rounded: call layer_sensitivity with check=True")
        at = self.bits.index(bits)
        return [row[at] for row in table]

    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        sentences = []
        for bits in self.bits:
            order = self.ranking(bits)
            sentences.append(f"At {bits} bits rounding {order[0]} is foretold to cost most, {order[-1]} least.")
            if self.measured is not None and len(self.names) >= 3:
                by_form, by_trace = self.rank_correlation(bits), self.rank_correlation(bits, by="trace")
                told = f"Really rounding each layer at {bits} bits, the rank correlation with the quadratic form is {by_form:.2f}"
                sentences.append(f"{told}, with the mean trace alone {by_trace:.2f}.")
        if not self.converged:
            sentences.append("Some layer's number did not reach its tolerance; see its error.")
        return sentences

    def __str__(self) -> str:
        return f"LayerSensitivity({len(self.names)} layers, bits {', '.join(map(str, self.bits))}, {self.num_matvecs} products)"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Foretold against measured rises; see :func:`sharpkit.plots.measures.plot_layer_sensitivity`."""
        from sharpkit.plots.measures import plot_layer_sensitivity

        return plot_layer_sensitivity(self, ax=ax)


def round_weights(weights: Tensor, bits: int, *, per_channel: bool = False) -> Tensor:
    """Symmetric uniform rounding to 2^bits - 1 levels, from -s to s with s the largest absolute weight.

    Args:
        weights: of any shape.
        bits: at least 2.
        per_channel: s for each index of the first axis by itself, an output channel, in place of one for the tensor.

    Example:
        >>> import torch
        >>> round_weights(torch.tensor([[1.0, 0.4, -0.6]]), 2).tolist()
        [[1.0, 0.0, -1.0]]
    """
    bits = whole("bits", bits, least=2, hint="that is one level below 0, 0, and one above")
    top = 2 ** (bits - 1) - 1
    axes = tuple(range(1, weights.ndim)) if per_channel and weights.ndim > 1 else None
    largest = weights.abs().amax(dim=axes, keepdim=True) if axes else weights.abs().max()
    step = (largest / top).clamp_min(torch.finfo(weights.dtype).tiny)  # a channel of zeros stays one
    rounded: Tensor = (weights / step).round().clamp(-top, top) * step
    return rounded


@public_call
def layer_sensitivity(
    objective: Objective,
    *,
    bits: Sequence[int] = (2, 4, 8),
    per_channel: bool = False,
    rounding: Rounding | None = None,
    check: bool = True,
    tol: float = 1e-2,
    trace_rtol: float = 0.05,
    seed: int = 0,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> LayerSensitivity:
    """Curvature of each weight tensor's block, and the loss's rise foretold and measured if that tensor alone is rounded to few bits.

    Foretold by the mean trace, as HAWQ-V2 ranks layers: (tr H_l / n_l) ||Q(W_l) - W_l||^2 / 2. Beside it the quadratic form of the
    rounding error itself, g . d + d^T H d / 2, which costs one product for each bit width; and with ``check`` the rise as it is, which
    costs one forward pass. Biases and norms' scales are not rounded.

    The mean trace leaves the slope out, which decides at many bits: there the rounding error is small, and the slope falls with it, the
    curvature's part with its square (docs/measures.md has the measured rank correlations).

    Foretold and measured rises are invariant under layer rescaling of a ReLU network and permutations of neurons; with ``per_channel``,
    the quadratic form and the measured rises also under scaling of filters before a batch norm. Eigenvalues and traces by themselves are
    invariant under permutations alone.

    Args:
        objective: f, at a trained point.
        bits: bit widths, each at least 2.
        per_channel: round each output channel with a step of its own.
        rounding: ``rounding(weights, bits)`` -> the rounded weights, in place of :func:`round_weights`.
        check: really round each layer, alone, and evaluate the loss.
        tol: relative tolerance of the eigenvalues.
        trace_rtol: relative standard error asked of each trace.
        seed: seeds starting vectors and random probes.
        callback: called with a :class:`sharpkit.Progress` after each layer.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError, TypeError: arguments out of range; a rounding that changes the shape; a model without weight tensors of two axes.
        NonFiniteError: rounded weights are not finite.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[1.0, 0.4]])
        >>> objective = sk.Objective(model, (torch.eye(2), torch.tensor([[1.0], [0.4]])), loss=torch.nn.functional.mse_loss)
        >>> layers = sk.measures.layer_sensitivity(objective, bits=[2])  # 0.4 becomes 0: H = 1, so 0.4^2 / 2
        >>> [round(table[0][0], 4) for table in (layers.predicted, layers.quadratic, layers.measured)]
        [0.08, 0.08, 0.08]

    References:
        Dong et al. (2020), HAWQ-V2, arXiv 1911.03852.
    """
    check_objective(objective, "layer_sensitivity")
    check_callback(callback)
    widths = tuple(sorted(set(wholes("bits", bits, least=2))))
    if not widths:
        raise ValueError("bits must hold at least one bit width, got none")
    per_channel, check, seed = flag("per_channel", per_channel), flag("check", check), as_seed(seed)
    tol, trace_rtol = real("tol", tol, above=0, below=1), real("trace_rtol", trace_rtol, above=0)
    if rounding is not None:
        check_callable("rounding", rounding, "rounding(weights, bits)")
    started, layout = time.perf_counter(), objective.layout
    names = tuple(name for name, p in zip(layout.names, layout.params, strict=True) if p.ndim >= 2)
    if not names:
        raise ValueError(f"layers are weight tensors with two axes or more, and the objective has none: {', '.join(layout.names[:8])}")
    loss, layers = objective.value(), list[_Layer]()
    for number, layer in enumerate(names, start=1):
        layers.append(
            _layer(objective, layer, widths, rounding, loss, per_channel=per_channel, check=check, tol=tol, rtol=trace_rtol, seed=seed)
        )
        if callback is not None:
            done, elapsed = sum(each.num_matvecs for each in layers), time.perf_counter() - started
            expected = done * len(names) // number
            callback(
                Progress(done, expected, elapsed, elapsed / number * (len(names) - number), f"{layer} (layer {number} of {len(names)})")
            )
    return LayerSensitivity(
        names=names,
        num_parameters=tuple(layer.size for layer in layers),
        lambda_max=tuple(layer.top for layer in layers),
        lambda_min=tuple(layer.bottom for layer in layers),
        trace=tuple(layer.trace for layer in layers),
        bits=widths,
        rounding_error=tuple(layer.error for layer in layers),
        slope=tuple(layer.slope for layer in layers),
        predicted=tuple(tuple(layer.trace.value / layer.size * e / 2 for e in layer.error) for layer in layers),
        quadratic=tuple(layer.quadratic for layer in layers),
        measured=tuple(layer.measured for layer in layers) if check else None,
        loss=loss,
        num_matvecs=sum(layer.num_matvecs for layer in layers),
        num_evaluations=1 + (len(names) * len(widths) if check else 0),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Layer:
    """What is known of one layer; of error, quadratic and measured one number for each bit width."""

    size: int
    top: Estimate
    bottom: Estimate
    trace: Estimate
    error: tuple[float, ...]
    slope: tuple[float, ...]
    quadratic: tuple[float, ...]
    measured: tuple[float, ...]
    num_matvecs: int


def _layer(
    objective: Objective,
    name: str,
    widths: Sequence[int],
    rounding: Rounding | None,
    loss: float,
    *,
    per_channel: bool,
    check: bool,
    tol: float,
    rtol: float,
    seed: int,
) -> _Layer:
    own = objective.with_params(lambda each, _: each == name)
    block, layout = HessianOperator(own), own.layout
    (weights,) = (p.detach() for p in layout.params)
    shifts = []
    for bits in widths:
        rounded = round_weights(weights, bits, per_channel=per_channel) if rounding is None else called("rounding", rounding, weights, bits)
        if not isinstance(rounded, Tensor) or rounded.shape != weights.shape:
            raise ValueError(f"rounding must return a tensor of the shape {tuple(weights.shape)} of {name}, got {shown(rounded)}")
        if not bool(torch.isfinite(rounded).all()):
            raise NonFiniteError(f"{name} rounded to {bits} bits is not finite")
        shifts.append(layout.flatten([rounded - weights]))
    _, gradient = own.gradient()
    stacked = torch.stack(shifts, dim=1)
    products = block @ stacked
    slope = tuple(float(gradient @ d) for d in stacked.T)
    quadratic = [s + float(d @ h) / 2 for s, d, h in zip(slope, stacked.T, products.T, strict=True)]
    measured = []
    for d in shifts if check else ():
        with moved(layout, layout.split(d), 1.0):
            measured.append(_finite_value(own) - loss)
    top = end_of(eigenpairs(block, k=1, tol=tol, seed=seed))
    with warnings.catch_warnings():  # of a singular block the smallest one is 0, and its own size no measure of its error
        warnings.simplefilter("ignore", ConvergenceWarning)
        bottom = end_of(eigenpairs(block, k=1, which="smallest", tol=tol, seed=seed))
    bottom = replace(bottom, converged=bottom.converged or bottom.stderr <= tol * abs(top.value))
    total = trace(block, rtol=rtol, seed=seed)
    errors = tuple(float(d.double() @ d.double()) for d in shifts)
    return _Layer(block.size, top, bottom, total, errors, slope, tuple(quadratic), tuple(measured), block.num_matvecs)


def _finite_value(objective: Objective) -> float:
    try:
        return objective.value()
    except NonFiniteError:
        return math.inf
