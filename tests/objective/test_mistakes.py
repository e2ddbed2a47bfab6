"""What users get wrong at the seam of model, batch and loss is told: what came, what was expected, what to do; their own errors pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.objective import batches as batches_module

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(8) % 2
CE = F.cross_entropy


def network(out: int = 2, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out)).to(dtype)


def refusal(data: Any, model: nn.Module | None = None, **settings: Any) -> str:
    with pytest.raises((sk.SharpkitError, TypeError, ValueError)) as told:
        sk.HessianOperator(sk.Objective(network() if model is None else model, data, **settings)).to_dense()
    return str(told.value)


@pytest.mark.parametrize(
    ("inputs", "labels", "came", "remedy"),
    [
        (X.float(), Y, "float32 (8, 3) on cpu; the parameters are torch.float64", "x.to(torch.float64)"),
        (X.half(), Y, "float16 (8, 3)", "x.to(torch.float64)"),
        (X.long(), Y, "int64 (8, 3)", "x.to(torch.float64)"),
        (X.to(torch.complex64), Y, "complex64 (8, 3)", "x.to(torch.float64)"),
        (X, Y.double(), "target: float64 (8,)", "y.long()"),
        (X, Y.int(), "target: int32 (8,)", "y.long()"),
        (X[:, :2], Y, "input: float64 (8, 2)", "Look at the shapes"),
        (X, Y[:5], "target: int64 (5,)", "the output holds 8 and the target 5"),
        (X, Y[:, None], "target: int64 (8, 1)", "y.squeeze(-1)"),
        (X, Y + 5, "target: int64 (8,)", "between 0 and 1"),
        (X.to("meta"), Y, "batch 0 has tensors on the meta device", "make the data on 'cpu'"),
        (X[:0], Y[:0], "the data holds nothing that counts", "only empty ones"),
        (X.numpy(), Y, "input: a value of type ndarray without tensors", "torch.as_tensor(x)"),
        (None, Y, "NoneType", "torch.as_tensor(x)"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_types_devices_and_shapes_are_told(inputs: Any, labels: Any, came: str, remedy: str, check: bool) -> None:
    settings: dict[str, Any] = {} if check else {"check": False, "reduction": "mean"}
    said = refusal((inputs, labels), loss=CE, **settings)
    assert came in said
    assert remedy in said


def test_the_original_error_is_the_cause_and_a_closures_batch_is_described() -> None:
    with pytest.raises(
        sk.ObjectiveError, match=r"closure\(model, batch\) raised RuntimeError: mat1 and mat2.*a tuple of '0' float32"
    ) as told:
        sk.Objective(network(), (X.float(), Y), closure=lambda m, b: CE(m(b[0]), b[1]))
    assert isinstance(told.value.__cause__, RuntimeError)


class Mine(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Mine("mine"), ValueError("You have to specify input_ids"), NameError("x"), ZeroDivisionError("y")])
def test_errors_that_user_code_raises_itself_pass_unchanged(error: Exception) -> None:
    def closure(model: nn.Module, batch: Any) -> Tensor:
        raise error

    with pytest.raises(type(error)) as told:
        sk.Objective(network(), (X, Y), closure=closure)
    assert told.value is error


def calls_backward(model: nn.Module, batch: Any) -> Tensor:
    loss = CE(model(batch[0]), batch[1])
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def trains(model: nn.Module, batch: Any) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = calls_backward(model, batch)
    optimizer.step()
    return loss


@pytest.mark.parametrize(
    ("closure", "said"),
    [
        (lambda m, b: None, "returned nothing; end it with return loss"),
        (lambda m, b: CE(m(b[0]), b[1]).backward(), "returned nothing; end it with return loss, and leave backward() to sharpkit"),
        (calls_backward, "called backward() on the loss that it returned"),
        (trains, "called backward() on the loss that it returned"),
        (lambda m, b: CE(m(b[0]), b[1]).item(), "got float: return the loss itself"),
        (lambda m, b: (CE(m(b[0]), b[1]), 1), "got tuple: return the loss alone"),
        (lambda m, b: {"loss": CE(m(b[0]), b[1])}, "got dict: return the loss alone"),
        (lambda m, b: m(b[0]).sum(1), "shape (8,): use reduction='mean'"),
        (lambda m, b: m(b[0]).sum().long(), "got torch.int64"),
        (lambda m, b: m(b[0]).detach().sum(), "does not depend on any trainable parameter"),
        (lambda m, b: torch.tensor(1.0, requires_grad=True), "not with respect to any of the parameters that are picked"),
        (lambda b: b[0].sum(), "takes 1 positional argument but 2 were given"),
        (lambda m, b: CE(m(b["x"]), b["y"]), "TypeError: tuple indices must be integers"),
        (lambda m, b: CE(m(b.x), b.y), "AttributeError: 'tuple' object has no attribute 'x'"),
        (lambda m, b: m(b[2]).sum(), "IndexError: tuple index out of range"),
        (3, "closure must be a function called as closure(model, batch), got 3 (int)"),
        (nn.CrossEntropyLoss, "closure is the class CrossEntropyLoss"),
    ],
)
def test_closures_that_are_none_are_told(closure: Any, said: str) -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    assert said in refusal((X, Y), model, closure=closure)
    if closure is not trains:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_that_takes_a_gradient_with_backward_inside_is_fine() -> None:
    def penalty(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        CE(model(x), batch[1]).backward()  # fills the parameters' gradients, too
        assert x.grad is not None
        return CE(model(batch[0] + 0.1 * x.grad.sign()), batch[1])

    assert sk.Objective(network(), (X, Y), closure=penalty).gradient()[1].norm() > 0


@pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss(), F.l1_loss, lambda o, t: F.mse_loss(o, t), lambda o, t: ((o - t) ** 2).mean()])
@pytest.mark.parametrize("swapped", [False, True])
def test_an_output_of_shape_n_1_against_a_target_of_shape_n_is_refused(loss: Callable[..., Tensor], swapped: bool) -> None:
    model = nn.Sequential(network(1), nn.Flatten(0)) if swapped else network(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's own
        said = refusal((X, X[:, :1] if swapped else X[:, 0]), model, loss=loss)
    assert "(8, 1)" in said
    assert "every output with every target" in said
    assert "model(x).squeeze(-1) or y.unsqueeze(-1)" in said


def test_all_pairs_that_are_meant_are_no_mistake() -> None:
    pairs = lambda o, t: ((o - o.T) * (t[:, None] - t[None])).square().mean()  # noqa: E731
    assert sk.Objective(network(1), (X, X[:, 0]), loss=pairs).value() > 0


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))  # type: ignore[no-any-return]


@pytest.mark.parametrize("loss", [CE, nn.CrossEntropyLoss(), lambda o, t: CE(o, t)])
def test_sequence_labels_are_refused_with_the_loss_to_pass(loss: Any) -> None:
    ids, tags = torch.arange(24).view(4, 6) % 7, torch.arange(24).view(4, 6) % 5
    said = refusal((ids, tags), Tagger(), loss=loss)
    assert "output: float32 (4, 6, 5) on cpu; target: int64 (4, 6)" in said or not isinstance(loss, nn.Module)
    assert "F.cross_entropy(output.flatten(0, -2), target.flatten())" in said
    flat = sk.Objective(Tagger(), (ids, tags), loss=lambda o, t: CE(o.flatten(0, -2), t.flatten()))
    assert flat.num_targets == 24


def test_as_many_labels_as_classes_leave_a_doubt_that_is_told() -> None:
    ids, tags = torch.arange(20).view(4, 5) % 7, torch.arange(20).view(4, 5) % 5
    with pytest.warns(sk.ObjectiveWarning, match="takes axis 1 for the classes"):
        sk.Objective(Tagger(), (ids, tags), loss=CE)


@pytest.mark.parametrize("wrong", ["bf16", "bfloat16", "fp16", 16, True, torch.float32, torch.float64, torch.int8, float])
def test_autocast_takes_a_half_precision_type(wrong: Any) -> None:
    assert "autocast must be torch.bfloat16, torch.float16 or None, got" in refusal(
        (X.float(), Y), network(dtype=torch.float32), loss=CE, autocast=wrong
    )
    model = network(dtype=torch.float32)
    with pytest.raises(ValueError, match="autocast must be"):
        sk.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=CE, autocast=wrong)


class Endless:
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield X, Y


def test_a_loader_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_MOST_BATCHES", 50)
    assert "gave 50 batches and did not end: pass a list of as many as are meant" in refusal(Endless(), loss=CE)


def test_a_sparse_adjacency_matrix_is_a_part_of_its_batch() -> None:
    edges = (torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    layer = nn.Linear(3, 2).double()
    objective = sk.Objective(layer, (edges.to_sparse(), X, Y), closure=lambda m, b: CE(torch.sparse.mm(b[0], m(b[1])), b[2]))
    assert objective.value() == pytest.approx(float(CE(edges @ layer(X), Y)))


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("seed", "0", "seed must be a whole number from"),
        ("seed", True, "got True (bool)"),
        ("seed", 2**70, "seed must be a whole number from"),
        ("check", "no", "check must be True or False, got 'no' (str)"),
        ("mode", None, "mode must be one of 'eval', 'train', got None"),
        ("params", [], "picks none of the model's parameters"),
        ("params", lambda name: True, "called as params(name, parameter)"),
        ("process_group", "world", "torch.distributed is not initialised"),
        ("count", lambda: 8, "count(batch) raised TypeError"),
        ("count", lambda b: "8", "what count(batch) returns must be a number of at least 0, got '8' (str)"),
        ("micro_batch_size", "all", "micro_batch_size must be 'auto', None or a whole number of at least 1, got 'all' (str)"),
    ],
)
def test_settings_are_told(argument: str, value: Any, said: str) -> None:
    assert said in refusal((X, Y), loss=CE, **{argument: value})
