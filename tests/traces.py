"""Everything a measurement could disturb, written down before and compared after, bit for bit and object by object."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(v) for v in value]
    return value


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, NaN included."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def snapshot(
    model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, generators: tuple[torch.Generator, ...] = ()
) -> dict[str, Any]:
    """Values (copied) and identities of parameters, gradients, buffers, hooks, flags, random states and thread-wide switches."""
    params, modules = list(model.parameters()), list(model.modules())
    buffers = [(name, b) for m in modules for name, b in m._buffers.items()]
    return {
        "parameters": _copied([p.data for p in params]),
        "parameter versions": [(id(p), p._version, p.data_ptr()) for p in params],
        "gradients": _copied([p.grad for p in params]),
        "gradient objects": [id(p.grad) for p in params],
        "requires_grad": [p.requires_grad for p in params],
        "buffers": _copied([b for _, b in buffers]),
        "buffer objects": [(name, id(b)) for name, b in buffers],
        "buffer versions": [None if b is None else b._version for _, b in buffers],
        "training flags": [m.training for m in modules],
        "parameter hooks": [(id(p._backward_hooks), list(p._backward_hooks or ())) for p in params],
        "module hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in modules],
        "torch random": torch.get_rng_state(),
        "CUDA random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy random": list(np.random.get_state()),  # noqa: NPY002
        "python random": random.getstate(),
        "generators": [g.get_state() for g in generators],
        "optimizer": _copied(optimizer.state_dict()) if optimizer is not None else None,
        "switches": [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.is_autocast_cache_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cudnn.enabled,
        ],
    }


@contextmanager
def untouched(model: nn.Module, **more: Any) -> Iterator[None]:
    """Fail, naming what differs, unless the model and the global state come out as they went in."""
    before = snapshot(model, **more)
    try:
        yield
    finally:
        after = snapshot(model, **more)
        changed = [key for key in before if not same(before[key], after[key])]
        assert not changed, f"the measurement disturbed: {', '.join(changed)}"
