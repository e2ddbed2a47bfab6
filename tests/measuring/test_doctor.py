"""The doctor passes sound objectives, fails planted faults, and names what it sees."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk


def _data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(30, 6, generator=g, dtype=dtype), torch.randint(3, (30,), generator=g)


def _check(diagnosis: sk.Diagnosis, name: str) -> Any:
    return next(check for check in diagnosis.checks if check.name == name)


class _DetachedCube(torch.autograd.Function):
    """x^3 with a right first and a silently wrong second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3 * ctx.saved_tensors[0].detach() ** 2


class _Cubed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _DetachedCube.apply(super().forward(x))  # type: ignore[no-any-return]


def test_a_smooth_network_passes_every_check() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    diagnosis = sk.examine(sk.Objective(model, _data(), loss=F.cross_entropy))
    assert diagnosis.passed and {c.status for c in diagnosis.checks} == {"ok"}


def test_a_wrong_second_derivative_is_caught_by_finite_differences() -> None:
    diagnosis = sk.examine(sk.Objective(_Cubed(6, 3), _data(), loss=F.cross_entropy))
    assert not diagnosis.passed
    assert _check(diagnosis, "finite differences").status == "failed"
    assert "NOT be trusted" in str(diagnosis)


class _Counting(nn.Linear):
    """A function that changes with every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


def test_state_that_changes_between_calls_fails_the_repeat_check() -> None:
    diagnosis = sk.examine(sk.Objective(_Counting(6, 3), _data(), loss=F.cross_entropy, check=False))
    assert _check(diagnosis, "repeatable").status == "failed"


def test_dropout_batch_norm_and_integer_buffers_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    x, y = _data()
    evaluated = sk.examine(sk.Objective(model, (x, y), loss=F.cross_entropy))
    assert evaluated.passed and _check(evaluated, "randomness").status == "note"
    assert "integer buffers" in _check(evaluated, "parameters").message
    trained = sk.examine(sk.Objective(model, [(x[:15], y[:15]), (x[15:], y[15:])], loss=F.cross_entropy, mode="train"))
    assert _check(trained, "randomness").status == "warning" and "batch statistics" in _check(trained, "randomness").message


def test_unused_frozen_and_tied_parameters_are_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused, self.frozen = (
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(2, 2),
                nn.Linear(6, 3).requires_grad_(False),
            )
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(torch.tanh(self.b(torch.tanh(self.a(x)))))  # type: ignore[no-any-return]

    message = _check(sk.examine(sk.Objective(Net(), _data(), loss=F.cross_entropy)), "parameters").message
    assert "2 unused" in message and "2 frozen" in message and "1 tied" in message


def test_attention_and_kinks_are_noted() -> None:
    x, y = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    diagnosis = sk.examine(sk.Objective(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (x, y), loss=F.mse_loss))
    assert diagnosis.passed and "math kernel" in _check(diagnosis, "attention").message
    kinked = sk.examine(sk.Objective(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), _data(), loss=F.cross_entropy))
    assert kinked.passed and "ReLU" in _check(kinked, "smoothness").message


def test_examining_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    sk.examine(sk.Objective(model, _data(), loss=F.cross_entropy, mode="train"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and all(p.grad is None for p in model.parameters()) and model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_measured_against_float64(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    check = _check(sk.examine(sk.Objective(model, _data(dtype), loss=F.cross_entropy)), "rounding")
    assert check.status == "ok" and "float64" in check.message


def test_the_diagnosis_serialises() -> None:
    document = sk.examine(sk.Objective(nn.Linear(6, 3), _data(), loss=F.cross_entropy)).to_dict()
    assert document["passed"] is True and document["kind"] == "diagnosis"


def test_each_check_is_announced_as_progress() -> None:
    model = nn.Linear(3, 2)
    seen: list[sk.Progress] = []
    diagnosis = sk.examine(sk.Objective(model, (torch.randn(8, 3), torch.randn(8, 2)), loss=F.mse_loss), callback=seen.append)
    assert [(p.text, p.done, p.expected, p.unit) for p in seen] == [(c.name, i, 12, "checks") for i, c in enumerate(diagnosis.checks)]


class _Decoder(nn.Module):
    """As Hugging Face decoders do: the loss is computed on logits cast to float32, whatever the model's type."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8, padding_idx=0), nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(torch.tanh(self.embedding(input_ids))).float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return type("Output", (), {"loss": loss})()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_in_float32_and_padding_rows_are_no_false_alarm(dtype: torch.dtype) -> None:
    ids = torch.randint(11, (6, 12), generator=torch.Generator().manual_seed(0))
    diagnosis = sk.examine(sk.Objective(_Decoder().to(dtype), {"input_ids": ids, "labels": ids}))
    assert diagnosis.passed
    assert _check(diagnosis, "finite differences").status == "ok", str(diagnosis)


def test_a_model_that_cannot_be_copied_is_examined_itself() -> None:
    sound, faulty = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), _Cubed(6, 3)
    for model, passed in ((sound, True), (faulty, False)):
        model.lock = threading.Lock()
        diagnosis = sk.examine(sk.Objective(model, _data(), loss=F.cross_entropy, check=False))
        assert diagnosis.passed == passed
        assert "itself" in _check(diagnosis, "finite differences").message


def test_parts_kept_in_eval_mode_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    model[1].eval()
    check = _check(sk.examine(sk.Objective(model, _data(), loss=F.cross_entropy, mode="train")), "randomness")
    assert "1, kept in eval mode as you put them" in check.message
