"""Models, batches, losses and closures as users bring them, right and wrong, each with the loss that is meant, if any."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._fuzz import Input, OwnError

# fmt: off
# Tables with many values to a line.
Meant = Callable[[nn.Module], Tensor]
D = torch.float64


@dataclasses.dataclass(frozen=True)
class Seam:
    """One way to bring model, data and loss.

    Attributes:
        what: in words.
        make: a fresh model, the data, and settings of the objective.
        meant: model -> the loss that is meant, written in plain torch; None if nothing sensible is.
        open: whether it is a matter of taste; any answer but a raw error will do.
    """

    what: str
    make: Callable[[], tuple[Any, Any, dict[str, Any]]]
    meant: Meant | None = None
    open: bool = False


# -- models -------------------------------------------------------------------------------------------------------------------------
def mlp(dtype: torch.dtype = D, out: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out)).to(dtype)


class OneMapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, data: Any) -> Tensor:
        return self.net(data["x"])  # type: ignore[no-any-return]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(x) * scale  # type: ignore[no-any-return]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x * mask)  # type: ignore[no-any-return]


class Tokens(nn.Module):
    def __init__(self, classes: int = 5, dtype: torch.dtype = D) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, classes)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))  # type: ignore[no-any-return]


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Tokens()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        logits = self.net(input_ids)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return collections.namedtuple("Output", "loss logits")(loss, logits)


class Graphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2).to(D)

    def forward(self, graph: Any) -> Tensor:
        source, target = graph.edge_index
        pooled = torch.zeros(len(graph.x), 3, dtype=D).index_add(0, target, graph.x[source])
        return torch.tanh(self.lin(graph.x + pooled))


class Returns(nn.Module):
    """Returns something that is no tensor."""

    def __init__(self, turn: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.turn = mlp(), turn

    def forward(self, x: Tensor) -> Any:
        return self.turn(self.net(x))


class Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.net, self.error = mlp(), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


# -- data ---------------------------------------------------------------------------------------------------------------------------
def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


X = torch.randn(8, 3, generator=_generator(), dtype=D)
Y = torch.randint(2, (8,), generator=_generator())
R = torch.randn(8, 2, generator=_generator(), dtype=D)
IDS = torch.randint(7, (4, 6), generator=_generator())
TAGS = torch.randint(5, (4, 6), generator=_generator())
EDGES = torch.randint(8, (2, 12), generator=_generator())
Pair = collections.namedtuple("Pair", "inputs target")


@dataclasses.dataclass
class Sample:
    x: Tensor
    y: Tensor


class Graph:
    """As torch_geometric's batches: attributes, ``.to``, and iteration over names and tensors."""

    def __init__(self, x: Tensor, edge_index: Tensor, y: Tensor, *, iterable: bool = True) -> None:
        self.x, self.edge_index, self.y = x, edge_index, y
        if iterable:
            self.__class__ = IterableGraph

    def to(self, device: Any, **_: Any) -> Graph:
        return self


class IterableGraph(Graph):
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from (("x", self.x), ("edge_index", self.edge_index), ("y", self.y))


class BareGraph:
    """Attributes alone."""

    def __init__(self) -> None:
        self.x, self.edge_index, self.y = X, EDGES, Y


class Loader:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


class Once:
    """Gives its batches on the first pass only."""

    def __init__(self) -> None:
        self.left = [(X, Y)]

    def __iter__(self) -> Iterator[Any]:
        while self.left:
            yield self.left.pop()


class Shuffles:
    def __init__(self) -> None:
        self.generator = _generator()

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(8, generator=self.generator)
        yield X[order][:4], Y[order][:4]
        yield X[order][4:], Y[order][4:]


# -- the seams -----------------------------------------------------------------------------------------------------------------------
def _ce(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def _mse(model: nn.Module) -> Tensor:
    return F.mse_loss(model(X), R)


def seams() -> list[Seam]:
    return [*_losses(), *_closures(), *_types(), *_shapes(), *_batches(), *_loaders(), *_models(), *_numbers(), *_settings()]


def _with(what: str, data: Any, meant: Meant | None = None, *, model: Callable[[], Any] = mlp, open: bool = False, **settings: Any) -> Seam:
    return Seam(what, lambda: (model(), data, settings), meant, open)


def _losses() -> list[Seam]:
    ce = [
        ("F.cross_entropy", F.cross_entropy), ("a module", nn.CrossEntropyLoss()), ("a lambda", lambda o, t: F.cross_entropy(o, t)),
        ("by hand", lambda o, t: -(torch.log_softmax(o, 1) * F.one_hot(t, 2)).sum(1).mean()),
    ]
    found = [_with(f"loss: {what}", (X, Y), _ce, loss=loss) for what, loss in ce]
    mse = [("F.mse_loss", F.mse_loss), ("a module", nn.MSELoss()), ("by hand", lambda o, t: ((o - t) ** 2).mean())]
    found += [_with(f"loss: {what} for regression", (X, R), _mse, loss=loss) for what, loss in mse]
    wrong: list[tuple[str, Any]] = [
        ("a text", "cross_entropy"), ("a class", nn.CrossEntropyLoss), ("a number", 3), ("a list", [F.cross_entropy]),
        ("reduction none", nn.CrossEntropyLoss(reduction="none")), ("returns nothing", lambda o, t: None),
        ("returns a float", lambda o, t: float(F.cross_entropy(o, t))),
        ("returns a vector", lambda o, t: F.cross_entropy(o, t, reduction="none")),
        ("returns a tuple", lambda o, t: (F.cross_entropy(o, t), o)), ("returns a dict", lambda o, t: {"loss": F.cross_entropy(o, t)}),
        ("returns NumPy", lambda o, t: F.cross_entropy(o, t).detach().numpy()), ("takes one argument", lambda o: o.sum()),
        ("takes three arguments", lambda o, t, w: o.sum()), ("takes none", lambda: 1.0),
        ("returns a count", lambda o, t: (o.argmax(1) == t).sum()), ("returns a complex number", lambda o, t: F.cross_entropy(o, t) + 0j),
        ("detached", lambda o, t: F.cross_entropy(o, t).detach()), ("accuracy", lambda o, t: (o.argmax(1) == t).double().mean()),
        ("of the target alone", lambda o, t: t.double().mean()), ("a bool", True), ("NaN", lambda o, t: F.cross_entropy(o, t) * math.nan),
        ("infinite", lambda o, t: F.cross_entropy(o, t) / 0.0), ("log of a negative number", lambda o, t: torch.log(-o.abs()).mean()),
        ("an unknown attribute", lambda o, t: o.logit_scale.mean()), ("an unknown key", lambda o, t: o["logits"].mean()),
        ("an index out of range", lambda o, t: o[:, 7].mean()), ("a wrong view", lambda o, t: o.view(7, -1).mean()),
        ("BCE of logits", F.binary_cross_entropy), ("NLL of floats", lambda o, t: F.nll_loss(o, t.double())),
        ("a module that is none of a loss", nn.Linear(2, 2).to(D)), ("calls backward", lambda o, t: F.cross_entropy(o, t).backward()),
        ("an assertion of torch", lambda o, t: torch.testing.assert_close(o, t.double())),
    ]
    found += [_with(f"loss: {what}", (X, Y), loss=loss) for what, loss in wrong]

    def own(o: Tensor, t: Tensor) -> Tensor:
        raise OwnError("mine")

    return [*found, _with("loss: raises the user's own error", (X, Y), loss=own)]


def _closures() -> list[Seam]:
    def steps_too(m: nn.Module, b: Any) -> Tensor:
        loss = F.cross_entropy(m(b[0]), b[1])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def backward_only(m: nn.Module, b: Any) -> None:
        F.cross_entropy(m(b[0]), b[1]).backward()  # type: ignore[no-untyped-call]

    def forgets(m: nn.Module, b: Any) -> None:
        F.cross_entropy(m(b[0]), b[1])

    def keeps_graph(m: nn.Module, b: Any) -> Tensor:
        loss = F.cross_entropy(m(b[0]), b[1])
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        return loss

    def without_grad(m: nn.Module, b: Any) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(m(b[0]), b[1])

    def trains(m: nn.Module, b: Any) -> Tensor:
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        loss = F.cross_entropy(m(b[0]), b[1])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    def own(m: nn.Module, b: Any) -> Tensor:
        raise OwnError("mine")

    wrong: list[tuple[str, Any]] = [
        ("calls backward and returns the loss", steps_too), ("calls backward and returns nothing", backward_only),
        ("forgets to return", forgets), ("under no_grad", without_grad), ("trains", trains),
        ("returns a float", lambda m, b: F.cross_entropy(m(b[0]), b[1]).item()), ("returns a vector", lambda m, b: m(b[0]).sum(1)),
        ("returns a tuple", lambda m, b: (F.cross_entropy(m(b[0]), b[1]), 1)),
        ("returns a dict", lambda m, b: {"loss": F.cross_entropy(m(b[0]), b[1])}),
        ("returns a list", lambda m, b: [F.cross_entropy(m(b[0]), b[1])]), ("returns the output", lambda m, b: m(b[0])),
        ("returns a text", lambda m, b: "loss"), ("takes the batch alone", lambda b: b[0].sum()), ("takes nothing", lambda: 0.0),
        ("takes three", lambda m, b, i: m(b[0]).sum()), ("unpacks three of two", lambda m, b: next(m(x).sum() for x, y, z in [b])),
        ("takes the batch for a dict", lambda m, b: F.cross_entropy(m(b["x"]), b["y"])),
        ("takes the batch for an object", lambda m, b: F.cross_entropy(m(b.x), b.y)),
        ("calls the model without the batch", lambda m, b: m().sum()), ("calls the model with the batch", lambda m, b: m(b).sum()),
        ("calls the model with **batch", lambda m, b: m(**b).loss), ("wrong order", lambda m, b: F.cross_entropy(b[1], m(b[0]))),
        ("a text", "closure"), ("a class", nn.CrossEntropyLoss), ("an index", lambda m, b: m(b[2]).sum()),
        ("a module's missing part", lambda m, b: m.encoder(b[0]).sum()), ("a sum of no parameter", lambda m, b: b[0].sum()),
        ("a generator", lambda m, b: (m(b[0]).sum() for _ in [0])), ("a count", lambda m, b: (m(b[0]) > 0).sum()),
        ("a closure and a loss", None), ("a tensor of no entries", lambda m, b: m(b[0])[:0].sum(1)),
        ("an int tensor", lambda m, b: m(b[0]).sum().long()), ("a NaN", lambda m, b: m(b[0]).sum() * math.nan),
        ("a parameter's copy", lambda m, b: torch.tensor(float(m(b[0]).sum()), requires_grad=True)),
    ]
    found = [_with(f"closure: {what}", (X, Y), closure=closure) for what, closure in wrong if closure is not None]
    found += [_with("closure: and a loss", (X, Y), closure=lambda m, b: _ce(m), loss=F.cross_entropy)]
    found += [_with("closure: raises the user's own error", (X, Y), closure=own)]
    right: list[tuple[str, Any]] = [
        ("as usual", lambda m, b: F.cross_entropy(m(b[0]), b[1])), ("keeps the graph", keeps_graph),
        ("of shape (1,)", lambda m, b: F.cross_entropy(m(b[0]), b[1]).reshape(1)),
        ("with a default", lambda m, b, scale=1.0: scale * F.cross_entropy(m(b[0]), b[1])), ("ignores the batch", lambda m, b: _ce(m)),
    ]
    return [*found, *(_with(f"closure: {what}", (X, Y), _ce, closure=closure) for what, closure in right)]


def _types() -> list[Seam]:
    kinds: list[tuple[str, Any]] = [
        ("float32", X.float()), ("float16", X.half()), ("bfloat16", X.bfloat16()), ("int64", X.long()), ("int32", X.int()), ("bool", X > 0),
        ("complex64", X.to(torch.complex64)), ("complex128", X.to(torch.complex128)), ("uint8", X.abs().to(torch.uint8)),
        ("NumPy", X.numpy()), ("a list", X.tolist()), ("meta", X.to("meta")), ("a text", "x"), ("nothing", None), ("a number", 3.0),
        ("sparse", X.to_sparse()),
    ]
    found = [_with(f"inputs: {what} to a float64 model", (x, Y), loss=F.cross_entropy, open=what == "sparse") for what, x in kinds]
    found += [
        _with(
            f"inputs: {what} to a float64 model in a closure", (x, Y), closure=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            open=what == "sparse",
        )
        for what, x in kinds
    ]
    models: list[tuple[str, Any]] = [
        ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16), ("complex128", torch.complex128),
    ]
    found += [_with(f"inputs: float64 to a {what} model", (X, Y), model=lambda d=d: mlp(d), loss=F.cross_entropy) for what, d in models]
    half = [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
    found += [
        _with(f"inputs: {what} model and data", (X.to(d), Y), model=lambda d=d: mlp(d), loss=F.cross_entropy, open=True) for what, d in half
    ]
    labels: list[tuple[str, Any]] = [
        ("float64", Y.double()), ("float32", Y.float()), ("bool", Y > 0), ("NumPy", Y.numpy()), ("a list", Y.tolist()), ("nothing", None),
        ("a text", "y"), ("complex", Y.to(torch.complex64)), ("int16", Y.short()), ("int32", Y.int()), ("meta", Y.to("meta")),
    ]
    found += [_with(f"labels: {what}", (X, y), loss=F.cross_entropy) for what, y in labels]
    found += [_with("labels: uint8", (X, Y.to(torch.uint8)), _ce, loss=F.cross_entropy)]
    targets: list[tuple[str, Any]] = [
        ("NumPy", R.numpy()), ("nothing", None), ("a text", "y"), ("a list", R.tolist()), ("meta", R.to("meta")),
    ]
    found += [_with(f"regression targets: {what}", (X, r), loss=F.mse_loss) for what, r in targets]
    found += [_with("regression targets: float32", (X, R.float()), lambda m: F.mse_loss(m(X), R.float().double()), loss=F.mse_loss)]
    found += [_with("regression targets: int64", (X, R.long()), lambda m: F.mse_loss(m(X), R.long().double()), loss=F.mse_loss)]
    found += [
        _with("regression targets: complex", (X, R + 0j), loss=F.mse_loss),
        _with("meta model", (X, Y), model=lambda: mlp().to("meta"), loss=F.cross_entropy),
    ]
    found += [
        _with(
            "ids: float to an embedding", (IDS.double(), TAGS), model=Tokens,
            loss=lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()),
        )
    ]
    found += [_with("ids: out of range", (IDS + 7, TAGS), model=Tokens, loss=lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()))]
    found += [_with("ids: negative", (IDS - 9, TAGS), model=Tokens, loss=lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()))]
    found += [_with("weights of another type in the loss", (X, Y), loss=nn.CrossEntropyLoss(weight=torch.ones(2)))]
    found += [_with("weights of another length in the loss", (X, Y), loss=nn.CrossEntropyLoss(weight=torch.ones(3, dtype=D)))]
    found += [
        _with(
            "parts of the model on other types", (X, Y),
            model=lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double()).float().append(nn.Linear(2, 2).double()),
            loss=F.cross_entropy,
        )
    ]
    return found


def _by_hand(what: str) -> str:
    return "by hand, " if "by hand" in what else ""


def _shapes() -> list[Seam]:
    one, r = (lambda: mlp(out=1)), R[:, 0]
    squeezed = lambda m: F.mse_loss(m(X).squeeze(-1), r)  # noqa: E731
    elementwise: list[tuple[str, Any]] = [
        ("mse_loss", F.mse_loss), ("MSELoss", nn.MSELoss()), ("l1_loss", F.l1_loss), ("smooth_l1_loss", F.smooth_l1_loss),
        ("HuberLoss", nn.HuberLoss()), ("a lambda", lambda o, t: F.mse_loss(o, t)), ("by hand", lambda o, t: ((o - t) ** 2).mean()),
        ("by hand, target first", lambda o, t: ((t - o) ** 2).mean()), ("torch.sub by hand", lambda o, t: torch.sub(o, t).square().mean()),
        ("absolute values by hand", lambda o, t: (o - t).abs().mean()), ("BCE", F.binary_cross_entropy_with_logits),
    ]
    found = [_with(f"{_by_hand(what)}shapes: (N, 1) against (N,) in {what}", (X, r), model=one, loss=loss) for what, loss in elementwise]
    found += [
        _with(
            f"{_by_hand(what)}shapes: (N,) against (N, 1) in {what}", (X, r[:, None]),
            model=lambda: nn.Sequential(mlp(out=1), nn.Flatten(0)), loss=loss,
        )
        for what, loss in elementwise
    ]
    found += [_with("shapes: (N, 1) against (N,) in a closure", (X, r), model=one, closure=lambda m, b: F.mse_loss(m(b[0]), b[1]))]
    found += [
        _with("by hand, shapes: (N, 1) against (N,) in a closure", (X, r), model=one, closure=lambda m, b: (m(b[0]) - b[1]).square().mean())
    ]
    found += [_with("shapes: (N, 1) against (N,) squeezed", (X, r), squeezed, model=one, loss=lambda o, t: F.mse_loss(o.squeeze(-1), t))]
    found += [_with("shapes: (N, 1) against (N, 1)", (X, r[:, None]), squeezed, model=one, loss=F.mse_loss)]
    wrong: list[tuple[str, Any, Any]] = [
        ("too few labels", X, Y[:5]), ("too many labels", X[:5], Y), ("one label", X, Y[:1]), ("labels (N, 1)", X, Y[:, None]),
        ("a 0-d label", X, Y[0]), ("0-d inputs", X[0, 0], Y), ("inputs of another width", X[:, :2], Y), ("inputs (3,)", X[0], Y),
        ("empty batch", X[:0], Y[:0]), ("empty inputs", X[:0], Y), ("labels out of range", X, Y + 5), ("negative labels", X, Y - 3),
        ("one-hot labels of another width", X, F.one_hot(Y, 5).double()), ("four axes", X[None, None], Y), ("labels (1, N)", X, Y[None]),
        ("all labels ignored", X, torch.full_like(Y, -100)), ("inputs and targets exchanged", Y, X),
        ("no axis for classes", X, Y.double()[:, None].expand(8, 3)),
    ]
    found += [_with(f"shapes: {what}", (x, y), loss=F.cross_entropy) for what, x, y in wrong]
    found += [
        _with(
            f"shapes: {what} in a closure", (x, y), closure=lambda m, b: F.cross_entropy(m(b[0]), b[1]), open=what == "all labels ignored"
        )
        for what, x, y in wrong
        if what not in ("empty batch",)
    ]
    found += [_with("shapes: class probabilities", (X, F.one_hot(Y, 2).double()), _ce, loss=F.cross_entropy)]
    meant = lambda m: F.cross_entropy(m(IDS).flatten(0, 1), TAGS.flatten())  # noqa: E731
    flat = lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten())  # noqa: E731
    found += [
        _with("sequence labels: flattened", (IDS, TAGS), meant, model=Tokens, loss=flat),
        _with("sequence labels: (N, T) with logits (N, T, C)", (IDS, TAGS), model=Tokens, loss=F.cross_entropy),
    ]
    found += [
        _with("sequence labels: transposed", (IDS, TAGS), meant, model=Tokens, loss=lambda o, t: F.cross_entropy(o.transpose(1, 2), t))
    ]
    found += [_with("sequence labels: in a module", (IDS, TAGS), model=Tokens, loss=nn.CrossEntropyLoss())]
    found += [_with("sequence labels: T equal to C", (IDS[:, :5], TAGS[:, :5]), model=Tokens, loss=F.cross_entropy)]
    found += [_with("sequence labels: T equal to C in a module", (IDS[:, :5], TAGS[:, :5]), model=Tokens, loss=nn.CrossEntropyLoss())]
    found += [_with("sequence labels: in a closure", (IDS, TAGS), model=Tokens, closure=lambda m, b: F.cross_entropy(m(b[0]), b[1]))]
    found += [_with("sequence labels: one for each sequence", (IDS, TAGS[:, 0]), model=Tokens, loss=F.cross_entropy)]
    return found


def _batches() -> list[Seam]:
    graph = lambda m: F.cross_entropy(m(BareGraph()), Y)  # noqa: E731
    close = lambda m, b: F.cross_entropy(m(b), b.y)  # noqa: E731
    of = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    named: list[tuple[str, Any, Any]] = [
        ("a graph that can be gone through", IterableGraph(X, EDGES, Y), close),
        ("a graph with .to", Graph(X, EDGES, Y, iterable=False), close), ("a list of graphs", [Graph(X, EDGES, Y)], close),
        ("a graph and its labels", (Graph(X, EDGES, Y), Y), of), ("a loader of graphs", Loader([IterableGraph(X, EDGES, Y)]), close),
        ("a graph of attributes alone in a list", [BareGraph()], close),
    ]
    found = [_with(f"batch: {what}", data, graph, model=Graphs, closure=closure) for what, data, closure in named]
    found += [_with("batch: a graph and its labels, loss=", (IterableGraph(X, EDGES, Y), Y), graph, model=Graphs, loss=F.cross_entropy)]
    found += [_with("batch: a graph of attributes alone", BareGraph(), model=Graphs, closure=close, open=True)]
    found += [_with("batch: a graph with loss=", IterableGraph(X, EDGES, Y), model=Graphs, loss=F.cross_entropy)]
    mapping = lambda m: F.cross_entropy(m.net(X), Y)  # noqa: E731
    for what, model in (("one mapping", OneMapping), ("keywords", Keywords)):
        found += [_with(f"batch: a dict to a model that takes {what}", ({"x": X}, Y), mapping, model=model, loss=F.cross_entropy)]
        found += [_with(f"batch: a dict and its labels in a list, {what}", [({"x": X}, Y)], mapping, model=model, loss=F.cross_entropy)]
    found += [_with("batch: a dict of another key, keywords", ({"z": X}, Y), model=Keywords, loss=F.cross_entropy)]
    found += [_with("batch: a dict of another key, one mapping", ({"z": X}, Y), model=OneMapping, loss=F.cross_entropy)]
    found += [_with("batch: a dict to a model of tensors", ({"x": X}, Y), model=mlp, loss=F.cross_entropy)]
    found += [_with("batch: a dict for loss=", {"x": X, "y": Y}, model=mlp, loss=F.cross_entropy)]
    found += [
        _with("batch: a dict in a closure", {"x": X, "y": Y}, mapping, model=OneMapping, closure=lambda m, b: F.cross_entropy(m(b), b["y"]))
    ]
    two = lambda m: F.cross_entropy(m(X, torch.ones_like(X)), Y)  # noqa: E731
    found += [_with("batch: two inputs and labels", ((X, torch.ones_like(X)), Y), two, model=Two, loss=F.cross_entropy)]
    found += [
        _with("batch: one of two inputs", (X, Y), model=Two, loss=F.cross_entropy),
        _with("batch: three tensors", (X, torch.ones_like(X), Y), model=Two, loss=F.cross_entropy),
    ]
    found += [
        _with(
            "batch: three tensors in a closure", (X, torch.ones_like(X), Y), two, model=Two,
            closure=lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2]),
        )
    ]
    found += [
        _with(
            "batch: nested", ({"a": (X, [torch.ones_like(X)])}, Y), two, model=Two,
            closure=lambda m, b: F.cross_entropy(m(b[0]["a"][0], b[0]["a"][1][0]), b[1]),
        )
    ]
    plain: list[tuple[str, Any]] = [
        ("a named tuple", Pair(X, Y)), ("a list of two tensors", [X, Y]), ("a list of a pair", [(X, Y)]), ("a list of lists", [[X, Y]]),
        ("two halves", [(X[:4], Y[:4]), (X[4:], Y[4:])]), ("three uneven parts", [(X[:1], Y[:1]), (X[1:6], Y[1:6]), (X[6:], Y[6:])]),
    ]
    found += [_with(f"batch: {what}", data, _ce, loss=F.cross_entropy) for what, data in plain]
    found += [
        _with("batch: a data class", Sample(X, Y), _ce, closure=lambda m, b: F.cross_entropy(m(b.x), b.y)),
        _with("batch: a data class with loss=", Sample(X, Y), loss=F.cross_entropy),
    ]
    found += [
        _with("batch: a tensor in a closure", X, lambda m: m(X).square().mean(), closure=lambda m, b: m(b).square().mean()),
        _with("batch: a tensor with loss=", X, loss=F.cross_entropy),
    ]
    own = lambda m: F.cross_entropy(m.net(IDS).flatten(0, 1), TAGS.flatten())  # noqa: E731
    found += [
        _with("batch: own loss", {"input_ids": IDS, "labels": TAGS}, own, model=OwnLoss),
        _with("batch: own loss, extra keys", {"input_ids": IDS, "labels": TAGS, "idx": IDS}, own, model=OwnLoss),
    ]
    found += [
        _with("batch: own loss without labels", {"input_ids": IDS}, model=OwnLoss),
        _with("batch: own loss of a tuple", (IDS, TAGS), model=OwnLoss),
        _with("batch: own loss of a model without", {"input": X}, model=mlp),
        _with("batch: own loss without inputs", {"labels": TAGS}, model=OwnLoss),
        _with("batch: own loss of a model of tensors", {"x": X}, model=mlp),
    ]
    wrong: list[tuple[str, Any]] = [
        ("nothing", None), ("a text", "data"), ("a number", 3), ("an array", X.numpy()), ("a list of numbers", [1, 2, 3]),
        ("a list of nothing", [None]), ("a list of texts", ["a", "b"]), ("empty tuple", ()), ("one-tuple", (X,)), ("an empty dict", {}),
        ("a set", {1, 2}), ("a class", Sample), ("a pair of nothing", (None, None)), ("a pair of lists", ([1.0], [2])),
        ("a function", lambda: (X, Y)), ("an object", object()), ("a dataset", torch.utils.data.TensorDataset(X, Y)),
        ("a list of samples", [(X[0], Y[0]), (X[1], Y[1])]), ("batches of other forms", [(X, Y), {"x": X}]), ("a range", range(3)),
        ("bytes", b"abc"), ("an inner list too many", [[(X, Y)]]), ("a model", mlp()),
    ]
    return [*found, *(_with(f"batch: {what}", data, loss=F.cross_entropy, open=what == "a list of samples") for what, data in wrong)]


def _loaders() -> list[Seam]:
    halves = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    dataset = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader
    right: list[tuple[str, Callable[[], Any]]] = [
        ("a DataLoader", lambda: loader(dataset, batch_size=3)), ("a loader of its own", lambda: Loader(halves)),
        ("a tuple of one batch", lambda: [(X, Y)]), ("a re-iterable map", lambda: Loader([(X, Y)])),
    ]
    found = [Seam(f"loader: {what}", lambda make=make: (mlp(), make(), {"loss": F.cross_entropy}), _ce) for what, make in right]
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("a generator", lambda: (b for b in halves)), ("an iterator", lambda: iter(halves)),
        ("a used up generator", lambda: (b for b in [])), ("endless", lambda: itertools.cycle(halves)), ("once", Once),
        ("an empty list", list), ("an empty loader", lambda: Loader([])),
        ("an empty DataLoader", lambda: loader(torch.utils.data.TensorDataset(X[:0], Y[:0]))),
        ("a shuffling DataLoader", lambda: loader(dataset, batch_size=3, shuffle=True)), ("shuffles", Shuffles),
        ("zip", lambda: zip([X], [Y], strict=True)), ("map", lambda: (b for b in halves)), ("enumerate", lambda: enumerate(halves)),
        ("list of an enumerate", lambda: list(enumerate(halves))), ("iter of a DataLoader", lambda: iter(loader(dataset, batch_size=3))),
        ("a list of loaders", lambda: [loader(dataset, batch_size=3)]),
        ("a DataLoader without batches", lambda: loader(dataset, batch_size=None)),
        ("a dict of loaders", lambda: {"train": loader(dataset)}),
    ]
    found += [
        Seam(f"loader: {what}", lambda make=make: (mlp(), make(), {"loss": F.cross_entropy}), None, what == "a DataLoader without batches")
        for what, make in wrong
    ]
    return found


def _models() -> list[Seam]:
    def frozen() -> nn.Module:
        return mlp().requires_grad_(False)

    def shared() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2)).to(D)
        model[2].weight = model[0].weight
        return model

    def partly() -> nn.Module:
        model = mlp()
        model[0].requires_grad_(False)  # type: ignore[index]
        return model

    turned: list[tuple[str, Any]] = [
        ("a tuple", lambda o: (o, o)), ("a dict", lambda o: {"out": o}), ("nothing", lambda o: None), ("a list", lambda o: [o]),
        ("NumPy", lambda o: o.detach().numpy()), ("a text", lambda o: "out"), ("detached", lambda o: o.detach()),
        ("classes", lambda o: o.argmax(1)), ("a float", lambda o: float(o.sum())), ("0-d", lambda o: o.sum()),
        ("probabilities of no class", lambda o: o[:, :0]),
    ]
    found = [_with(f"model: returns {what}", (X, Y), model=lambda turn=turn: Returns(turn), loss=F.cross_entropy) for what, turn in turned]
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("no parameters", lambda: nn.Sequential(nn.Tanh())), ("frozen", frozen), ("a function", lambda: F.relu),
        ("a class", lambda: nn.Linear), ("nothing", lambda: None), ("a text", lambda: "model"), ("a list", lambda: [mlp()]),
        ("lazy", lambda: nn.LazyLinear(2)), ("an empty sequence", nn.Sequential), ("a ModuleList", lambda: nn.ModuleList([mlp()])),
        ("a ModuleDict", lambda: nn.ModuleDict({"a": mlp()})), ("no forward", lambda: _NoForward()),
        ("parameters alone", lambda: list(mlp().parameters())), ("a state dict", lambda: mlp().state_dict()),
        ("an optimizer", lambda: torch.optim.SGD(mlp().parameters())), ("complex", lambda: mlp(torch.complex128)),
        ("another width", lambda: nn.Linear(5, 2).to(D)), ("a convolution", lambda: nn.Conv2d(3, 2, 3).to(D)),
        ("an embedding", lambda: nn.Embedding(3, 2).to(D)), ("an RNN", lambda: nn.LSTM(3, 2).to(D)),
        ("BatchNorm of another width", lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5), nn.Linear(4, 2)).to(D)),
    ]
    found += [Seam(f"model: {what}", lambda make=make: (make(), (X, Y), {"loss": F.cross_entropy})) for what, make in wrong]
    found += [
        _with("model: shared weights", (X, Y), _ce, model=shared, loss=F.cross_entropy),
        _with("model: partly frozen", (X, Y), _ce, model=partly, loss=F.cross_entropy),
    ]
    found += [_with("model: raises the user's own error", (X, Y), model=lambda: Raises(OwnError("mine")), loss=F.cross_entropy)]
    return found


class _NoForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()


def _numbers() -> list[Seam]:
    spoilt = X.clone()
    spoilt[2, 1] = math.nan
    far = X.clone()
    far[0, 0] = math.inf

    def broken(value: float) -> nn.Module:
        model = mlp()
        with torch.no_grad():
            next(model.parameters())[0, 0] = value
        return model

    found = [
        _with(f"numbers: {what}", (x, Y), loss=F.cross_entropy) for what, x in (("a NaN in the inputs", spoilt), ("all NaN", X * math.nan))
    ]
    found += [
        _with("numbers: infinity in the inputs", (far, Y), lambda m: F.cross_entropy(m(far), Y), loss=F.cross_entropy, open=True),
        _with("numbers: a NaN among the targets", (X, R * math.nan), loss=F.mse_loss),
    ]
    found += [
        _with("numbers: a NaN parameter", (X, Y), model=lambda: broken(math.nan), loss=F.cross_entropy),
        _with("numbers: an infinite parameter", (X, Y), model=lambda: broken(math.inf), loss=F.cross_entropy, open=True),
    ]
    found += [
        _with("numbers: a NaN in the second batch", [(X, Y), (spoilt, Y)], loss=F.cross_entropy),
        _with("numbers: another shape in the second batch", [(X, Y), (X[:, :2], Y)], loss=F.cross_entropy),
        _with("numbers: another type in the second batch", [(X, Y), (X.float(), Y)], loss=F.cross_entropy),
        _with("numbers: fewer labels in the second batch", [(X, Y), (X, Y[:3])], loss=F.cross_entropy),
    ]
    return found


def _settings() -> list[Seam]:
    wrong: dict[str, list[Any]] = {
        "autocast": [
            "bf16", "bfloat16", "fp16", "float16", "auto", 16, True, False, float, torch.float32, torch.float64, torch.int8, object(),
            ["bf16"], torch.complex64,
        ],
        "mode": ["evaluate", "Eval", "", None, 3, True, ["eval"], b"eval", "test"],
        "reduction": ["avg", "none", "", None, 3, True, ["mean"], "Mean"],
        "seed": ["0", None, 0.5, [0], 2**70, object(), math.nan, True, torch.Generator()],
        "micro_batch_size": [0, -1, 1.5, "3", "all", True, [2], object(), math.nan, 2j],
        "count": [
            3, "n", [8], lambda: 8, lambda b: None, lambda b: "8", lambda b: -1, lambda b: math.nan, lambda b: math.inf, lambda b: X,
            lambda b, c: 8, lambda b: b["n"], lambda b: 0, nn.Linear, True, lambda b: 2j,
        ],
        "params": [
            3, "nothing.*", [], [3], object(), "", b"0.*", True, lambda: True, lambda n: True, lambda n, p: False, ["0.*", "zzz"], {"0": 1},
            torch.ones(3), [None],
        ],
        "process_group": ["world", 3, object(), True, []], "check": ["yes", None, 2, -1, [], 0.5, object()],
        "closure": [3, "closure", [], object(), nn.Linear], "unknown": [1],
    }
    found = []
    for name, values in wrong.items():
        for value in values:
            shown = repr(value)[:40] if not callable(value) else "a function"
            base = {} if name == "closure" else {"loss": F.cross_entropy}
            found.append(Seam(f"{name}={shown}", lambda name=name, value=value, base=base: (mlp(), (X, Y), {**base, name: value})))
    right: dict[str, list[Any]] = {
        "mode": ["eval", "train"], "seed": [0, 5, -3], "micro_batch_size": [2, 3, None, "auto"],
        "count": [lambda b: len(b[0]), lambda b: torch.tensor(8), lambda b: 8.0], "params": [None, "*", ["0.*", "2.*"], lambda n, p: True],
        "process_group": [None, False], "check": [True, False], "reduction": ["auto", "mean"],
    }
    for name, values in right.items():
        for value in values:
            found.append(
                Seam(
                    f"{name}={repr(value)[:40]}", lambda name=name, value=value: (mlp(), (X, Y), {"loss": F.cross_entropy, name: value}),
                    _ce,
                )
            )
    return found


# What a use does not see: a monitor gets one batch at a time, training all of them at once, and what is not checked is trusted.
_SEVERAL = (
    "batch: batches of other forms",
    "batch: an inner list",
    "loader",
    "numbers: another",
    "numbers: fewer",
    "numbers: a NaN in the second",
)
_DO_NOT_APPLY = {
    "Monitor.step": _SEVERAL,
    "transfer.coordinate_check": ("loader: once", "loader: shuffles", *_SEVERAL[3:]),
    "Objective(check=False)": ("by hand",),
}


# -- what is done with them ----------------------------------------------------------------------------------------------------------
def _params(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _flat(parts: Any, params: list[Tensor]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(parts, params, strict=True)])


def _gradient(loss: Tensor, params: list[Tensor]) -> Tensor:
    return _flat(torch.autograd.grad(loss, params, allow_unused=True), params)


def _times(meant: Meant, model: nn.Module, vector: Tensor) -> Tensor:
    params = _params(model)
    slope = _flat(torch.autograd.grad(meant(model), params, create_graph=True, allow_unused=True), params)
    return _flat(torch.autograd.grad(slope @ vector, params, allow_unused=True), params)


def _close(a: Any, b: Any) -> bool:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).detach().double()
    return bool((a - b).norm() <= 1e-6 * b.norm() + 1e-9)


def inputs() -> Iterator[Input]:
    """Every seam with every use that fits it."""
    for seam in seams():
        for name, use in USES.items():
            if not any(seam.what.startswith(which) for which in _DO_NOT_APPLY.get(name, ())):
                yield _input(seam, name, use)


def _input(seam: Seam, name: str, use: Callable[..., tuple[Any, Any]]) -> Input:
    meaning: Any = True if seam.open else None if seam.meant is None else (lambda pair: _close(*pair) if pair[1] is not None else True)
    torch.manual_seed(0)

    def call() -> Any:
        torch.manual_seed(0)
        model, data, settings = seam.make()
        return use(model, data, settings, seam.meant)

    return Input(name, seam.what, call, meaning)


def _value(model: Any, data: Any, settings: dict[str, Any], meant: Meant | None) -> tuple[Any, Any]:
    found = sk.Objective(model, data, **settings).value()
    return found, None if meant is None else meant(model)


def _slope(model: Any, data: Any, settings: dict[str, Any], meant: Meant | None) -> tuple[Any, Any]:
    found = sk.Objective(model, data, **settings).gradient()[1]
    return found, None if meant is None else _gradient(meant(model), _params(model))


def _product(model: Any, data: Any, settings: dict[str, Any], meant: Meant | None) -> tuple[Any, Any]:
    hessian = sk.HessianOperator(sk.Objective(model, data, **settings))
    vector = torch.randn(hessian.size, generator=_generator(), dtype=hessian.dtype)
    return hessian @ vector, None if meant is None else _times(meant, model, vector)


def _unchecked(model: Any, data: Any, settings: dict[str, Any], meant: Meant | None) -> tuple[Any, Any]:
    given = {"reduction": "mean", "count": _length, **settings, "check": False} if "check" not in settings else settings
    hessian = sk.HessianOperator(sk.Objective(model, data, **given))
    vector = torch.randn(hessian.size, generator=_generator(), dtype=hessian.dtype)
    return hessian @ vector, None if meant is None else _times(meant, model, vector)


def _length(batch: Any) -> int:
    return len(batch[0]) if isinstance(batch, (tuple, list)) and isinstance(batch[0], Tensor) and batch[0].ndim else 1


def _other(matrix: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    def use(model: Any, data: Any, settings: dict[str, Any], meant: Meant | None) -> tuple[Any, Any]:
        operator = matrix(sk.Objective(model, data, **settings))
        return operator @ torch.ones(operator.size, dtype=operator.dtype), None

    return use


def _measured(model: Any, data: Any, settings: dict[str, Any], meant: Meant | None) -> tuple[Any, Any]:
    found = sk.measure(sk.Objective(model, data, **settings), num_probes=3, num_steps=4)
    return found.loss, None if meant is None else meant(model)


def _monitored(model: Any, data: Any, settings: dict[str, Any], meant: Meant | None) -> tuple[Any, Any]:
    batch = _first(data)
    has = isinstance(model, nn.Module) and any(True for _ in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if has else model
    given = {key: value for key, value in settings.items() if key not in ("reduction", "micro_batch_size", "check")}
    _trained(settings, given)
    with sk.Monitor(model, optimizer, every=1, metrics=["lambda_max"], **{"mode": "eval", **given}) as monitor:
        record = monitor.step(batch)
    if record is not None and record.failed:  # said in a warning, once
        said = next(iter(record.failed.values()))
        raise OwnError(said) if "OwnError" in said else sk.ObjectiveError(said)
    return 0.0, None


def _transferred(model: Any, data: Any, settings: dict[str, Any], meant: Meant | None) -> tuple[Any, Any]:
    given = {key: value for key, value in settings.items() if key in ("loss", "closure")}
    _trained(settings, given)

    def build(_: int) -> Any:
        torch.manual_seed(0)
        return model

    found = sk.transfer.coordinate_check(
        build, [4, 8], optimizer=lambda m, w: torch.optim.SGD(m.parameters(), lr=0.1), data=data, seeds=1, steps=1, **given
    )
    if found.diverged:  # its findings say so
        raise sk.NonFiniteError(found.findings()[0])
    return 0.0, None


def _trained(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Settings of an objective that training has no place for are none of its concern."""
    if any(key not in given for key in settings):
        raise OwnError("does not apply")


def _first(data: Any) -> Any:
    if isinstance(data, list) and data and not all(isinstance(t, Tensor) for t in data):
        return data[0]
    if isinstance(data, (Loader, torch.utils.data.DataLoader)):
        return next(iter(data), None)
    return data


USES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "Objective.value": _value,
    "Objective.gradient": _slope,
    "HessianOperator": _product,
    "Objective(check=False)": _unchecked,
    "GaussNewtonOperator": _other(sk.GaussNewtonOperator),
    "EmpiricalFisherOperator": _other(sk.EmpiricalFisherOperator),
    "measure": _measured,
    "Monitor.step": _monitored,
    "transfer.coordinate_check": _transferred,
}
