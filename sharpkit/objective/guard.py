"""Leave no trace: everything a measurement could disturb is saved before it and restored after it, whatever happens."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpkit._errors import UnsupportedError


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

    Unlike ``torch.manual_seed`` it leaves no seed behind for a CUDA context that does not exist yet.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (user code draws from it; it takes 32 bits)


def random_fingerprint(device: torch.device) -> tuple[object, ...]:
    """Equal before and after a computation that drew no random numbers."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    legacy: Any = np.random.get_state()  # noqa: NPY002
    return (*(s.numpy().tobytes() for s in states), random.getstate(), legacy[1].tobytes(), legacy[2:])


@contextmanager
def undisturbed(
    model: nn.Module, *, training: bool, in_eval: Container[str] = (), generators: Iterable[torch.Generator] = ()
) -> Iterator[None]:
    """Run a measurement on a model without leaving a trace.

    Inside: gradients are on, autocast is off, attention uses the math kernel (the only one that can be differentiated twice), compiled
    code runs eagerly, backward hooks of parameters and modules are silent, ``.grad`` is empty, buffers are copies. After, also after an
    exception: training flags, buffers, gradients, hooks and random states are what they were, the very same objects. Forward hooks run:
    they may be part of the function, as those of pruning and old-style weight norm are.

    Args:
        model: unwrapped.
        training: the mode to measure in.
        in_eval: names of the modules that stay in eval mode all the same; see :func:`modules_in_eval`.
        generators: further random generators (those of data loaders) to restore.
    """
    with ExitStack() as stack:
        stack.enter_context(_random_states_kept(generators))  # first in, last out: restoring the rest may draw, too
        stack.enter_context(_module_state_kept(model, training, in_eval))
        stack.enter_context(torch.inference_mode(False))  # a user may measure from inside an evaluation loop
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(p.device.type for p in model.parameters())}:
            stack.enter_context(torch.autocast(kind, enabled=False))  # the objective's own autocast is entered inside
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):  # the cuDNN kernel has no second derivative
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def _random_states_kept(generators: Iterable[torch.Generator]) -> Iterator[None]:
    # asking an uninitialised CUDA for its state would make a context on every device
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    cuda = [(d, torch.cuda.get_rng_state(d)) for d in devices]
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    own = [(g, g.get_state()) for g in generators]
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for d, state in cuda:
            torch.cuda.set_rng_state(state, d)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for g, state in own:
            g.set_state(state)


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
            m._buffers.clear()  # also those that the forward pass registered
            m._buffers.update(own)
        for p, grad, hook in zip(params, grads, hooks, strict=True):
            p.grad = grad
            p._backward_hooks = hook


def modules_in_eval(model: nn.Module) -> frozenset[str]:
    """Names of the modules that stay in eval mode while the model trains: the present ones, or as ``train()`` leaves a model in eval mode.

    A frozen batch norm is one: its user called ``.eval()`` on it, or overrode ``train()`` to do so.
    """
    modules = list(model.modules())
    flags = [m.training for m in modules]
    try:
        if not model.training:
            model.train()
        return frozenset(name for name, m in model.named_modules() if not m.training)
    finally:
        for m, flag in zip(modules, flags, strict=True):
            m.training = flag


def loader_generators(data: Any) -> list[torch.Generator]:
    """The random generators that iterating a DataLoader would advance."""
    sampler = getattr(data, "sampler", None)
    owners = (data, sampler, getattr(getattr(data, "batch_sampler", None), "sampler", None))
    generators = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    return list(generators.values())
