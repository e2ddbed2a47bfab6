"""What went wrong inside a user's model or loss, told with what it was given: types, devices and shapes, and what to do."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._errors import ObjectiveError, SharpkitError
from sharpkit.objective.batches import named_tensors
from sharpkit.objective.memory import is_out_of_memory

_TORCH = Path(torch.__file__).parent
_TOLD = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)  # NotImplementedError is a RuntimeError
_PLAIN = ("ndarray", "list", "str", "int", "float", "NoneType")  # types that no layer takes
_MOST_TENSORS = 6  # of a batch, shown in a message: by judgement
# Part of what PyTorch says of derivatives and checkpoints: whoever differentiates knows more about these.
_OTHERS = ("does not require grad", "derivative for", "once_differentiable", "heckpoint", "double backward", "inplace operation", "donated")
_SPENT = ("backward through the graph a second time", "modified by an inplace operation")


@contextmanager
def telling(what: str, model: nn.Module | None, *given: Any) -> Iterator[None]:
    """Around a call of user code: an error of PyTorch's or Python's in there is told together with what the code was given.

    Errors that the user's own code raises on purpose pass as they are, and so do those about memory and derivatives.

    Args:
        what: the call, such as ``"loss(output, target)"``.
        model: whose parameters are told, if any.
        given: what it is called with.

    Raises:
        ObjectiveError: from the error.
    """
    try:
        yield
    except _TOLD as error:
        if not is_mistake(error):
            raise
        raise ObjectiveError(told(error, what, model, given)) from error


def is_mistake(error: Exception) -> bool:
    """Whether an error says that user code and its input do not go together, and not something that the code says itself."""
    said = str(error)
    if isinstance(error, SharpkitError) or is_out_of_memory(error) or any(sign in said for sign in _OTHERS):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or _TORCH in Path(trace.tb_frame.f_code.co_filename).parents:
        return True
    last = next((i for i in dis.get_instructions(trace.tb_frame.f_code) if i.offset == trace.tb_lasti), None)
    return last is None or last.opname != "RAISE_VARARGS"  # a raise statement: the code's own words


def told(error: Exception, what: str, model: nn.Module | None, given: Sequence[Any]) -> str:
    """An error in one or two sentences: what was called with what, what was said, and what to do."""
    said = " ".join(str(error).split())[:300].rstrip(". ")
    params = list(model.parameters()) if model is not None else []
    types = " and ".join(sorted({str(p.dtype) for p in params})) or "none"
    devices = " and ".join(sorted({str(p.device) for p in params})) or "no device"
    shown = "; ".join(f"{name}: {described(value)}" for name, value in zip(_names(what), given, strict=False))
    came = f"It was given {shown}" + (f"; the parameters are {types} on {devices}." if params else ".")
    return f"{what} raised {type(error).__name__}: {said}. {came} {_remedy(said, what, params, given)}"


def _names(what: str) -> list[str]:
    return [name.strip() for name in what.partition("(")[2].rstrip(")").split(",")]


def described(value: Any) -> str:
    """A batch in words: every tensor with its type, shape and device."""
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Tensor):
        return _tensor(value)
    tensors = named_tensors(value)
    if not tensors:
        return f"a value of type {type(value).__name__} without tensors"
    parts = [f"{path!r} {_tensor(t)}" for path, t in list(tensors.items())[:_MOST_TENSORS]]
    more = f" and {len(tensors) - _MOST_TENSORS} more" if len(tensors) > _MOST_TENSORS else ""
    return f"a {type(value).__name__} of {', '.join(parts)}{more}"


def _tensor(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} on {t.device}"


def _remedy(said: str, what: str, params: Sequence[nn.Parameter], given: Sequence[Any]) -> str:
    data = [value for value in given if not isinstance(value, nn.Module)]
    tensors = [t for value in data for t in named_tensors(value).values()]
    if "argument" in said and ("positional" in said or "keyword" in said):
        return (
            "Batches do not have the form that it takes: give it as many arguments as the call shows, or write what is to be done with a "
            "batch in closure=lambda model, batch: ..."
        )
    if what.startswith("loss") and not isinstance(given[0], Tensor):
        return (
            f"The output is a {type(given[0]).__name__}: pass loss=lambda output, target: ... that takes the tensor which is meant from it."
        )
    if what != "count(batch)" and any(type(value).__name__ in _PLAIN and not named_tensors(value) for value in data):
        return "Inputs and targets must be tensors, as torch.as_tensor(x) makes them."
    if what.startswith("loss") and (advice := _about_labels(said, given)):
        return advice
    devices = {t.device for t in tensors} | {p.device for p in params}
    if len(devices) > 1 or "same device" in said or "meta" in {d.type for d in devices}:
        return "Put the model, the loss and every tensor that they hold on one device that holds numbers, as with model.to('cpu')."
    floating = {p.dtype for p in params if p.is_floating_point()}
    others = {t.dtype for t in tensors if t.is_floating_point()} - floating
    mismatch = any(word in said.lower() for word in ("dtype", "scalar type", "not implemented for", "to be long", "datatype"))
    if mismatch and others and floating:
        own = str(min(floating, key=str))
        return f"Convert one to the other's type: the data by x.to({own}), or the model by model.to({min(others, key=str)})."
    if mismatch:
        own = str(min(floating, key=str)) if floating else "torch.float32"
        return (
            f"Inputs of layers must have the parameters' type, as by x.to({own}), and class labels must be whole numbers, as by y.long()."
        )
    if "index out of range in self" in said:
        return "Token ids must not be negative, and lie below the number of rows of the embedding that looks them up."
    if "multi-target" in said:
        return "Class labels must have one axis less than the output, as by y.squeeze(-1)."
    if any(
        word in said for word in ("has no attribute", "indices must be", "tuple index", "list index", "not subscriptable", "not iterable")
    ):
        return "It must read what it is given in the form shown here."
    if any(word in said for word in ("shape", "size", "dimension", "Dimension", "batch", "expand", "stack", "channels")):
        return "Look at the shapes: the data must have those that the model and the loss were written for, and each sample its target."
    return "Batches must have the form that it was written for; write what is to be done with a batch in closure=lambda model, batch: ..."


def _about_labels(said: str, given: Sequence[Any]) -> str:
    if len(given) != 2 or not all(isinstance(value, Tensor) for value in given):
        return ""
    output, target = given
    labels = not target.is_floating_point() and not target.is_complex()
    if labels and output.ndim == target.ndim + 1 >= 3 and output.shape[:-1] == target.shape:
        return (
            "The output has its classes on the last axis and cross_entropy takes them on axis 1: pass "
            "loss=lambda output, target: F.cross_entropy(output.flatten(0, -2), target.flatten())."
        )
    if labels and output.ndim > 1 and target.ndim == output.ndim and target.shape[-1] == 1:
        return f"Class labels must have one axis less than the output: pass y.squeeze(-1), of shape {tuple(target.shape[:-1])}."
    if "out of bounds" in said or "out of range" in said:
        classes = output.shape[1] if output.ndim > 1 else output.numel()
        return f"Class labels must lie between 0 and {classes - 1}, the number of the output's last class, or be the loss's ignore_index."
    if output.ndim and target.ndim and len(output) != len(target):
        return f"Each sample needs its target: the output holds {len(output)} and the target {len(target)}."
    if "dtype" in said or "scalar type" in said.lower():
        return (
            "Targets of a regression must have the output's type, as by y.float(), and class labels must be whole numbers, as by y.long()."
        )
    return ""


def refuse_unrelated(loss: Tensor, params: Sequence[nn.Parameter]) -> None:
    """Refuse a loss that has a gradient, but none with respect to these parameters.

    Raises:
        ObjectiveError: it has none.
    """
    wanted, nodes, seen = {id(p) for p in params}, [loss.grad_fn], set()
    if id(loss) in wanted:
        return
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return
        seen.add(node)
        nodes.extend(parent for parent, _ in node.next_functions)
    # a function of the user's own may hide parameters from the graph, as re-entrant checkpoints do; such ones refuse torch.autograd.grad
    try:
        parts = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return
    if all(part is None for part in parts):
        raise ObjectiveError(
            "the loss has a gradient, but not with respect to any of the parameters that are picked: it was computed from copies of them, "
            "from another model, or without the model"
        )


def refuse_own_backward(loss: Tensor, params: Sequence[nn.Parameter]) -> None:
    """Refuse a loss that was differentiated already, which frees its graph.

    Raises:
        ObjectiveError: it was.
    """
    if all(p.grad is None for p in params):  # set to None before the evaluation
        return
    try:
        torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SPENT):
            raise
        raise ObjectiveError(
            "the closure called backward() on the loss that it returned, which frees the graph: leave that call out, and the steps of "
            "training after it; a closure returns the loss, and sharpkit differentiates it"
        ) from error
    finally:
        for p in params:
            p.grad = None
