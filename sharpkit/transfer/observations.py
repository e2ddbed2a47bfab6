"""What was seen over sizes, seeds and steps: of each coordinate, and of each parameter tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

Numbers = dict[int, list[list[float]]]  # size -> a list for each seed: one number for each step 0 .. num_steps
Values = dict[int, list[float]]  # size -> one number for each seed


@dataclass
class Track:
    """One coordinate over sizes, seeds and steps.

    Attributes:
        name, kind: as of an Activation.
        rms, mean_abs: of x_t.
        update: root mean square of x_t - x_0.
        input_rms: of the module's input, NaN without one.
        spread: of x_0 over samples, without what biases add.
        entries: number of entries by size.
        inner: by size, the dimension that attention logits sum over.
    """

    name: str
    kind: str
    rms: Numbers = field(default_factory=dict)
    mean_abs: Numbers = field(default_factory=dict)
    update: Numbers = field(default_factory=dict)
    input_rms: Numbers = field(default_factory=dict)
    spread: Values = field(default_factory=dict)
    entries: dict[int, int] = field(default_factory=dict)
    inner: dict[int, int | None] = field(default_factory=dict)


@dataclass
class TensorTrack:
    """One parameter tensor over sizes and seeds, after the last step.

    Attributes:
        name: its place in the model; a tied tensor has several.
        shapes: by size.
        table: whether it is looked up (nn.Embedding).
        shown_in: the first coordinate in which its change shows.
        effect: RMS of the change of that coordinate when the tensor is put back to its initial value.
        level: RMS of that coordinate.
        input_rms: of the module that owns the tensor; 1 where the coordinate is not its own output, or it has no floating input.
        entries: of that coordinate, by size.
        signal: RMS of the loss's gradient by the coordinate while training (geometric mean over steps); NaN for adaptive optimizers.
        lr, weight_decay: of its parameter group, by size; decay only where decoupled.
    """

    name: str
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    table: bool = False
    shown_in: str = ""
    effect: Values = field(default_factory=dict)
    level: Values = field(default_factory=dict)
    input_rms: Values = field(default_factory=dict)
    entries: dict[int, int] = field(default_factory=dict)
    signal: Values = field(default_factory=dict)
    lr: dict[int, float] = field(default_factory=dict)
    weight_decay: dict[int, float] = field(default_factory=dict)


@dataclass
class Observations:
    """All runs together.

    Attributes:
        sizes, num_seeds, num_steps, dimension: what was run.
        coordinates: by name, in the order of computing; only those that every size has.
        tensors: by name; empty where effects were not asked for.
        stream: for depths, RMS at initialisation of what all blocks together add to the residual stream.
        blocks: for depths, RMS of the output's change when all tensors of the blocks are put back.
        adaptive: whether the optimizer's step does not grow with the gradient.
        diverged: (size, seed) of runs whose loss left the finite.
    """

    sizes: tuple[int, ...]
    num_seeds: int
    num_steps: int
    dimension: str
    coordinates: dict[str, Track] = field(default_factory=dict)
    tensors: dict[str, TensorTrack] = field(default_factory=dict)
    stream: Values = field(default_factory=dict)
    blocks: Values = field(default_factory=dict)
    adaptive: bool = True
    diverged: list[tuple[int, int]] = field(default_factory=list)

    def keep_common(self) -> None:
        """Leave out what not every size has."""
        self.coordinates = {n: t for n, t in self.coordinates.items() if len(t.rms) == len(self.sizes)}
        self.tensors = {n: t for n, t in self.tensors.items() if len(t.shapes) == len(self.sizes)}


def at(values: Numbers, step: int) -> Values:
    """One value per seed, at a step."""
    return {size: [run[step] for run in runs] for size, runs in values.items()}


def over_steps(values: Numbers, *, start: int = 1) -> Values:
    """One value per seed: the geometric mean over steps from ``start`` on.

    Example:
        >>> over_steps({8: [[5.0, 1.0, 4.0]]})
        {8: [2.0]}
    """
    return {size: [geometric_mean(run[start:]) for run in runs] for size, runs in values.items()}


def geometric_mean(values: Iterable[float]) -> float:
    """NaN where nothing is positive and finite, or anything is not."""
    found = list(values)
    if not found or not all(math.isfinite(v) and v > 0 for v in found):
        return math.nan
    return math.exp(sum(map(math.log, found)) / len(found))
