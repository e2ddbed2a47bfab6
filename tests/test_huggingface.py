"""Hugging Face models from a tiny configuration: tied weights, padded labels, dict batches, default attention, their own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contracts.operator_contract import check_operator
from problems import Problem, built, dense_gauss_newton, dense_hessian, labels, relative_error
from problems_logits import cut_small_logits
from torch import Tensor, nn
from torch.nn import functional as F
from traces import untouched

import sharpkit as sk

transformers = pytest.importorskip("transformers")


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=7, n_positions=5, n_embd=4, n_layer=1, n_head=2, n_inner=4)
    return built(lambda: transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=7,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=5,
        tie_word_embeddings=True,
    )
    return built(lambda: transformers.LlamaForCausalLM(config))


MODELS = {"gpt2": gpt2, "llama": llama}
SHAPE = {
    "vocab_size": 7,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 5,
}
# What they do to the logits: nothing, a bias, a soft cap, a factor, a divisor; and a head over labels that are not shifted.
HEADS: dict[str, Callable[[], nn.Module]] = {
    "gpt2, tied": gpt2,
    "llama, tied": llama,
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)),
    "phi, bias": lambda: transformers.PhiForCausalLM(
        transformers.PhiConfig(**{**SHAPE, "num_key_value_heads": 2}, partial_rotary_factor=1.0)
    ),
    "gemma2, soft cap": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SHAPE, head_dim=2, final_logit_softcapping=0.05)
    ),
    "cohere, factor": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SHAPE, logit_scale=0.3)),
    "granite, divisor": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "bert, masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE)),
}


def batches() -> list[dict[str, Tensor]]:
    tokens, marks = labels(4, 5, classes=7), labels(4, 5, classes=7, seed=3)
    marks[1, 3:], marks[3, 2:] = -100, -100
    attended = (marks != -100).long()
    return [
        {"input_ids": t, "attention_mask": a, "labels": y}
        for t, a, y in zip(tokens.split([3, 1]), attended.split([3, 1]), marks.split([3, 1]), strict=True)
    ]


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """In the model's own precision; theirs is computed in float32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def total(model: nn.Module) -> Tensor:
    summed, count = torch.zeros((), dtype=torch.float64), 0.0
    for batch in batches():
        kept = batch["labels"][:, 1:] != -100
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        summed = summed - logits[kept].log_softmax(-1).gather(-1, batch["labels"][:, 1:][kept][:, None]).sum()
        count += float(kept.sum())
    return summed / count


@pytest.mark.parametrize("name", MODELS)
def test_the_hessian_equals_the_dense_reference(name: str) -> None:
    model = MODELS[name]()
    objective = sk.Objective(model, batches(), closure=own_loss)
    assert objective.counted == "next tokens"
    params = list(model.parameters())
    # Llama's RMSNorm computes in float32, whatever the model's type
    check_operator(
        sk.HessianOperator(objective), dense_hessian(lambda: total(model), params), model=model, rtol=1e-9 if name == "gpt2" else 3e-5
    )


def test_gauss_newton_of_dict_inputs_uses_the_logits() -> None:
    model = gpt2()
    data = [({"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]}, b["labels"]) for b in batches()]

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z.transpose(1, 2), t)

    def unit(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z.transpose(1, 2), t, reduction="sum")

    class Logits(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> Any:
            return model(**inputs).logits

    logits = Logits()
    logits.parameters = model.parameters  # type: ignore[method-assign]
    problem = Problem("gpt2", logits, data, loss, unit, lambda t: float((t != -100).sum()))
    G = sk.GaussNewtonOperator(sk.Objective(model, data, loss=loss))
    assert relative_error(G.to_dense(), dense_gauss_newton(problem)) < 1e-9


def test_their_own_loss_in_float32_is_recognised_as_a_mean_over_tokens() -> None:
    model = gpt2()
    with untouched(model):
        objective = sk.Objective(model, batches())
        assert objective.counted == "next tokens"
        assert objective.value() == pytest.approx(float(total(model).detach()), rel=1e-6)
        v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        theirs, ours = sk.HessianOperator(objective) @ v, sk.HessianOperator(sk.Objective(model, batches(), closure=own_loss)) @ v
    assert 1e-12 < relative_error(theirs, ours) < 1e-4, "float32 inside a float64 model"


@pytest.mark.parametrize("items", [None, 17], ids=["mean", "num_items_in_batch"])
@pytest.mark.parametrize("name", HEADS)
def test_their_loss_in_chunks_of_tokens_is_their_loss(name: str, items: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = built(HEADS[name]), batches()
    if items is not None:
        data = [{**batch, "num_items_in_batch": torch.tensor(items)} for batch in data]
    whole = sk.Objective(model, data)
    assert not whole.chunking.allowed, "so small a vocabulary gains nothing"
    cut_small_logits(monkeypatch, tokens=3)
    with untouched(model):
        chunked = sk.Objective(model, data)
        assert chunked.chunking.used
        assert chunked.chunking.allowed
        assert (chunked.counted, chunked.reduction) == (whole.counted, whole.reduction)
        assert chunked.value() == pytest.approx(whole.value(), rel=1e-6)  # theirs is computed in float32
        assert relative_error(chunked.gradient()[1], whole.gradient()[1]) < 1e-6
        v = torch.randn(whole.num_parameters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert relative_error(sk.HessianOperator(chunked) @ v, sk.HessianOperator(whole) @ v) < 1e-6


def next_tokens(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z[:, :-1].flatten(0, 1), t[:, 1:].flatten())


@pytest.mark.parametrize("name", ["gpt2, tied", "gemma2, soft cap", "phi, bias"])
def test_gauss_newton_of_their_own_loss_is_that_of_their_logits(name: str) -> None:
    model = built(HEADS[name])
    apart = [({"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]}, b["labels"]) for b in batches()]
    expected = sk.GaussNewtonOperator(sk.Objective(model, apart, loss=next_tokens)).to_dense()
    with untouched(model):
        found = sk.GaussNewtonOperator(sk.Objective(model, batches())).to_dense()
    assert relative_error(found, expected) < 1e-5  # theirs is computed in float32
    assert relative_error(found, found.T) < 1e-6


def test_the_fisher_matrix_of_their_own_loss_has_the_gauss_newton_matrix_as_its_mean() -> None:
    model = gpt2()
    objective = sk.Objective(model, batches())
    v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sk.GaussNewtonOperator(objective) @ v
    draws = torch.stack([sk.FisherOperator(objective, seed=seed) @ v for seed in range(100)])
    error = draws.std(0) / 10
    assert bool(((draws.mean(0) - expected).abs() < 5 * error + 1e-6 * expected.abs().max()).all())
    whole = sk.FisherOperator(objective, num_draws=2) @ v
    objective.micro_batch_size = 2
    assert relative_error(sk.FisherOperator(objective, num_draws=2) @ v, whole) < 1e-5, "a piece draws the labels of the whole"


@pytest.mark.parametrize("items", [None, 17], ids=["mean", "num_items_in_batch"])
def test_the_empirical_fisher_of_their_own_loss_has_the_gradients_of_their_samples(items: int | None) -> None:
    model = gpt2()
    data = batches() if items is None else [{**batch, "num_items_in_batch": torch.tensor(items)} for batch in batches()]
    objective = sk.Objective(model, data)
    singles = [{k: v[i : i + 1] if v.ndim else v for k, v in b.items()} for b in data for i in range(len(b["labels"]))]
    counts = [float((b["labels"][:, 1:] != -100).sum()) for b in singles]
    gradients = []
    for batch, count in zip(singles, counts, strict=True):
        parts = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in parts]) * (count * len(singles) / sum(counts) if items is None else 1.0))
    rows = torch.stack(gradients)
    expected = rows.T @ rows / (len(rows) if items is None else 1.0)
    assert relative_error(sk.EmpiricalFisherOperator(objective).to_dense(), expected) < 1e-5


def test_gauss_newton_of_a_loss_with_more_in_it_than_a_cross_entropy_asks_for_output_and_loss_apart() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt2()

        def forward(self, **batch: Tensor) -> Any:
            output = self.inner(**batch)
            output.loss = output.loss + self.inner.lm_head.weight.square().mean()
            return output

    objective = sk.Objective(Penalised(), batches())
    for make in (sk.GaussNewtonOperator, sk.FisherOperator):
        operator = make(objective)
        with pytest.raises(sk.ObjectiveError, match="output and the loss apart"):
            operator @ torch.ones(operator.size, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_is_exact_or_refused(settings: dict[str, bool]) -> None:
    model = gpt2()
    H = sk.HessianOperator(sk.Objective(model, batches(), closure=own_loss))
    v = torch.ones(H.size, dtype=torch.float64)
    expected = H @ v
    model.config.attn_pdrop = model.config.resid_pdrop = model.config.embd_pdrop = 0.0
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    checkpointed = sk.HessianOperator(sk.Objective(model, batches(), closure=own_loss, mode="train"))
    if settings["use_reentrant"]:
        with pytest.raises(sk.UnsupportedError, match="use_reentrant"):
            checkpointed @ v
    else:
        assert relative_error(checkpointed @ v, expected) < 1e-10
