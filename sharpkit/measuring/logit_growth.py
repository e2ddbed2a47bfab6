"""How large a transformer's logits have grown: the largest attention logit, and the log normaliser of its output distribution."""

from __future__ import annotations

import inspect
import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sharpkit._calls import public_call
from sharpkit._errors import ObjectiveError
from sharpkit._results import Result
from sharpkit.objective.objective import Objective, check_objective

_ROWS = 1024  # queries whose scores with all keys are held at once, by judgement: 32 MiB at 8192 keys
_SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)


@dataclass(frozen=True)
class LogitGrowth(Result, kind="logit_growth"):
    """The logits of a transformer on some data.

    Attributes:
        attention: the largest attention logit, scaled as before the softmax and not masked; NaN if no attention was seen.
        by_call: the largest of each attention call of the forward pass, in order: mostly one for each layer.
        log_z: root mean square over targets of log Z = log sum exp of the output logits, in nats; NaN if no cross-entropy was seen.
        num_targets: targets averaged over.
        seconds: wall time of one forward pass over the data.
    """

    attention: float
    by_call: tuple[float, ...]
    log_z: float
    num_targets: int
    seconds: float

    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        said = []
        if self.by_call:
            at = max(range(len(self.by_call)), key=lambda i: self.by_call[i])
            said.append(f"The largest attention logit is {self.attention:.4g}, in attention call {at + 1} of {len(self.by_call)}.")
        if self.num_targets:
            said.append(f"The output's log Z has a root mean square of {self.log_z:.4g} nats.")
        return said


@public_call
def logit_growth(objective: Objective, *, name: str = "") -> LogitGrowth:
    """The largest attention logit and the size of the output's log normaliser, by one forward pass over the data.

    Two instabilities of transformers at high learning rates show there before the loss does: attention logits that grow until each query
    attends to one key, and output logits that drift all together, which log Z shows and the loss does not. The monitor has them as
    metrics ``"attention_logits"`` and ``"output_log_z"``.

    Attention is seen where it is computed by ``F.scaled_dot_product_attention`` or by a softmax over scores of shape (..., queries, keys)
    of four axes, or of three with as many queries as keys, ``nn.MultiheadAttention`` and Hugging Face's models among them; kernels of
    other packages are not. log Z is seen where the loss calls ``F.cross_entropy`` with class labels.

    Args:
        objective: model, loss and data.
        name: of the result, which pages and comparisons show.

    Raises:
        ObjectiveError: neither attention nor such a cross-entropy was seen.

    Example:
        >>> import torch, sharpkit as sk
        >>> class Attention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.tensor(3.0))
        ...     def forward(self, x):
        ...         return torch.nn.functional.scaled_dot_product_attention(self.scale * x, x, x, scale=1.0).mean(dim=1)
        >>> x = torch.eye(4).expand(2, 4, 4)
        >>> objective = sk.Objective(Attention(), (x, torch.tensor([0, 1])), loss=torch.nn.functional.cross_entropy)
        >>> round(sk.measures.logit_growth(objective).attention, 4)
        3.0

    References:
        Dehghani et al. (2023), arXiv 2302.05442 (attention logits, QK norm); Chowdhery et al. (2022), arXiv 2204.02311 (z-loss);
        Wortsman et al. (2023), arXiv 2309.14322 (both in small models).
    """
    check_objective(objective, "logit_growth")
    started = time.perf_counter()

    def local() -> tuple[list[float], list[float]]:
        largest, sums = list[float](), [0.0, 0.0]
        with objective.undisturbed():
            for piece in objective.pieces():
                watch = _Watch()
                with watch:  # with gradients enabled, since without them nn.MultiheadAttention runs as one closed operation
                    objective.unchecked_loss(piece.batch, piece.key[0])
                seen = [float(v) for v in torch.stack(watch.largest).tolist()] if watch.largest else []
                largest = _highest([largest, seen])
                sums = [sums[0] + watch.squares, sums[1] + watch.targets]
        return largest, sums

    everyone = objective.ranks.gather(objective.ranks.run_together(local, device=objective.device))
    largest = _highest([each for each, _ in everyone])
    squares, targets = (sum(column) for column in zip(*(sums for _, sums in everyone), strict=True))
    if not largest and not targets:
        raise ObjectiveError(
            "logit_growth saw neither attention (torch.nn.functional.scaled_dot_product_attention, or a softmax over scores of four axes) "
            "nor torch.nn.functional.cross_entropy with class labels: this model has nothing that it reads"
        )
    top, size = max(largest, default=math.nan), math.sqrt(squares / targets) if targets else math.nan
    return LogitGrowth(top, tuple(largest), size, int(targets), time.perf_counter() - started)


def _highest(rows: list[list[float]]) -> list[float]:
    """The largest of each attention call."""
    return [max(column) for column in itertools.zip_longest(*rows, fillvalue=-math.inf)]


def _as_added(mask: Tensor) -> Tensor:
    """A mask that is True where attention is forbidden, or is added to scores, as one that is added."""
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask


class _Watch(TorchFunctionMode):
    """While it is entered, notes the largest score of each attention and the squares of the log normalisers of cross-entropies.

    Attributes:
        largest: one scalar for each attention call.
        squares, targets: sum of (log Z)^2, and how many.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest: list[Tensor] = []
        self.squares, self.targets = 0.0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._attention(*args, **kwargs)
        elif func is F.multi_head_attention_forward:  # whose insides run out of sight
            given = inspect.signature(func).bind(*args, **kwargs)
            given.apply_defaults()
            self._module(given.arguments)
        elif func in _SOFTMAXES:
            self._softmax(*args, **kwargs)
        elif func is F.cross_entropy:
            given = inspect.signature(func).bind(*args, **kwargs)
            given.apply_defaults()
            self._output(given.arguments)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        highest = [query.new_tensor(-math.inf, dtype=torch.float32)]
        for first in range(0, query.shape[-2], _ROWS):
            scores = (query.detach()[..., first : first + _ROWS, :] @ key.detach().mT).float() * factor
            if attn_mask is not None:
                mask = attn_mask.expand(*attn_mask.shape[:-2], query.shape[-2], key.shape[-2])[..., first : first + _ROWS, :]
                scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.detach()
            if is_causal:
                rows = torch.arange(first, first + scores.shape[-2], device=scores.device)
                scores = scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) > rows[:, None], -math.inf)
            if scores.numel():
                highest.append(scores.max())
        self.largest.append(torch.stack(highest).max())

    def _module(self, given: dict[str, Any]) -> None:
        """What nn.MultiheadAttention computes: queries (L, N, E) or (L, E), keys (S, N, E) or (S, E)."""
        query, key = (t if t.dim() == 3 else t[:, None] for t in (given["query"], given["key"]))
        size, heads = given["embed_dim_to_check"], given["num_heads"]
        if given["use_separate_proj_weight"]:
            weights = given["q_proj_weight"], given["k_proj_weight"]
        else:
            weights = given["in_proj_weight"][:size], given["in_proj_weight"][size : 2 * size]
        offsets = (None, None) if given["in_proj_bias"] is None else given["in_proj_bias"].split(size)[:2]
        q, k = (
            F.linear(t, w, b).reshape(*t.shape[:2], heads, -1).permute(1, 2, 0, 3)
            for t, w, b in zip((query, key), weights, offsets, strict=True)
        )
        mask = q.new_zeros(*q.shape[:2], q.shape[2], k.shape[2])
        attn, padding = given["attn_mask"], given["key_padding_mask"]
        if attn is not None:
            mask = mask + _as_added(attn.reshape(-1, heads, *attn.shape[1:]) if attn.dim() == 3 else attn)
        if padding is not None:
            mask = mask + _as_added(padding if padding.dim() == 2 else padding[None])[:, None, None, :]
        self._attention(q, k, k, mask)

    def _softmax(self, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> None:
        over_keys = dim is not None and dim in (-1, input.dim() - 1) and input.is_floating_point()
        square = input.dim() == 3 and input.shape[-1] == input.shape[-2]
        if over_keys and input.numel() and (input.dim() >= 4 or square):
            self.largest.append(input.detach().max().float())

    def _output(self, given: dict[str, Any]) -> None:
        z, y = given["input"], given["target"]
        if y.is_floating_point():
            return
        log_z = z.detach().float().logsumexp(1 if z.ndim > 1 else 0)[y != given["ignore_index"]]
        self.squares += float(log_z.double().square().sum())
        self.targets += log_z.numel()
