"""Attention logits and log Z: against direct computation, however attention is written, masked, batched; as metrics with findings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.measures import logit_growth
from sharpkit.monitor.findings import run_findings

TIME, WIDTH, CLASSES = 7, 8, 5


class Attending(nn.Module):
    """One attention layer with two heads, computed in a way of choice, and a head over classes at each place."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.queries, self.keys, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def scores(self, x: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.queries, self.keys))
        return q @ k.mT / math.sqrt(WIDTH / 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.queries, self.keys))
        v = x.unflatten(-1, (2, -1)).transpose(1, 2)
        mask = torch.ones(TIME, TIME, dtype=torch.bool).tril()
        if self.way == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.way == "mask":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.way == "added":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(TIME, TIME).masked_fill(~mask, torch.finfo().min))
        elif self.way == "softmax":
            y = self.scores(x).masked_fill(~mask, -math.inf).softmax(dim=-1) @ v
        else:
            y = F.softmax(self.scores(x) + torch.zeros(TIME, TIME).masked_fill(~mask, -1e9), dim=-1, dtype=torch.float32) @ v
        return self.head(y.transpose(1, 2).flatten(2)).mT  # (N, classes, time), as cross_entropy takes it


def made(way: str = "causal") -> tuple[Attending, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Attending(way)
    x, y = torch.randn(6, TIME, WIDTH), torch.randint(CLASSES, (6, TIME))
    y[0, :3] = -100
    return model, x, y


@pytest.mark.parametrize("way", ["causal", "mask", "added", "softmax", "dtype"])
@pytest.mark.parametrize("size", [6, 4, 1])
def test_the_largest_score_that_is_not_masked_is_found_however_attention_is_written(way: str, size: int) -> None:
    model, x, y = made(way)
    with torch.no_grad():
        allowed = torch.ones(TIME, TIME, dtype=torch.bool).tril()
        expected = float(model.scores(x)[..., allowed].max())
        log_z = model(x).logsumexp(1)[y != -100]
    batches = list(zip(x.split(size), y.split(size), strict=True))
    growth = logit_growth(sk.Objective(model, batches, loss=F.cross_entropy))
    assert growth.attention == pytest.approx(expected, rel=1e-5)
    assert growth.by_call == (growth.attention,)
    assert growth.log_z == pytest.approx(float(log_z.square().mean().sqrt()), rel=1e-5) and growth.num_targets == 39


def test_grouped_queries_long_sequences_and_a_scale_of_ones_own() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.scale * x[:, :4], x[:, 4:]
            return F.scaled_dot_product_attention(q, k, k, scale=0.7, is_causal=True, enable_gqa=True).sum(dim=(2, 3))

    torch.manual_seed(0)
    x = torch.randn(2, 6, 1100, 3)
    scores = 0.7 * 2.0 * x[:, :4] @ x[:, 4:].repeat_interleave(2, 1).mT
    expected = scores[..., torch.ones(1100, 1100, dtype=torch.bool).tril()].max()
    growth = logit_growth(sk.Objective(Grouped(), (x, torch.tensor([0, 1])), loss=F.cross_entropy))
    assert growth.attention == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_torchs_own_module_is_seen(weights: bool, masked: bool) -> None:
    forbidden = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    padding = torch.zeros(4, TIME, dtype=torch.bool)
    padding[:, 4] = True

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            masks = {"attn_mask": forbidden, "key_padding_mask": padding} if masked else {}
            return self.head(self.attention(x, x, x, need_weights=weights, **masks)[0].mean(1))

    torch.manual_seed(0)
    model, x = Own(), 3 * torch.randn(4, TIME, WIDTH)
    with torch.no_grad():
        q, k, _ = F.linear(x, model.attention.in_proj_weight, model.attention.in_proj_bias).chunk(3, dim=-1)
        q, k = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k))
        scores = q @ k.mT / math.sqrt(WIDTH / 2)
        expected = float((scores.masked_fill(forbidden | padding[:, None, None, :], -math.inf) if masked else scores).max())
    growth = logit_growth(sk.Objective(model, (x, torch.tensor([0, 1, 2, 3])), loss=F.cross_entropy))
    assert growth.attention == pytest.approx(expected, rel=1e-5)


def test_a_model_without_either_is_refused_and_left_as_it_was() -> None:
    model, x, y = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logit_growth(sk.Objective(model, (x, y), loss=F.cross_entropy))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.head.weight.grad is None
    plain = nn.Linear(3, 2)
    assert math.isnan(logit_growth(sk.Objective(plain, (torch.eye(3), torch.tensor([0, 1, 0])), loss=F.cross_entropy)).attention)
    with pytest.raises(sk.ObjectiveError, match="saw neither attention"):
        logit_growth(sk.Objective(plain, (torch.eye(3), torch.zeros(3, 2)), loss=F.mse_loss))


def test_the_monitor_records_both_and_names_the_remedies_where_they_grow() -> None:
    model, x, y = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, metrics=["attention_logits", "output_log_z"], every=1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        monitor.step((x, y))
        optimizer.step()
        with torch.no_grad():
            model.queries.weight *= 20
            model.head.bias += 20
    values = [record["attention_logits"].value for record in monitor.history]
    assert values[-1] > 50 > values[0] and monitor.history[-1]["output_log_z"].value > 25
    said = " ".join(monitor.history.findings())
    assert "QK norm" in said and "z-loss" in said
    monitor.close()


def test_logits_that_do_not_grow_are_stated_without_a_remedy() -> None:
    def record(step: int, value: float) -> dict[str, Any]:
        return {"step": step, "values": {"attention_logits": {"value": value, "stderr": 0.0}}}

    said = " ".join(run_findings({}, [record(0, 4.0), record(10, 5.0)]))
    assert "largest attention logit went from 4 (step 0) to 5 (step 10)." in said and "QK norm" not in said
