"""Where each parameter enters the forward pass: the first result that it makes with data, with the scalar multipliers around it.

A multiplier is judged by what it does to the function and not by where it is written: ``scale * linear(x)``, ``linear(scale * x)`` and
``F.linear(x, scale * weight)`` are one contribution. A scalar behind a product belongs to it; a scalar before a product belongs to that
one if it follows something else (an activation, a norm, a sum), or stands in the forward pass of the module that owns the later weight.
A scalar between two products of data (queries times keys) belongs to neither weight: it is the attention's scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_MATRIX_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
_LINEAR = {*_MATRIX_PRODUCTS, "aten::convolution", "aten::embedding", "aten::mkldnn_rnn_layer"}
# results that hold the same numbers in another storage
_COPIES = {"aten::clone", "aten::_to_copy", "aten::contiguous", "aten::copy", "aten::_reshape_copy"}
_SCALINGS = {"aten::mul", "aten::div", "aten::mul_", "aten::div_"}
_SOFTMAX = {"aten::_softmax", "aten::_safe_softmax"}
_MASKINGS = {*_COPIES, "aten::add", "aten::add_", "aten::masked_fill", "aten::masked_fill_", "aten::where"}
_SUMS = {"aten::add", "aten::sub", "aten::add_", "aten::sub_"}


@dataclass(eq=False)
class Product:
    """What parameters make together with data."""

    names: tuple[str, ...]  # the parameters, by their places in the model
    place: str  # name of the module in whose forward pass it was made
    matrix: bool  # whether a parameter of two or more dimensions is among them
    linear: bool  # whether the result is a matrix product, a convolution or a row looked up, and no sum or elementwise product
    values: list[Tensor]  # copies: with the biases that followed, then behind each multiplier; the last one counts
    input_rms: float | None  # root mean square of the data before multipliers of its own; None for what is looked up
    exits: str | None = None  # the module whose output it is
    exit_rms: float = 0.0  # its size there
    scaled_in: str | None = None  # the module in whose forward pass the last multiplier stood

    @property
    def value(self) -> Tensor:
        """Its contribution, multipliers included."""
        return self.values[-1]

    @property
    def scale(self) -> float:
        """What multipliers make of it after it has left its module."""
        return _rms(self.value) / self.exit_rms if self.exit_rms > 0 else 1.0

    def revert(self, count: int = 1) -> None:
        """The last so many multipliers belong to what follows."""
        del self.values[max(len(self.values) - count, 1) :]


class ProductWatch:
    """Sees every operation of one forward pass; ``products`` by the name of each parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.products: dict[str, Product] = {}
        self._names: dict[int, list[str]] = {}
        self._matrices: set[str] = set()
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.numel():
                self._names.setdefault(_key(p), []).append(name)
                if p.ndim > 1:
                    self._matrices.add(name)
        self._made: dict[int, frozenset[int]] = {key: frozenset([key]) for key in self._names}  # of parameters alone
        self._live: dict[int, list[Product]] = {}  # whose present value this storage holds
        self._logits: dict[int, list[Product]] = {}  # what entered a product of data with data that has no scalar behind it yet
        self._unscaled: dict[int, tuple[float, str]] = {}  # size before a scalar, and the place of that scalar
        self._kept: list[Tensor] = []  # so that no storage is used again

    def see(self, name: str, args: Any, kwargs: Any, result: Any, place: str) -> None:
        """One operation, after it was done."""
        out = next(iter(_flat(result)), None)
        if out is None or not out.is_floating_point() or not out.numel():
            return
        inputs = [t for t in _flat((args, kwargs)) if t.numel()]
        own = [t for t in inputs if _key(t) in self._made]
        scalars = [t for t in inputs if t.numel() == 1 and t.is_floating_point()]
        data = [t for t in inputs if _key(t) not in self._made and not (t.numel() == 1 and t.is_floating_point())]
        if not data:
            if own:
                self._made[self._keep(out)] = frozenset().union(*(self._made[_key(t)] for t in own))
            return
        before, after = _key(data[0]), _key(out)
        changed = name.endswith("_") and after == before
        for t in data:
            if name in _MASKINGS and _key(t) in self._logits:
                self._logits[self._keep(out)] = self._logits[_key(t)]
        if name in _COPIES:
            self._follow(before, self._keep(out))
        elif name in _SCALINGS and len(data) == 1 and all(t.numel() == 1 for t in own):
            self._scaled(data[0], out, place, changed)
            self._add([t for t in own if t in scalars], data, out, place)
        elif name in _SUMS and len(data) == 1 and own and before in self._live and not self._are_matrices(own):
            # a bias behind the product: both are one contribution
            for product in self._live[before]:
                product.values = [out.detach().clone()]
            self._live[self._keep(out)] = list(self._live[before])
            self._add(own, data, out, place, live=self._live[before])
        elif own:
            if changed:
                self._live.pop(after, None)
            self._add(own, data, out, place, linear=name in _LINEAR)
        elif name in _MATRIX_PRODUCTS:
            self._logits[self._keep(out)] = [p for t in data for p in self._live.get(_key(t), [])]
        elif name in _SOFTMAX:
            # queries times keys: a scalar on one of them is the attention's scale
            for product in self._logits.pop(before, []):
                product.revert()
        elif changed:
            self._live.pop(after, None)
            self._unscaled.pop(after, None)

    def leave(self, name: str, output: Any) -> None:
        """A module has ended with this output."""
        for t in _flat(output):
            for product in self._live.get(_key(t), []) if t.numel() else []:
                if product.exits is None:
                    product.exits, product.exit_rms = name, _rms(product.value)

    def is_in(self, product: Product, tensors: Iterable[Tensor]) -> bool:
        """Whether one of these tensors holds a product's value."""
        return any(product in self._live.get(_key(t), []) for t in tensors if t.numel())

    # -- the steps --------------------------------------------------------------------------------------------------------
    def _keep(self, t: Tensor) -> int:
        self._kept.append(t)
        return _key(t)

    def _follow(self, before: int, after: int) -> None:
        if before in self._live:
            self._live[after] = list(self._live[before])
        if before in self._unscaled:
            self._unscaled[after] = self._unscaled[before]

    def _scaled(self, data: Tensor, out: Tensor, place: str, changed: bool) -> None:
        before, after = _key(data), self._keep(out)
        self._logits.pop(before, None)
        products = self._live.get(before, [])
        # of a tensor changed in place the size before is that of the product it holds, or no longer known
        size = None if changed else _rms(data)
        if changed and products:
            size = _rms(products[0].value)
        known = self._unscaled.get(before)
        if known is not None or size is not None:
            self._unscaled[after] = (known[0] if known is not None else size or 0.0, place)
        for product in products:
            product.values.append(out.detach().clone())
            product.scaled_in = place
        if products:
            self._live[after] = list(products)

    def _add(
        self, own: list[Tensor], data: list[Tensor], out: Tensor, place: str, *, linear: bool = False, live: Sequence[Product] = ()
    ) -> None:
        names = {n for t in own for key in self._made[_key(t)] for n in self._at(key, place)}
        # the first use counts, where a change shows before it has changed the input; one that saw zeros alone (a first state) says nothing
        new = [n for n in sorted(names) if n not in self.products or self.products[n].input_rms == 0]
        first = next((t for t in data if t.is_floating_point()), None)
        size = self._input(first, place, linear)  # also of a further use: scalars before it belong to it all the same
        if not new:
            return
        made = Product(tuple(new), place, self._are_matrices(own), linear, [out.detach().clone()], size)
        self.products.update(dict.fromkeys(new, made))
        self._live[self._keep(out)] = [*live, made]

    def _are_matrices(self, own: Iterable[Tensor]) -> bool:
        return any(n in self._matrices for t in own for key in self._made[_key(t)] for n in self._names[key])

    def _input(self, data: Tensor | None, place: str, linear: bool) -> float | None:
        """Size of the data, before the scalars that belong to this product."""
        if data is None:
            return None
        key = _key(data)
        if not linear or key not in self._unscaled:
            return _rms(data)
        products, (size, where) = self._live.get(key, []), self._unscaled[key]
        if any(p.linear for p in products) and not (place and where == place):
            return _rms(data)
        for product in products:
            product.revert(len(product.values))
        return size

    def _at(self, key: int, place: str) -> list[str]:
        """The name of a parameter that is used here: of a tied one, that of the module that computes."""
        names = self._names[key]
        near = [n for n in names if n.rpartition(".")[0] == place]
        return near[:1] or names[:1]


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [t for entry in value for t in _flat(entry)]


def _key(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _rms(x: Tensor) -> float:
    wide = torch.promote_types(x.dtype, torch.float32)  # squares of half-precision activations overflow
    return float(torch.linalg.vector_norm(x.detach(), dtype=wide)) / math.sqrt(x.numel())
