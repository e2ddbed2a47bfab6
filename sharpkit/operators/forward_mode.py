"""The model's linearisation, J v, as the operations of forward mode: recorded once, played back for every vector where that is faster."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sharpkit.objective.interrupts import Whole
from sharpkit.objective.memory import graph_nodes, is_out_of_memory
from sharpkit.objective.params import replaced
from sharpkit.operators.blocks import seconds_now
from sharpkit.operators.curvature import version_of

logger = logging.getLogger(__name__)

_PRODUCTS = 2  # before it is tried, by judgement: a trial takes as long as 3 to 5 of them (experiments/forward_mode.py)
_SHAPES = ("aten::is_same_size", "aten::_has_same_storage_numel")  # what asks for no value: the answer is the same for every vector
# The reference implementations that PyTorch falls back to have no rule for several vectors; where they are one operation, it has.
_SAME = {"prims::add": torch.ops.aten.add.Tensor, "prims::mul": torch.ops.aten.mul.Tensor, "prims::sub": torch.ops.aten.sub.Tensor}


class _Slot:
    """A place for a tensor that depends on the vector."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class _Step:
    """One operation: what it is called with, where its results go, and which places nothing reads after it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int | None, ...]
    done: tuple[int, ...] = ()


class _Unrecordable(RuntimeError):
    """Played back, an operation would not do again what it did."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation on tensors that come from the tangents; all other tensors are constants of the linear map."""

    def __init__(self, tangents: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
        self.constants: dict[int, tuple[Tensor, int]] = {}  # by id, with their versions when they were read
        # By id, which names a tensor only while that lives; none is kept alive, or all that forward mode computes would be there at once.
        self._places: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0
        for tangent in tangents:
            self.place(tangent)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, torch would import torch._dynamo, which takes seconds

    def place(self, t: Tensor) -> int:
        """Where a tensor is kept; a new place for a new one."""
        if (number := self.number(t)) is None:
            number, self._count = self._count, self._count + 1
            self._places[id(t)] = (weakref.ref(t), number)
        return number

    def number(self, t: Tensor) -> int | None:
        """The place of a tensor that has one."""
        known, number = self._places.get(id(t), (None, 0))
        return number if known is not None and known() is t else None

    def knows(self, t: Tensor) -> bool:
        """Whether a tensor comes from the tangents."""
        return self.number(t) is not None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if any(map(self.knows, given)):
            self._note(func, args, kwargs, given, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor], result: Any) -> None:
        made = list(result) if isinstance(result, (tuple, list)) else [result]
        name = func._schema.name
        if not any(isinstance(r, Tensor) for r in made):
            if name in _SHAPES:
                return
            raise _Unrecordable(f"{name} reads a tangent's value")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Unrecordable(f"{name} draws random numbers for a tangent")
        for number, described in enumerate(func._schema.arguments):
            if described.alias_info is not None and described.alias_info.is_write:
                written = args[number] if number < len(args) else kwargs.get(described.name)
                if any(isinstance(a, Tensor) and not self.knows(a) for a in tree_leaves(written)):
                    raise _Unrecordable(f"{name} writes a tangent into a constant")
        for a in given:
            if not self.knows(a):
                self.constants.setdefault(id(a), (a, version_of(a)))
        args, kwargs = tree_map(self._encoded, args), tree_map(self._encoded, kwargs)
        results = tuple(self.place(r) if isinstance(r, Tensor) else None for r in made)
        self.steps.append(_Step(_SAME.get(name, func), args, kwargs, results))

    def _encoded(self, a: Any) -> Any:
        return _Slot(self.place(a)) if isinstance(a, Tensor) and self.knows(a) else a


class Recording:
    """v -> J v by the operations that forward mode performed.

    Args:
        recorder: holds them.
        tangents: what stood for v, one tensor per parameter.
        output: what stood for J v.

    Attributes:
        constants: the tensors that it holds.
        operations: the kinds of operations in it.
    """

    def __init__(self, recorder: _Recorder, tangents: Sequence[Tensor], output: Tensor) -> None:
        self.constants = [t for t, _ in recorder.constants.values()]
        self.operations = frozenset(step.function for step in recorder.steps)
        self._strides = [t.stride() for t in tangents]
        self._output = recorder.place(output)
        self._steps = _with_ends(recorder.steps, self._output)

    def __call__(self, vectors: Sequence[Tensor], batched: bool = False) -> Tensor:
        """J v in the output's shape; ``batched`` for several v, (k, ...) each."""
        with torch.no_grad():
            if batched:
                product: Tensor = torch.vmap(lambda *each: self._play(each))(*vectors)
                return product
            # as they were recorded: a view that one layout allows, another may not
            return self._play([v if v.stride() == s else _laid_out(v, s) for v, s in zip(vectors, self._strides, strict=True)])

    def _play(self, vectors: Sequence[Tensor]) -> Tensor:
        places: dict[int | None, Any] = dict(enumerate(vectors))

        def put_in(a: Any) -> Any:
            if isinstance(a, _Slot):
                return places[a.number]
            return [put_in(x) for x in a] if isinstance(a, (list, tuple)) else a

        for step in self._steps:
            result = step.function(*map(put_in, step.args), **{name: put_in(a) for name, a in step.kwargs.items()})
            places.update(zip(step.results, result if isinstance(result, (tuple, list)) else (result,), strict=True))
            for number in step.done:
                del places[number]
        output: Tensor = places[self._output]
        return output


def _laid_out(v: Tensor, strides: Sequence[int]) -> Tensor:
    return torch.empty_strided(v.shape, strides, dtype=v.dtype, device=v.device).copy_(v)


def _with_ends(steps: Sequence[_Step], output: int) -> list[_Step]:
    """The steps, each with the places that nothing reads after it."""
    free: list[_Step] = []
    later = {output}
    for step in reversed(steps):
        read = {a.number for a in tree_leaves((step.args, step.kwargs)) if isinstance(a, _Slot)}
        made = {r for r in step.results if r is not None}
        done = tuple((read | made) - later)
        later |= read | made
        free.append(_Step(step.function, step.args, step.kwargs, step.results, done))
    return free[::-1]


def record(compute: Callable[[], Tensor], model: nn.Module, params: Sequence[nn.Parameter]) -> tuple[Tensor, Recording] | None:
    """The output with its graph and the linear map from tangents to it, from one pass; None where it cannot be recorded.

    Forward mode is on for one level and nothing is differentiated through it: its derivatives are right, those of nested ones need not be.

    Args:
        compute: the output as a function of the model's parameters.
        model: theirs.
        params: those that tangents are given for.

    Raises:
        Exception: what an allocation that failed raises.
    """
    try:
        with Whole(_dual(model, params)) as tangents, _Recorder(tangents) as recorder:
            output = forward_ad.unpack_dual(compute())  # type: ignore[no-untyped-call]
            primal, tangent = output.primal, output.tangent
    except Exception as error:  # no rule for an operation, or user code that cannot run like this: it has run without
        if is_out_of_memory(error):
            raise
        logger.info("forward mode is not used: %s", error)
        return None
    overwritten = any(version_of(t) != version for t, version in recorder.constants.values()) or any(map(version_of, tangents))
    if overwritten or tangent is None or not recorder.knows(tangent):  # the last two: nothing is seen to depend on the parameters
        return None
    return primal, Recording(recorder, tangents, tangent)


@contextmanager
def _dual(model: nn.Module, params: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Inside, the model computes with dual numbers; their tangents, which stand for the vector, one tensor per parameter."""
    with forward_ad.dual_level():
        tangents = [torch.zeros_like(p, requires_grad=False) for p in params]
        duals = [forward_ad.make_dual(p, t) for p, t in zip(params, tangents, strict=True)]  # type: ignore[no-untyped-call]
        with replaced(model, params, duals):
            yield tangents


class ForwardMode:
    """How one operator computes J v: by the derivative of u -> J^T u, or by a recording, once that was timed and found right and faster.

    Attributes:
        used: whether recordings are played back; None while it is not decided.
    """

    def __init__(self) -> None:
        self.used: bool | None = None
        self._operations: frozenset[Any] = frozenset()
        self._products = 0

    @property
    def due(self) -> bool:
        """Whether it is time to find out."""
        return self.used is None and self._products >= _PRODUCTS

    def count(self, output: Tensor) -> None:
        """Note a product J v of a network with convolutions, whose double backward takes up to three times as long as forward mode.

        Without them, or with group norms, whose forward mode is many small operations, a trial costs more than there is to gain in 50
        products (experiments/forward_mode.py).
        """
        names = {node.name() for node in graph_nodes([output])}
        self._products += any("Convolution" in name for name in names) and not any("GroupNorm" in name for name in names)

    def covers(self, recording: Recording) -> bool:
        """Whether a recording is made of operations that were found right."""
        return recording.operations <= self._operations

    def decide(self, twice: Callable[[], Tensor], recording: Recording, vectors: Sequence[Tensor], *, rounding: float) -> None:
        """Use recordings from now on if this one gives what ``twice`` gives, J v by the double-backward trick, in less time."""
        device = vectors[0].device
        (expected, usual), (recorded, seconds) = _timed(twice, device), _timed(lambda: recording(vectors), device)
        # the square root of the rounding, by judgement: far above what another order of sums changes, far below a wrong rule
        right = float((recorded - expected).norm()) <= math.sqrt(rounding) * float(expected.norm())
        if right and seconds >= usual:  # the first time loads what it needs
            usual, seconds = _timed(twice, device)[1], _timed(lambda: recording(vectors), device)[1]
        self.used, self._operations = right and seconds < usual, recording.operations
        logger.info("J v by recorded forward mode is %s and takes %.3g of the time", "right" if right else "wrong", seconds / usual)


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    began = seconds_now(device)
    result = call()
    return result, seconds_now(device) - began
