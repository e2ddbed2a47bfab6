"""What a forward pass computes: every module's output, once for each call, and the logits of every attention, seen from outside."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkit._guard import undisturbed

ATTENTION = ": attention logits"
INPUT = ": input"
_PRODUCTS = ("aten::bmm", "aten::baddbmm")
_SOFTMAX = ("aten::_softmax", "aten::_safe_softmax")


@dataclass(frozen=True)
class Activation:
    """One tensor seen in a forward pass.

    Attributes:
        name: of the module, with the call where it is called again and the place in the output where that holds several tensors:
            ``"block"``, ``"block (call 2)"``, ``"block[0]"``, ``"model.logits"``; the model itself is ``"output"``.
        kind: ``"module"``, ``"output"`` (the model's, or a module's that is the model's too), ``"before output"`` (of the last module,
            changed afterwards into the model's output), ``"attention logits"``, ``"input"`` (of a module, where asked for).
        tensor: its values, any shape; masked attention logits left out.
        owner: name of the module.
        input_rms: root mean square of the module's first floating input; None without one.
        inner: the dimension that attention logits sum over; None otherwise.
    """

    name: str
    kind: str
    tensor: Tensor
    owner: str
    input_rms: float | None = None
    inner: int | None = None

    @property
    def rms(self) -> float:
        """Root mean square."""
        return root_mean_square(self.tensor)

    @property
    def spread(self) -> float:
        """Root mean square of the deviation from the mean over the first dimension, the samples: without what a bias adds."""
        return root_mean_square(self.tensor - self.tensor.mean(0)) if self.tensor.ndim > 1 else 0.0


def root_mean_square(x: Tensor) -> float:
    """In single precision at least; 0 for an empty tensor.

    Example:
        >>> root_mean_square(torch.tensor([3.0, -3.0, 3.0, -3.0]))
        3.0
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return float(torch.linalg.vector_norm(x.detach(), dtype=dtype)) / math.sqrt(x.numel()) if x.numel() else 0.0


def record(model: nn.Module, forward: Callable[[], Any], *, inputs_of: Collection[str] = ()) -> dict[str, Activation]:
    """Every module's output in one forward pass, in eval mode and without gradients; the model is left as found, also after an exception.

    Containers that hand on a child's output unchanged are left out, but for the model itself; so are integers and single numbers (a loss).

    Args:
        model: without wrappers.
        forward: calls the model once.
        inputs_of: names of modules whose first floating input is recorded too.

    Returns:
        name -> activation, in the order in which they were computed.
    """
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, training=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_slow_attention())
        watch = _Watch(model, inputs_of)
        stack.enter_context(watch.hooked())
        stack.enter_context(_SoftmaxWatch(watch))
        forward()
        return watch.finish()


@contextmanager
def _slow_attention() -> Iterator[None]:
    """nn.MultiheadAttention step by step: its fast path is one kernel, into which nobody sees."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Watch:
    """Collects outputs through hooks; ``place`` is the stack of modules being computed."""

    def __init__(self, model: nn.Module, inputs_of: Collection[str]) -> None:
        self.model, self._inputs_of = model, inputs_of
        self.place: list[str] = [""]
        self.found: list[tuple[Activation, Tensor]] = []  # with the very tensor, which keeps its storage from being used again
        self._calls: dict[str, int] = {}
        self._inputs: list[float | None] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leaving(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.place.append(name)
            first = next((t for _, t in _tensors((args, kwargs)) if t.is_floating_point()), None)
            self._inputs.append(None if first is None else root_mean_square(first))
            if first is not None and name in self._inputs_of:
                self.add(Activation(name + INPUT, "input", first.detach().clone(), name), torch.empty(0))

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.place.pop()
            size = self._inputs.pop()
            known = {id(t) for _, t in self.found}
            label = self._call(name or "output")
            for where, tensor in _tensors(output):
                if tensor.is_floating_point() and tensor.ndim and (name == "" or id(tensor) not in known):
                    self.add(Activation(label + where, "output" if name == "" else "module", tensor.detach().clone(), name, size), tensor)

        return hook

    def _call(self, label: str) -> str:
        self._calls[label] = count = self._calls.get(label, 0) + 1
        return label if count == 1 else f"{label} (call {count})"

    def add(self, activation: Activation, tensor: Tensor) -> None:
        self.found.append((activation, tensor))

    def add_attention(self, name: str, logits: Tensor, inner: int | None) -> None:
        label = self._call(f"{name or 'output'}{ATTENTION}")
        shown = logits[logits > torch.finfo(logits.dtype).min / 2]
        self.add(Activation(label, "attention logits", shown, name, None, inner), logits)

    def finish(self) -> dict[str, Activation]:
        """What is also the model's output is called so, and what is turned into it outside of any module is marked."""
        outputs = [t for a, t in self.found if a.kind == "output"]
        storages = {t.untyped_storage().data_ptr() for t in outputs}
        last = next((i for i in range(len(self.found) - 1, -1, -1) if self.found[i][0].kind == "module"), -1)
        direct = any(a.kind == "module" and t.untyped_storage().data_ptr() in storages for a, t in self.found)
        marked = {}
        for i, (a, t) in enumerate(self.found):
            if a.kind == "module" and t.untyped_storage().data_ptr() in storages:
                a = dataclasses.replace(a, kind="output")
            elif i == last and not direct and any(t.numel() == o.numel() for o in outputs):
                a = dataclasses.replace(a, kind="before output")
            marked[a.name] = a
        return marked


class _SoftmaxWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each softmax over the last dimension whose result enters a batched product: that is what makes its input attention logits.

    Under the math kernel, which the guard around it asks for, F.scaled_dot_product_attention is made of these too.
    """

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch
        self._product: tuple[int, int] | None = None  # (entries, inner dimension) of the latest batched product
        self._pending: list[tuple[Tensor, Tensor, str, int | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _PRODUCTS:
            self._confirm(args)
        result = func(*args, **(kwargs or {}))
        if name in _PRODUCTS:
            self._product = (result.numel(), args[-2].shape[-1])
        elif name in _SOFTMAX and args[0].ndim > 2 and args[1] in (-1, args[0].ndim - 1):
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
