"""Cross-entropy over a large vocabulary, and its derivatives, from a few tokens' logits at a time."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sharpkit.objective.batches import map_tensors

# On a CPU, chunks of 16 MiB take up to a fifth more time than 8 to 62 MiB of whole logits, and half the time of 250 MiB; smaller chunks
# take longer (experiments/large_vocabulary.py). From where the memory matters more than the fifth: by judgement.
_LEAST_BYTES = 2**25  # of logits, from which on they are not held whole
_CHUNK_BYTES = {"cpu": 2**24}  # of the logits of one chunk of tokens, by that experiment
_LEAST_CLASSES = 1024  # of a head that is looked out for, by judgement: with fewer, large logits belong to batches that are cut anyway
_ELSEWHERE = 2**28  # on other devices, by judgement: 512 tokens of 128k classes, enough rows for a matrix product to run at full speed
_AT_ONCE = 7  # tensors of a chunk's size that a product holds at once, by judgement: as many as _TokenGradients.backward names
_FEWEST = 16  # tokens in a chunk, by judgement: fewer make the product with the head one of a matrix with single vectors

# What is done to logits between the head and the loss, entry by entry: multiplied by a number, cast to a type, or tanh.
Step = float | torch.dtype | str
TANH = "tanh"


@dataclass(frozen=True)
class _Way:
    """How a token's loss depends on its head's output, and which second derivative is meant.

    Attributes:
        steps: between the head and the loss.
        smoothing: of labels, as in cross-entropy.
        curvature: ``"hessian"``, or what leaves out the second derivatives of the logits themselves: ``"gauss_newton"``, and ``"fisher"``,
            which has the square of the gradient at the given labels in place of the loss's second derivative.
    """

    steps: tuple[Step, ...] = ()
    smoothing: float = 0.0
    curvature: str = "hessian"

    def logits(self, z: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """What the loss receives for the head's output z, and its first and second derivative in z, entry by entry."""
        y, slope, bend = z, 1.0, 0.0  # type: tuple[Tensor, Tensor | float, Tensor | float]
        for step in self.steps:
            if isinstance(step, torch.dtype):
                y = y.to(step)
            elif isinstance(step, float):
                y, slope, bend = y * step, slope * step, bend * step
            else:
                y = y.tanh()
                first = 1 - y * y
                bend = first * bend - 2 * y * first * slope * slope
                slope = first * slope
        return y.float() if y.dtype in (torch.bfloat16, torch.float16) else y, slope, bend


class _TokenLosses(torch.autograd.Function):
    """-log p(label) of each token, (T,), of hidden states (T, d), a head's weight (V, d) and bias (V,), and labels (T,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, way: _Way) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.way = way
        losses = []
        for part in _chunks(hidden, weight):
            y, _, _ = way.logits(F.linear(hidden[part], weight, bias))
            own = y.gather(1, labels[part, None])[:, 0]
            losses.append(y.logsumexp(1) - (1 - way.smoothing) * own)
            if way.smoothing:
                losses[-1] -= way.smoothing * y.mean(1)
        return torch.cat(losses) if losses else hidden.sum(1)

    @staticmethod
    def backward(ctx: Any, share: Tensor) -> Any:  # type: ignore[override]
        gradients = _TokenGradients.apply(share, *ctx.saved_tensors, ctx.way, ctx.needs_input_grad[:3])  # type: ignore[no-untyped-call]
        return *gradients, None, None


class _TokenGradients(torch.autograd.Function):
    """The gradients of sum_t share_t loss_t in hidden states, weight and bias; None where it is not needed."""

    @staticmethod
    def forward(
        ctx: Any, share: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, way: _Way, needed: Sequence[bool]
    ) -> Any:
        ctx.save_for_backward(share, hidden, weight, bias, labels)
        ctx.way = way
        ctx.set_materialize_grads(False)
        total = _Total(hidden, weight, bias, needed)
        for part in _chunks(hidden, weight):
            y, slope, _ = way.logits(F.linear(hidden[part], weight, bias))
            score = _score(y.softmax(1), labels[part], way.smoothing)
            total.add(part, (score * share[part, None] * slope).to(hidden.dtype))
        return total.results()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        share, hidden, weight, bias, labels = ctx.saved_tensors
        way, hessian = ctx.way, ctx.way.curvature == "hessian"
        along_hidden, along_weight, along_bias = along
        slopes = []
        total = _Total(hidden, weight, bias, ctx.needs_input_grad[1:4])
        for part in _chunks(hidden, weight):
            y, slope, bend = way.logits(F.linear(hidden[part], weight, bias))
            dz = torch.zeros_like(y, dtype=hidden.dtype) if along_weight is None else F.linear(hidden[part], along_weight)
            if along_hidden is not None:
                dz.addmm_(along_hidden[part], weight.T)
            if along_bias is not None:
                dz += along_bias
            dz = dz.to(y.dtype)
            dy, p = dz * slope, y.softmax(1)
            curved = None if way.curvature == "fisher" else p * (dy - (p * dy).sum(1, keepdim=True))
            score = _score(p, labels[part], way.smoothing)
            slopes.append((score * dy).sum(1))
            if curved is None:
                curved = score * slopes[-1][:, None]
            curved = curved * slope
            if hessian and not isinstance(bend, float):
                curved += score * bend * dz
            curved = (curved * share[part, None]).to(hidden.dtype)
            total.add(part, curved)
            if hessian:  # logits are bilinear in hidden states and weight
                total.add_mixed(part, (score * share[part, None] * slope).to(hidden.dtype), along_hidden, along_weight)
        return torch.cat(slopes) if ctx.needs_input_grad[0] and slopes else None, *total.results(), None, None, None


def _score(p: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The gradient of a token's loss in its logits, written over the probabilities."""
    if smoothing:
        p -= smoothing / p.shape[1]
    return p.scatter_add_(1, labels[:, None], p.new_full((len(labels), 1), smoothing - 1.0))


class _Total:
    """Gradients in hidden states, weight and bias, added up chunk by chunk; of half precision in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> None:
        self._hidden, self._weight = hidden, weight
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self._in_hidden = torch.empty_like(hidden) if needed[0] else None
        self._in_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self._in_bias = torch.zeros_like(bias, dtype=wide) if needed[2] and bias is not None else None

    def add(self, part: slice, slope: Tensor) -> None:
        """A gradient in a chunk's logits, (tokens, V), taken through the head."""
        if self._in_hidden is not None:
            torch.mm(slope, self._weight, out=self._in_hidden[part])
        self._add_outer(slope, self._hidden[part])
        if self._in_bias is not None:
            self._in_bias += slope.sum(0)

    def add_mixed(self, part: slice, slope: Tensor, along_hidden: Tensor | None, along_weight: Tensor | None) -> None:
        """The derivative of :meth:`add` in what the gradient is multiplied by."""
        if self._in_hidden is not None and along_weight is not None:
            self._in_hidden[part].addmm_(slope, along_weight)
        if along_hidden is not None:
            self._add_outer(slope, along_hidden[part])

    def _add_outer(self, slope: Tensor, rows: Tensor) -> None:
        if self._in_weight is None:
            return
        if self._in_weight.dtype == slope.dtype:
            self._in_weight.addmm_(slope.T, rows)
        else:
            self._in_weight += slope.T @ rows

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        in_weight = None if self._in_weight is None else self._in_weight.to(self._weight.dtype)
        return self._in_hidden, in_weight, None if self._in_bias is None else self._in_bias.to(self._weight.dtype)


def bytes_of_chunks(device: torch.device) -> int:
    """Memory that a product takes for the logits of one chunk, and what is computed from them."""
    return _AT_ONCE * _CHUNK_BYTES.get(device.type, _ELSEWHERE)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    entries = _CHUNK_BYTES.get(hidden.device.type, _ELSEWHERE) // max(hidden.element_size(), 4)
    rows = max(_FEWEST, entries // len(weight))
    return (slice(start, start + rows) for start in range(0, len(hidden), rows))


@dataclass
class Chunking:
    """Whether an objective's cross-entropies over large vocabularies are computed in chunks; shared by it and those made from it.

    Attributes:
        allowed: unless a loss in chunks failed, or was not the loss.
        compared: whether one was compared with the loss from whole logits; True from the start where nothing is to be checked.
        used: whether there was one.
    """

    allowed: bool
    compared: bool
    used: bool = False

    @property
    def in_use(self) -> bool:
        """Whether losses are computed in chunks."""
        return self.allowed and self.used

    @classmethod
    def of(cls, model: nn.Module, *, check: bool) -> Chunking:
        """Of an objective of this model: allowed if it may have a head of many classes."""
        allowed = any(p.ndim == 2 and max(p.shape) >= _LEAST_CLASSES for p in model.parameters())
        return cls(allowed, compared=not check)


# -- logits that are not computed until they must be ------------------------------------------------------------------------
class LazyLogits(Tensor):
    """The output of a head, ``steps(hidden @ weight.T + bias)``, computed only if something else than a cross-entropy asks for its entries.

    What acts on whole tokens (cuts, reshapes, a moved class axis) acts on the hidden states; what acts on each entry alike (scaling, casts,
    tanh) is noted. Everything else computes the logits, and goes on with those.
    """

    hidden: Tensor  # (..., d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    axis: int  # of the classes among the axes; those of the tokens keep their order
    way: _Way
    watch: weakref.ref[Chunked]  # told of what is computed in chunks; weakly, since it keeps the last of that
    made_with_gradients: bool
    computed: Tensor | None

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        axis: int | None = None,
        way: _Way = _Way(),
        watch: weakref.ref[Chunked],
    ) -> LazyLogits:
        axis = hidden.ndim - 1 if axis is None else axis
        shape = [*hidden.shape[:axis], len(weight), *hidden.shape[axis:-1]]
        dtype = next((step for step in reversed(way.steps) if isinstance(step, torch.dtype)), hidden.dtype)
        gradients = torch.is_grad_enabled()
        needs = gradients and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
        lazy: LazyLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device, requires_grad=needs)  # type: ignore
        lazy.hidden, lazy.weight, lazy.bias, lazy.axis, lazy.way = hidden, weight, bias, axis, way
        lazy.made_with_gradients, lazy.computed, lazy.watch = gradients, None, watch
        return lazy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _writes(func) or "out" in kwargs:  # views of these logits would have to see it
            raise RuntimeError(f"{func.__name__} writes to logits that are not computed")
        if func in _NATIVE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        lazy = args[0] if args else None
        if isinstance(lazy, LazyLogits) and lazy.computed is None and func in _KNOWN:
            result = _KNOWN[func](lazy, *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        computed = functools.partial(map_tensors, lambda t: t.compute() if isinstance(t, LazyLogits) else t)
        return func(*computed(args), **computed(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} was called on logits that are not computed")  # past the torch functions: the objective computes them

    def compute(self) -> Tensor:
        """The logits themselves, once; from then on all that is done is done to them."""
        if self.computed is None:
            with torch.set_grad_enabled(self.made_with_gradients), torch.autocast(self.hidden.device.type, enabled=False):
                y = F.linear(self.hidden, self.weight, self.bias)
                for step in self.way.steps:
                    y = y.to(step) if isinstance(step, torch.dtype) else y * step if isinstance(step, float) else y.tanh()
                self.computed = y.movedim(-1, self.axis)
        return self.computed

    def like(self, **changed: Any) -> LazyLogits:
        same = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias, "axis": self.axis, "way": self.way, "watch": self.watch}
        with torch.set_grad_enabled(self.made_with_gradients and torch.is_grad_enabled()):
            return LazyLogits(**{**same, **changed})

    def cut(self, curvature: str, cut: Callable[[Tensor], bool]) -> tuple[LazyLogits, list[Tensor], list[Tensor]]:
        """The same logits of leaves in place of hidden states, weight and bias.

        Args:
            curvature: that second derivatives have from then on, as in :class:`_Way`.
            cut: which of the three to replace; the others are held fixed.

        Returns:
            the logits, what was replaced, and the leaves in its place.
        """
        whole: list[Tensor] = []
        leaves: list[Tensor] = []

        def replaced(t: Tensor) -> Tensor:
            leaf = t.detach()
            if cut(t):
                whole.append(t)
                leaves.append(leaf.requires_grad_())
            return leaf

        hidden, weight = replaced(self.hidden), replaced(self.weight)
        bias = None if self.bias is None else replaced(self.bias)
        return self.like(hidden=hidden, weight=weight, bias=bias, way=replace(self.way, curvature=curvature)), whole, leaves

    def token_losses(self, kept: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """-log p(label), (T,), of the tokens that are kept, a mask in the tokens' shape; in float32 at least."""
        way = replace(self.way, smoothing=smoothing)
        losses: Tensor = _TokenLosses.apply(self.hidden[kept], self.weight, self.bias, labels, way)  # type: ignore[no-untyped-call]
        return losses

    def draw(self, noise: Tensor) -> Tensor:
        """A label of each token drawn from the model.

        Args:
            noise: float64, uniform in [0, 1), one for each token, in the tokens' shape.
        """
        hidden, uniform, drawn = self.hidden.reshape(-1, self.hidden.shape[-1]), noise.reshape(-1, 1), []
        with torch.no_grad():
            for part in _chunks(hidden, self.weight):
                # float64, as in the draws from whole logits: they must not depend on the device
                p = self.way.logits(F.linear(hidden[part], self.weight, self.bias))[0].double().softmax(1)
                drawn.append((p.cumsum_(1) < uniform[part]).sum(1).clamp_max(len(self.weight) - 1))
        return torch.cat(drawn).view(noise.shape)

    def take(self, index: Any) -> Any:
        """What an index picks among the tokens, or a range of classes."""
        given = list(index) if isinstance(index, tuple) else [index]
        if sum(i is Ellipsis for i in given) > 1 or self.axis != self.ndim - 1:
            return NotImplemented
        axes = sum(i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None and i is not Ellipsis for i in given)
        at_end = axes == self.ndim or (Ellipsis in [i for i in given if not isinstance(i, Tensor)] and given[-1] is not Ellipsis)
        if not at_end:
            return self.like(hidden=(hidden := self.hidden[index]), axis=hidden.ndim - 1)
        *before, last = given
        if not isinstance(last, slice) or last.step not in (None, 1):
            return NotImplemented
        hidden = self.hidden[(*before, slice(None))]
        bias = None if self.bias is None else self.bias[last]
        return self.like(hidden=hidden, weight=self.weight[last], bias=bias, axis=hidden.ndim - 1)

    def reshaped(self, *sizes: Any) -> Any:
        sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        if self.axis != self.ndim - 1 or not all(isinstance(size, int) for size in sizes):
            return NotImplemented
        shape = torch.empty(self.shape, device="meta").reshape(*sizes).shape
        if not shape or shape[-1] != len(self.weight):
            return NotImplemented
        return self.like(hidden=self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]), axis=len(shape) - 1)

    def flattened(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        return self.reshaped(*torch.empty(self.shape, device="meta").flatten(start_dim, end_dim).shape)

    def reordered(self, *dims: Any) -> LazyLogits:
        order = [*dims[0]] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else [*dims]
        torch.empty(self.shape, device="meta").permute(order)  # refuses what is no permutation
        return self.permuted([d % self.ndim for d in order])

    def permuted(self, order: Sequence[int]) -> LazyLogits:
        tokens = [i for i in range(self.ndim) if i != self.axis]
        hidden = self.hidden.permute([*(tokens.index(i) for i in order if i != self.axis), self.ndim - 1])
        return self.like(hidden=hidden, axis=order.index(self.axis))

    def transposed(self, dim0: int, dim1: int) -> LazyLogits:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permuted(order)

    def moved(self, source: Any, destination: Any) -> Any:
        if not (isinstance(source, int) and isinstance(destination, int)):
            return NotImplemented
        torch.empty(self.shape, device="meta").movedim(source, destination)  # refuses axes that there are not
        order = list(range(self.ndim))
        order.insert(destination % self.ndim, order.pop(source))
        return self.permuted(order)

    def stepped(self, *steps: Step) -> LazyLogits:
        return self.like(way=replace(self.way, steps=(*self.way.steps, *steps)))

    def scaled(self, factor: Any, *, inverse: bool = False) -> Any:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor:
            return NotImplemented
        return self.stepped(1.0 / factor if inverse else float(factor))

    def cast(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        kinds = [each for each in given if isinstance(each, torch.dtype)]
        places = [torch.device(each) for each in given if isinstance(each, (str, torch.device))]
        if len(kinds) + len(places) < len(given) or not kinds + places or any(p != self.device for p in places):
            return NotImplemented
        return self.stepped(*kinds) if all(kind.is_floating_point for kind in kinds) else NotImplemented

    def cross_entropy(
        self,
        target: Any,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        """As torch.nn.functional.cross_entropy, from a few tokens' logits at a time."""
        labels = type(target) is Tensor and target.dtype == torch.int64 and target.shape == self.hidden.shape[:-1]
        if not labels or self.axis != 1 or size_average is not None or reduce is not None or (weight is not None and label_smoothing):
            return NotImplemented
        kept = target != ignore_index
        own = target[kept]
        if len(own) and (int(own.min()) < 0 or int(own.max()) >= len(self.weight)):
            return NotImplemented  # PyTorch says it
        source, watch = self, self.watch()
        if watch is not None and watch.cut is not None:
            source, watch.outputs, watch.leaves = watch.cut(self)
        losses = source.token_losses(kept, own, smoothing=float(label_smoothing))
        if watch is not None:
            watch.losses += 1
            watch.last = TokenLosses(losses, source, kept, own, ignore_index, weight is None and not label_smoothing)
        losses = losses if torch.is_autocast_enabled(self.device.type) else losses.to(self.dtype)
        if weight is not None:
            losses = losses * weight[own]
        if reduction == "none":
            return losses.new_zeros(target.shape).masked_scatter(kept, losses)
        if reduction == "sum":
            return losses.sum()
        return losses.sum() / (losses.numel() if weight is None else weight[own].sum())


@dataclass(frozen=True)
class TokenLosses:
    """A cross-entropy that was computed in chunks, before it was reduced.

    Attributes:
        losses: of the tokens that count, (T,).
        logits: what it was computed from.
        kept: which of their tokens count.
        labels: of those, (T,).
        ignored: the label of tokens that do not count.
        plain: whether it has neither class weights nor smoothed labels.
    """

    losses: Tensor
    logits: LazyLogits
    kept: Tensor
    labels: Tensor
    ignored: int
    plain: bool


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__setitem__", "__set__") or (name.startswith("__i") and name.endswith("__")) or (name[-1:] == "_" != name[-2:-1])


_NATIVE = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu")),
        *(getattr(Tensor, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "is_nested")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "is_complex", "is_floating_point", "__len__")),
        *(torch.is_floating_point, torch.is_complex, torch.numel, Tensor.__hash__),
    ]
)
_KNOWN: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: LazyLogits.cross_entropy,
    Tensor.__getitem__: LazyLogits.take,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), LazyLogits.reshaped),
    **dict.fromkeys((Tensor.flatten, torch.flatten), LazyLogits.flattened),
    **dict.fromkeys((Tensor.transpose, torch.transpose), LazyLogits.transposed),
    **dict.fromkeys((Tensor.movedim, torch.movedim), LazyLogits.moved),
    **dict.fromkeys((Tensor.permute, torch.permute), LazyLogits.reordered),
    Tensor.mT.__get__: lambda lazy: lazy.transposed(-2, -1),  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.contiguous, Tensor.clone, torch.clone), lambda lazy: lazy),
    Tensor.float: lambda lazy: lazy.stepped(torch.float32),
    Tensor.double: lambda lazy: lazy.stepped(torch.float64),
    Tensor.to: LazyLogits.cast,
    **dict.fromkeys((Tensor.tanh, torch.tanh, F.tanh), lambda lazy: lazy.stepped(TANH)),
    **dict.fromkeys((Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__), LazyLogits.scaled),
    **dict.fromkeys((Tensor.div, torch.div, Tensor.__truediv__, torch.true_divide), lambda lazy, c: lazy.scaled(c, inverse=True)),
}
_FUSED = getattr(F, "linear_cross_entropy", None)  # from torch 2.12 on
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


Cut = Callable[[LazyLogits], tuple[LazyLogits, list[Tensor], list[Tensor]]]


class Chunked(TorchFunctionMode):
    """While it is entered, heads with many classes give :class:`LazyLogits`.

    Args:
        least_bytes: of logits, from which on; by default where it saves memory and no time is lost.
        cut: applied to logits before their cross-entropy is computed, as :meth:`LazyLogits.cut`.

    Attributes:
        heads: outputs that were not computed at once.
        nbytes: of the largest of them.
        losses: cross-entropies that were computed in chunks.
        last: the last of them.
        outputs, leaves: what ``cut`` replaced there, and by what.

    Raises:
        RuntimeError: a derivative of such a loss is taken inside, which would be one too many.
    """

    def __init__(self, *, least_bytes: float | None = None, cut: Cut | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heads = self.losses = self.nbytes = 0
        self.last: TokenLosses | None = None
        self.cut, self.outputs, self.leaves = cut, list[Tensor](), list[Tensor]()
        self._least_bytes = _LEAST_BYTES if least_bytes is None else least_bytes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DERIVATIVES and self.losses:
            raise RuntimeError("a derivative is taken inside the loss")
        if func is _FUSED and (loss := self._fused(*args, **kwargs)) is not None:
            return loss
        if func is F.linear and (lazy := self._lazy(*args, **kwargs)) is not None:
            return lazy
        if func in _PRODUCTS and len(args) == 2 and args[1].ndim == 2 and (lazy := self._lazy(args[0], args[1].mT)) is not None:
            return lazy
        return func(*args, **kwargs)

    def _fused(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        options: Any = None,
        **settings: Any,
    ) -> Tensor | None:
        """PyTorch's own head and loss in one, whose chunks cannot be differentiated twice."""
        if (lazy := self._lazy(input, linear_weight, linear_bias)) is None:
            return None
        settings.pop("options", None)
        ignored = settings.pop("ignore_index", None)
        return F.cross_entropy(lazy, target, ignore_index=-100 if ignored is None else ignored, **settings)

    def _lazy(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LazyLogits | None:
        input = input.compute() if isinstance(input, LazyLogits) else input  # a wide layer before the head
        given = [t for t in (input, weight, bias) if t is not None]
        if any(type(t) not in (Tensor, nn.Parameter) or not t.is_floating_point() or t.device != input.device for t in given):
            return None
        if weight.ndim != 2 or input.ndim < 2 or len(weight) <= weight.shape[1]:
            return None
        nbytes = input.numel() // weight.shape[1] * len(weight) * input.element_size()
        if nbytes < self._least_bytes:
            return None
        if torch.is_autocast_enabled(input.device.type):
            half = torch.get_autocast_dtype(input.device.type)
            given = [t if t.dtype == torch.float64 else t.to(half) for t in given]
        if len({t.dtype for t in given}) > 1:
            return None
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in given):  # under vmap or jvp
            return None
        self.heads, self.nbytes = self.heads + 1, max(self.nbytes, nbytes)
        return LazyLogits(*given, watch=weakref.ref(self))
