"""Cross-entropies over large vocabularies, in chunks of tokens: their values and derivatives are those from whole logits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contracts.operator_contract import check_operator
from problems import Largest, built, dense_hessian, flat, gaussian, labels, relative_error
from problems_logits import CLASSES, HEADS, LOSSES, WHOLE, WIDTH, Loss, Tagger, cut_small_logits, marks, rows, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.objective import logits
from sharpkit.objective.logits import Chunked


@pytest.fixture(autouse=True)
def _small_logits_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small_logits(monkeypatch)


def derivatives(model: nn.Module, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient, and the dense Hessian."""
    params = list(model.parameters())

    def value() -> Tensor:
        return loss(model(tokens()), marks())

    gradient = torch.autograd.grad(value(), params, allow_unused=True)
    return value().detach(), flat(gradient, params), dense_hessian(value, params)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [*LOSSES, *WHOLE])
def test_value_gradient_and_hessian_are_those_of_whole_logits(name: str, head: str) -> None:
    model, loss = built(HEADS[head]), {**LOSSES, **WHOLE}[name]
    mode = Chunked()

    def in_chunks(z: Tensor, y: Tensor) -> Tensor:
        with mode:
            return loss(model(tokens()), y)

    for ours, expected in zip(derivatives(model, in_chunks), derivatives(model, loss), strict=True):
        assert relative_error(ours, expected) < 1e-12
    assert (mode.losses > 0) == (name in LOSSES)


DONE: list[Callable[[Tensor], Tensor]] = [
    lambda z: z[0],
    lambda z: z[..., -1:, :],
    lambda z: z[:, None],
    lambda z: z[..., 1:],
    lambda z: z[..., 2],
    lambda z: z[torch.tensor([0, 1])],
    lambda z: z[torch.ones(len(z), dtype=torch.bool)],
    lambda z: z.reshape(-1, z.shape[-1]),
    lambda z: z.reshape(-1),
    lambda z: z.flatten(0, 1),
    lambda z: z.flatten(-2),
    lambda z: z.transpose(0, 1),
    lambda z: torch.permute(z, tuple(range(z.ndim))[::-1]),
    lambda z: z.movedim(0, -1),
    lambda z: z.mT,
    lambda z: -2 * z / 3,
    lambda z: torch.tanh(z),
    lambda z: z.to(torch.float32).double(),
    lambda z: z.unsqueeze(1),
    lambda z: z - z.logsumexp(0),
]


def test_whatever_is_done_to_logits_is_done_to_the_same_logits() -> None:
    chance = random.Random(0)
    hidden, weight = gaussian(2, 3, WIDTH).requires_grad_(), gaussian(CLASSES, WIDTH, seed=2).requires_grad_()
    for _ in range(400):
        with Chunked():
            ours = F.linear(hidden, weight)
        plain = F.linear(hidden, weight)
        for step in chance.choices(DONE, k=4):
            try:
                done = step(plain)
            except (RuntimeError, IndexError, TypeError):  # not of so few axes
                continue
            ours, plain = step(ours), done
            assert ours.shape == plain.shape
        if plain.ndim > 1 and chance.random() < 0.7:
            y = torch.zeros(plain.shape[0], *plain.shape[2:], dtype=torch.int64)
            ours, plain = F.cross_entropy(ours, y), F.cross_entropy(plain, y)
        ours, plain = ours.square().sum(), plain.square().sum()
        # a step of the chain casts to float32, whose rounding the others enlarge
        for a, b in zip(torch.autograd.grad(ours, [hidden, weight]), torch.autograd.grad(plain, [hidden, weight]), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_looked_at_without_gradients_has_them_later() -> None:
    model = built(Tagger)
    with Chunked():
        z = model(tokens())
        with torch.no_grad():
            z.argmax(-1)
        assert z.sum().requires_grad


def test_writing_into_logits_is_refused_since_views_of_them_must_see_it() -> None:
    model = built(Tagger)

    def masked(z: Tensor, y: Tensor) -> Tensor:
        rows_of_it = z.flatten(0, 1)
        z[..., 0] = -5.0
        return F.cross_entropy(rows_of_it, y.flatten())

    with Chunked(), pytest.raises(RuntimeError, match="writes to logits"):
        masked(model(tokens()), marks())
    objective = sk.Objective(model, (tokens(), marks()), loss=masked)
    assert not objective.chunking.allowed
    assert objective.value() == pytest.approx(float(masked(model(tokens()), marks()).detach()), rel=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_an_objective_uses_chunks_by_itself_and_its_hessian_is_the_dense_one(head: str) -> None:
    model = built(HEADS[head])
    x, y = tokens(), marks()
    objective = sk.Objective(model, [(x[:1], y[:1]), (x[1:], y[1:])], loss=LOSSES["transposed"])
    assert objective.chunking.in_use
    assert not objective.second_order.doubts
    expected = dense_hessian(lambda: LOSSES["transposed"](model(x), y), list(model.parameters()))
    H = sk.HessianOperator(objective)
    check_operator(H, expected, model=model)
    assert H.choices()["logits"] == "of some tokens at a time"
    needed = H.bytes_needed()
    objective.chunking.used = False
    assert needed - H.bytes_needed() == logits.bytes_of_chunks(H.device), "what a chunk takes is foretold"


def test_frozen_heads_and_frozen_bodies_have_the_blocks_of_the_hessian() -> None:
    model = built(Tagger)
    objective = sk.Objective(model, (tokens(), marks()), loss=rows)
    H = sk.HessianOperator(objective)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    body = sum(n for name, n in sizes.items() if not name.startswith("head"))
    dense = H.to_dense()
    assert relative_error(H.block("head*").to_dense(), dense[body:, body:]) < 1e-12
    assert relative_error(H.block(["embedding*", "hidden*"]).to_dense(), dense[:body, :body]) < 1e-12
    assert relative_error(H.block("head.bias").to_dense(), dense[-CLASSES:, -CLASSES:]) < 1e-12


def test_no_tensor_of_the_size_of_the_logits_is_made() -> None:
    classes = 300
    model, x, y = built(lambda: Tagger(classes=classes)), labels(4, 16, classes=classes), labels(4, 16, classes=classes, seed=1)

    H = sk.HessianOperator(sk.Objective(model, (x, y), loss=LOSSES["transposed"]))
    v = torch.ones(H.size, dtype=torch.float64)
    with Largest() as seen:
        H.objective.value(), H.objective.gradient(), H @ v
    assert seen.entries < 64 * classes


def test_a_loss_in_chunks_that_is_not_the_loss_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_score", lambda p, labels, smoothing: p)
    model = built(Tagger)
    objective = sk.Objective(model, (tokens(), marks()), loss=rows)
    assert not objective.chunking.allowed
    expected = flat(torch.autograd.grad(rows(model(tokens()), marks()), list(model.parameters())), list(model.parameters()))
    assert relative_error(objective.gradient()[1], expected) < 1e-12


def test_nothing_is_compared_with_logits_that_would_not_fit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = built(Tagger)
    monkeypatch.setattr("sharpkit.objective.objective.available_memory", lambda device: 1000.0)
    with caplog.at_level("INFO"):
        objective = sk.Objective(model, (tokens(), marks()), loss=rows)
    assert objective.chunking.in_use
    assert "whole logits would not fit" in caplog.text
    assert objective.value() == pytest.approx(float(rows(model(tokens()), marks()).detach()), rel=1e-12)


def test_a_loss_that_takes_a_gradient_inside_has_whole_logits() -> None:
    model = built(lambda: Tagger(cap=1.0))

    def penalised(z: Tensor, y: Tensor) -> Tensor:
        loss = rows(z, y)
        (slope,) = torch.autograd.grad(loss, [model.head.weight], create_graph=True)
        return loss + slope.square().sum()

    objective = sk.Objective(model, (tokens(), marks()), loss=penalised)
    assert not objective.chunking.allowed
    expected = dense_hessian(lambda: penalised(model(tokens()), marks()), list(model.parameters()))
    assert relative_error(sk.HessianOperator(objective).to_dense(), expected) < 1e-9


def test_logits_under_vmap_and_jvp_are_whole() -> None:
    model = built(Tagger)
    params = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return rows(torch.func.functional_call(model, values, (x[None],)), y[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    y = labels(2, 5, classes=CLASSES, seed=1)
    expected = per_sample(params, tokens(), y)
    with Chunked() as mode:
        found = per_sample(params, tokens(), y)
    assert mode.losses == 0
    assert all(torch.equal(found[name], expected[name]) for name in params)


def test_half_precision_is_added_up_in_float32() -> None:
    model = built(Tagger, dtype=torch.float32)
    data = (tokens(), marks())
    exact = sk.Objective(model, data, loss=rows)
    half = sk.Objective(model, data, loss=rows, autocast=torch.bfloat16)
    assert half.chunking.used
    assert half.chunking.allowed
    assert relative_error(half.gradient()[1], exact.gradient()[1]) < 0.02
    v = torch.ones(exact.num_parameters)
    assert relative_error(sk.HessianOperator(half) @ v, sk.HessianOperator(exact) @ v) < 0.05


def test_labels_out_of_range_are_refused_as_ever() -> None:
    with pytest.raises(sk.ObjectiveError, match="out of bounds"):
        sk.Objective(built(Tagger), (tokens(), marks() + CLASSES), loss=rows)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no linear_cross_entropy")
def test_pytorchs_own_head_and_loss_in_one_is_differentiated_twice() -> None:
    model, x, y = built(Tagger), tokens(), labels(2, 5, classes=CLASSES, seed=1)

    def closure(model: nn.Module, batch: Any) -> Tensor:
        hidden = model.hidden(model.embedding(batch[0])).tanh()
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(
            hidden.flatten(0, 1), model.head.weight, batch[1].flatten(), linear_bias=model.head.bias, options=options
        )

    objective = sk.Objective(model, (x, y), closure=closure)
    assert objective.chunking.used
    expected = dense_hessian(lambda: rows(model(x), y), list(model.parameters()))
    assert relative_error(sk.HessianOperator(objective).to_dense(), expected) < 1e-9


def test_small_logits_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    objective = sk.Objective(built(Tagger), (tokens(), marks()), loss=rows)
    assert not objective.chunking.allowed
