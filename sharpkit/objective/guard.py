"""Leave no trace: everything a measurement could disturb is saved before it and restored after it, whatever happens."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _pop_mode

from sharpkit._errors import ObjectiveError, UnsupportedError
from sharpkit.objective.interrupts import Whole, check_pending


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel, DataParallel and torch.compile wrappers.

    Second order through these wrappers fails or, with a static DDP graph, corrupts later training gradients.

    Raises:
        UnsupportedError: fully sharded (FSDP) models.
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        else:
            _check_parts(model)
            return model


def _check_parts(model: nn.Module) -> None:
    for name, part in model.named_modules():
        where = f"the model's part {name!r}" if name else "the model"
        if type(part).__name__ == "FullyShardedDataParallel":
            raise UnsupportedError(
                f"{where} is FullyShardedDataParallel, through which second derivatives fail: gather the parameters into a plain copy of "
                "the model (a full state dict) and measure that"
            )
        if isinstance(part, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise UnsupportedError(
                f"{where} is wrapped in {type(part).__name__}, through which second derivatives are silently wrong: wrap the whole model "
                "instead, or pass the model with that part unwrapped (.module)"
            )


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed every generator that a model may draw from; to be called under :func:`undisturbed`, which puts their states back.

    On the CPU, unlike ``torch.manual_seed``, it leaves no seeds behind for devices without a context: torch notes each with a traceback,
    which took a third of a small network's training step.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (user code draws from it; it takes 32 bits)


def random_fingerprint(device: torch.device) -> tuple[object, ...]:
    """Equal before and after a computation that drew no random numbers."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    legacy: Any = np.random.get_state()  # noqa: NPY002
    return (*(s.numpy().tobytes() for s in states), random.getstate(), legacy[1].tobytes(), legacy[2:])


# Measurements of one process take turns, guard by guard: random states, kernel switches and a model's flags are the process's or the
# model's, and a thread that came in between would save what another has changed, or draw the dropout masks that another has seeded.
# A bare ``with TURN`` is for work too short for a guard: CPython runs no signal handler between taking a lock so and entering the block.
TURN = threading.RLock()


class _Under:
    """One guard that is in force: the model, and how many calls of user code are running under it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, 0


class _Guards(threading.local):
    """The guards that this thread is under, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Under] = []


_GUARDS = _Guards()


def undisturbed(
    model: nn.Module,
    *,
    training: bool,
    in_eval: Container[str] = (),
    inside: Callable[[], AbstractContextManager[None]] | None = None,
    twice: bool = True,
) -> AbstractContextManager[None]:
    """Run a measurement on a model without leaving a trace, also where a signal's exception or another thread comes in between.

    Inside: gradients are on, autocast is off, attention uses the math kernel (the only one that can be differentiated twice), compiled
    code runs eagerly, backward hooks of parameters and modules are silent, ``.grad`` is empty, buffers are copies. After, also after an
    exception: training flags, buffers, gradients, hooks and random states are what they were, the very same objects. Forward hooks run:
    they may be part of the function, as those of pruning and old-style weight norm are. Other threads wait until it is left.

    Args:
        model: unwrapped.
        training: the mode to measure in.
        in_eval: names of the modules that stay in eval mode all the same; see :func:`modules_in_eval`.
        inside: a context to be entered last, for a sharded model.
        twice: whether attention is to be differentiated twice; else it may run any kernel.

    Raises:
        ObjectiveError: the model is being evaluated by a measurement in this thread, which its forward pass, a hook or its loss called.
    """
    refuse_reentry(model)
    return Whole(_undisturbed(model, training, in_eval, inside, twice))


@contextmanager
def _undisturbed(
    model: nn.Module, training: bool, in_eval: Container[str], inside: Callable[[], AbstractContextManager[None]] | None, twice: bool
) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(turn())
        stack.enter_context(_under(model))
        stack.enter_context(_random_states_kept())  # early in, late out: restoring the rest may draw, too
        stack.enter_context(_module_state_kept(model, training, in_eval))
        stack.enter_context(torch.inference_mode(False))  # a user may measure from inside an evaluation loop
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(p.device.type for p in model.parameters())}:
            stack.enter_context(torch.autocast(kind, enabled=False))  # the objective's own autocast is entered inside
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):  # the cuDNN kernel has no second derivative
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_modes_kept())  # last in, first out: a mode left pushed would see what the others do to put things back
        if inside is not None:
            stack.enter_context(inside())
        yield


def grad_mode_kept() -> AbstractContextManager[None]:
    """Around training of our own, outside a guard: an interruption in an optimizer's ``no_grad`` must not leave gradients off."""
    return Whole(_grad_mode_kept())


@contextmanager
def _grad_mode_kept() -> Iterator[None]:
    before = torch.is_grad_enabled()
    with _modes_kept():
        try:
            yield
        finally:
            torch._C._set_grad_enabled(before)  # type: ignore[no-untyped-call, unused-ignore]


@contextmanager
def _modes_kept() -> Iterator[None]:
    """Function and dispatch modes that an exception left pushed are popped: entered in the body, they are no whole (see Whole)."""
    stacks: tuple[tuple[Callable[[], int], Callable[[], Any]], ...] = (
        (torch._C._len_torch_function_stack, torch._C._pop_torch_function_stack),
        (torch._C._len_torch_dispatch_stack, _pop_mode),
    )
    before = [size() for size, _ in stacks]
    try:
        yield
    finally:
        for (size, pop), count in zip(stacks, before, strict=True):
            while size() > count:
                pop()


@contextmanager
def turn() -> Iterator[None]:
    """Other threads wait until it is left: around what reads a model as a whole or moves its parameters, outside a guard."""
    while not TURN.acquire(timeout=0.1):  # in pieces, by judgement: Ctrl-C must work while another thread measures
        check_pending()
    try:
        yield
    finally:
        TURN.release()


@contextmanager
def _under(model: nn.Module) -> Iterator[None]:
    _GUARDS.stack.append(_Under(model))
    try:
        yield
    finally:
        _GUARDS.stack.pop()


@contextmanager
def calling(model: nn.Module) -> Iterator[None]:
    """Around each call of user code under a guard: a measurement that is started in there is refused."""
    under = _GUARDS.stack[-1] if _GUARDS.stack else _Under(model)
    under.calls += 1
    try:
        yield
    finally:
        under.calls -= 1


def refuse_reentry(model: nn.Module) -> None:
    """Raise where this thread is inside a measurement's own call of the model.

    Raises:
        ObjectiveError: it is; without end each measurement would start another.
    """
    for under in _GUARDS.stack:
        if under.calls and (any(m is model for m in under.model.modules()) or any(m is under.model for m in model.modules())):
            raise ObjectiveError(
                f"a measurement of {type(model).__name__} was started while another one evaluates it, by a forward hook, its forward() or "
                "its loss: start it in the training loop, or let the hook return at once while a flag of yours says that you measure"
            )


class RandomStates:
    """The states of every generator that user code may draw from, as they are now."""

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        # asking an uninitialised CUDA for its state would make a context on every device
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        self._cuda = [(d, torch.cuda.get_rng_state(d)) for d in devices]
        self._cpu, self._python, self._numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        self._own = [(g, g.get_state()) for g in generators]

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self._cpu)
        for d, state in self._cuda:
            torch.cuda.set_rng_state(state, d)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        for g, state in self._own:
            g.set_state(state)


def random_states_kept(generators: Iterable[torch.Generator] = ()) -> AbstractContextManager[None]:
    """Whatever is drawn or seeded inside, every generator goes on afterwards as if it had not been: those of torch, Python, NumPy."""
    return Whole(_random_states_kept(generators))


@contextmanager
def _random_states_kept(generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    with turn():
        states = RandomStates(generators)
        try:
            yield
        finally:
            states.restore()


def silenced(category: type[Warning]) -> AbstractContextManager[None]:
    """No warnings of a category inside. Other threads wait: the filters are the process's, and two would put back each other's."""
    return Whole(_silenced(category))


@contextmanager
def _silenced(category: type[Warning]) -> Iterator[None]:
    with turn(), warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield


@contextmanager
def _module_state_kept(model: nn.Module, training: bool, in_eval: Container[str]) -> Iterator[None]:
    named = list(model.named_modules())
    modules = [m for _, m in named]
    flags = [m.training for m in modules]
    buffers = [dict(m._buffers) for m in modules]
    params = list(model.parameters())
    grads = [p.grad for p in params]
    hooks = [p._backward_hooks for p in params]
    module_hooks = [(m._backward_hooks, m._backward_pre_hooks) for m in modules]
    copies: dict[int, Tensor] = {}  # by id: a buffer that two modules share stays shared
    try:
        for name, m in named:
            m.training = training and name not in in_eval  # not .train(): a module may override it
            m._backward_hooks, m._backward_pre_hooks = OrderedDict(), OrderedDict()
        for m, own in zip(modules, buffers, strict=True):
            for name, b in own.items():
                if b is not None:
                    m._buffers[name] = copies[id(b)] = copies[id(b)] if id(b) in copies else b.detach().clone()
        for p in params:
            p.grad = None
            p._backward_hooks = None  # a user's hook would log or change gradients that are none of training
        yield
    finally:
        for m, flag, (backward, pre) in zip(modules, flags, module_hooks, strict=True):
            m.training, m._backward_hooks, m._backward_pre_hooks = flag, backward, pre
        for m, own in zip(modules, buffers, strict=True):
            if [*m._buffers.keys()] != [*own]:  # the forward pass registered or removed some, which it cannot in TorchScript
                m._buffers.clear()
            for name, b in own.items():
                m._buffers[name] = b
        for p, grad, hook in zip(params, grads, hooks, strict=True):
            p.grad = grad
            p._backward_hooks = hook


def modules_in_eval(model: nn.Module) -> frozenset[str]:
    """Names of the modules that stay in eval mode while the model trains: the present ones, or as ``train()`` leaves a model in eval mode.

    A frozen batch norm is one: its user called ``.eval()`` on it, or overrode ``train()`` to do so.
    """
    with Whole(_flags_kept(model)):
        if not model.training:
            model.train()
        return frozenset(name for name, m in model.named_modules() if not m.training)


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    with turn():
        flags = [(m, m.training) for m in model.modules()]
        try:
            yield
        finally:
            for m, flag in flags:
                m.training = flag


def loader_generators(data: Any) -> list[torch.Generator]:
    """The random generators that iterating a DataLoader would advance."""
    sampler = getattr(data, "sampler", None)
    owners = (data, sampler, getattr(getattr(data, "batch_sampler", None), "sampler", None))
    generators = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    return list(generators.values())
