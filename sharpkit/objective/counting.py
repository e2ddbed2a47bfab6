"""What a batch may count: rules that a mean over it may follow, general ones and those of standard losses seen at work inside a call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sharpkit.objective.batches import Batch, batch_length, holds_samples, named_tensors, tensors_of
from sharpkit.objective.loss import STANDARD_LOSSES, KnownLoss, check_axes

_LABEL_KEYS = ("labels", "label", "target", "targets", "y")
_UNMASKED = KnownLoss(F.cross_entropy, "mean")  # counts the labels other than PyTorch's default ignore_index


@dataclass(frozen=True)
class CountRule:
    """One way to count a batch; it can be sent to another process.

    Attributes:
        name: in words, for messages.
        measure: what is counted of the tensor, or of the whole batch; None where it does not apply.
        leaf: path of the tensor in the batch, None for the whole batch.
        may_vanish: whether a batch that counts nothing by this rule may have a loss all the same, as by a flag that happens to be 0.
    """

    name: str
    measure: Callable[[Any], float | None]
    leaf: str | None = None
    may_vanish: bool = False

    def count(self, batch: Batch) -> float | None:
        """What the batch counts, None where the rule does not apply to it."""
        part = batch if self.leaf is None else named_tensors(batch).get(self.leaf)
        return None if part is None else self.measure(part)

    def counts(self, batch: Batch, length: int) -> list[float] | None:
        """What each of ``length`` samples counts; None where only :meth:`count` of each by itself tells."""
        part = None if self.leaf is None else named_tensors(batch).get(self.leaf)
        known = getattr(self.measure, "__self__", None)  # of KnownLoss.count
        if part is None or not len(part) or not holds_samples(part, length):
            return None
        if isinstance(known, KnownLoss):
            return known.counts(part).tolist()
        return [_entries(part[:1])] * length if self.measure is _entries else None


def rules_for(batch: Batch, known: KnownLoss | None, pair: bool) -> list[CountRule]:
    """Every rule that applies to a batch, the likeliest first.

    Args:
        batch: any of them.
        known: if given, its rule alone.
        pair: the batch is (input, target).
    """
    tensors, label = named_tensors(batch), target_path(batch, pair)
    rules = []
    if label is not None and known is not None:
        return [CountRule("targets", known.count, label)]
    if label is not None and (target := tensors[label]).ndim > 0:
        if not target.is_floating_point() and not target.is_complex():
            if not pair and target.ndim > 1:  # causal language models shift the labels inside, so the first predicts nothing
                rules.append(CountRule("next tokens", functools.partial(_shifted, known=_UNMASKED), label))
            rules.append(CountRule("labels other than -100", _UNMASKED.count, label))
        rules.append(CountRule("target entries", _entries, label))
    for path, t in tensors.items():
        if path == "attention_mask":
            rules.append(CountRule("attended tokens", _total, path))
        elif path != label and t.ndim > 0 and _mask_total(t) is not None:  # a mask by any name
            rules.append(CountRule(f"ones in {path!r}", _mask_total, path, may_vanish=True))
        elif label is None and t.ndim > 1:
            rules.append(CountRule(f"entries of {path!r}", _entries, path))
    rules.append(CountRule("samples", functools.partial(_samples, pair=pair)))
    return [rule for rule in rules if rule.count(batch) is not None] or [CountRule("batches", one)]


# Module-level functions, so that a rule can be pickled.
def _entries(t: Tensor) -> float:
    return float(t.numel())


def _total(t: Tensor) -> float:
    return float(t.sum())


def one(_: Batch) -> float:
    """Each batch counts as 1."""
    return 1.0


def _mask_total(t: Tensor) -> float | None:
    return float(t.sum()) if t.layout is torch.strided and not t.is_complex() and bool(((t == 0) | (t == 1)).all()) else None


def _shifted(t: Tensor, known: KnownLoss) -> float:
    return known.count(t[..., 1:])


def _scaled_entries(t: Tensor, each: float) -> float:
    return t.numel() * each


def _samples(batch: Batch, pair: bool) -> float | None:
    if (length := batch_length(batch)) is None and (label := target_path(batch, pair)) is not None:
        target = named_tensors(batch)[label]
        length = len(target) if target.ndim > 0 else None
    return None if length is None else float(length)


def samples_in(batch: Batch, pair: bool) -> int:
    """Samples in a batch: its common leading dimension, else the target's, else 1."""
    length = _samples(batch, pair)
    return 1 if length is None else int(length)


def target_path(batch: Batch, pair: bool) -> str | None:
    """Where the target lies in a batch, as far as its form tells."""
    paths = list(named_tensors(batch))
    if isinstance(batch, Mapping):
        return next((key for key in _LABEL_KEYS if key in paths), None)
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not (pair or isinstance(batch[1], Tensor)):
        return None
    key = str(getattr(batch, "_fields", (0, 1))[1])
    return next((path for path in paths if path == key or path.startswith(f"{key}.")), None)  # of a nested target the first tensor


# -- standard losses seen at work ---------------------------------------------------------------------------------------------
_DIFFERENCES = {torch.sub, torch.subtract, torch.rsub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, Tensor.subtract}


@dataclass(frozen=True)
class SeenLoss:
    """A call of a standard loss: its settings and target."""

    known: KnownLoss
    target: Tensor


class LossWatch(TorchFunctionMode):
    """While it is entered, notes every call of a standard PyTorch loss that averages or sums, wherever it is made.

    What is no loss over the samples is refused on the way: a difference of an (N, 1) output and an (N,) target, which has all N x N pairs.

    Args:
        batch: whose tensors are data.

    Attributes:
        seen: the calls, in order.

    Raises:
        ObjectiveError: a target is subtracted, or compared by an elementwise loss, as N x N pairs.
    """

    def __init__(self, batch: Batch = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._data = {id(t) for t in tensors_of(batch)}
        self.seen: list[SeenLoss] = []
        self._results: list[Tensor] = []  # of the calls; they hold the graph, and so go when the watch goes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) > 1 and (func in STANDARD_LOSSES or (func in _DIFFERENCES and self._is_residual(*args[:2]))):
            check_axes(func, args[0], args[1])
        result = func(*args, **(kwargs or {}))
        if func in STANDARD_LOSSES:
            given = inspect.signature(func).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            settings = given.arguments
            # the legacy arguments override reduction=: such a loss is tried out like any other
            if settings["reduction"] in ("mean", "sum") and settings.get("size_average") is None and settings.get("reduce") is None:
                weight = settings.get("weight") if KnownLoss(func, "mean").labelled else None  # an elementwise one is not divided by
                known = KnownLoss(func, settings["reduction"], weight, settings.get("ignore_index", -100))
                self.seen.append(SeenLoss(known, settings["target"].detach()))
                self._results.append(result)
        return result

    def _is_residual(self, first: Any, second: Any) -> bool:
        """Whether one is a tensor of the batch and the other was computed from parameters."""
        given = [t for t in (first, second) if isinstance(t, Tensor)]
        return len(given) == 2 and any(id(t) in self._data for t in given) and any(t.requires_grad for t in given)

    def behind(self, loss: Tensor) -> SeenLoss | None:
        """The seen loss that a returned loss *is*: of the same value, with nothing but conversions of that one number after it."""
        node, value = loss.grad_fn, float(loss.detach())
        while node is not None:
            for each, result in zip(self.seen, self._results, strict=True):
                # 1e-6: of a number that was only converted, by judgement; half precision rounds it at 4e-3, and is then tried out instead
                if result.grad_fn is node and abs(float(result.detach()) - value) <= 1e-6 * abs(value):
                    return each
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            node = parents[0] if len(parents) == 1 else None
        return None


def rules_seen(seen: SeenLoss, batch: Batch) -> Iterator[CountRule]:
    """What a seen loss averages over, for each tensor of the batch that may be its target, flattened, shifted or permuted as it may be."""
    known, target = seen.known, seen.target
    setting = f"labels other than {known.ignore_index}" if known.weight is None else "class weights of the labels"
    labels = known.labelled and not target.is_floating_point()
    for path, leaf in named_tensors(batch).items():
        if labels and not leaf.is_floating_point() and leaf.dtype != torch.bool and leaf.ndim > 0:
            if _same_labels(leaf, target, known.ignore_index):
                yield CountRule(setting, known.count, path)
            if leaf.ndim > 1 and _same_labels(leaf[..., 1:], target, known.ignore_index):
                name = "next tokens" if known.weight is None and known.ignore_index == -100 else f"next {setting}"
                yield CountRule(name, functools.partial(_shifted, known=known), path)
        elif not labels and leaf.numel() == target.numel() and torch.equal(_sorted(leaf), _sorted(target)):
            each = known.count(target) / max(1, leaf.numel())
            yield CountRule(f"entries of {path!r}", functools.partial(_scaled_entries, each=each), path)


def _same_labels(leaf: Tensor, target: Tensor, ignored: int) -> bool:
    """Whether the counted labels of two tensors are the same in any order: a shift inside the loss may have added ignored ones."""
    mine, theirs = leaf[leaf != ignored], target[target != ignored]
    return mine.numel() == theirs.numel() and torch.equal(_sorted(mine), _sorted(theirs))


def _sorted(t: Tensor) -> Tensor:
    return t.detach().reshape(-1).double().cpu().sort().values
