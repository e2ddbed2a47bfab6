"""A muP parametrisation to use: initial values, rates and multipliers of a wide network set from a narrow one on which rates were tuned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkit._arguments import choice, shown
from sharpkit._errors import UnsupportedError
from sharpkit._results import Result
from sharpkit.objective.guard import unwrap
from sharpkit.optimizers import (
    GroupFactors,
    StepKind,
    check_fresh,
    eps_beside_gradients,
    gradient_decays,
    held_parameters,
    split_groups,
    step_kind,
)
from sharpkit.transfer.base_shapes import Base, Role, Shape, as_base

# of the standard deviation asked for, by judgement: samples of a thousand entries scatter by 2 %, and an own law is worth keeping as it is
_SAMPLED = 0.1


@dataclass(frozen=True)
class TensorRule(Result):
    """What was done to one tensor: factors against the base, all of them 1 at the base's own size."""

    name: str
    role: str  # "input", "hidden", "readout", "vector" or "fixed"
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    init: float  # on the initial values of the model
    lr: float
    weight_decay: float
    eps: float
    multiplier: float = 1.0  # on the input of the readout that a tied embedding serves as


@dataclass(frozen=True)
class Parametrization(Result, kind="parametrization"):
    """What :func:`parametrize` changed."""

    optimizers: tuple[str, ...]  # names of their classes
    tensors: tuple[TensorRule, ...]
    attention: tuple[str, ...]  # modules whose scale became q.k/d
    notes: tuple[str, ...]  # what could not be seen to, in sentences

    def table(self) -> str:
        """One line for each tensor."""
        head = f"{'tensor':44s} {'role':8s} {'init':>8s} {'lr':>8s} {'decay':>8s} {'eps':>8s} {'mult.':>8s}"
        rows = (
            f"{t.name[-44:]:44s} {t.role:8s} {t.init:8.3g} {t.lr:8.3g} {t.weight_decay:8.3g} {t.eps:8.3g} {t.multiplier:8.3g}"
            for t in self.tensors
        )
        return "\n".join([head, *rows])

    def __str__(self) -> str:
        changed = sum(any(f != 1 for f in (t.init, t.lr, t.weight_decay, t.eps, t.multiplier)) for t in self.tensors)
        text = f"muP for {', '.join(self.optimizers)}: {changed} of {len(self.tensors)} tensors changed"
        if self.attention:
            text += f", {len(self.attention)} attention scales set to q.k/d"
        return " ".join([f"{text}.", *self.notes])


def parametrize(
    model: nn.Module,
    base: nn.Module | Mapping[str, Sequence[int | None]] | str,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    roles: Mapping[str, Role] | None = None,
) -> Parametrization:
    """Change a fresh model and its optimizer in place so that rates tuned on a narrow base do for it (the maximal update parametrisation).

    With m = fan_in over the base's fan_in: hidden weights get a standard deviation of the base's times m^-1/2 and, under Adam, a rate of
    1/m; readouts a deviation and a rate of 1/m, which does what a multiplier of 1/m would; a readout tied to an embedding has that
    multiplier on its input. Under SGD rates of inputs, biases and gains grow with fan_out and those of readouts fall with fan_in; under
    Muon a step keeps its spectral norm, relative to sqrt(fan_out / fan_in). eps follows the gradients, which fall as 1/fan_out; lr times
    decoupled decay stays, and so does the share of coupled decay. A model of the base's size is left as it is.

    Call it on the new model before the first step and before schedulers are made, with the rates that were best on the base:
    ``sk.transfer.diagnose`` with ``build`` and ``optimizer`` that call it verifies the result.

    Args:
        model: freshly initialised; its forward pass, names and state dict stay as they are.
        base: a narrow model of the same depth, or its shapes by name: a mapping, or the path of a file as microsoft's mup writes, None
            where a dimension does not grow. Of a model the initial values are taken as the base's; with shapes alone, hidden weights and
            readouts are expected with variance 1/fan_in, as PyTorch initialises both.
        optimizer: of the model, with the base's settings; or several that share it. Its groups are split where tensors need rates of their
            own.
        roles: by tensor name, where the layout does not tell: of weights held by modules that torch and transformers do not have.

    Returns:
        what was done to each tensor.

    Raises:
        ValueError: other names or numbers of dimensions than the base's, another depth, an optimizer that has stepped or was changed.
        UnsupportedError: a tensor whose role cannot be determined, an unknown optimizer, nn.MultiheadAttention with larger heads.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> build = lambda n: nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))
        >>> model = build(256)
        >>> adam = torch.optim.Adam(model.parameters(), lr=1e-3)  # the best rate of width 64
        >>> done = parametrize(model, build(64), adam)
        >>> [(t.name, t.role, t.lr) for t in done.tensors if t.lr != 1]
        [('2.weight', 'hidden', 0.25), ('4.weight', 'readout', 0.25)]

    References:
        G. Yang, E. J. Hu et al., Tensor Programs V, 2022, arXiv:2203.03466, Table 3. J. Bernstein, L. Newhouse, Old Optimizer, New Norm,
        2024, arXiv:2409.20325, for steps of a fixed spectral norm.
    """
    net = unwrap(model)
    narrow = as_base(base)
    optimizers = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer of the model, or several, got {shown(each)}")
        check_fresh(each)
    named = dict(net.named_parameters())
    shapes = {name: narrow.shape(name, tuple(p.shape)) for name, p in narrow.matched(named).items()}
    given = dict(roles or {})
    for name, role in given.items():
        choice(f"roles[{name!r}]", role, get_args(Role))
        if name not in named:
            raise ValueError(f"roles names {name!r}, which is no parameter of the model; there are {', '.join(list(named)[:8])}, ...")
    scales = {name: _Scale.of(net, name, tuple(named[name].shape), shapes[name], given.get(name)) for name in named}
    attention, notes = _attention(net, narrow)
    ties = _tied_readouts(net)

    rules = {}
    places = {id(p): name for name, p in named.items()}
    for each in optimizers:
        for name, factors in _factors(each, places, scales).items():
            rules[name] = factors
    done = []
    for name, p in named.items():
        scale = scales[name]
        tied = name in ties
        lr, decay, eps = rules.get(name, GroupFactors(1.0, 1.0, 1.0))
        init = _initialise(p, narrow.std(name), scale)
        multiplier = 1 / scale.width if tied else 1.0
        done.append(TensorRule(name, scale.role, tuple(p.shape), shapes[name], init, lr, decay, eps, multiplier))
    # after everything was checked: a refusal leaves model and optimizers as they were
    for name, heads in ties.items():
        for head in heads if scales[name].width != 1 else ():
            head.register_forward_pre_hook(_Multiplied(1 / scales[name].width), with_kwargs=True)
    for module, value in attention.values():
        module.scaling = value
    for each in optimizers:
        split_groups(each, {place: rules[name] for place, name in places.items() if name in rules})
    return Parametrization(tuple(type(o).__name__ for o in optimizers), tuple(done), tuple(attention), tuple(notes))


# -- roles --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Scale:
    """How a tensor's dimensions grew from the base."""

    role: Role
    into: float  # fan_in over the base's, and fan_out likewise; 1 where it does not grow
    out: float
    shape: Shape
    base: Shape

    @property
    def width(self) -> float:
        """Of the network, as far as this tensor shows it."""
        return self.out if self.out != 1 else self.into

    @property
    def std(self) -> float:
        """Standard deviation over the base's."""
        return math.pow(self.into, {"hidden": -0.5, "readout": -1.0}.get(self.role, 0.0))

    @property
    def gradient(self) -> float:
        """Size of an entry of the gradient over the base's."""
        return 1.0 if self.role in ("readout", "fixed") else 1 / self.out

    @classmethod
    def of(cls, model: nn.Module, name: str, shape: Shape, base: Shape, given: Role | None) -> _Scale:
        grown = [n / b for n, b in zip(shape, base, strict=True)]
        wide = [i for i, r in enumerate(grown) if r != 1]
        owner = model.get_submodule(name.rpartition(".")[0])
        if not wide or given == "fixed":
            return cls("fixed", 1.0, 1.0, shape, base)
        layout = _layout(owner, name.rpartition(".")[2], shape)
        if layout is None and len(wide) == 1 and given is None:
            raise UnsupportedError(
                f"which role {name} {shape} has cannot be determined: {type(owner).__name__} does not say which dimension is the input's. "
                f"Say so: roles={{{name!r}: 'input'}} (or 'hidden', 'readout', 'vector', 'fixed')"
            )
        if layout == ():
            return cls(given or "vector", 1.0, grown[wide[0]], shape, base)
        if layout is None:  # both grow, or the role is given: the growing dimensions are what it says
            first, last = grown[wide[0]], grown[wide[-1]]
            into, out = {"input": (1.0, last), "vector": (1.0, last), "readout": (first, 1.0)}.get(given or "hidden", (last, first))
            return cls(given or "hidden", into, out, shape, base)
        out, into = (math.prod(grown[i] for i in axes) for axes in layout)
        role: Role = "hidden" if into != 1 and out != 1 else "readout" if into != 1 else "input"
        return cls(given or role, into, out, shape, base)


def _layout(owner: nn.Module, leaf: str, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]] | tuple[()] | None:
    """The dimensions of (output, input) of a module's tensor; empty for vectors, None if it is not known."""
    if sum(n > 1 for n in shape) < 2 or (len(shape) > 2 and shape[0] == 1):
        return ()  # biases, gains, a class token, positions (1, time, width) that are added
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return (1,), ()
    if isinstance(owner, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return (1,), (0,)
    if isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
        return (0,), (1,)
    if isinstance(owner, nn.Bilinear):
        return (0,), (1, 2)
    if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf"):  # GPT-2's
        return (1,), (0,)
    return None


def _tied_readouts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Linear modules that share their weight with an embedding, by the name of the shared tensor."""
    names = {id(p): name for name, p in model.named_parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    tied: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in tables:
            tied.setdefault(names[id(module.weight)], []).append(module)
    return tied


class _Multiplied:
    """A hook before a module: its first input times a factor. A class, so that the model can be pickled."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        return args, {name: value * self.factor for name, value in kwargs.items()}  # nn.Linear has one argument


def _attention(model: nn.Module, base: Base) -> tuple[dict[str, tuple[Any, float]], list[str]]:
    """Modules with a scale for q.k and the scale they get; notes on those that could not be compared."""
    set_: dict[str, tuple[Any, float]] = {}
    notes: list[str] = []
    for name, module in model.named_modules():
        d, scaling = getattr(module, "head_dim", None), getattr(module, "scaling", None)
        if not isinstance(d, int):
            continue
        other = base.module(name)
        if other is None:
            if "heads" not in "".join(notes):
                notes.append("Shapes alone do not tell the heads' dimension: where it differs from the base's, logits must be q.k/d.")
            continue
        narrow = getattr(other, "head_dim", d)
        if narrow == d:
            continue
        if isinstance(scaling, float) and isinstance(getattr(other, "scaling", None), float):
            set_[name or "model"] = (module, other.scaling * narrow / d)
        elif isinstance(module, nn.MultiheadAttention):
            raise UnsupportedError(
                f"{name} is nn.MultiheadAttention with heads of {d} dimensions where the base has {narrow}: it divides q.k by sqrt(d), and "
                "muP by d. Keep the heads' dimension and take more heads"
            )
        else:
            notes.append(f"{name}: its heads have {d} dimensions, {narrow} in the base, and its scale is not known: logits must be q.k/d.")
    return set_, notes


# -- factors ------------------------------------------------------------------------------------------------------------------
def _factors(optimizer: Optimizer, places: Mapping[int, str], scales: Mapping[str, _Scale]) -> dict[str, GroupFactors]:
    """Of each tensor that the optimizer holds."""
    coupled, eps = gradient_decays(optimizer), eps_beside_gradients(optimizer)
    factors = {}
    for i, params in enumerate(held_parameters(optimizer)):
        for p in params:
            name = places.get(id(p))
            if name is None:
                raise ValueError(
                    f"the optimizer holds a tensor of shape {tuple(p.shape)} that is no parameter of the model: make the optimizer from "
                    "the model that is passed"
                )
            scale = scales[name]
            kind, length = step_kind(optimizer, i, scale.shape, scale.base)
            lr = _rate(kind, scale) / length
            # lr times decay is what shrinks a weight in a step, unless decay is divided together with the gradient
            decay = scale.gradient / scale.std if coupled[i] else 1 / lr
            factors[name] = GroupFactors(lr, decay, scale.gradient if eps[i] else 1.0)
    return factors


def _rate(kind: StepKind, scale: _Scale) -> float:
    """The factor on the rate for steps whose length the rate alone sets, in their norm."""
    if kind == "spectral":
        return math.sqrt(scale.out / scale.into)
    if kind == "entrywise":
        return 1 / scale.into if scale.role in ("hidden", "readout") else 1.0
    # a gradient's entries: 1/fan_out behind inputs, so that the rate makes up for it, and 1 in readouts, whose steps must be 1/fan_in
    return {"input": scale.out, "vector": scale.out, "hidden": scale.out / scale.into, "readout": 1 / scale.into}.get(scale.role, 1.0)


def _initialise(p: Tensor, base: float | None, scale: _Scale) -> float:
    """Multiply the initial values; the factor."""
    if p.device.type == "meta" or not p.is_floating_point() or scale.role == "fixed":
        return 1.0
    if base is None:  # of variance 1/fan_in by agreement
        factor = scale.into**-0.5 if scale.role == "readout" else 1.0
    else:
        now = float(p.detach().float().std()) if p.numel() > 1 else 0.0
        factor = base * scale.std / now if now > 0 and base > 0 else 1.0
        if abs(factor - 1) < _SAMPLED:
            factor = 1.0
    if factor != 1:
        with torch.no_grad():
            p.mul_(factor)
    return factor
