"""Sharpness in the norm in which an optimizer is steepest descent: the largest d^T H d over the norm's unit ball."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit._arguments import as_seed, choice, real, whole
from sharpkit._calls import public_call
from sharpkit._results import ProgressCallback, Result
from sharpkit.linalg.krylov import affordable_rows
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.results import Budget
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.objective.params import ParamLayout
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import turned_curvature
from sharpkit.optimizers import Norm, check_trains, is_adaptive, learning_rate, refuse_unknown, step_geometry, step_matrix, unwrap_optimizer

Geometry = Norm | Mapping[str, Norm] | Optimizer

_CLIMBS = 40  # steps on the model of the products made so far, which cost none: by judgement, most end after five
_WIDE, _NARROW = 256, 8  # points climbed from at most and at least, by judgement
_ENTRIES, _FACTORED = 2**18, 2**10  # numbers in all points, of signs, and where matrices are to be factored: by judgement
_SMALL = 10_000  # parameters of a small problem, where single entries are turned as well: by judgement
_WORK = 2.0**33  # operations between two products, by judgement a fifth of a second on one core
_MODEL = 60  # operations of the model of H for an entry of a vector: by judgement, six for each of ten products
_PATIENCE = 5  # products without a rise that end the search: by judgement
_RISE = 1e-3  # of the value, by judgement: less is no rise


@dataclass(frozen=True)
class GeneralizedSharpness(Result, kind="generalized_sharpness"):
    """The largest d^T H d found over the unit ball of a norm. It is no eigenvalue, unless the norm is ``"l2"`` or a rescaled one.

    Attributes:
        value: d^T H d at the best direction: a lower bound.
        norm: the norm's name, ``"mixed"`` where parameters have different ones; for an optimizer that divides its gradients the matrix
            whose largest eigenvalue it is, such as ``"D^-1 H"``.
        upper: an upper bound, None where none was asked for.
        dual_norm: ||g||_*, the largest g . d over the ball; None without a gradient. Steps of fixed length lr d* are steepest descent with
            the rate lr / ||g||_*, so that 2 dual_norm / lr is what ``value`` is to be compared with; at rate lr itself it is 2 / lr.
        direction: d, (n,).
        num_matvecs: Hessian products.
        seconds: wall time.
        optimizer: the name of the optimizer whose geometry it is, None without one.
        limit: the largest value that is stable at the optimizer's present rate; None without one, or at rate 0.
        stable_lr: the largest stable rate; inf where nothing curves upwards.
    """

    value: float
    norm: str
    upper: float | None
    dual_norm: float | None
    direction: Tensor = field(repr=False)
    num_matvecs: int
    seconds: float
    optimizer: str | None = None
    limit: float | None = None
    stable_lr: float = math.nan

    def __float__(self) -> float:
        return self.value

    @property
    def share(self) -> float | None:
        """value / limit: training is at its edge of stability at 1; None without a limit."""
        return None if self.limit is None else self.value / self.limit if self.limit > 0 else math.inf

    @property
    def finding(self) -> str:
        """What it means, in a sentence."""
        if self.optimizer is None or self.share is None:
            return f"Steepest descent in this norm is stable up to a rate of {self.stable_lr:.3g}."
        return f"{self.optimizer} is at {self.share:.2f} of its limit: it is stable up to a rate of {self.stable_lr:.3g}."

    def __str__(self) -> str:
        whose = "" if self.optimizer is None else f" of {self.optimizer}"
        edge = "" if self.limit is None else f", limit {self.limit:.4g}"
        if self.dual_norm is None:
            matrix = "H" if self.norm == "l2" else self.norm
            return f"sharpness{whose}, lambda_max({matrix}), {self.value:.4g}{edge} ({self.num_matvecs} products)"
        above = "" if self.upper is None else f", at most {self.upper:.4g}"
        return f"{self.norm} sharpness{whose} at least {self.value:.4g}{above}{edge} ({self.num_matvecs} products)"


class Ball:
    """The unit ball of a norm over the parameters of a layout: the largest of the parameters' own norms, or, for ``"l2"``, one of all.

    A matrix has the shape (first, all others) of its tensor. Vectors and single numbers have the l2 norm, but for ``"linf"``.

    Args:
        norm: ``"l2"``; ``"linf"``, the largest entry; ``"spectral"``, the largest singular value of each matrix; ``"blocks"``, the l2 norm
            of each tensor; ``"rows"`` or ``"columns"``, the largest l2 norm of a row or column; or one of the last five for each parameter.
        layout: the parameters.
        radii: how large the own norm of each parameter may be, 1 by default; in ``"linf"`` also a tensor, for each entry.
    """

    def __init__(self, norm: Norm | Sequence[Norm], layout: ParamLayout, radii: Sequence[float | Tensor] | None = None) -> None:
        self.layout = layout
        self._norms: Sequence[Norm] = [norm] * len(layout.params) if isinstance(norm, str) else norm
        self._radii = radii or [1.0] * len(layout.params)

    @property
    def norm(self) -> str:
        """Its name, of all that move: ``"mixed"`` where there are several."""
        moving = {norm for norm, radius in zip(self._norms, self._radii, strict=True) if isinstance(radius, Tensor) or radius}
        return moving.pop() if len(moving) == 1 else "mixed"

    def furthest(self, vectors: Tensor) -> Tensor:
        """Where on the ball a linear function is largest: argmax v . d for each of the (n, k) columns, 0 where v is."""
        if self._norms[0] == "l2":
            return _scaled(vectors, 0)
        parts = torch.split(vectors, list(self.layout.sizes))
        every = zip(parts, self._norms, self._radii, self.layout.params, strict=True)
        return torch.cat([_times(_furthest(part, norm, p.shape), radius) for part, norm, radius, p in every])

    @property
    def work(self) -> float:
        """Arithmetic operations of :meth:`furthest` for one vector, nearly."""
        moving = [
            (norm, p.shape)
            for norm, radius, p in zip(self._norms, self._radii, self.layout.params, strict=True)
            if isinstance(radius, Tensor) or radius
        ]
        return sum(_work(norm, shape) for norm, shape in moving)

    @property
    def reach(self) -> float:
        """The largest ||d||_2^2 on the ball, so that the sharpness is at most so many times lambda_max."""
        if self._norms[0] == "l2":
            return 1.0
        every = zip(self._norms, self._radii, self.layout.params, strict=True)
        return sum(float(r.square().sum()) if isinstance(r, Tensor) else r**2 * _reach(norm, p.shape) for norm, r, p in every)


def _work(norm: Norm, shape: torch.Size) -> float:
    if norm != "spectral" or len(shape) < 2:
        return float(shape.numel())
    small, large = sorted((shape[0], math.prod(shape[1:])))
    return 25.0 * small**2 * large  # of a symmetric eigenproblem and three products, by LAPACK's counts


def _times(part: Tensor, radius: float | Tensor) -> Tensor:
    return part * radius.reshape(-1, 1).to(part) if isinstance(radius, Tensor) else part if radius == 1.0 else part * radius


def _furthest(part: Tensor, norm: Norm, shape: torch.Size) -> Tensor:
    if norm == "linf":
        return part.sign()
    if len(shape) < 2 or norm == "blocks":
        return _scaled(part, 0)
    matrices = part.T.reshape(part.shape[1], shape[0], -1)  # (k, rows, columns)
    if norm == "spectral":
        turned = _orthogonal(matrices)
    else:
        turned = _scaled(matrices, 2 if norm == "rows" else 1)
    flat: Tensor = turned.reshape(part.shape[1], -1).T
    return flat


def _orthogonal(matrices: Tensor) -> Tensor:
    """U V^T of each (k, rows, columns) matrix U S V^T, as (M M^T)^-1/2 M: half the time of singular values, and in float64 as exact."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    exact = wide.double()
    squares, vectors = torch.linalg.eigh(exact @ exact.mT)
    largest, entries = squares[:, -1:], max(wide.shape[1:])
    # what is 0 to rounding, of the matrix or of its square, has no direction
    floor = largest * max((entries * torch.finfo(wide.dtype).eps) ** 2, entries * torch.finfo(torch.float64).eps)
    roots = torch.where(squares > floor, squares.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    turned: Tensor = (((vectors * roots[:, None, :]) @ vectors.mT) @ exact).to(matrices.dtype)
    return turned.mT if wide is not matrices else turned


def _reach(norm: Norm, shape: torch.Size) -> int:
    if norm == "linf":
        return shape.numel()
    if len(shape) < 2 or norm == "blocks":
        return 1
    rows, columns = shape[0], math.prod(shape[1:])
    return min(rows, columns) if norm == "spectral" else rows if norm == "rows" else columns


def _scaled(values: Tensor, dim: int) -> Tensor:
    length = values.norm(dim=dim, keepdim=True)
    return torch.where(length > 0, values / length.clamp_min(torch.finfo(values.dtype).tiny), 0.0)


@public_call
@keeps_memory_limit
def generalized_sharpness(
    objective: Objective,
    geometry: Geometry,
    *,
    seed: int = 0,
    num_starts: int = 5,
    initial: Tensor | None = None,
    lambda_max: float | None = None,
    diagonal: Tensor | None = None,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> GeneralizedSharpness:
    """S = max {d^T H d : ||d|| <= 1}, the curvature that steepest descent in this norm feels; it is stable up to a rate of 2 / S.

    Plain gradient descent is steepest descent in ``"l2"`` (S is lambda_max), sign descent (and Lion without its momentum) in ``"linf"``,
    Muon without momentum in ``"spectral"``. But for ``"l2"``, no algorithm finds S for certain: what comes back is the best of several
    starts, a lower bound. The highest start takes one step to where its product points furthest; then a model of H, made from all products
    so far, is climbed from many points, which costs none, and the best of them is multiplied, until nothing rises.

    Of an optimizer it is the sharpness that its own steps feel, with the limit at its present rate. Steps that are proportional to the
    gradient, whatever it is divided by (SGD, Adam and their like), make S the largest eigenvalue of the matrix in the optimizer's rule,
    and the limit counts their momentum. Steps of a fixed length (Lion, Muon, Rprop) are compared with 2 ||g||_* / lr, without momentum;
    parameters move as far as their group's rate and shape say.

    Args:
        objective: the function.
        geometry: ``"l2"``, ``"linf"``, ``"spectral"``, ``"blocks"``, ``"rows"`` or ``"columns"`` (see :class:`Ball`); a mapping from
            patterns of parameter names to these, the first that fits a name counts; or an optimizer over the objective's parameters,
            which is only read.
        seed: seeds the random starts.
        num_starts: directions to begin with: the given one, the steepest one, and random ones (experiments/geometry_search.py).
        initial: (n,) a direction near the wanted one, such as that of an earlier call.
        lambda_max: the largest eigenvalue of H, if known: an upper bound follows, which is far above S for large models.
        diagonal: (n,) positive, what an optimizer divides its gradients by, where its state is not the one meant.
        max_matvecs: most products, by default 2 for each start and 2 more.
        max_seconds: most seconds.
        memory_limit: bytes that may be taken on the model's device.
        callback: called with a :class:`sharpkit.Progress` after each product, or several made at once.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError, TypeError: arguments out of range, or an optimizer of other parameters.
        UnsupportedError: an optimizer that sharpkit does not know (the message spells out how to register it), that maximizes, or that
            trains more than the objective's model; or from the products.
        NonFiniteError, OutOfMemoryError: from the products.

    References:
        Islamov, Crawshaw, Cohen and Gower, arXiv 2603.05002; Balles, Pedregosa and Le Roux, "The geometry of sign gradient descent",
        arXiv 2002.08056.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.eye(2), torch.zeros(2, 1)), loss=torch.nn.functional.mse_loss)  # H = I
        >>> round(sk.generalized_sharpness(objective, "linf").value, 4)
        2.0
        >>> round(sk.generalized_sharpness(objective, torch.optim.SGD(model.parameters(), lr=0.5)).share, 4)  # 1 of 2 / 0.5
        0.25
    """
    started, num_starts = time.perf_counter(), whole("num_starts", num_starts)
    lambda_max = None if lambda_max is None else real("lambda_max", lambda_max)
    most = whole("max_matvecs", max_matvecs) if max_matvecs is not None else None
    check_objective(objective, "generalized_sharpness")
    hessian = HessianOperator(objective)
    initial = None if initial is None else objective.layout.checked(initial, "initial")
    ball, optimizer, lr = _ball(geometry, objective)
    seed = as_seed(seed)
    if diagonal is not None:
        objective.layout.checked(diagonal, "diagonal")  # in its own type: small second moments lose digits in float32
        if optimizer is None or ball is not None or not is_adaptive(optimizer):
            raise ValueError("diagonal says what an optimizer divides its gradients by: pass one that does, such as Adam")
        if not bool((diagonal > 0).all()):
            raise ValueError("the diagonal must be positive everywhere")
    if ball is None:
        matrix: SymmetricOperator = hessian
        rule, scale = None, None
        if optimizer is not None:
            turned = step_matrix(optimizer, objective.layout, diagonal=diagonal)
            matrix, rule, scale = turned_curvature(hessian, turned), turned.rule, turned.scale
        if scale is not None:
            scale = scale.to(hessian.dtype)
            initial = None if initial is None else torch.where(scale > 0, initial / scale, 0.0)
        pairs = eigenpairs(matrix, seed=seed, initial=initial, max_matvecs=most, max_seconds=max_seconds, callback=callback)
        value, direction, dual = float(pairs.values[0]), pairs.vectors[:, 0], None
        direction = direction if scale is None else scale * direction  # of length 1 in the norm that divides as the optimizer does
        limit = None if rule is None or not lr else rule.max_curvature(lr)
        stable = rule.max_learning_rate(value) if rule is not None else _quotient(2.0, value)
        norm, upper = "l2" if rule is None else rule.operator, None
    else:
        most = most or 2 * num_starts + 2
        budget = Budget(hessian, max_matvecs=most, max_seconds=max_seconds, callback=callback)
        num_starts = min(num_starts, max(1, most // 2))
        value, direction, dual = sharpest(hessian, ball, objective.gradient()[1], budget, seed=seed, num_starts=num_starts, initial=initial)
        limit = None if optimizer is None or not lr else 2 * dual / lr
        stable = _quotient(2.0 if optimizer is None else 2 * dual, value)
        norm, upper = ball.norm, None if lambda_max is None else ball.reach * max(lambda_max, 0.0)
    seconds, whose = time.perf_counter() - started, None if optimizer is None else type(optimizer).__name__
    return GeneralizedSharpness(value, norm, upper, dual, direction, hessian.num_matvecs, seconds, whose, limit, stable)


def sharpest(
    hessian: HessianOperator,
    ball: Ball,
    gradient: Tensor,
    budget: Budget,
    *,
    seed: int,
    num_starts: int,
    initial: Tensor | None = None,
    thorough: bool = True,
) -> tuple[float, Tensor, float]:
    """The search of :func:`generalized_sharpness` over a ball: the value, its direction, and the dual norm of the gradient.

    Unless it is ``thorough``, the model is climbed from the best direction alone, which takes no longer than a small network's products.
    """
    steepest = ball.furthest(gradient[:, None])
    dual = float(hessian.dot(gradient, steepest[:, 0]))
    given = [] if initial is None else [ball.furthest(initial[:, None])]
    generator = torch.Generator().manual_seed(seed)
    randomly = hessian.random_vectors(num_starts, generator=generator)
    starts = torch.cat([*given, steepest, ball.furthest(randomly)], dim=1)[:, :num_starts]
    value, direction = _Search(hessian, ball, budget, generator, thorough=thorough).run(starts)
    return max(value, 0.0), direction, dual  # 0 lies in the ball: where everything curves downwards, that is the maximum


def _quotient(above: float, below: float) -> float:
    return above / below if below > 0 else math.inf


def _ball(geometry: Geometry, objective: Objective) -> tuple[Ball | None, Optimizer | None, float]:
    """The ball, None where it is that of l2 or a rescaled one; the optimizer and its rate, if the geometry is one's."""
    layout = objective.layout
    if isinstance(geometry, str):
        choice("geometry", geometry, get_args(Norm), other="an optimizer, a mapping from patterns of names")
        return (None if geometry == "l2" else Ball(geometry, layout)), None, 0.0
    if isinstance(geometry, Mapping):
        for pattern, norm in geometry.items():
            choice(f"the norm of {pattern!r}", norm, get_args(Norm)[1:])
        fitting = {name: next((pattern for pattern in geometry if fnmatch.fnmatchcase(name, pattern)), None) for name in layout.names}
        if missing := [name for name, pattern in fitting.items() if pattern is None]:
            raise ValueError(f"the geometry has no norm for {', '.join(missing[:3])}: add a pattern such as '*' for all others")
        return Ball([geometry[pattern] for pattern in fitting.values() if pattern is not None], layout), None, 0.0
    optimizer = unwrap_optimizer(geometry)
    check_trains(optimizer, objective.model)
    shape = step_geometry(optimizer, layout)
    if shape is not None:
        return Ball(shape.norms, layout, shape.radii), optimizer, shape.lr
    refuse_unknown(optimizer, "the norm that its steps are measured in", "Pass the norm's name instead of the optimizer", "geometry")
    return None, optimizer, learning_rate(optimizer, layout)


class _Search:
    """Directions, their products, and the best so far."""

    def __init__(self, hessian: HessianOperator, ball: Ball, budget: Budget, generator: torch.Generator, *, thorough: bool) -> None:
        self._hessian, self._ball, self._budget, self._generator = hessian, ball, budget, generator
        self._directions, self._products = torch.empty(hessian.size, 0), torch.empty(hessian.size, 0)
        self._best: tuple[float, Tensor] | None = None
        wide = max(_NARROW, min(_WIDE, (_ENTRIES if ball.norm == "linf" else _FACTORED) // hessian.size))
        self._width = max(1, min(wide, affordable_rows(hessian) // 4))
        affordable = _WORK / (ball.work + _MODEL * hessian.size)
        self._few = 0 if thorough and affordable >= 3 * self._width * _CLIMBS else max(2, min(_CLIMBS, int(affordable)))

    def run(self, starts: Tensor) -> tuple[float, Tensor]:
        products, idle = self._multiply(starts), 0
        # of random directions; the first may be a given one
        tried, turned = starts[:, 1:] if starts.shape[1] > 1 else starts, products[:, 1:] if starts.shape[1] > 1 else products
        self._mean_curvature = float((tried * turned).sum() / tried.square().sum())
        if self._budget.allows():  # from the others the model leads on
            highest = (starts * products).sum(dim=0).argmax()
            self._multiply(self._ball.furthest(products[:, highest, None]))
        while idle < _PATIENCE and self._budget.allows():
            before = self._value
            candidate = self._candidate()
            if candidate is None:  # the model has nothing new to tell: another product at random makes it a better one
                candidate = self._ball.furthest(self._hessian.random_vectors(1, generator=self._generator))[:, 0]
            self._multiply(candidate[:, None])
            idle = 0 if self._value > before + _RISE * abs(before) else idle + 1
        assert self._best is not None
        return self._best

    @property
    def _value(self) -> float:
        return -math.inf if self._best is None else self._best[0]

    def _multiply(self, directions: Tensor) -> Tensor:
        products = self._hessian @ directions
        values = (directions * products).sum(dim=0)
        top = int(values.argmax())
        if float(values[top]) > self._value:
            self._best = float(values[top]), directions[:, top].clone()
        kept = self._directions.to(directions), self._products.to(products)
        self._directions, self._products = (torch.cat(pair, dim=1) for pair in zip(kept, (directions, products), strict=True))
        self._budget.vectors = 4 * self._directions.shape[1] + 4 * self._width
        self._budget.report(self._budget.num_matvecs + 1, f"{self._ball.norm} sharpness, {self._value:.4g} so far")
        return products

    def _candidate(self) -> Tensor | None:
        """The highest point of the model that has not been multiplied, None if there is none."""
        apply, diagonal, image = self._model()
        mixtures = torch.randn(image.shape[1], self._width, generator=self._generator, dtype=torch.float64).to(image)
        anywhere = self._hessian.random_vectors(self._width, generator=self._generator).to(image)
        if self._few:  # what is large is climbed from the best direction alone, and only as far as this leads
            assert self._best is not None
            points = self._climbed(self._best[1][:, None], apply)
        else:
            points = torch.cat([self._ball.furthest(torch.cat([image @ mixtures, anywhere], dim=1)), self._directions], dim=1)
            # entry by entry where that is affordable: long steps from many points end at few, and miss more
            by_entries = self._ball.norm == "linf" and len(points) <= _SMALL
            points = _turned(points, apply, diagonal) if by_entries else self._climbed(points, apply)
        heights = (points * apply(points)).sum(dim=0)
        seen = self._directions / self._directions.norm(dim=0).clamp_min(1e-30)
        for index in heights.argsort(descending=True).tolist():
            point = points[:, index]
            if bool(((seen.T @ point).abs() < (1 - 1e-6) * point.norm()).all()):
                return point
        return None

    def _model(self) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
        """H on the span Q of the directions, and what leads out of it, as far as the products tell; nothing beyond."""
        vectors, sizes, right = torch.linalg.svd(self._directions, full_matrices=False)
        rank = int((sizes > 1e-5 * sizes[0]).sum())
        basis = vectors[:, :rank]
        image = self._products @ (right[:rank].T / sizes[:rank])  # H Q
        inner = basis.T @ image
        inner, outer = (inner + inner.T) / 2, image - basis @ inner
        # of the rest its mean: all of it together has the trace that random directions tell, less what lies in the span
        left, beyond = len(basis) - rank, 0.0
        if left:
            beyond = float(self._mean_curvature * len(basis) - inner.trace()) / left

        def apply(points: Tensor) -> Tensor:
            inside = basis.T @ points
            image: Tensor = basis @ (inner @ inside + outer.T @ points - beyond * inside) + outer @ inside + beyond * points
            return image

        return apply, (basis * (basis @ inner + 2 * outer - beyond * basis)).sum(dim=1) + beyond, image

    def _climbed(self, points: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """Steps to where the slope points furthest; where that leads down, with a multiple of the identity added, which makes it rise."""
        slopes = apply(points)
        heights, shifts = (points * slopes).sum(dim=0), torch.zeros(points.shape[1]).to(points)
        for _ in range(self._few or _CLIMBS):
            tried = self._ball.furthest(slopes + shifts * points)
            new = apply(tried)
            higher = (tried * new).sum(dim=0)
            rises, falls = higher > heights * (1 + 1e-9) + 1e-30, higher < heights
            scale = slopes.norm(dim=0) / points.norm(dim=0).clamp_min(1e-30)
            shifts = torch.where(falls, torch.maximum(2 * shifts, scale / 4), shifts)
            points, slopes = torch.where(rises, tried, points), torch.where(rises, new, slopes)
            heights = torch.where(rises, higher, heights)
            if not bool((rises | (falls & (shifts < 100 * scale))).any()):
                break
        return points


def _turned(points: Tensor, apply: Callable[[Tensor], Tensor], diagonal: Tensor) -> Tensor:
    """Signs turned one by one while the height rises: turning entry i changes it by 4 (H_ii d_i^2 - d_i (H d)_i)."""
    points, columns = points.clone(), torch.arange(points.shape[1], device=points.device)
    for _ in range(min(len(points), 2 * _CLIMBS)):
        own = diagonal[:, None] * points.square()
        gain, entry = (own - points * apply(points)).max(dim=0)
        rises = gain > 1e-6 * own.abs().max().clamp_min(1e-30)
        if not bool(rises.any()):
            break
        points[entry[rises], columns[rises]] *= -1
    return points
