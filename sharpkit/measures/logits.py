"""Sharpness in the logits: how far a cross-entropy rises in a small box around them, in closed form."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sharpkit._arguments import choice, real
from sharpkit._calls import public_call
from sharpkit._errors import ObjectiveError
from sharpkit._results import Result
from sharpkit.objective.objective import Objective, check_objective

_TOKENS = ("all", "last")


@dataclass(frozen=True)
class LogitSharpness(
    Result,
    kind="logit_sharpness",
    saved=("value", "stderr", "loss", "worst_loss", "eps", "tokens", "num_targets", "num_evaluations", "seconds", "findings"),
):
    """100 (max l(z') - l(z)) / (1 + l(z)) over |z'_i - z_i| <= eps (|z_i| + 1), l the mean cross-entropy of the logits z.

    Attributes:
        value: in percent.
        stderr: 0: the maximum is exact up to rounding.
        loss: l(z), in nats for each target.
        worst_loss: the maximum.
        eps: half the width of the box, relative to |z_i| + 1.
        tokens: ``"all"`` targets that count, or the ``"last"`` of each sequence.
        num_targets: targets averaged over, or the sum of their class weights.
        num_evaluations: forward passes over the data.
        seconds: wall time spent.
    """

    value: float
    loss: float
    worst_loss: float
    eps: float
    tokens: str
    num_targets: float
    num_evaluations: int = 1
    seconds: float = 0.0

    @property
    def stderr(self) -> float:
        return 0.0

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} % (Keskar form in the logits, eps = {self.eps:g}, {self.num_targets:g} targets)"

    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        which = "the last target of each sequence" if self.tokens == "last" else "all targets"
        return [
            f"In a box of {self.eps:g} (|z| + 1) around the logits of {which} the loss rises from {self.loss:.4g} to {self.worst_loss:.4g} "
            f"at most: {self.value:.4g} % of 1 + loss. It is a matter of the logits' size, not of the weights' curvature."
        ]


@public_call
def logit_sharpness(objective: Objective, *, eps: float = 5e-4, tokens: str = "all", name: str = "") -> LogitSharpness:
    """Keskar's form of sharpness in the logits of a classifier or language model, exactly, by one forward pass.

    The largest cross-entropy in the box is where the target's logit is lowest and all others are highest, so that no search is needed:
    z'_y = z_y - eps (|z_y| + 1) and z'_j = z_j + eps (|z_j| + 1). It is Keskar's form with the logits in place of the weights; the paper
    on FP8 training measures loss landscapes of language models in this way at the last token, and has details of its own: see there.

    Invariant under everything that leaves the logits as they are: layer rescaling, permutations, filters before a batch norm. Not under
    the scale of the last layer: larger logits are sharper, at the same weights' curvature or not.

    Args:
        objective: its loss must call ``torch.nn.functional.cross_entropy`` with class labels, once for each batch, wherever it does so:
            as ``loss=``, within a closure, or within the model as Hugging Face's do.
        eps: half the width of the box.
        tokens: ``"all"`` targets that count, or the ``"last"`` one that counts in each sequence, where logits are (N, C, T).
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError, TypeError: arguments out of range.
        ObjectiveError: no such cross-entropy is seen, or it has soft labels or label smoothing, for which the corner is another.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 3)
        >>> for p in model.parameters():
        ...     _ = torch.nn.init.zeros_(p)
        >>> objective = sk.Objective(model, (torch.ones(4, 2), torch.tensor([0, 1, 2, 0])), loss=torch.nn.functional.cross_entropy)
        >>> round(sk.measures.logit_sharpness(objective, eps=0.01).value, 4)  # 2 eps (1 - 1/3) / (1 + log 3), to first order
        0.6375

    References:
        Keskar, Mudigere, Nocedal, Smelyanskiy and Tang (2017), arXiv 1609.04836, metric 2.1; Lee et al. (2024), arXiv 2405.18710.
    """
    check_objective(objective, "logit_sharpness")
    eps, tokens = real("eps", eps, above=0), choice("tokens", tokens, _TOKENS)
    started = time.perf_counter()

    def local() -> list[float]:
        sums = [0.0, 0.0, 0.0]
        with objective.undisturbed(), torch.no_grad():
            for piece in objective.pieces():
                watch = _Worst(eps, tokens)
                with watch:
                    objective.unchecked_loss(piece.batch, piece.key[0])
                if watch.calls != 1:
                    raise ObjectiveError(
                        f"logit_sharpness reads the logits off one call of torch.nn.functional.cross_entropy for each batch, and the loss "
                        f"made {watch.calls}: write it with that function"
                    )
                sums = [total + more for total, more in zip(sums, watch.sums, strict=True)]
        return sums

    # every process its own part; sums add up
    loss, worst, count = objective.ranks.sum_numbers(objective.ranks.run_together(local, device=objective.device), device=objective.device)
    if not count > 0:
        raise ObjectiveError("no target counts: all are masked")
    loss, worst = loss / count, worst / count
    return LogitSharpness(100 * (worst - loss) / (1 + loss), loss, worst, eps, tokens, count, seconds=time.perf_counter() - started)


class _Worst(TorchFunctionMode):
    """While it is entered, takes the losses of cross-entropies at their logits and at the worst corner of the box around them.

    Attributes:
        calls: cross-entropies seen.
        sums: of the losses, of the worst losses, and of what counts.
    """

    def __init__(self, eps: float, tokens: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._eps, self._tokens = eps, tokens
        self.calls, self.sums = 0, (0.0, 0.0, 0.0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.cross_entropy:
            self.calls += 1
            given = inspect.signature(func).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            self._look(given.arguments)
        return func(*args, **(kwargs or {}))

    def _look(self, given: dict[str, Any]) -> None:
        z, y, ignored = given["input"], given["target"], given["ignore_index"]
        if y.is_floating_point() or given["label_smoothing"]:
            raise ObjectiveError("logit_sharpness is for class labels: with soft or smoothed labels the worst logits are others")
        if self._tokens == "last" and z.ndim < 3:
            raise ObjectiveError(
                f"tokens='last' needs logits of shape (N, C, T) to know the sequences by, got {tuple(z.shape)}: pass tokens='all'"
            )
        classes = 1 if z.ndim > 1 else 0
        z = z.movedim(classes, -1)  # (..., C), as the targets but for the classes
        kept = y != ignored
        if self._tokens == "last":
            z, y, kept = z.flatten(1, -2), y.flatten(1), kept.flatten(1)
            place = torch.arange(kept.shape[1], device=kept.device).expand_as(kept).where(kept, -1)
            kept = kept & (place == place.max(dim=1, keepdim=True).values)
        logits, labels = z[kept].double(), y[kept]  # float64: differences of losses nearly alike
        weights = torch.ones_like(labels, dtype=torch.float64) if given["weight"] is None else given["weight"].double()[labels]
        room = self._eps * (logits.abs() + 1)
        corner = (logits + room).scatter(-1, labels[:, None], (logits - room).gather(-1, labels[:, None]))
        losses = [F.cross_entropy(each, labels, reduction="none") @ weights for each in (logits, corner)]
        self.sums = (float(losses[0]), float(losses[1]), float(weights.sum()))
