"""What each layer's own learning rate would be: by curvature, trust ratios and signal to noise; parameter groups to train with."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sharpkit._arguments import as_seed, as_text, check_callback, choice, real
from sharpkit._calls import public_call
from sharpkit._checkpoint import clock, resumable, step
from sharpkit._results import Bounded, Progress, ProgressCallback, Result
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.measuring.layers import layer_of
from sharpkit.measuring.sharpness import end_of
from sharpkit.measuring.stability import rate_under
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.objective.objective import Objective, check_objective, objective_call
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import optimizer_curvature
from sharpkit.optimizers import (
    check_one_way,
    check_trains,
    gradient_descent,
    has_stepped,
    held_parameters,
    is_adaptive,
    learning_rate,
    next_update,
    regrouped,
    unwrap_optimizer,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RULES", "LayerRates", "layer_rates"]

RULES = ("curvature", "lars", "lamb", "snr", "apollo")
_NAMES = {"curvature": "2 / lambda", "lars": "|w| / |g|", "lamb": "|w| / |u|", "snr": "g-SNR", "apollo": "|u| / |g|"}
_EPS = 1e-8  # of Adam, and of g-SNR as its authors have it
_SPREAD = 10.0  # by judgement: ratios reach over 1e6 where a layer is almost flat or its weights begin at 0, and no training stands that


@dataclass(frozen=True)
class LayerRates(Result, kind="layer_rates"):
    """What each layer's own learning rate would be, by five rules, and how far such rates may be turned up together.

    Attributes:
        names: layers, or whatever the parameters were grouped by, in the model's order.
        parameters: names of each layer's parameters.
        num_parameters: entries of each.
        optimizer: whose limits these are.
        lr: its present rate.
        alone: each layer's largest stable rate if it moved alone; infinite where its block is not curved upwards.
        lars: |w| / |g| of each layer, LARS's trust ratio but for its factor of 1e-3; infinite where the gradient is 0.
        lamb: |w| / |u|, u Adam's update: the optimizer's own next one if it is adaptive, Adam's first one otherwise.
        snr: |g| / standard deviation of g's entries, SGD-SaI's, largest over the layer's tensors.
        apollo: |u| / |g|: what Adam multiplies a layer's gradient by as a whole.
        channels: lowest, median and highest of |u_j| / |g_j| over the channels j of the layer's matrices, along their longer side.
        one_rate: largest stable rate of all layers together, at the ratios that the optimizer has now.
        together: for each rule, largest stable rate of :meth:`ratios`: that of a layer is this times its ratio.
        num_matvecs, num_gradients, seconds: cost.
        converged: whether every eigenvalue reached its tolerance.
    """

    names: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    num_parameters: tuple[int, ...]
    optimizer: str
    lr: float
    alone: tuple[Bounded, ...]
    lars: tuple[float, ...]
    lamb: tuple[float, ...]
    snr: tuple[float, ...]
    apollo: tuple[float, ...]
    channels: tuple[tuple[float, float, float], ...]
    one_rate: Bounded
    together: dict[str, Bounded]
    num_matvecs: int
    num_gradients: int
    seconds: float
    converged: bool

    def ratios(self, rule: str = "curvature") -> dict[str, float]:
        """Each layer's rate over the base rate: of geometric mean 1 before they are held to a factor of 10 of it.

        Args:
            rule: ``"curvature"`` (in proportion to the layer's own limit), ``"lars"``, ``"lamb"``, ``"snr"`` or ``"apollo"``.

        Raises:
            ValueError: another rule.
        """
        choice("rule", rule, RULES)
        return dict(zip(self.names, _ratios(self.alone if rule == "curvature" else getattr(self, rule)), strict=True))

    def param_groups(self, model: nn.Module, *, lr: float, rule: str = "curvature") -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer: each layer at the base rate times its ratio.

        Parameters of the model that were not measured get the base rate.

        Args:
            model: whose parameters have the names that were measured.
            lr: base rate; ``.together[rule]`` is the largest stable one.
            rule: as for :meth:`ratios`.

        Returns:
            Dictionaries with ``params``, ``lr`` and ``name``.

        Raises:
            ValueError: another rule, or a model that lacks a parameter.

        Example:
            >>> import torch, sharpkit as sk
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
            >>> data = (torch.eye(2), torch.ones(2, 1))
            >>> rates = sk.layerwise.layer_rates(sk.Objective(model, data, loss=torch.nn.functional.mse_loss))
            >>> optimizer = torch.optim.SGD(rates.param_groups(model, lr=0.1))
            >>> [group["name"] for group in optimizer.param_groups]
            ['0', '1']
        """
        lr, ratios = real("lr", lr, above=0), self.ratios(rule)
        left = dict(model.named_parameters())
        groups: list[dict[str, Any]] = []
        for name, members in zip(self.names, self.parameters, strict=True):
            if missing := [member for member in members if member not in left]:
                raise ValueError(f"the model has no parameter {missing[0]!r}, which was measured: pass the model that was measured")
            groups.append({"params": [left.pop(member) for member in members], "lr": lr * ratios[name], "name": name})
        rest = [p for p in left.values() if p.requires_grad]
        return [*groups, {"params": rest, "lr": lr, "name": "not measured"}] if rest else groups

    def findings(self) -> list[str]:
        """What came out, in sentences."""
        curved = [(float(limit), name) for limit, name in zip(self.alone, self.names, strict=True) if math.isfinite(limit)]
        if not curved:
            return ["No layer's block is curved upwards, so that curvature sets no rate."]
        (low, tight), (high, loose) = min(curved), max(curved)
        said = [
            f"Alone, {tight} would be stable up to a rate of {low:.3g} and {loose} up to {high:.3g}, {high / low:.3g} times as much; all "
            f"together at one rate up to {float(self.one_rate):.3g}."
        ]
        best = max(self.together, key=lambda rule: self.mean_rate(rule))
        said.append(
            f"Of the rules, {_NAMES[best]} allows the highest rates together: {self.mean_rate(best):.3g} in the geometric mean over "
            f"layers, {self.mean_rate(best) / float(self.one_rate):.3g} times one rate for all. Higher stable rates need not train better."
        )
        if not self.converged:
            said.append("Some eigenvalue did not reach its tolerance; see the intervals.")
        return said

    def mean_rate(self, rule: str) -> float:
        """Geometric mean over layers of the largest stable rates of a rule."""
        ratios = self.ratios(rule).values()
        return float(self.together[rule]) * math.exp(sum(map(math.log, ratios)) / len(ratios))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Ratios of every rule by layer, on a logarithmic axis.

        Example:
            >>> import matplotlib; matplotlib.use("Agg")
            >>> import torch, sharpkit as sk
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
            >>> data = (torch.eye(2), torch.ones(2, 1))
            >>> rates = sk.layerwise.layer_rates(sk.Objective(model, data, loss=torch.nn.functional.mse_loss))
            >>> rates.plot().get_xscale()
            'log'
        """
        from sharpkit.plots.laws import draw_layer_rates

        return draw_layer_rates(self.names, {_NAMES[rule]: list(self.ratios(rule).values()) for rule in RULES}, ax=ax)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {float(limit):.3g}" for name, limit in zip(self.names[:8], self.alone, strict=False))
        more = f", ... {len(self.names)} layers" if len(self.names) > 8 else ""
        return f"LayerRates(alone {rows}{more}; one rate {float(self.one_rate):.3g}; {self.num_matvecs} products)"


def _ratios(values: Sequence[float]) -> list[float]:
    """Of geometric mean 1 over those that are positive and finite, held to a factor of ``_SPREAD``; infinity goes to its end."""
    known = [math.log(v) for v in values if 0 < v < math.inf]
    middle = math.exp(sum(known) / len(known)) if known else 1.0
    # NaN, where a rule has nothing to say, counts as the mean
    return [1.0 if math.isnan(v) else min(max(float(v) / middle, 1 / _SPREAD), _SPREAD) for v in values]


@public_call
@keeps_memory_limit
@resumable(objective_call)
def layer_rates(
    objective: Objective,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    group: str | Callable[[str], str] = "layer",
    tol: float = 1e-2,
    seed: int = 0,
    memory_limit: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> LayerRates:
    """Measure what each layer's own learning rate would be, by its curvature and by the rules of layer-wise optimizers.

    Each layer's largest stable rate follows from the top eigenvalue of its diagonal block, the others held fixed. Layers that move
    together are less stable: rates r_l times a common factor are stable while it is below 2 / lambda_max(R^1/2 H R^1/2), R = diag(r_l),
    with the optimizer's momentum, decay and preconditioner as :func:`sharpkit.measure` has them. That is measured for each rule, too. All
    is of the present point: curvature changes while training; docs/layerwise.md has what such rates were worth.

    Args:
        objective: the function whose Hessian is meant.
        optimizer: whose limits are meant, by default gradient descent; an adaptive one must have stepped. Only read.
        group: ``"layer"`` (modules that own parameters), ``"tensor"``, or a function from a parameter's name to that of its group: LoRA's
            A and B, attention and MLP.
        tol: relative tolerance of each eigenvalue.
        seed: seeds starting vectors.
        memory_limit: bytes that may be taken on the model's device, besides model and data.
        checkpoint: a folder from which the call goes on if it is killed and made again (docs/guide.md).
        callback: called with a :class:`sharpkit.Progress` after each product.
        name: of the result, as pages show it.

    Raises:
        UnsupportedError: an optimizer whose stability limit is not known.
        ValueError: an adaptive optimizer that has not stepped, or one of another model.
        TypeError: group is neither a name nor a function from text to text.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False)).double()
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.eye(2)), model[1].weight.copy_(torch.tensor([[2.0, 0.0]]))
        >>> data = (torch.eye(2).double(), torch.zeros(2, 1).double())
        >>> rates = sk.layerwise.layer_rates(sk.Objective(model, data, loss=torch.nn.functional.mse_loss))
        >>> [round(float(limit), 4) for limit in rates.alone], round(float(rates.one_rate), 3)
        ([0.5, 2.0], 0.295)

    References:
        You, Gitman and Ginsburg (2017), arXiv 1708.03888 (LARS); You et al. (2020), arXiv 1904.00962 (LAMB); Xu et al. (2024), arXiv
        2412.11768 (g-SNR); Zhu et al. (2024), arXiv 2412.05270 (APOLLO's channel-wise scaling). The joint limit: docs/mathematics.md.
    """
    started = clock()
    check_objective(objective, "layer_rates")
    check_callback(callback)
    own = gradient_descent(objective.layout.live, lr=1.0) if optimizer is None else unwrap_optimizer(optimizer)
    check_trains(own, objective.model)
    check_one_way(own, objective.layout)
    layout, seed = objective.layout, as_seed(seed)
    owners = [_group_of(group, name) for name in layout.names]
    names = tuple(dict.fromkeys(owners))
    members = tuple(tuple(n for n, o in zip(layout.names, owners, strict=True) if o == name) for name in names)
    sizes = tuple(sum(size for size, o in zip(layout.sizes, owners, strict=True) if o == name) for name in names)
    gradient = step("gradient", lambda: objective.gradient()[1])
    update = _adam_update(own, objective, gradient)
    by_tensor = list(zip(*(layout.split(vector) for vector in (layout.current(), gradient, update)), strict=True))
    lars, lamb, snr, apollo = list[float](), list[float](), list[float](), list[float]()
    channels = list[tuple[float, float, float]]()
    for name in names:
        tensors = [row for row, owner in zip(by_tensor, owners, strict=True) if owner == name]
        weight, grad, step_length = (math.sqrt(sum(float(row[j].double().square().sum()) for row in tensors)) for j in range(3))
        lars.append(_over(weight, grad))
        lamb.append(_over(weight, step_length))
        apollo.append(_over(step_length, grad))
        snr.append(max(_signal_to_noise(row[1]) for row in tensors))
        channels.append(_channel_scaling([row for row in tensors if row[0].dim() > 1]))

    matvecs, stages, converged = 0, 1 + len(names) + len(RULES), True

    def top_rate(base: HessianOperator, ratios: Sequence[float], done: int, text: str) -> Bounded:
        """Largest stable rate of the reference group of parameters that move at these ratios, over its own ratio."""
        nonlocal matvecs, converged
        before = base.num_matvecs

        def report(progress: Progress) -> None:
            if callback is not None:
                done_here = base.num_matvecs - before
                spent = matvecs + done_here
                expected = (matvecs + max(progress.expected, done_here)) * stages // (done + 1)
                left = (clock() - started) / spent * max(expected - spent, 0) if spent else math.nan
                said = f"{text}: {progress.text}"
                callback(Progress(spent, expected, clock() - started, left, said, peak_bytes=progress.peak_bytes, choices=progress.choices))

        twin = regrouped(own, base.layout, ratios)
        matrix, rule = optimizer_curvature(base, twin)
        pair = end_of(eigenpairs(matrix, k=1, tol=tol, seed=seed, callback=report))
        matvecs, converged = matvecs + base.num_matvecs - before, converged and pair.converged
        limit, held = rate_under(rule, pair), {id(p) for group in held_parameters(own) for p in group}
        reference = next(r for r, p in zip(ratios, base.layout.live, strict=True) if id(p) in held)
        return Bounded(*(float(v) / reference for v in (limit, limit.lower, limit.upper)))

    alone = list[Bounded]()
    for number, name in enumerate(names):
        block = HessianOperator(objective.with_params(_members(members[number])))
        alone.append(top_rate(block, [1.0] * len(block.layout.names), number, f"{name} (layer {number + 1} of {len(names)})"))
    columns: dict[str, Sequence[float]] = {"curvature": alone, "lars": lars, "lamb": lamb, "snr": snr, "apollo": apollo}
    whole = HessianOperator(objective)  # one for all rules: its graph is kept from here on, beside none of a layer's
    one = top_rate(whole, [1.0] * len(owners), len(names), "all layers")
    together = dict[str, Bounded]()
    for number, rule in enumerate(RULES):
        ratio = dict(zip(names, _ratios(columns[rule]), strict=True))
        together[rule] = top_rate(whole, [ratio[o] for o in owners], 1 + len(names) + number, f"rates by {rule}")
    return LayerRates(
        names=names,
        parameters=members,
        num_parameters=sizes,
        optimizer=type(own).__name__,
        lr=learning_rate(own, layout) if optimizer is not None else math.nan,
        alone=tuple(alone),
        lars=tuple(lars),
        lamb=tuple(lamb),
        snr=tuple(snr),
        apollo=tuple(apollo),
        channels=tuple(channels),
        one_rate=one,
        together=together,
        num_matvecs=matvecs,
        num_gradients=1,
        seconds=clock() - started,
        converged=converged,
    )


def _members(names: Sequence[str]) -> Callable[[str, Tensor], bool]:
    return lambda name, _: name in names


def _group_of(group: str | Callable[[str], str], parameter: str) -> str:
    if callable(group):
        return as_text("group(name)", group(parameter), least=1)
    choice("group", group, ("layer", "tensor"), other="a function of a parameter's name")
    return layer_of(parameter) if group == "layer" else parameter


def _adam_update(optimizer: torch.optim.Optimizer, objective: Objective, gradient: Tensor) -> Tensor:
    """(n,) The optimizer's own next update if it is adaptive, Adam's first one otherwise."""
    if is_adaptive(optimizer) and has_stepped(optimizer):
        return next_update(optimizer, objective.layout, gradient).to(gradient)
    return gradient / (gradient.abs() + _EPS)


def _over(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.inf if numerator else math.nan


def _signal_to_noise(gradient: Tensor) -> float:
    if gradient.numel() < 2:
        return math.nan
    return float(gradient.double().norm() / (gradient.double().std() + _EPS))


def _channel_scaling(matrices: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float, float]:
    """Lowest, median and highest |u_j| / |g_j| over the channels of matrices, which lie along their longer side."""
    scalings = list[Tensor]()
    for _, gradient, update in matrices:
        g, u = gradient.flatten(1).double(), update.flatten(1).double()
        dim = 0 if g.shape[1] >= g.shape[0] else 1
        lengths = g.norm(dim=dim)
        scalings.append((u.norm(dim=dim) / lengths)[lengths > 0])
    every = torch.cat(scalings) if scalings else torch.empty(0)
    if not every.numel():
        return math.nan, math.nan, math.nan
    return float(every.min()), float(every.median()), float(every.max())
