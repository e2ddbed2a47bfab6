"""Train each size from each seed for a few steps and note, on a fixed batch, how large everything is and what each tensor's change does."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkit._arguments import whole
from sharpkit._results import ProgressCallback
from sharpkit.objective.batches import Batch, batch_length, slice_batch, to_device
from sharpkit.objective.guard import undisturbed, unwrap
from sharpkit.objective.interrupts import Whole
from sharpkit.objective.loss import call_model
from sharpkit.objective.mistakes import telling
from sharpkit.optimizers import eps_beside_gradients, gradient_decays, held_parameters, is_adaptive, learning_rates, subtracted_decays
from sharpkit.training_run import as_seeds
from sharpkit.transfer.products import Product, ProductWatch
from sharpkit.transfer.setup import Family, FamilyRun, RunProgress

Numbers = dict[int, list[list[float]]]  # size -> a list for each seed: one number for each step 0 .. num_steps
Values = dict[int, list[float]]  # size -> one number for each seed

ATTENTION = ": attention logits"
INPUT = ": input"
PRODUCT = ": product"  # of a weight that no module's output shows
SCALED = " x multiplier"  # a module's output times the scalar behind it
_ROUNDED = 1e-3  # by judgement: a multiplier nearer to 1 is rounding
MOST_SAMPLES = 64  # of the fixed batch, by judgement: sizes are means over all its entries, thousands in the narrowest layer
_ROUGH = 5.0  # times the first loss, by judgement: more than batches and good rates do
# the operators of a softmax and of the products around it, as attention is decomposed into
_PRODUCTS = ("aten::bmm", "aten::baddbmm")
_SOFTMAX = ("aten::_softmax", "aten::_safe_softmax")


# -- what is noted ------------------------------------------------------------------------------------------------------------
@dataclass
class Track:
    """One coordinate over sizes, seeds and steps."""

    name: str  # those of the :class:`Activation`
    kind: str
    rms: Numbers = field(default_factory=dict)  # root mean square and mean absolute value of x_t
    mean_abs: Numbers = field(default_factory=dict)
    update: Numbers = field(default_factory=dict)  # root mean square of x_t - x_0
    input_rms: Numbers = field(default_factory=dict)  # root mean square of the module's input, NaN without one
    spread: Values = field(default_factory=dict)  # of x_0 over samples, without what biases add
    entries: dict[int, int] = field(default_factory=dict)  # number of entries by size
    inner: dict[int, int | None] = field(default_factory=dict)  # by size, the dimension that attention logits sum over


@dataclass
class TensorTrack:
    """One parameter tensor over sizes and seeds, after the last step."""

    name: str  # its place in the model; a tied tensor has several
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by size
    table: bool = False  # whether it is looked up (nn.Embedding)
    own: bool = False  # whether the coordinate is what the tensor itself makes together with data
    shown_in: str = ""  # the first coordinate in which its change shows
    effect: Values = field(default_factory=dict)  # RMS of the change of that coordinate when the tensor is put back to its initial value
    level: Values = field(default_factory=dict)  # RMS of that coordinate
    # of the data it multiplies, before multipliers of its own; 1 if it multiplies none, or its place is not known
    input_rms: Values = field(default_factory=dict)
    entries: dict[int, int] = field(default_factory=dict)  # number of entries of that coordinate, by size
    # RMS of the loss's gradient by the coordinate while training (geometric mean over steps); NaN for adaptive optimizers
    signal: Values = field(default_factory=dict)
    lr: dict[int, float] = field(default_factory=dict)  # of its parameter group, by size; decay only if a step subtracts lr decay w
    weight_decay: dict[int, float] = field(default_factory=dict)
    decay_share: Values = field(default_factory=dict)  # RMS of decay w over that of g, where both are divided by D; 0 without decay
    eps_share: Values = field(default_factory=dict)  # eps over the RMS of g, of optimizers that add eps to their root of g^2; else 0


@dataclass
class ProductTrack:
    """What a weight makes of its input at initialisation, over sizes and seeds."""

    name: str  # of the module whose output it is, or of the tensor
    gain: Values = field(default_factory=dict)  # spread of the result, multipliers included, for an input of size one


@dataclass
class Observations:
    """All runs together."""

    sizes: tuple[int, ...]  # what was run
    num_seeds: int
    num_steps: int
    dimension: str
    coordinates: dict[str, Track] = field(default_factory=dict)  # by name, in the order of computing; only those that every size has
    tensors: dict[str, TensorTrack] = field(default_factory=dict)  # by name; empty unless effects were asked for
    products: dict[str, ProductTrack] = field(default_factory=dict)  # by name of the tensor, of those that multiply; likewise
    stream: Values = field(default_factory=dict)  # for depths, RMS at initialisation of what all blocks together add to the residual stream
    blocks: Values = field(default_factory=dict)  # for depths, RMS of the last block's change when all tensors of the blocks are put back
    adaptive: bool = True  # whether the optimizer's step does not grow with the gradient
    rough: bool = False  # whether a loss rose far above the first one: sizes are then those of a saturated network
    diverged: list[tuple[int, int]] = field(default_factory=list)  # (size, seed) of runs whose loss became NaN or infinite


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
    """NaN unless there are values and all of them are positive and finite."""
    every = list(values)
    if not every or not all(math.isfinite(v) and v > 0 for v in every):
        return math.nan
    return math.exp(sum(map(math.log, every)) / len(every))


def root_mean_square(x: Tensor) -> float:
    """In single precision at least; 0 for an empty tensor.

    Example:
        >>> root_mean_square(torch.tensor([3.0, -3.0, 3.0, -3.0]))
        3.0
    """
    return _norm(x, 2) / math.sqrt(x.numel()) if x.numel() else 0.0


def _norm(x: Tensor, power: int) -> float:
    # squares of half-precision activations overflow, and their sums lose what is small
    return float(torch.linalg.vector_norm(x.detach(), power, dtype=torch.promote_types(x.dtype, torch.float32)))


# -- one forward pass ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Activation:
    """One tensor seen in a forward pass."""

    # name of the module, with the call if it is called again and the place in the output if that holds several tensors: "block", "block
    # (call 2)", "block[0]", "model.logits"; the model itself is "output"
    name: str
    # "module", "output" (the model's, or a module's that is the model's too), "before output" (of the last module, changed afterwards
    # into the model's output), "before multiplier" (of a module, by which a scalar is multiplied afterwards), "attention logits",
    # "input" (of a module, if asked for)
    kind: str
    tensor: Tensor  # its values, any shape; masked attention logits left out
    owner: str  # name of the module
    input_rms: float | None = None  # root mean square of the module's first floating input; None without one
    inner: int | None = None  # the dimension that attention logits sum over; None otherwise

    @property
    def rms(self) -> float:
        """Root mean square."""
        return root_mean_square(self.tensor)

    @property
    def mean_abs(self) -> float:
        """Mean absolute value; 0 for an empty tensor."""
        return _norm(self.tensor, 1) / self.tensor.numel() if self.tensor.numel() else 0.0

    @property
    def spread(self) -> float:
        """Root mean square of the deviation from the mean over the first dimension, the samples: without what a bias adds."""
        return root_mean_square(self.tensor - self.tensor.mean(0)) if self.tensor.ndim > 1 else 0.0

    def change(self, other: Activation | None) -> float:
        """Root mean square of the difference from another; NaN if there is none, or it has another shape."""
        if other is None or other.tensor.shape != self.tensor.shape:
            return math.nan
        return root_mean_square(self.tensor - other.tensor)


def record(model: nn.Module, forward: Callable[[], Any], *, inputs_of: Collection[str] = ()) -> dict[str, Activation]:
    """Every module's output in one forward pass in eval mode; the model is left as it was, also after an exception.

    Containers that hand on a child's output unchanged are left out, except the model itself; so are integers and single numbers (a loss).
    """
    return record_products(model, forward, inputs_of=inputs_of)[0]


def record_products(
    model: nn.Module, forward: Callable[[], Any], *, inputs_of: Collection[str] = ()
) -> tuple[dict[str, Activation], dict[str, Product]]:
    """The same, and what each parameter makes together with data, by the parameter's name."""
    watch = _Watch(inputs_of, ProductWatch(model))
    with Whole(_watched(model, watch)):
        forward()
        return watch.finish(), watch.products.products


@contextmanager
def _watched(model: nn.Module, watch: _Watch) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, training=False))  # gradients on, since the model or its loss may take one inside
        # the fast path of nn.MultiheadAttention is one kernel, which calls no hooks and shows no logits
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_pre_hook(watch.entering(name), with_kwargs=True))
            stack.enter_context(module.register_forward_hook(watch.leaving(name)))
        stack.enter_context(_SoftmaxWatch(watch))
        yield


class _Watch:
    """Collects outputs through hooks; ``place`` is the stack of modules being computed."""

    def __init__(self, inputs_of: Collection[str], products: ProductWatch) -> None:
        self._inputs_of, self.products = inputs_of, products
        self.place: list[str] = [""]
        self.seen: list[tuple[Activation, Tensor]] = []  # with the very tensor, which keeps its storage from being used again
        self._calls: dict[str, int] = {}
        self._inputs: list[float | None] = []  # RMS of the inputs of the modules being computed, innermost last

    def entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.place.append(name)
            first = next((t for _, t in _tensors((args, kwargs)) if t.is_floating_point()), None)
            self._inputs.append(None if first is None else root_mean_square(first))
            if first is not None and name in self._inputs_of:
                # a copy, as the module may change its input in place; with an empty tensor, since an input hides no later output
                self.seen.append((Activation(name + INPUT, "input", first.detach().clone(), name), torch.empty(0)))

        return hook

    def leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.place.pop()
            size = self._inputs.pop()
            self.products.leave(name, output)
            known = {id(t) for _, t in self.seen}
            label, kind = self._call(name or "output"), "module" if name else "output"
            for where, tensor in _tensors(output):
                # a child's very tensor is there already, under the child's name
                if tensor.is_floating_point() and tensor.ndim and (name == "" or id(tensor) not in known):
                    self.seen.append((Activation(label + where, kind, tensor.detach().clone(), name, size), tensor))

        return hook

    def _call(self, label: str) -> str:
        self._calls[label] = count = self._calls.get(label, 0) + 1
        return label if count == 1 else f"{label} (call {count})"

    def add_attention(self, name: str, logits: Tensor, inner: int | None) -> None:
        """Logits of a softmax that turned out to be attention, computed in this module."""
        label = self._call(f"{name or 'output'}{ATTENTION}")
        shown = logits[logits > torch.finfo(logits.dtype).min / 2]  # masks are the lowest number, or minus infinity
        self.seen.append((Activation(label, "attention logits", shown, name, None, inner), logits))

    def finish(self) -> dict[str, Activation]:
        """What is also the model's output is called so, and what is turned into it outside of any module is marked."""
        outputs_at = [i for i, (a, _) in enumerate(self.seen) if a.kind == "output"]
        outputs = [self.seen[i][1] for i in outputs_at]
        # by storage and not by object: the last module's output, reshaped, is the same numbers
        storages = {t.untyped_storage().data_ptr() for t in outputs}
        last = next((i for i in range(len(self.seen) - 1, -1, -1) if self.seen[i][0].kind == "module"), -1)
        direct = any(a.kind == "module" and t.untyped_storage().data_ptr() in storages for a, t in self.seen)
        marked = {}
        for i, (a, t) in enumerate(self.seen):
            if a.kind == "module" and t.untyped_storage().data_ptr() in storages:
                a = dataclasses.replace(a, kind="output")
            elif i == last and not direct and any(t.numel() == o.numel() for o in outputs):
                a = dataclasses.replace(a, kind="before output")
            marked[a.name] = a
        # what the function sees of a module is behind its multiplier; a product that is no module's output is a coordinate of its own
        for product in self._added(self.seen[i][1] for i in outputs_at):
            name = product.exits
            if name is None:
                name = f"{product.names[-1]}{PRODUCT}"
            elif name in marked:
                marked[name] = dataclasses.replace(marked[name], kind="before multiplier")
                name += SCALED
            marked.setdefault(name, Activation(name, "module", product.value, product.place, product.input_rms))
        return marked

    def _added(self, outputs: Iterable[Tensor]) -> list[Product]:
        """Linear products that no module's output shows as they are."""
        final = list(outputs)
        every = {id(p): p for p in self.products.products.values() if p.linear and not self.products.is_in(p, final)}
        return [p for p in every.values() if p.exits is None or abs(p.scale - 1) > _ROUNDED]


class _SoftmaxWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each softmax over the last dimension whose result enters a batched product: that is what makes its input attention logits.

    Under the math kernel, which the guard around it asks for, F.scaled_dot_product_attention is made of these too.
    """

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch
        self._product: tuple[int, int] | None = None  # (entries, inner dimension) of the latest batched product
        self._pending: list[tuple[Tensor, Tensor, str, int | None]] = []  # (result, logits, module, inner dimension)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _PRODUCTS:
            self._confirm(args)
        result = func(*args, **(kwargs or {}))
        self._watch.products.see(name, args, kwargs, result, self._watch.place[-1])
        if name in _PRODUCTS:
            self._product = (result.numel(), args[-2].shape[-1])
        elif name in _SOFTMAX and args[0].ndim > 2 and args[1] in (-1, args[0].ndim - 1):
            # a scale and a mask may lie between q.k and the softmax, so only the number of entries ties the two together
            inner = self._product[1] if self._product is not None and self._product[0] == args[0].numel() else None
            self._pending.append((result, args[0].clone(), self._watch.place[-1], inner))
        return result

    def _confirm(self, args: Any) -> None:
        used = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for entry in list(self._pending):
            if entry[0].untyped_storage().data_ptr() in used:
                self._pending = [e for e in self._pending if e is not entry]
                self._watch.add_attention(entry[2], entry[1], entry[3])


def _tensors(value: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """(place, tensor) for each tensor in an output of any nesting; the place of a lone tensor is empty."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, Mapping):  # Hugging Face's outputs too
        for key, entry in value.items():
            yield from _tensors(entry, f"{where}.{key}")
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        for i, entry in enumerate(value):
            yield from _tensors(entry, f"{where}.{names[i]}" if names else f"{where}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from _tensors(getattr(value, f.name), f"{where}.{f.name}")


# -- blocks over depths -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stacks:
    """The numbered containers (``blocks.0``, ``blocks.1``, ...) whose length differs between the sizes."""

    names: tuple[str, ...] = ()  # names of the containers
    lengths: dict[str, dict[int, int]] = field(default_factory=dict)  # container -> size -> number of blocks

    @classmethod
    def of(cls, models: Mapping[int, nn.Module]) -> Stacks:
        """Those in one model for each size.

        Example:
            >>> make = lambda depth: nn.Sequential(nn.Linear(2, 2), nn.Sequential(*[nn.ReLU() for _ in range(depth)]))
            >>> Stacks.of({2: make(2), 4: make(4)}).lengths
            {'1': {2: 2, 4: 4}}
        """
        lengths: dict[str, dict[int, int]] = {}
        for size, model in models.items():
            for name, module in model.named_modules():
                if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
                    lengths.setdefault(name, {})[size] = len(module)
        varying = {n: by for n, by in lengths.items() if len(by) == len(models) and len(set(by.values())) > 1}
        # blocks within blocks are part of the blocks around them
        outermost = {n: by for n, by in varying.items() if not any(n.startswith(f"{o}.") for o in varying if o != n)}
        return cls(tuple(outermost), outermost)

    def aliases(self, name: str, size: int) -> list[str]:
        """What a module or tensor is called when depths are compared: in the first or last block, or as it is; none in between.

        Example:
            >>> stacks = Stacks(("blocks",), {"blocks": {1: 1, 3: 3}})
            >>> stacks.aliases("blocks.0.out", 1), stacks.aliases("blocks.2.out", 3), stacks.aliases("blocks.1", 3)
            (['blocks.first.out', 'blocks.last.out'], ['blocks.last.out'], [])
        """
        for stack in self.names:
            begin = f"{stack}." if stack else ""  # the model itself may be the stack
            if match := re.match(rf"{re.escape(begin)}(\d+)(.*)", name):
                place, rest = int(match[1]), match[2]
                ends = {"first": place == 0, "last": place == self.lengths[stack][size] - 1}
                return [f"{begin}{end}{rest}" for end, here in ends.items() if here]
        return [name]

    def inside(self, name: str) -> bool:
        """Whether a tensor belongs to a block."""
        return any(re.match(rf"{re.escape(s)}\.\d+" if s else r"\d+", name) for s in self.names)

    def ends(self, size: int) -> tuple[str, str]:
        """Names of the first and the last block of the longest stack; empty strings without one."""
        if not self.names:
            return "", ""
        longest = max(self.names, key=lambda n: self.lengths[n][size])
        begin = f"{longest}." if longest else ""
        return f"{begin}0", f"{begin}{self.lengths[longest][size] - 1}"


# -- the runs -----------------------------------------------------------------------------------------------------------------
def observe(
    family: Family,
    sizes: Sequence[int],
    *,
    steps: int,
    seeds: int | Sequence[int],
    effects: bool,
    lr_factor: float = 1.0,
    callback: ProgressCallback | None = None,
) -> Observations:
    """Train and note, one run after another; with ``effects``, also put back each tensor in turn, one forward pass each.

    ``lr_factor`` multiplies all rates.

    Raises:
        ValueError, TypeError: steps or seeds that are no positive whole numbers.
    """
    steps = whole("steps", steps)
    chosen = as_seeds(seeds)
    seen = Observations(tuple(sizes), len(chosen), steps, family.dimension)
    progress = RunProgress(callback, len(sizes) * len(chosen))
    # over widths every module has the same name in all models; over depths blocks are compared by their place from either end
    deep = family.dimension == "depth"
    stacks = Stacks.of({size: unwrap(family.start(size).model) for size in sizes}) if deep else Stacks()
    for size in sizes:
        for seed in chosen:
            _Observer(seen, family.start(size, seed=seed, lr_factor=lr_factor), stacks).observe(effects=effects)
            progress.tell(f"{family.dimension} {size}, seed {seed}", runs=1)
    # what not every size has, as a layer that only wide networks get, has no exponent
    seen.coordinates = {n: t for n, t in seen.coordinates.items() if len(t.rms) == len(sizes)}
    seen.tensors = {n: t for n, t in seen.tensors.items() if len(t.shapes) == len(sizes)}
    seen.products = {n: t for n, t in seen.products.items() if len(t.gain) == len(sizes)}
    return seen


class Effect(NamedTuple):
    """What putting one tensor back changes, as in :class:`TensorTrack`."""

    change: float
    level: float
    input_rms: float
    signal: float


class _Observer:
    """One run, noted in the observations of all."""

    def __init__(self, seen: Observations, run: FamilyRun, stacks: Stacks) -> None:
        self.seen, self.training, self.stacks, self.size = seen, run, stacks, run.size
        self.model = unwrap(run.model)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.probe = to_device(probe_batch(run.family), device)
        self.signals: dict[str, list[float]] = {}
        self.gradients: dict[int, list[tuple[float, float]]] = {}  # RMS of the gradient and of the parameter at each step
        seen.adaptive = is_adaptive(run.optimizer, unknown=True)

    def observe(self, *, effects: bool) -> None:
        # by identity, since a tied tensor has several names
        start = {id(p): p.detach().clone() for p in self.model.parameters()}
        first, products = self._record()
        self._note(first, first)
        # the depth multiplier shows before any step: what all branches together add must not grow with their number
        if self.stacks.names:
            self.seen.stream.setdefault(self.size, []).append(self._added(first))
        if effects and not self.stacks.names:
            self._note_products(products)
        now = first
        for _ in range(self.seen.num_steps):
            # an adaptive step does not grow with the gradient, so that only under SGD its size at each output is needed
            with self._signals_heard() if effects and not self.seen.adaptive else nullcontext():
                self.training.step()
            now, products = self._record()
            self._note(now, first)
            self._note_gradients()
        losses = self.training.losses
        self.seen.rough |= not max(losses) <= _ROUGH * abs(losses[0])
        if self.training.diverged:
            self.seen.diverged.append((self.size, self.training.seed))
        if effects:
            self._put_back_each(start, now, products)

    def _record(self, replaced: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Activation], dict[str, Product]]:
        """Activations and products on the fixed batch, with some parameters replaced for the while."""
        begin = self.stacks.ends(self.size)[0]
        with _replaced(self.model, replaced or {}):
            call = partial(forward, self.training.family, self.model, self.probe)
            return record_products(self.model, call, inputs_of=[begin] if begin else [])

    def _note(self, now: dict[str, Activation], first: dict[str, Activation]) -> None:
        for raw, a in now.items():
            for name in self.stacks.aliases(raw, self.size) if a.kind != "input" else []:
                # in the residual stream only the last block's output has a size that the depth may not change
                within = name != raw and name.rpartition(".")[2] != "last"
                track = self.seen.coordinates.setdefault(name, Track(name, "inside a block" if within else a.kind))
                track.entries[self.size], track.inner[self.size] = a.tensor.numel(), a.inner
                values = {"rms": a.rms, "mean_abs": a.mean_abs, "update": a.change(first.get(raw))}
                values["input_rms"] = math.nan if a.input_rms is None else a.input_rms
                if now is first:
                    track.spread.setdefault(self.size, []).append(a.spread)
                for key, value in values.items():
                    runs = getattr(track, key).setdefault(self.size, [])
                    if now is first:
                        runs.append([])
                    runs[-1].append(math.nan if self.training.diverged else value)

    def _added(self, first: dict[str, Activation]) -> float:
        """RMS of the last block's output minus the first block's input."""
        begin, end = self.stacks.ends(self.size)
        into = first.get(begin + INPUT)
        out = first.get(end) or first.get(f"{end}[0]")
        return math.nan if into is None or out is None else out.change(into)

    # -- what each tensor's change does ---------------------------------------------------------------------------------------
    def _put_back_each(self, start: dict[int, Tensor], now: dict[str, Activation], products: dict[str, Product]) -> None:
        inside = {}
        # a tied tensor at each of its places, since it may have another role at each
        for raw, p in self.model.named_parameters(remove_duplicate=False):
            if not p.requires_grad:
                continue
            if self.stacks.inside(raw):
                inside[raw] = start[id(p)]
            names = self.stacks.aliases(raw, self.size)
            if names:
                back, again = self._record({raw: start[id(p)]})
                named = [(a, back.get(a.name)) for a in now.values() if a.kind not in ("attention logits", "input")]
                changed = (a for a, before in named if a.change(before) > 0)  # lazily: the first one is found early
                shown = next(changed, None)
                if shown is not None and shown.kind == "before output":  # a multiplier outside of the module is part of the readout
                    shown = next((a for a in changed if a.kind == "output"), shown)
                made = self._contribution(raw, products, again)
                for name in names:
                    if made is not None:
                        self._note_effect(name, raw, p, *made)
                        self.seen.tensors[name].own = True
                    else:
                        self._note_elsewhere(name, raw, p, shown, back)
                    self._note_settings(name, p)
        # all blocks at once: each one's share shrinks with the depth in any parametrisation
        if inside:
            # at the end of the stack: a norm behind it would hide that the changes grow
            end = self.stacks.ends(self.size)[1]
            name = next((n for n in (end, f"{end}[0]", "output") if n in now), "")
            change = now[name].change(self._record(inside)[0].get(name)) if name else math.nan
            self.seen.blocks.setdefault(self.size, []).append(math.nan if self.training.diverged else change)

    def _contribution(self, raw: str, now: dict[str, Product], back: dict[str, Product]) -> tuple[Effect, str, int] | None:
        """What the change of a parameter makes of its own product; None where it has none, as where it is used in an unknown way."""
        product, before = now.get(raw), back.get(raw)
        if product is None or before is None or product.value.shape != before.value.shape:
            return None
        change = root_mean_square(product.value - before.value)
        # the gradient at a module's output is that at the product only if the module gives the product
        heard = geometric_mean(self.signals.get(product.exits, [])) if product.exits is not None else math.nan
        signal = heard / product.scale if product.scale > 0 else math.nan
        scale = 1.0 if product.input_rms is None or not product.matrix else product.input_rms
        shown = raw + PRODUCT if product.exits is None else product.exits or "output"
        return Effect(change, root_mean_square(product.value), scale, signal), shown, product.value.numel()

    def _note_elsewhere(self, name: str, raw: str, p: Tensor, shown: Activation | None, back: dict[str, Activation]) -> None:
        """By the first coordinate that changes."""
        if shown is None:
            return self._note_effect(name, raw, p, None, "", None)
        signal = geometric_mean(self.signals.get(shown.owner, []))
        # a tensor used outside of its module shows elsewhere, where this input says nothing about it
        scale = shown.input_rms if shown.owner == raw.rpartition(".")[0] and shown.input_rms is not None else 1.0
        effect = Effect(shown.change(back.get(shown.name)), shown.rms, scale, signal)
        self._note_effect(name, raw, p, effect, shown.name, shown.tensor.numel())

    def _note_effect(self, name: str, raw: str, p: Tensor, effect: Effect | None, shown_in: str, entries: int | None) -> None:
        track = self.seen.tensors.setdefault(name, TensorTrack(name))
        track.shapes[self.size] = tuple(p.shape)
        track.table = isinstance(self.model.get_submodule(raw.rpartition(".")[0]), nn.Embedding)
        if effect is None or self.training.diverged:
            effect = Effect(math.nan, math.nan, 1.0, math.nan)
        elif entries is not None:
            track.shown_in, track.entries[self.size] = shown_in, entries
        values = (track.effect, track.level, track.input_rms, track.signal)
        for kept, value in zip(values, effect, strict=True):
            kept.setdefault(self.size, []).append(value)

    def _note_gradients(self) -> None:
        """Against which coupled decay and eps are small or large."""
        for p in self.model.parameters():
            if p.grad is not None and self.seen.adaptive:
                self.gradients.setdefault(id(p), []).append((root_mean_square(p.grad), root_mean_square(p)))

    def _note_settings(self, name: str, p: Tensor) -> None:
        """Rate, decay and eps of its group; an optimizer need not hold every parameter that requires gradients."""
        optimizer, track = self.training.optimizer, self.seen.tensors[name]
        at = next((i for i, held in enumerate(held_parameters(optimizer)) if any(q is p for q in held)), None)
        if at is None:
            rate, decay, coupled, eps = math.nan, 0.0, 0.0, 0.0
        else:
            read = (learning_rates, subtracted_decays, gradient_decays, eps_beside_gradients)
            rate, decay, coupled, eps = (of(optimizer)[at] for of in read)
        track.lr[self.size], track.weight_decay[self.size] = rate, decay
        seen = self.gradients.get(id(p), [])
        for kept, factor, over in ((track.decay_share, coupled, 1), (track.eps_share, eps, 0)):
            ratios = [(w if over else 1.0) / g for g, w in seen if g > 0]
            kept.setdefault(self.size, []).append(factor * geometric_mean(ratios) if factor else 0.0)

    def _note_products(self, products: dict[str, Product]) -> None:
        """At initialisation: what each parameter contributes, for an input of its size."""
        for name, product in products.items():
            if product.linear:
                track = self.seen.products.setdefault(name, ProductTrack(product.exits or name))
                # over samples, without what biases add
                result = product.value
                spread = root_mean_square(result - result.mean(0) if len(result) > 1 else result)
                gain = spread / product.input_rms if product.input_rms else spread
                track.gain.setdefault(self.size, []).append(gain)

    @contextmanager
    def _signals_heard(self) -> Iterator[None]:
        """Note the gradient by each module's output in the training step inside."""

        def listener(name: str) -> Callable[..., None]:
            def note(gradient: Tensor) -> None:
                self.signals.setdefault(name, []).append(root_mean_square(gradient))

            def hook(module: nn.Module, args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, (tuple, list)) and output else output
                if isinstance(first, Tensor) and first.requires_grad:
                    first.register_hook(note)  # type: ignore[no-untyped-call]

            return hook

        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                stack.enter_context(module.register_forward_hook(listener(name)))
            yield


def probe_batch(family: Family) -> Batch:
    """The fixed batch: the first one, its first 64 samples."""
    batch = family.batches[0]
    length = batch_length(batch)
    return batch if length is None or length <= MOST_SAMPLES else slice_batch(batch, 0, MOST_SAMPLES, length=length)


def forward(family: Family, model: nn.Module, batch: Batch) -> None:
    """One call of the model on a batch, whatever its form."""
    if family.loss is not None:
        with telling("model(input)", model, batch[0]):
            call_model(model, batch[0])  # the loss is not needed; in the other two forms it is the loss that calls the model
    else:
        with torch.enable_grad():  # a closure may take a gradient inside
            family.loss_of(model, batch)


@contextmanager
def _replaced(model: nn.Module, replaced: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in some places of the model; a tied tensor stays as it is in its other places."""
    before = {name: model.get_parameter(name) for name in replaced}

    def place(name: str, value: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)

    try:
        for name, value in replaced.items():
            # a new parameter, not a copy into the old one, which tied places and the optimizer share
            other = nn.Parameter(value, requires_grad=before[name].requires_grad)
            other.__dict__.update(before[name].__dict__)  # what libraries note on a parameter (its base shape)
            place(name, other)
        yield
    finally:
        for name, p in before.items():
            place(name, p)
