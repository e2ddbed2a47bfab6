"""Second derivatives that PyTorch lacks or gets wrong: seen in the graph of a loss, and mended by computing the operation another way."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from sharpkit._errors import UnsupportedError
from sharpkit.objective.memory import graph_nodes

REENTRANT = (
    "reentrant activation checkpointing cannot be differentiated twice: use torch.utils.checkpoint(..., use_reentrant=False); for Hugging "
    "Face models gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
)
ONCE = (
    "a custom autograd.Function in the model has a backward marked once_differentiable, so that second derivatives through it are wrong: "
    "write the backward in torch operations and remove the mark, or use GaussNewtonOperator or EmpiricalFisherOperator, which need first "
    "derivatives alone"
)
_ONCE_CODE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__  # shared by all functions so marked

# Nodes of a loss's graph whose next derivative PyTorch 2.6 to 2.13 gets wrong (norms: a gradient taken inside the loss, whose second
# derivative is a third one; weight norm: the second already) or does not have, by the operation to compute another way. Each was compared
# with finite differences, as tests/objective/test_second_order.py does.
_FAULTY = {
    "WeightNormInterfaceBackward0": "weight_norm",
    "NativeLayerNormBackwardBackward0": "layer_norm",
    "NativeBatchNormBackwardBackward0": "batch_norm",
    "CudnnBatchNormBackwardBackward0": "batch_norm",
    "HardsigmoidBackward0": "hardsigmoid",
    "CdistBackward0": "cdist",
    "PdistBackward0": "pdist",
    "EmbeddingBackward0": "embedding",
    "EmbeddingBagBackward0": "embedding_bag",
    "MultiMarginLossBackward0": "multi_margin_loss",
    "MultilabelMarginLossBackward0": "multilabel_margin_loss",
    "CtcLossBackward0": "ctc_loss",
    "CudnnCtcLossBackward0": "ctc_loss",
}
# Attributes of nodes that are at fault only where these are true: sparse gradients, statistics of the batch.
_ONLY = {"EmbeddingBackward0": "_saved_sparse", "NativeBatchNormBackwardBackward0": "_saved_train"}


class SecondOrder:
    """What is known of an objective's second derivatives; shared by the objective and those made from it.

    Attributes:
        replaced: operations computed another way.
        doubts: what was seen that may make gradients or products wrong without a trace in the graph.
        takes_gradients: whether the loss differentiates inside, so that it needs a graph even for its value.
        rounding: of the coarsest type seen in the graph, relative: a model may turn on autocast, or cast, by itself.
        refusal: why products are refused, once a probe has shown it.
        probed: whether the doubts were looked into; True from the start where nothing is to be checked.
        probe_gradients: gradients that the probe took, counted here and nowhere else.
    """

    def __init__(self, *, check: bool) -> None:
        self.replaced: frozenset[str] = frozenset()
        self.doubts: set[str] = set()
        self.takes_gradients = False
        self.rounding = 0.0
        self.refusal: Exception | None = None
        self.probed = not check
        self.probe_gradients = 0

    def adapt(self, outputs: Sequence[Tensor], *, once: bool = False) -> bool:
        """Look at a graph that is to be differentiated twice; whether to compute it again, with operations replaced.

        Args:
            outputs: the loss, or the model's output.
            once: custom functions that cannot be differentiated twice are the caller's concern.

        Raises:
            UnsupportedError: reentrant checkpointing, a custom function marked once_differentiable, or an operation that stayed although
                it was to be replaced.
        """
        faulty, doubts = _examine(outputs, once=once)
        self.doubts |= doubts
        new = {_FAULTY[name] for name in faulty} - self.replaced
        if faulty and not new:
            names = ", ".join(sorted({_FAULTY[name] for name in faulty}))
            raise UnsupportedError(
                f"the second derivative of {names} is wrong or missing in PyTorch, and the way the model calls it cannot be replaced: call "
                f"torch.nn.functional.{names.split(', ')[0]} with plain arguments, or use EmpiricalFisherOperator, which needs first "
                "derivatives alone"
            )
        self.replaced |= new
        return bool(new)

    def mend_inner_gradients(self, loss: Tensor) -> None:
        """Replace weight norm in a loss that takes a gradient inside: of one in the weights, even PyTorch's first derivative is wrong."""
        if any(node.name() == "WeightNormInterfaceBackward0" for node in graph_nodes([loss])):
            self.replaced |= {"weight_norm"}


def _examine(outputs: Iterable[Tensor], *, once: bool) -> tuple[set[str], set[str]]:
    """(nodes of faulty operations, doubts about custom functions) in the graph behind tensors."""
    faulty, doubts = set(), set()
    for node in graph_nodes(outputs):
        if (name := node.name()) in _FAULTY and getattr(node, _ONLY.get(name, ""), True):
            faulty.add(name)
        if (function := getattr(node, "_forward_cls", None)) is None:  # of a custom autograd.Function
            continue
        if function is CheckpointFunction:
            raise UnsupportedError(REENTRANT)
        if not once and _marked_once(function):
            raise UnsupportedError(f"{ONCE} ({function.__name__})")
        if not function.__module__.startswith(("torch.", "sharpkit.")):
            doubts.add(f"the custom function {function.__name__}")
    return faulty, doubts


def coarsest_rounding(loss: Tensor) -> float:
    """Relative rounding of the coarsest type in the graph of a loss, which may be cast to float32 inside a float64 model."""
    made = (m.dtype for node in graph_nodes([loss]) for m in getattr(node, "_input_metadata", ()))  # of the tensors that a node made
    return max(float(torch.finfo(dtype).eps) for dtype in (loss.dtype, *made) if dtype.is_floating_point)


def custom_functions(outputs: Iterable[Tensor]) -> set[str]:
    """Names of the custom autograd functions, but for those of torch and of this package, in the graph behind tensors."""
    functions = (getattr(node, "_forward_cls", None) for node in graph_nodes(outputs))
    return {f.__name__ for f in functions if f is not None and not f.__module__.startswith(("torch.", "sharpkit."))}


def _marked_once(function: Any) -> bool:
    """Whether a custom function's backward is marked once_differentiable."""
    return getattr(getattr(function, "backward", None), "__code__", None) is _ONCE_CODE


def refuse_held_vectors(model: nn.Module, in_eval: Container[str]) -> None:
    """Spectral norm in train mode holds the vectors of its power iteration constant: right for a first derivative, wrong for a second.

    On two tanh layers of 6 and 1 units the matrix with held vectors was 16 % off the finite differences of the train-mode gradient (its top
    6 %). Nor would another matrix be right: at one iteration a step, torch's default, those differences are unsymmetric by 1.3 %, and no
    Hessian; only with the iteration run to its end would they be one.

    Raises:
        UnsupportedError: a part of the model has it, and is not among those in eval mode.
    """
    for name, m in model.named_modules():
        kinds = {type(m).__name__, *(type(hook).__name__ for hook in m._forward_pre_hooks.values())}
        if name not in in_eval and kinds & {"_SpectralNorm", "SpectralNorm"}:
            raise UnsupportedError(
                f"spectral_norm ({name}) in train mode holds the vectors of its power iteration constant, which makes second derivatives "
                "wrong: use mode='eval', where they are constants of the function, or GaussNewtonOperator, which needs no second ones"
            )


# -- what leaves no trace in the graph ------------------------------------------------------------------------------------------
_CUTS = {
    torch.Tensor.detach: "detach()",
    torch.detach: "detach()",
    torch.Tensor.detach_: "detach_()",
    torch.Tensor.data.__get__: ".data",  # type: ignore[attr-defined]
    torch.Tensor.item: "item()",
    torch.Tensor.tolist: "tolist()",
    torch.Tensor.__float__: "float()",
    torch.Tensor.numpy: "numpy()",
    torch.Tensor.register_hook: "a hook on a tensor",
}
# What says how a tensor is made and not what is in it: rotary embeddings read a dtype and a device under no_grad.
_PLAIN = (bool, int, str, torch.Size, torch.dtype, torch.device, torch.layout)


class Watch(TorchFunctionMode):
    """Notes, during one evaluation, what may cut off or change a derivative: most cuts are harmless (a logged loss), some are not."""

    def __init__(self, known: SecondOrder) -> None:
        super().__init__()
        self._known = known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad or func in (torch.autograd.backward, Tensor.backward):
            self._known.takes_gradients = True
        elif func in _CUTS:
            if _has_gradient(args[:1]):
                self._known.doubts.add(_CUTS[func])
        elif func is F.gumbel_softmax and (kwargs or {}).get("hard", args[2:3] == (True,)):  # what it calls is not seen
            self._known.doubts.add("gumbel_softmax(hard=True)")
        elif not torch.is_grad_enabled() and (_has_gradient(args) or _has_gradient((kwargs or {}).values())):
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, _PLAIN):
                self._known.doubts.add("torch.no_grad()")
            return result
        return func(*args, **(kwargs or {}))


def _has_gradient(arguments: Iterable[Any]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


# -- operations by their definitions --------------------------------------------------------------------------------------------
class Replaced(TorchFunctionMode):
    """Inside, the named operations are computed by definitions that PyTorch can differentiate as often as is asked for."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._table = {function: mine for name in names for function, mine in _REPLACEMENTS[name].items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._table.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _standardised(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps), the mean and the variance, over some dimensions, at least in float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    variance = centred.square().mean(dims, keepdim=True)
    return centred * torch.rsqrt(variance + eps), mean, variance


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y if torch.is_autocast_enabled(like.device.type) else y.to(like.dtype)  # under autocast, norms return float32


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    dims = list(range(x.ndim - len(normalized_shape), x.ndim))
    return _scaled(_standardised(x, dims, eps)[0], weight, bias, x)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:  # its derivatives are right
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _normalised(x, [0, *range(2, x.ndim)], running_mean, running_var, weight, bias, momentum, eps)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _normalised(x, list(range(2, x.ndim)), running_mean, running_var, weight, bias, momentum, eps)


def _normalised(
    x: Tensor,
    dims: list[int],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalisation over ``dims`` of (N, C, ...), with its running statistics updated: a later part of the same pass may read them."""
    y, mean, variance = _standardised(x, dims, eps)
    count = x.numel() / mean.numel()
    with torch.no_grad():
        for running, present in ((running_mean, mean), (running_var, variance * (count / max(count - 1, 1)))):
            if running is not None:
                channels = present.detach().reshape(-1, x.shape[1]).mean(0)  # instance norm: the mean over samples
                running.mul_(1 - momentum).add_(momentum * channels)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return _scaled(y, None if weight is None else weight.view(shape), None if bias is None else bias.view(shape), x)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(x + 3) / 6


def _distance(difference: Tensor, p: float) -> Tensor:
    """The p-norm over the last dimension; 0 with zero derivatives where all is 0, as in torch.cdist."""
    apart = difference.detach().any(-1, keepdim=True)
    safe = torch.where(apart, difference, torch.ones_like(difference))  # a norm has no second derivative at 0
    return torch.where(apart.squeeze(-1), torch.linalg.vector_norm(safe, p, dim=-1), 0.0)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    return _distance(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return _distance(x[i] - x[j], p)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq:  # both change what a derivative is: left as they are, and refused
        return F.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    if input.ndim == 2:
        ids, scale = input, per_sample_weights
        kept = torch.ones_like(ids, dtype=torch.bool)
    else:  # bags of uneven length, padded to the longest
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        ends = torch.cat([starts[1:], starts.new_tensor([int(offsets[-1]) if include_last_offset else len(input)])])
        positions = starts[:, None] + torch.arange(int((ends - starts).max()) if len(starts) else 0, device=input.device)
        kept = positions < ends[:, None]
        positions = positions.clamp_max(max(len(input) - 1, 0))
        ids = input[positions]
        scale = None if per_sample_weights is None else per_sample_weights[positions]
    if padding_idx is not None:
        kept = kept & (ids != padding_idx % len(weight))
    rows = F.embedding(ids, weight) if scale is None else F.embedding(ids, weight) * scale[..., None]
    if mode == "max":
        largest = rows.masked_fill(~kept[..., None], -torch.inf).amax(1)
        return torch.where(kept.any(1)[:, None], largest, 0.0)
    total = torch.where(kept[..., None], rows, 0.0).sum(1)
    return total / kept.sum(1).clamp_min(1)[:, None] if mode == "mean" else total


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    rows, labels = (input, target) if input.ndim == 2 else (input[None], target.reshape(1))
    terms = (margin - rows.gather(1, labels[:, None]) + rows).clamp_min(0) ** p
    terms = terms if weight is None else terms * weight[labels][:, None]
    own = F.one_hot(labels, rows.shape[1]).bool()
    losses = terms.masked_fill(own, 0.0).sum(1) / rows.shape[1]
    return _reduced(losses if input.ndim == 2 else losses[0], reduction)


def _multilabel_margin_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
) -> Tensor:
    rows, labels = (input, target) if input.ndim == 2 else (input[None], target[None])
    listed = (labels >= 0).cumprod(1).bool()  # up to the first -1
    wanted = labels.clamp_min(0)
    is_target = torch.zeros_like(rows, dtype=torch.bool).scatter_reduce(1, wanted, listed, "amax")
    gaps = (1 - rows.gather(1, wanted)[:, :, None] + rows[:, None, :]).clamp_min(0)
    losses = torch.where(listed[:, :, None] & ~is_target[:, None, :], gaps, 0.0).sum((1, 2)) / rows.shape[1]
    return _reduced(losses if input.ndim == 2 else losses[0], reduction)


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """The forward recursion of Graves et al. (2006), eq. 6 and 7, in logarithms.

    torch.nn.functional.ctc_loss has the gradient of normalised probabilities alone; behind a log_softmax the two are the same.
    """
    frames = log_probs if log_probs.ndim == 3 else log_probs[:, None]
    device, never = frames.device, -1e30  # not -inf, whose derivatives are NaN; exp of it is 0 all the same
    lengths, sizes = (torch.as_tensor(n, device=device).reshape(-1).long() for n in (input_lengths, target_lengths))
    if targets.ndim == 1:  # one after another
        targets = torch.nn.utils.rnn.pad_sequence(list(torch.split(targets.to(device), sizes.tolist())), batch_first=True)
    targets = targets.to(device).long()[:, : int(sizes.max())]
    states = torch.full((targets.shape[0], 2 * targets.shape[1] + 1), blank, device=device)
    states[:, 1::2] = targets  # a blank before, between and after the labels
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    scores = frames.gather(2, states.expand(len(frames), -1, -1))  # (T, N, 2 S + 1)
    alpha = torch.where(torch.arange(states.shape[1], device=device) < 2, scores[0], never)
    for t in range(1, len(frames)):
        stay, step, skip = alpha, F.pad(alpha, (1, 0), value=never)[:, :-1], F.pad(alpha, (2, 0), value=never)[:, :-2]
        following = scores[t] + torch.stack([stay, step, torch.where(may_skip, skip, never)]).logsumexp(0)
        alpha = torch.where((t < lengths)[:, None], following, alpha)
    last = torch.stack([alpha.gather(1, (2 * sizes - back).clamp_min(0)[:, None])[:, 0] for back in (0, 1)])
    losses = -torch.where(sizes == 0, last[0], last.logsumexp(0))
    impossible = losses > 1e20
    losses = torch.where(impossible, 0.0 if zero_infinity else torch.inf, losses)
    if reduction == "mean":
        return (losses / sizes.clamp_min(1)).mean()
    return losses.sum() if reduction == "sum" else losses if log_probs.ndim == 3 else losses[0]


_REPLACEMENTS: dict[str, dict[Any, Callable[..., Tensor]]] = {
    "weight_norm": {torch._weight_norm: _weight_norm},
    "layer_norm": {F.layer_norm: _layer_norm, torch.layer_norm: _layer_norm},
    "batch_norm": {F.batch_norm: _batch_norm, F.instance_norm: _instance_norm},
    "hardsigmoid": {F.hardsigmoid: _hardsigmoid},
    "cdist": {torch.cdist: _cdist},
    "pdist": {F.pdist: _pdist},
    "embedding": {F.embedding: _embedding},
    "embedding_bag": {F.embedding_bag: _embedding_bag},
    "multi_margin_loss": {F.multi_margin_loss: _multi_margin_loss},
    "multilabel_margin_loss": {F.multilabel_margin_loss: _multilabel_margin_loss},
    "ctc_loss": {F.ctc_loss: _ctc_loss},
}
