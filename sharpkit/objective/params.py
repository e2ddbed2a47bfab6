"""Which parameters are meant, and how they lie in one flat vector."""

from __future__ import annotations

import fnmatch
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._arguments import shown
from sharpkit._errors import ObjectiveError, UnsupportedError
from sharpkit.objective.guard import turn
from sharpkit.objective.interrupts import Whole
from sharpkit.objective.sharding import Shards, is_sharded

ParamSelector = str | Iterable[str] | Callable[[str, Tensor], bool] | None


@dataclass(frozen=True)
class ParamLayout:
    """Named parameters, each once, laid end to end in one flat vector; of a sharded model, this process's own part of each.

    Attributes:
        names: in the order of ``model.named_parameters()``; tied tensors appear once, under their first name.
        params: what is differentiated with respect to: the live parameters themselves, or this process's own parts of them.
        shards: of a sharded model, who holds what.
        sharded: the live parameters of a sharded model.
    """

    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    shards: Shards | None = None
    sharded: tuple[nn.Parameter, ...] = ()

    @property
    def live(self) -> tuple[nn.Parameter, ...]:
        """The model's own parameters, as an optimizer holds them."""
        return self.params if self.shards is None else self.sharded

    def part_of(self, live: Tensor, tensor: Tensor) -> Tensor:
        """What this process's vectors hold of a tensor like a parameter (an optimizer's state, say): all of it unless it is sharded."""
        return tensor if self.shards is None else self.shards.part_of(live, tensor)

    def own_rows(self, vectors: Tensor) -> Tensor:
        """This process's own rows of vectors over all processes, (num_entries,) or (num_entries, k)."""
        if self.shards is None:
            return vectors
        own, begin = [], 0
        for p in self.sharded:
            rows = vectors[begin : begin + p.numel()]
            columns = [self.shards.part_of_whole(p, column).reshape(-1) for column in (rows.T if rows.ndim == 2 else rows[None])]
            own.append(torch.stack(columns, dim=1) if rows.ndim == 2 else columns[0])
            begin += p.numel()
        return torch.cat(own)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries per parameter."""
        return tuple(p.numel() for p in self.params)

    @property
    def size(self) -> int:
        """Length of the flat vector, on this process."""
        return sum(self.sizes)

    @property
    def num_entries(self) -> int:
        """Entries of all parameters, over all processes."""
        return sum(p.numel() for p in self.live)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the flat vector: the widest of the parameters', at least float32."""
        dtype = torch.float32  # half precision vectors would round away the small entries of a basis
        for p in self.params:
            dtype = torch.promote_types(dtype, p.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the flat vector lives: with the first parameter."""
        return self.params[0].device

    def split(self, vector: Tensor) -> list[Tensor]:
        """The flat vector as one tensor per parameter, in its shape, type and device (views where possible).

        Several vectors, (n, k), give tensors of shape (k, ...).
        """
        block = vector.shape[1:]
        if not block and not (self._is_odd or vector.storage_offset() % 2) and vector.is_contiguous() and self._holds(vector):
            # nothing to convert or to copy: at small models a third of what a product takes around its backward pass
            return [x.view(p.shape) for x, p in zip(torch.split_with_sizes(vector, self._sizes), self.params, strict=True)]
        whole = torch.split_with_sizes(vector.T if block else vector, self._sizes, dim=-1)
        # complex views of a parameter (torch.view_as_complex) need pairs that begin at an even place
        pieces = [x.clone() if x.storage_offset() % 2 and x.numel() % 2 == 0 else x for x in whole]
        return [x.reshape(*block, *p.shape).to(dtype=p.dtype, device=p.device) for x, p in zip(pieces, self.params, strict=True)]

    @cached_property
    def _sizes(self) -> list[int]:
        return list(self.sizes)

    @cached_property
    def _is_odd(self) -> bool:
        """Whether a parameter with an even number of entries begins at an odd place."""
        return any(
            start % 2 and size % 2 == 0 for start, size in zip(itertools.accumulate(self.sizes, initial=0), self.sizes, strict=False)
        )

    def _holds(self, vector: Tensor) -> bool:
        """Whether all parameters have the type and device of a vector."""
        return all(p.dtype == vector.dtype and p.device == vector.device for p in self.params)

    def add_flat_(self, total: Tensor, pieces: Sequence[Tensor | None], weight: float) -> None:
        """``total += weight * pieces``, with None meaning zero; of several vectors, (n, k), if the pieces have shape (k, ...)."""
        block = total.shape[1:]
        for target, piece in zip(torch.split_with_sizes(total, self._sizes), pieces, strict=True):
            if piece is not None:
                rows = _dense(piece).reshape(*block, -1).to(device=target.device)
                target.add_(rows.T if block else rows, alpha=weight)

    def flatten(self, pieces: Sequence[Tensor | None], weight: float = 1.0) -> Tensor:
        """``weight * pieces`` as one flat vector, one tensor (or None, meaning zero) per parameter."""
        dtype, device, parts = self.dtype, self.device, [p.reshape(-1) for p in pieces if p is not None and not p.is_sparse]
        if len(parts) == len(self.params) and all(part.dtype == dtype and part.device == device for part in parts):
            flat = torch.cat(parts)
        else:
            flat = torch.empty(self.size, dtype=dtype, device=device)
            for target, piece in zip(torch.split_with_sizes(flat, self._sizes), pieces, strict=True):
                target.copy_(_dense(piece).reshape(-1)) if piece is not None else target.zero_()
        return flat if weight == 1.0 else flat.mul_(weight)  # in place: one vector of memory, not two

    def current(self) -> Tensor:
        """The parameters' present values as a new flat vector."""
        return self.flatten([p.detach() for p in self.params])

    def checked(self, vector: Any, name: str) -> Tensor:
        """A given vector in parameter space, in the layout's type and on its device.

        Raises:
            TypeError: it is no tensor of real numbers.
            ValueError: it has another shape.
        """
        if not isinstance(vector, Tensor) or vector.is_complex() or vector.is_meta:
            raise TypeError(f"{name} must be a tensor of {self.size} real numbers, got {shown(vector)}")
        if vector.shape != (self.size,):
            raise ValueError(f"{name} must have the shape ({self.size},) of the flat parameter vector, got {tuple(vector.shape)}")
        return vector.to(dtype=self.dtype, device=self.device)

    def indices(self, names: Iterable[str]) -> Tensor:
        """Positions of the named parameters in the flat vector, (m,) int64."""
        wanted, start, chunks = set(names), 0, []
        for name, size in zip(self.names, self.sizes, strict=True):
            if name in wanted:
                chunks.append(torch.arange(start, start + size))
            start += size
        return torch.cat(chunks).to(self.device)

    def check_live(self, model: nn.Module) -> None:
        """Make sure that these are still the model's own trainable parameters.

        Raises:
            ObjectiveError: one was replaced, frozen, or changed its type.
        """
        present = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}
        for name, p in zip(self.names, self.live, strict=True):
            if present.get(name) is not p:
                cause = "is no longer part of the model: it was replaced, as load_state_dict(..., assign=True) does"
            elif not p.requires_grad:
                cause = "was frozen (requires_grad=False)"
            elif torch.promote_types(self.dtype, p.dtype) != self.dtype:
                cause = f"is now {p.dtype}"
            else:
                continue
            raise ObjectiveError(f"parameter {name!r} {cause} after the objective was made: make a new Objective")

    def layers(self) -> dict[str, list[str]]:
        """Parameter names grouped by the module that owns them."""
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
        return groups


class ModelTensors:
    """What a model is made of at this moment: its modules, parameters and buffers, found again without going through the modules.

    Args:
        model: the module.
        shards: of a sharded model, who holds what: then its parameters are this process's parts of them.
    """

    def __init__(self, model: nn.Module, shards: Shards | None = None) -> None:
        modules = list(model.modules())
        held_by = [held for m in modules for held in ((m._modules, m._parameters) if shards is None else (m._modules,))]
        self._made_of = [(held, tuple(held.values())) for held in held_by]
        self._holders = [m._buffers for m in modules]
        self.parameters: list[nn.Parameter] = list(model.parameters() if shards is None else shards.leaves.values())

    def are_current(self) -> bool:
        """Whether no module and no parameter was added, removed or replaced."""
        return all(len(held) == len(before) and all(map(operator.is_, held.values(), before)) for held, before in self._made_of)

    def now(self) -> list[Tensor]:
        """Every parameter once, then every buffer, which may have been replaced: their values alone count."""
        return [*self.parameters, *(t for held in self._holders for t in held.values() if t is not None)]


def _dense(piece: Tensor) -> Tensor:
    """Gradients of sparse embeddings are sparse."""
    return piece.to_dense() if piece.is_sparse else piece


def select_params(
    model: nn.Module, selector: ParamSelector = None, *, shards: Shards | None = None, may_be_sharded: bool = False
) -> ParamLayout:
    """The trainable parameters that the selector picks.

    Args:
        model: its ``named_parameters()`` are asked, tied tensors once.
        selector: None for all; a shell pattern such as ``"blocks.*.attn.*"``, several of them, or a predicate (name, parameter) -> bool.
        shards: of a sharded model, who holds what.
        may_be_sharded: look at names alone, before that is known.

    Raises:
        ValueError: nothing is left, a pattern matches nothing, or a picked parameter is complex or not yet initialised.
        TypeError: the selector is none of these.
        UnsupportedError: parameters are sharded tensors.
    """
    selector = _checked_selector(selector)
    everything = [(name.replace("_orig_mod.", ""), p) for name, p in model.named_parameters()]  # compiled parts add a prefix
    for name, p in everything:
        _check_not_sharded(name, p, known=may_be_sharded or shards is not None)
    chosen = [(name, p) for name, p in everything if _matches(selector, name, p)]
    shown = (", ".join(name for name, _ in everything[:8]) or "none at all") + (" ..." if len(everything) > 8 else "")
    for pattern in selector if isinstance(selector, tuple) else ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in everything):
            raise ValueError(f"params={pattern!r} picks no parameter; the model's parameters are: {shown}")
    if not chosen:
        raise ValueError("the model has no parameters" if selector is None else f"params= picks none of the model's parameters: {shown}")
    trainable = [(name, p) for name, p in chosen if p.requires_grad]
    if not trainable:
        kinds = sorted({str(p.dtype) for _, p in chosen if not p.is_floating_point()})
        frozen = f"of type {', '.join(kinds)}, which has no gradient" if kinds else "frozen (requires_grad=False)"
        raise ValueError(f"all {len(chosen)} parameters picked are {frozen}: call requires_grad_(True) on those whose curvature is meant")
    for name, p in trainable:
        _check_param(name, p)
    names, picked = tuple(name for name, _ in trainable), tuple(p for _, p in trainable)
    return ParamLayout(names, picked) if shards is None else ParamLayout(names, tuple(shards.leaves[id(p)] for p in picked), shards, picked)


def _checked_selector(selector: ParamSelector) -> tuple[str, ...] | Callable[[str, Tensor], bool] | None:
    if selector is None or callable(selector):
        return selector
    listed = isinstance(selector, Iterable) and not isinstance(selector, (bytes, Mapping))
    patterns = (selector,) if isinstance(selector, str) else tuple(selector) if listed else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        came = shown(selector) if patterns is None else f"a {type(selector).__name__} of {type(patterns[0]).__name__}"
        raise TypeError(
            "params must be a name pattern such as 'blocks.*.attn.*', several of them, or a predicate (name, parameter) -> bool, got "
            f"{came}. For given tensors: params=lambda name, p: any(p is q for q in wanted)"
        )
    return patterns


def _matches(selector: tuple[str, ...] | Callable[[str, Tensor], bool] | None, name: str, param: Tensor) -> bool:
    if selector is None:
        return True
    if isinstance(selector, tuple):
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in selector)
    try:
        return bool(selector(name, param))
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise TypeError(
            f"params, as a function, is called as params(name, parameter) and must return a bool; it raised: {error}"
        ) from error


def _check_not_sharded(name: str, param: Tensor, *, known: bool) -> None:
    if type(param).__name__ == "FlatParameter" or (is_sharded(param) and not known):
        raise UnsupportedError(
            f"parameter {name!r} is sharded over processes in a way that this cannot measure: shard the model by fully_shard or "
            "parallelize_module and pass it to Objective, or gather it into plain tensors (full_tensor(), or a full state dict)"
        )


def _check_param(name: str, param: nn.Parameter) -> None:
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise ValueError(f"parameter {name!r} of a lazy module has no shape yet: run one forward pass first")
    if param.is_meta:
        raise ValueError(
            f"parameter {name!r} is on the meta device, which holds no numbers: call model.to_empty(device='cpu') and load its weights"
        )
    if param.is_complex():
        raise ValueError(
            f"parameter {name!r} is complex, and curvature here is of real parameters: store its real and imaginary parts as two "
            "parameters, or leave it out by params="
        )
    if param.is_inference():  # autograd refuses such tensors later, in other words
        raise ValueError(f"parameter {name!r} was made under torch.inference_mode() and can have no gradient: build the model outside it")


def among(own: set[int]) -> Callable[[str, Tensor], bool]:
    """A selector of the parameters with these ``id``s."""
    return lambda _, parameter: id(parameter) in own


def replaced(model: nn.Module, params: Sequence[Tensor], others: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Inside, the model computes with other tensors in the parameters' places; the very same objects are put back after."""
    return Whole(_replaced(model, params, others))


@contextmanager
def _replaced(model: nn.Module, params: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    with turn():
        instead = {id(p): other for p, other in zip(params, others, strict=True)}
        # what modules keep besides: tensors computed from parameters, as by the old weight norm, and the list of an RNN's weights
        kept = [(m, {k: v for k, v in vars(m).items() if isinstance(v, Tensor) or k == "_flat_weights"}) for m in model.modules()]
        places = [(m._parameters, name, p) for m, _ in kept for name, p in m._parameters.items() if id(p) in instead]
        try:
            for parameters, name, p in places:
                parameters[name] = instead[id(p)]  # type: ignore[assignment]
            for m, own in kept:
                if "_flat_weights" in own:
                    vars(m)["_flat_weights"] = [instead.get(id(w), w) for w in own["_flat_weights"]]
            yield
        finally:
            for parameters, name, p in places:
                parameters[name] = p
            for m, own in kept:
                vars(m).update(own)


def moved(layout: ParamLayout, direction: Sequence[Tensor], step: float) -> AbstractContextManager[None]:
    """Parameters at w + step * direction inside; the original storages, never written to, are put back after. Other threads wait."""
    return Whole(_moved(layout, direction, step))


@contextmanager
def _moved(layout: ParamLayout, direction: Sequence[Tensor], step: float) -> Iterator[None]:
    with turn():
        originals = [p.data for p in layout.params]  # exchanged whole: adding the step and taking it off again would leave rounding behind
        try:
            for p, here, d in zip(layout.params, originals, direction, strict=True):
                p.data = here + step * d
            yield
        finally:
            for p, here in zip(layout.params, originals, strict=True):
                p.data = here
