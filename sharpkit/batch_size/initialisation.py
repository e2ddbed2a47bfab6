"""Other initialisations of a model, drawn by its modules' own ``reset_parameters``, where the present parameters are such a draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sharpkit._errors import NonFiniteError
from sharpkit.objective.guard import grad_mode_kept, random_states_kept, seed_everything
from sharpkit.objective.objective import Objective

_FEWEST = 16  # entries from which on a tensor's size says how it was drawn, by judgement
_SIGMAS = 4.0  # of the relative error of a root mean square, about 1 / sqrt(n) for the difference of two draws
_FRESH = 0.7  # of the loss after another draw, by judgement: a trained point lies below, another initialisation rarely does


def redraw(model: nn.Module, *, seed: int, device: torch.device) -> None:
    """Draw parameters and buffers anew in place, the inner modules first, since outer ones overwrite theirs; no random state is touched."""
    with random_states_kept(), grad_mode_kept(), torch.no_grad():
        seed_everything(seed, device)
        for module in reversed(list(model.modules())):
            if (reset := _reset_of(module)) is not None:
                reset()


def may_redraw(objective: Objective, *, seed: int) -> str:
    """Why other initialisations cannot be drawn, or an empty text where they can: the present point could be one of them.

    Every parameter must belong to a module that can reset it, be as large as what it draws, and the loss not far below that of a draw.
    """
    owned = {id(p) for m in objective.model.modules() if _reset_of(m) is not None for p in m.parameters(recurse=False)}
    missing = [name for name, p in objective.model.named_parameters() if id(p) not in owned]
    if missing:
        return f"{missing[0]!r} belongs to no module with reset_parameters"
    try:
        with grad_mode_kept():
            twin = objective.copy(list(objective.batches()))
        redraw(twin.model, seed=seed, device=objective.device)
    except Exception as error:  # whatever the user's own reset_parameters raises
        return f"the model cannot draw its parameters anew ({type(error).__name__}: {error})"
    pairs = zip(objective.model.named_parameters(), twin.model.parameters(), strict=True)
    for (name, present), drawn in pairs:
        if not _alike(present.detach().double(), drawn.detach().double()):
            return f"{name!r} is not as its module draws it, trained or initialised by other code"
    try:
        if objective.value() < _FRESH * twin.value():
            return "the present parameters are trained: their loss is far below that of other draws"
    except NonFiniteError:
        return "another draw has no finite loss"
    return ""


def _alike(present: Tensor, drawn: Tensor) -> bool:
    if drawn.numel() and float(drawn.max() - drawn.min()) == 0:  # a constant, such as a bias of 0 or a scale of 1
        return torch.allclose(present, drawn)
    if drawn.numel() < _FEWEST:
        return True
    ratio = float(present.square().mean().sqrt() / drawn.square().mean().sqrt())
    return abs(math.log(max(ratio, 1e-30))) <= math.log1p(_SIGMAS / math.sqrt(drawn.numel()))


def _reset_of(module: nn.Module):  # type: ignore[no-untyped-def]
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return reset if callable(reset) else None
