"""Sharpness layer by layer: lambda_max and trace of each layer's own diagonal block of the Hessian."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sharpkit._arguments import as_text, check_callback
from sharpkit._calls import public_call
from sharpkit._checkpoint import clock, resumable
from sharpkit._results import Progress, ProgressCallback, Result
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.results import Estimate
from sharpkit.linalg.trace import trace
from sharpkit.measuring.sharpness import end_of
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.objective.objective import Objective, check_objective, objective_call
from sharpkit.operators.hessian import HessianOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LayerSharpness(
    Result,
    kind="layer_sharpness",
    saved=("name", "names", "num_parameters", "lambda_max", "trace", "num_matvecs", "seconds", "converged", "findings"),
):
    """lambda_max and trace of the Hessian's diagonal blocks, one per layer.

    Attributes:
        names: layers (modules that own parameters), in the model's order.
        num_parameters: entries of each layer that were differentiated.
        lambda_max: each block's largest eigenvalue, with its residual bound.
        trace: each block's trace; the traces add up to the whole Hessian's.
        num_matvecs: products spent over all layers.
        seconds: wall time spent.
        name: what model this is, for titles.
    """

    names: tuple[str, ...]
    num_parameters: tuple[int, ...]
    lambda_max: tuple[Estimate, ...]
    trace: tuple[Estimate, ...]
    num_matvecs: int
    seconds: float = 0.0
    name: str = "model"

    @property
    def converged(self) -> bool:
        """Whether every number reached its tolerance."""
        return all(e.converged for e in (*self.lambda_max, *self.trace))

    @property
    def mean_curvature(self) -> tuple[float, ...]:
        """Trace per parameter: the average eigenvalue of each block."""
        return tuple(t.value / n for t, n in zip(self.trace, self.num_parameters, strict=True))

    def findings(self) -> list[str]:
        """What stands out, in plain sentences."""
        sharpest = max(range(len(self.names)), key=lambda i: self.lambda_max[i].value)
        value = self.lambda_max[sharpest].value
        sentences = [f"{self.name}: the sharpest layer is {self.names[sharpest]} (lambda_max {value:.3g})."]
        total = sum(t.value for t in self.trace)
        if total > 0:  # shares of a sum with both signs would say nothing
            largest = max(range(len(self.names)), key=lambda i: self.trace[i].value)
            share = self.trace[largest].value / total
            sentences.append(f"{self.name}: {self.names[largest]} holds {share:.0%} of the Hessian's trace.")
        if not self.converged:
            sentences.append(f"{self.name}: some layer's number did not reach its tolerance; see its error.")
        return sentences

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars of lambda_max and trace; see :func:`sharpkit.plots.plot_layers`."""
        from sharpkit.plots.spectrum import plot_layers

        return plot_layers(self, ax=ax)

    def __repr__(self) -> str:
        rows = ", ".join(f"{n}: {v}" for n, v in zip(self.names[:8], self.lambda_max, strict=False))
        more = f", ... {len(self.names)} layers" if len(self.names) > 8 else ""
        return f"LayerSharpness(lambda_max {rows}{more}; {self.num_matvecs} products)"


def layer_of(parameter: str) -> str:
    """The layer that owns a parameter: its name without the last part (``"conv1.weight"`` belongs to ``"conv1"``).

    Example:
        >>> layer_of("blocks.0.attn.weight"), layer_of("scale")
        ('blocks.0.attn', 'scale')
    """
    return parameter.rpartition(".")[0] or parameter


def members(layer: str) -> Callable[[str, Tensor], bool]:
    """A selector of the parameters that a layer owns."""
    return lambda name, parameter: layer_of(name) == layer


@public_call
@keeps_memory_limit
@resumable(objective_call)
def per_layer(
    objective: Objective,
    *,
    tol: float = 1e-3,
    trace_rtol: float = 0.05,
    seed: int = 0,
    name: str = "model",
    memory_limit: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
) -> LayerSharpness:
    """Measure lambda_max and trace of each layer's diagonal block of the Hessian.

    The block of layer l is the Hessian with respect to that layer's parameters alone, the others held fixed. Its lambda_max is at most
    that of the whole Hessian (Cauchy interlacing), and the traces of all blocks sum to the whole trace.

    Args:
        objective: the function whose Hessian is meant.
        tol: relative tolerance of each lambda_max.
        trace_rtol: relative standard error asked of each trace.
        seed: seeds starting vectors and random probes.
        name: what model this is, for titles.
        memory_limit: bytes that may be taken on the model's device, besides model and data.
        checkpoint: a folder from which the call goes on if it is killed and made again (docs/guide.md).
        callback: called with a :class:`sharpkit.Progress` over all layers after each step.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(3, 1).double()
        >>> data = (torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))
        >>> layers = sk.per_layer(sk.Objective(model, data, loss=torch.nn.functional.mse_loss))
        >>> layers.names, [round(e.value, 4) for e in layers.lambda_max]
        (('weight', 'bias'), [0.6667, 2.0])
    """
    started = clock()
    check_objective(objective, "per_layer", sharded=True)
    check_callback(callback)
    as_text("name", name)
    # a dictionary without values: each layer once, in the model's order
    layers, sizes = tuple(dict.fromkeys(layer_of(p) for p in objective.layout.names)), list[int]()
    tops, traces, matvecs = [], [], 0

    def report(progress: Progress) -> None:
        """Progress of one layer as progress of the whole call: the layers to come are expected to cost what those so far did."""
        if callback is not None:
            done, elapsed = matvecs + block.num_matvecs, clock() - started
            number = len(sizes) + 1  # the layer in hand, counted from 1: sizes are noted when a layer is done
            expected = max(done, (matvecs + max(progress.expected, block.num_matvecs)) * len(layers) // number)
            left = elapsed / done * (expected - done) if done else math.nan
            text = f"{layers[number - 1]} (layer {number} of {len(layers)}): {progress.text}"
            callback(Progress(done, expected, elapsed, left, text, peak_bytes=progress.peak_bytes, choices=progress.choices))

    # one block after the other, so that only its own graph is held
    for layer in layers:
        block = HessianOperator(objective.with_params(members(layer)))
        tops.append(end_of(eigenpairs(block, k=1, tol=tol, seed=seed, callback=report)))
        traces.append(trace(block, rtol=trace_rtol, seed=seed, callback=report))
        sizes.append(block.size)
        matvecs += block.num_matvecs
    return LayerSharpness(layers, tuple(sizes), tuple(tops), tuple(traces), matvecs, clock() - started, name)
