"""What a parameter tensor does, told from which of its dimensions grow with width."""

from __future__ import annotations

from collections.abc import Mapping

from sharpkit.transfer.observations import TensorTrack

ROLES = ("input", "hidden", "readout", "vector", "fixed")
IN_WORDS = {
    "input": "input weights and embeddings",
    "hidden": "hidden weights",
    "readout": "readout weights",
    "vector": "biases and gains",
    "fixed": "tensors whose shape does not change",
}


def role_of(tensor: TensorTrack) -> str:
    """``"input"``, ``"hidden"``, ``"readout"``, ``"vector"`` or ``"fixed"``.

    Growing output and input: hidden. Growing output alone: input, or, with one dimension, vector. A table that is looked up is input, and
    so is a matrix whose result grows although its first dimension does not (positions added to the stream). Growing input alone: readout.

    Example:
        >>> role_of(TensorTrack("head.weight", shapes={8: (10, 8), 16: (10, 16)}, entries={8: 640, 16: 640}))
        'readout'
        >>> role_of(TensorTrack("norm.weight", shapes={8: (8,), 16: (16,)}, entries={8: 512, 16: 1024}))
        'vector'
    """
    growing = growing_dimensions(tensor.shapes)
    if not growing:
        return "fixed"
    if len(next(iter(tensor.shapes.values()))) == 1:
        return "vector"
    if tensor.table:
        return "input"
    if len(growing) > 1:
        return "hidden"
    result_grows = len(set(tensor.entries.values())) > 1
    return "input" if 0 in growing or result_grows else "readout"


def growing_dimensions(shapes: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Which dimensions differ between the sizes.

    Example:
        >>> growing_dimensions({8: (8, 3, 3), 16: (16, 3, 3)})
        (0,)
    """
    columns = zip(*shapes.values(), strict=True)
    return tuple(i for i, column in enumerate(columns) if len(set(column)) > 1)
