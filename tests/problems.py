"""Small float64 models with data, and dense reference matrices computed from their definitions without sharpkit.

Every reference here goes by another road than the package: losses are sums divided by a count made on the spot, Hessians a loop of double
backwards over one flat vector, Jacobians a loop over output entries, per-sample gradients a loop over samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

Batches = list[tuple[Any, Any]]


@dataclass
class Problem:
    """A model, uneven batches, the loss as a user writes it, and the same loss as a plain sum with its count.

    Attributes:
        unit: (output, target) -> sum of the losses of all targets that count.
        count: target -> how many count.
    """

    name: str
    model: nn.Module
    batches: Batches
    loss: Callable[[Tensor, Tensor], Tensor]
    unit: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], float]
    likelihood: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def total(self) -> float:
        return sum(self.count(y) for _, y in self.batches)

    def value(self) -> Tensor:
        return sum(self.unit(self.model(x), y) for x, y in self.batches) / self.total  # type: ignore[return-value]

    def samples(self) -> Batches:
        return [(x[i : i + 1], y[i : i + 1]) for x, y in self.batches for i in range(len(x))]


# -- references -----------------------------------------------------------------------------------------------------------
def flat(tensors: Any, params: list[nn.Parameter]) -> Tensor:
    """One vector, with None meaning zero."""
    return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(tensors, params, strict=True)])


def dense_hessian(value: Callable[[], Tensor], params: list[nn.Parameter]) -> Tensor:
    """Row by row: the gradient of one entry of the gradient."""
    with sdpa_kernel(SDPBackend.MATH):
        gradient = flat(torch.autograd.grad(value(), params, create_graph=True, allow_unused=True), params)
        rows = []
        for entry in gradient:
            row = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True) if entry.requires_grad else [None] * len(params)
            rows.append(flat(row, params))
    return torch.stack(rows)


def dense_gauss_newton(problem: Problem) -> Tensor:
    """Sum over batches of J^T S J / total, J by one backward per output entry and S by torch.autograd.functional.hessian."""
    params = problem.params
    size = sum(p.numel() for p in params)
    matrix = torch.zeros(size, size, dtype=params[0].dtype)
    with sdpa_kernel(SDPBackend.MATH):
        for x, y in problem.batches:
            z = problem.model(x)
            jacobian = torch.stack(
                [flat(torch.autograd.grad(e, params, retain_graph=True, allow_unused=True), params) for e in z.reshape(-1)]
            )
            curvature = torch.autograd.functional.hessian(lambda u, y=y: problem.unit(u, y), z.detach()).reshape(z.numel(), z.numel())
            matrix += jacobian.T @ curvature @ jacobian
    return matrix / problem.total


def sample_gradients(problem: Problem) -> Tensor:
    """(N, n): each sample's own gradient, scaled so that their mean is the gradient of the objective."""
    samples = problem.samples()
    with sdpa_kernel(SDPBackend.MATH):
        rows = [
            flat(torch.autograd.grad(problem.unit(problem.model(x), y), problem.params, allow_unused=True), problem.params)
            for x, y in samples
        ]
    return torch.stack(rows) * len(samples) / problem.total


def dense_empirical_fisher(problem: Problem) -> Tensor:
    gradients = sample_gradients(problem)
    return gradients.T @ gradients / len(gradients)


def dense_covariance(problem: Problem) -> Tensor:
    gradients = sample_gradients(problem)
    centred = gradients - gradients.mean(dim=0)
    return centred.T @ centred / len(gradients)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# -- models ---------------------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """One LayerNorm transformer block around F.scaled_dot_product_attention with its default backend."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).mean(dim=1))


class EncoderClassifier(nn.Module):
    """torch's own encoder layer, dropout present (and silent in eval mode)."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, dim_feedforward=5, dropout=0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(dim=1))


class TiedLanguageModel(nn.Module):
    """Embedding, causal mean, and the embedding again as the output matrix."""

    def __init__(self, vocabulary: int = 7, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens).cumsum(dim=1) / torch.arange(1, tokens.shape[1] + 1, device=tokens.device).view(1, -1, 1)
        return self.head(torch.tanh(self.mix(hidden)))


class LastStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


# -- problems -------------------------------------------------------------------------------------------------------------
def built(make: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of seeded parameters, the global generator left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype).eval()


def gaussian(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(*shape: int, classes: int = 3, seed: int = 2) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def classified(name: str, make: Callable[[], nn.Module], x: Tensor, *, classes: int = 3, cuts: tuple[int, ...] = (4,)) -> Problem:
    """Cross-entropy on one label per sample, cut into uneven batches."""
    y = labels(len(x), classes=classes)
    batches = list(zip(torch.tensor_split(x, cuts), torch.tensor_split(y, cuts), strict=True))
    return Problem(
        name,
        built(make),
        batches,
        F.cross_entropy,
        lambda z, t: -z.log_softmax(-1).gather(-1, t[:, None]).sum(),
        lambda t: float(len(t)),
        "categorical",
    )


def mlp() -> Problem:
    return classified("mlp", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), gaussian(7, 4), cuts=(4, 6))


def regression(
    name: str, loss: Callable[[Tensor, Tensor], Tensor], unit: Callable[[Tensor, Tensor], Tensor], y: Tensor, likelihood: str | None
) -> Problem:
    x = gaussian(len(y), 3)
    batches = list(zip(torch.tensor_split(x, (4,)), torch.tensor_split(y, (4,)), strict=True))
    model = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, y.shape[1])))
    return Problem(name, model, batches, loss, lambda z, t: unit(z, t).sum(), lambda t: float(t.numel()), likelihood)


def squared() -> Problem:
    return regression("squared error", nn.MSELoss(), lambda z, t: (z - t) ** 2, gaussian(7, 2, seed=3), "gaussian")


def huber() -> Problem:
    def unit(z: Tensor, t: Tensor) -> Tensor:
        d = (z - t).abs()
        return torch.where(d <= 0.7, d**2 / 2, 0.7 * (d - 0.35))

    return regression("huber", nn.HuberLoss(delta=0.7), unit, gaussian(7, 2, seed=3), None)


def binary() -> Problem:
    def unit(z: Tensor, t: Tensor) -> Tensor:
        return F.softplus(z) - t * z

    return regression("binary", F.binary_cross_entropy_with_logits, unit, labels(7, 2, classes=2).double(), "bernoulli")


def conv() -> Problem:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))

    problem = classified("conv + BatchNorm", make, gaussian(6, 1, 6, 6))
    norm = problem.model[1]
    norm.running_mean.copy_(gaussian(2, seed=5) / 3)
    norm.running_var.copy_(1 + gaussian(2, seed=6) ** 2)
    return problem


def attention() -> Problem:
    return classified("attention", Attention, gaussian(5, 3, 4), cuts=(2,))


def encoder() -> Problem:
    return classified("encoder layer", EncoderClassifier, gaussian(5, 3, 4), cuts=(2,))


def lstm() -> Problem:
    return classified("lstm", LastStep, gaussian(5, 3, 2), classes=2, cuts=(2,))


def tied() -> Problem:
    tokens, y = labels(5, 4, classes=7), labels(5, 4, classes=7, seed=4)
    y[1, 2:], y[3, 1:], y[4, 3:] = -100, -100, -100

    def unit(z: Tensor, t: Tensor) -> Tensor:
        kept = t != -100
        return -z[kept].log_softmax(-1).gather(-1, t[kept][:, None]).sum()

    batches = list(zip(torch.tensor_split(tokens, (3,)), torch.tensor_split(y, (3,)), strict=True))
    model = built(TiedLanguageModel)
    return Problem(
        "tied, padded",
        model,
        batches,
        lambda z, t: F.cross_entropy(z.transpose(1, 2), t),
        unit,
        lambda t: float((t != -100).sum()),
        "categorical",
        extra={"output": lambda z: z.transpose(1, 2)},
    )


def weighted() -> Problem:
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    problem = mlp()
    problem.name, problem.loss, problem.likelihood = "class weights", nn.CrossEntropyLoss(weight=weight), None
    problem.unit = lambda z, t: -(weight[t] * z.log_softmax(-1).gather(-1, t[:, None])[:, 0]).sum()
    problem.count = lambda t: float(weight[t].sum())
    return problem


PROBLEMS: dict[str, Callable[[], Problem]] = {
    f.__name__: f for f in (mlp, squared, huber, binary, conv, attention, encoder, lstm, tied, weighted)
}


def standard_error_of(matrices: list[Tensor]) -> Tensor:
    """Entrywise standard error of the mean of independent draws."""
    stacked = torch.stack(matrices)
    return stacked.std(dim=0) / math.sqrt(len(matrices))


# -- what tests watch and differentiate ------------------------------------------------------------------------------------------
class Square(torch.autograd.Function):
    """x^2 as a custom function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Largest(TorchDispatchMode):
    """Notes the most entries that a tensor made inside has."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.entries = max(self.entries, result.numel())
        return result
