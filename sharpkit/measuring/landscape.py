"""The loss on a line or a plane through the present parameters, with its quadratic model and the stability limit beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpkit._arguments import as_seed, check_callback, choice, real, shown, whole
from sharpkit._calls import public_call
from sharpkit._checkpoint import checksum, clock, resumable, step
from sharpkit._errors import NonFiniteError, UnsupportedError
from sharpkit._results import Progress, ProgressCallback, Result, percent
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.objective.objective import Objective, check_objective, objective_call
from sharpkit.objective.params import ParamLayout, moved
from sharpkit.operators.hessian import HessianOperator
from sharpkit.optimizers import check_trains, learning_rate, next_update, step_matrix, unwrap_optimizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = ("eigenvectors", "filter", "gradient", "update")
_LINE, _PLANE = 41, 21  # points on an axis, by judgement: a line that looks smooth, a plane of some 400 forward passes
_MARGIN = 1.2  # of a path's extent, by judgement
_HOLDS = 0.1  # of the rise that the quadratic model may be off and still count as holding, by judgement
_LOWER = 0.01  # of the losses' range, by judgement: less is nothing that the picture shows
_TOL = 1e-2  # of the eigenvalues, by judgement: a direction to draw along need be no better


@dataclass(frozen=True)
class Landscape(Result, kind="landscape", saved=(
    "directions", "names", "axes", "losses", "loss", "slope", "curvature", "norms", "limits", "optimizer", "path", "path_losses",
    "explained", "mode", "batch_norm", "num_evaluations", "num_matvecs", "seconds",
)):  # fmt: skip
    """Losses at w + sum_i a_i d_i, w the present parameters, d one or two directions.

    Attributes:
        directions: how they were chosen: ``"eigenvectors"``, ``"filter"``, ``"gradient"``, ``"update"``, ``"path"`` or ``"given"``.
        names: of the axes, in words.
        axes: coordinates a_i on each axis, in lengths of d_i; the middle one is 0.
        losses: (p,) on a line, (p, q) on a plane, the first axis first; inf where the loss is not finite, NaN where time ran out.
        loss: at the present parameters.
        slope: (k,) g . d_i.
        curvature: (k, k) d_i^T H d_j: with the slope, the quadratic model.
        norms: (k,) lengths of the directions: 1, but for filters' and given ones.
        limits: largest stable d_i^T H d_i at the optimizer's present rate, for each direction; None without an optimizer.
        optimizer: name of its class.
        path: (m, k) coordinates of the checkpoints, in their order, projected; None without.
        path_losses: (m,) the checkpoints' own losses, which lie off the plane.
        explained: (k,) shares of the squared distances of the path from w that lie along each direction.
        mode: of the objective.
        batch_norm: whether the model has batch statistics: in eval mode those of the present point serve everywhere.
        num_evaluations, num_matvecs: forward passes over the data, and Hessian products.
        seconds: wall time.
    """

    directions: str
    names: tuple[str, ...]
    axes: tuple[Tensor, ...]
    losses: Tensor
    loss: float
    slope: Tensor
    curvature: Tensor
    norms: Tensor
    limits: tuple[float, ...] | None
    optimizer: str | None
    path: Tensor | None
    path_losses: Tensor | None
    explained: Tensor | None
    mode: str
    batch_norm: bool
    num_evaluations: int
    num_matvecs: int
    seconds: float

    def model(self) -> Tensor:
        """The quadratic model f + g.d a + a^T (d^T H d) a / 2 at the same points, of the shape of ``losses``."""
        grids = torch.meshgrid(*self.axes, indexing="ij")
        at = torch.stack([grid.double() for grid in grids])
        linear = torch.tensordot(self.slope.double(), at, dims=1)
        square = torch.einsum("i...,ij,j...->...", at, self.curvature.double(), at)
        modelled: Tensor = self.loss + linear + square / 2
        return modelled

    @property
    def holds_to(self) -> float:
        """Distance along the first direction up to which the model's rise is right to a tenth on both sides; 0 if not even one point is."""
        axis = self.axes[0]
        line, modelled = self.losses, self.model()
        if len(self.axes) == 2:
            line, modelled = (table[:, len(self.axes[1]) // 2] for table in (line, modelled))
        rise = (line - self.loss).abs()
        known = rise[torch.isfinite(rise)]
        rounding = 1e-6 * float(known.max()) if len(known) else 0.0  # by judgement, where the loss is again that of the middle
        holds = (line - modelled).abs() <= _HOLDS * rise + rounding
        middle, reach = len(axis) // 2, 0.0
        for away in range(1, middle + 1):
            if not (bool(holds[middle - away]) and bool(holds[middle + away])):
                break
            reach = float(axis[middle + away])
        return reach * float(self.norms[0])

    def findings(self) -> list[str]:
        """What the picture shows, in sentences."""
        finite = self.losses[torch.isfinite(self.losses)]
        sentences = []
        for i, name in enumerate(self.names):
            curvature = float(self.curvature[i, i])
            if self.limits is None:
                sentences.append(
                    f"Along {name} the curvature is {curvature / float(self.norms[i]) ** 2:.3g} for each unit of length squared."
                )
                continue
            share, limit = curvature / self.limits[i], self.limits[i]
            verdict = "steps along it grow" if share > 1 else "steps along it are stable"
            sentences.append(
                f"Along {name} the curvature is {curvature:.3g}, {share:.2g} of the limit {limit:.3g} of {self.optimizer}: {verdict}."
            )
        reach, end = self.holds_to, float(self.axes[0][-1]) * float(self.norms[0])
        how_far = (
            "nowhere on the grid"
            if not reach
            else f"up to a distance of {reach:.3g} of the {end:.3g} shown"
            if reach < end
            else "everywhere shown"
        )
        sentences.append(f"Along {self.names[0]} the quadratic model's rise is right to a tenth {how_far}.")
        if len(finite) and self.loss - float(finite.min()) > _LOWER * (float(finite.max()) - float(finite.min())):
            sentences.append(f"The lowest loss shown is {float(finite.min()):.4g}, below the {self.loss:.4g} of the present parameters.")
        if self.explained is not None:
            held = percent(float(self.explained.sum()))
            sentences.append(f"The directions hold {held} of the path's squared distances; what else moved is not shown.")
        if missing := int(self.losses.isnan().sum()):
            sentences.append(f"{missing} of {self.losses.numel()} points were not evaluated: time ran out.")
        if self.batch_norm and self.mode == "eval":
            sentences.append(
                "Batch norm uses the running statistics of the present parameters at every point, which makes far ones look worse."
            )
        return sentences

    def __str__(self) -> str:
        shape = " x ".join(str(len(axis)) for axis in self.axes)
        return f"Landscape({self.directions}, {shape} points, loss {self.loss:.4g}, {self.num_evaluations} evaluations)"

    def plot(self, ax: Axes | None = None, *, surface: bool = False) -> Axes:
        """The line with model and limit, or the plane's contours; ``surface`` draws the plane in three dimensions."""
        from sharpkit.plots.landscape import plot_landscape

        return plot_landscape(self, ax=ax, surface=surface)


@public_call
@resumable(objective_call)
def landscape(
    objective: Objective,
    directions: Any = "eigenvectors",
    *,
    dimensions: int = 2,
    optimizer: torch.optim.Optimizer | None = None,
    span: float | None = None,
    points: int | None = None,
    seed: int = 0,
    max_seconds: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> Landscape:
    """Evaluate the loss on a line or a plane through the present parameters.

    Args:
        objective: the function, at the point that the picture is centred on; left as it was. Processes share the work as for any other
            measurement.
        directions: ``"eigenvectors"``, the sharpest ones; ``"filter"``, random and scaled filter by filter to the weights' norms, zero for
            biases and norms' scales (Li et al.); ``"gradient"``, downhill, and the sharpest direction across; ``"update"``, the optimizer's
            next step instead of the gradient; an (n,) or (n, k) tensor in the order of the objective's parameters; or checkpoints in the
            order of training, as state dicts or files of them: the principal components of their differences from the present parameters,
            or on a line the way from the first.
        dimensions: 1 for a line, 2 for a plane.
        optimizer: whose stability limit at its present rate is drawn in; only read.
        span: half the length of each axis, in lengths of the directions; by default where the quadratic model has doubled the loss, 1 for
            filters and given directions, beyond the furthest checkpoint of a path.
        points: on each axis, made odd so that the present parameters are one; by default 41 on a line and 21 on a plane.
        seed: of random directions and of the search for eigenvectors.
        max_seconds: stop then; points that are missing are NaN.
        checkpoint: a folder, to go on from where the same call was killed.
        callback: called with a :class:`sharpkit.Progress` after each point, with a forecast.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError, TypeError: directions, checkpoints or numbers that make no sense.
        UnsupportedError: an optimizer without a stability limit, or ``"update"`` without an optimizer.
        NonFiniteError: the loss or its gradient is not finite here.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> objective = sk.Objective(model, (torch.diag(torch.tensor([2.0, 1.0])), torch.zeros(2, 1)), loss=torch.nn.functional.mse_loss)
        >>> shown = sk.landscape(objective, dimensions=1, span=1.0, points=5)
        >>> round(shown.curvature.item(), 3), [round(loss, 3) for loss in sorted(shown.losses.tolist())]
        (4.0, [0.5, 1.0, 2.5, 5.0, 8.5])

    References:
        Goodfellow, Vinyals and Saxe (2015), arXiv 1412.6544, for lines; Li, Xu, Taylor, Studer and Goldstein (2018), arXiv 1712.09913, for
        filter normalisation and paths.
    """
    began = clock()
    check_objective(objective, "landscape")
    dimensions, seed = whole("dimensions", dimensions, least=1), as_seed(seed)
    if dimensions > 2:
        raise ValueError(f"dimensions must be 1 or 2, got {dimensions}")
    points = (_LINE if dimensions == 1 else _PLANE) if points is None else whole("points", points, least=3)
    span = None if span is None else real("span", span, above=0)
    max_seconds = math.inf if max_seconds is None else real("max_seconds", max_seconds, above=0)
    check_callback(callback)
    if optimizer is not None:
        check_trains(optimizer, objective.model)
    hessian, layout = HessianOperator(objective), objective.layout
    loss, gradient = objective.gradient()
    if not math.isfinite(loss) or not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError(f"the loss here is {loss}, and its gradient may not be finite: there is no landscape to show around it")
    chosen = _directions(directions, hessian, gradient, dimensions, optimizer, seed)
    vectors = chosen.vectors.T.contiguous().T  # one layout, so that a call that goes on rounds as it did
    curvature = hessian.dot(vectors, hessian @ vectors).double().cpu()
    curvature = (curvature + curvature.T) / 2
    slope = hessian.dot(vectors, gradient).double().cpu()
    norms = hessian.dot(vectors, vectors).diagonal().double().sqrt().cpu()
    axes = tuple(half * torch.linspace(-1, 1, points | 1, dtype=torch.float64) for half in _spans(chosen, span, loss, slope, curvature))
    grid = _Grid(objective, layout, vectors, axes, began=began, max_seconds=max_seconds, callback=callback)
    losses = grid.fill()
    return Landscape(
        directions=chosen.kind,
        names=chosen.names,
        axes=axes,
        losses=losses,
        loss=loss,
        slope=slope,
        curvature=curvature,
        norms=norms,
        limits=_limits(optimizer, layout, vectors),
        optimizer=None if optimizer is None else type(unwrap_optimizer(optimizer)).__name__,
        path=chosen.path,
        path_losses=grid.at(chosen.checkpoints),
        explained=chosen.explained,
        mode=objective.mode,
        batch_norm=any(hasattr(module, "running_mean") for module in objective.model.modules()),
        num_evaluations=grid.num_evaluations,
        num_matvecs=hessian.num_matvecs,
        seconds=clock() - began,
    )


# -- directions ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Chosen:
    kind: str
    names: tuple[str, ...]
    vectors: Tensor  # (n, k)
    span: float | None = None  # where the kind says it
    path: Tensor | None = None
    explained: Tensor | None = None
    checkpoints: Tensor | None = None  # (m, n) differences from the present parameters


def _directions(
    asked: Any, hessian: HessianOperator, gradient: Tensor, k: int, optimizer: torch.optim.Optimizer | None, seed: int
) -> _Chosen:
    layout = hessian.layout
    if isinstance(asked, str):
        choice("directions", asked, _KINDS, other="a tensor, or the state dicts of checkpoints")
        if asked == "filter":
            return _Chosen(asked, ("a random direction", "another random direction")[:k], _filters(layout, k, seed), span=1.0)
        if asked == "eigenvectors":
            names = ("the sharpest direction", "the second sharpest")
            return _Chosen(asked, names[:k], eigenpairs(hessian, k=k, tol=_TOL, seed=seed).vectors)
        return _downhill(asked, hessian, gradient, k, optimizer, seed)
    if isinstance(asked, Tensor):
        vectors = asked.unsqueeze(1) if asked.ndim == 1 else asked
        if vectors.ndim != 2 or vectors.shape[1] != k:
            raise ValueError(f"directions must be a tensor of shape ({layout.size}, {k}) for dimensions={k}, got {tuple(asked.shape)}")
        columns = [layout.checked(column, "each direction") for column in vectors.T]
        if not all(bool(column.any()) and bool(torch.isfinite(column).all()) for column in columns):
            raise ValueError("directions must be finite and not zero")
        return _Chosen("given", ("the first direction given", "the second direction given")[:k], torch.stack(columns, dim=1), span=1.0)
    return _along_path(asked, layout, k)


def _filters(layout: ParamLayout, k: int, seed: int) -> Tensor:
    """Gaussian, each row of a matrix or filter of a convolution with the norm of the weights' own; 0 for vectors and numbers."""
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for _ in range(k):
        pieces = []
        for p in layout.params:
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            if p.ndim < 2:
                pieces.append(torch.zeros_like(p))
                continue
            own, new = (t.detach().flatten(1).norm(dim=1) for t in (p, drawn))
            pieces.append(drawn * (own / (new + 1e-10)).view(-1, *[1] * (p.ndim - 1)))  # as in the paper's code: rows of zeros stay finite
        columns.append(layout.flatten(pieces))
    vectors = torch.stack(columns, dim=1)
    if not bool(vectors.any()):
        raise ValueError("filter directions are 0 here: no weights with two axes or more differ from 0; ask for directions='eigenvectors'")
    return vectors


def _downhill(
    asked: str, hessian: HessianOperator, gradient: Tensor, k: int, optimizer: torch.optim.Optimizer | None, seed: int
) -> _Chosen:
    step, name = -gradient, "the negative gradient"
    if asked == "update":
        if optimizer is None:
            raise UnsupportedError("directions='update' is the optimizer's next step: pass optimizer= as well")
        step, name = -next_update(optimizer, hessian.layout, gradient), "the optimizer's next step"
    length = float(hessian.dot(step, step)) ** 0.5
    if not length > 0:
        raise ValueError(f"{name} is 0 here, so that it gives no direction: ask for directions='eigenvectors'")
    columns = [step / length]
    if k == 2:
        across = eigenpairs(hessian, k=1, tol=_TOL, seed=seed).vectors[:, 0]
        across = across - hessian.dot(columns[0], across) * columns[0]
        width = float(hessian.dot(across, across)) ** 0.5
        if width < 1e-3:  # by judgement: what is left of a direction that was nearly the same is rounding
            second = eigenpairs(hessian, k=2, tol=_TOL, seed=seed).vectors[:, 1]
            across = second - hessian.dot(columns[0], second) * columns[0]
            width = float(hessian.dot(across, across)) ** 0.5
        columns.append(across / width)
    return _Chosen(asked, (name, "the sharpest direction across")[:k], torch.stack(columns, dim=1))


def _along_path(asked: Any, layout: ParamLayout, k: int) -> _Chosen:
    if not isinstance(asked, Iterable) or isinstance(asked, Mapping):
        raise TypeError(f"directions must be one of {', '.join(_KINDS)}, a tensor, or a list of state dicts, got {shown(asked)}")
    here = layout.current()
    differences = torch.stack([_read(item, layout, number) - here for number, item in enumerate(asked)] or [torch.zeros_like(here)])
    total = float(differences.double().square().sum())
    if not total > 0:
        raise ValueError("the checkpoints do not differ from the present parameters: pass those of earlier steps, in their order")
    if k == 1:
        way = differences[0]
        if not bool(way.any()):
            raise ValueError("the first checkpoint has the present parameters: there is no way between them")
        vectors, names = (way / way.norm()).unsqueeze(1), ["the way to the first checkpoint"]
    else:
        values, mixing = torch.linalg.eigh(differences.double() @ differences.double().T)
        if len(values) < 2 or not float(values[-2]) > 1e-12 * float(values[-1]):
            raise ValueError("a plane needs at least two checkpoints that lie in different directions: pass more, or ask for dimensions=1")
        columns = differences.double().T @ mixing[:, -2:].flip(1)
        vectors = (columns / columns.norm(dim=0)).to(differences.dtype)
        names = ["the path's first component", "the path's second component"]
    path = (differences.double() @ vectors.double()).cpu()
    explained = path.square().sum(dim=0) / total
    span = _MARGIN * float(path.abs().max())
    return _Chosen("path", tuple(names), vectors, span=span, path=path, explained=explained, checkpoints=differences)


def _read(item: Any, layout: ParamLayout, number: int) -> Tensor:
    """The flat parameters of a checkpoint."""
    if isinstance(item, (str, os.PathLike)):
        item = torch.load(item, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model", "model_state_dict"):  # where training scripts keep them besides other things
        if isinstance(item, Mapping) and isinstance(item.get(key), Mapping):
            item = item[key]
    if not isinstance(item, Mapping):
        raise TypeError(f"checkpoint {number} must be a state dict, or a file that holds one, got {shown(item)}")
    names = {str(name).replace("_orig_mod.", "").removeprefix("module."): value for name, value in item.items()}
    missing = [name for name in layout.names if not isinstance(names.get(name), Tensor)]
    if missing:
        raise ValueError(
            f"checkpoint {number} has no parameter {missing[0]!r}, one of {len(missing)} that are missing: is it of this model?"
        )
    for name, p in zip(layout.names, layout.params, strict=True):
        if names[name].shape != p.shape:
            raise ValueError(
                f"parameter {name!r} of checkpoint {number} has shape {tuple(names[name].shape)}, the model's {tuple(p.shape)}"
            )
    return layout.flatten([names[name].to(p) for name, p in zip(layout.names, layout.params, strict=True)])


# -- spans and limits ------------------------------------------------------------------------------------------------------------
def _spans(chosen: _Chosen, span: float | None, loss: float, slope: Tensor, curvature: Tensor) -> Sequence[float]:
    count = len(chosen.names)
    if span is not None or chosen.span is not None:
        return [float(chosen.span or 1.0) if span is None else span] * count
    rise = max(abs(loss), 1e-12)
    # where |curvature| a^2 / 2 is the loss, or past the model's own lowest point, whichever is further
    steep = [max(abs(float(curvature[i, i])), 1e-12 * rise) for i in range(count)]
    return [max(math.sqrt(2 * rise / h), 2 * abs(float(s)) / h if h > 1e-9 * rise else 0.0) for s, h in zip(slope, steep, strict=True)]


def _limits(optimizer: torch.optim.Optimizer | None, layout: ParamLayout, vectors: Tensor) -> tuple[float, ...] | None:
    """Largest stable d^T H d for each direction d, at the optimizer's present rate."""
    if optimizer is None:
        return None
    turned = step_matrix(optimizer, layout)
    lr = learning_rate(unwrap_optimizer(optimizer), layout)
    most = turned.rule.max_curvature(lr) if lr > 0 else math.inf
    square = vectors.double().square()
    if turned.scale is None:
        return tuple((most * square.sum(dim=0)).tolist())
    inner = square / turned.scale.double().to(square.device).square().unsqueeze(1)
    decay, shift = (t.double().unsqueeze(1).to(square.device) if isinstance(t, Tensor) else t for t in (turned.decay, turned.shift))
    return tuple(((most - shift) * inner - decay * square).sum(dim=0).tolist())


# -- evaluations -----------------------------------------------------------------------------------------------------------------
class _Grid:
    """The losses at the grid's points, one after another."""

    def __init__(
        self, objective: Objective, layout: ParamLayout, vectors: Tensor, axes: Sequence[Tensor], *, began: float, max_seconds: float,
        callback: ProgressCallback | None,
    ) -> None:  # fmt: skip
        self._objective, self._layout, self._columns, self._axes = objective, layout, list(vectors.T), axes
        self._began, self._until, self._callback = began, began + max_seconds, callback
        self._name = f"loss near {checksum([vectors])}"  # other directions are another course
        self.num_evaluations = 0

    def fill(self) -> Tensor:
        """The whole grid."""
        coordinates = torch.cartesian_prod(*self._axes).view(-1, len(self._axes)).tolist()
        losses, started = torch.full((len(coordinates),), math.nan, dtype=torch.float64), clock()
        for index, at in enumerate(coordinates):
            if self._objective.ranks.agree(float(clock() > self._until), device=self._objective.device):
                break
            losses[index] = self._loss(sum((a * d for a, d in zip(at, self._columns, strict=True)), torch.zeros_like(self._columns[0])))
            if self._callback is not None:
                each = (clock() - started) / (index + 1)
                left, elapsed = each * (len(coordinates) - index - 1), clock() - self._began
                self._callback(Progress(index + 1, len(coordinates), elapsed, left, "points of the landscape", "points"))
        return losses.view(*(len(axis) for axis in self._axes))

    def at(self, points: Tensor | None) -> Tensor | None:
        """At other points, (m, n) differences from the present parameters."""
        return None if points is None else torch.tensor([self._loss(point) for point in points], dtype=torch.float64)

    def _loss(self, difference: Tensor) -> float:
        self.num_evaluations += 1
        return step(self._name, lambda: self._evaluated(difference))

    def _evaluated(self, difference: Tensor) -> float:
        with moved(self._layout, self._layout.split(difference), 1.0):
            try:
                return self._objective.value()
            except NonFiniteError:
                return math.inf
