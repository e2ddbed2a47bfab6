"""Excerpts of experiments/architectures.py: products right to 1e-6 or refused; the doctor quiet where all is well, and loud elsewhere."""

from __future__ import annotations

import pytest
import torch

from experiments._architectures import BY_DEFINITION, DECODERS, OTHERS, build, inner_gradients, wide_loss
from experiments.architectures import diagnosed, found_fault, judged, planted

FAMILIES = {family.name: family for family in [*DECODERS, *OTHERS]}


@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral", "mamba", "bert", "t5", "swin", "wav2vec2"])
def test_a_product_through_a_real_architecture_is_right(name: str) -> None:
    pytest.importorskip("transformers")
    row = judged(*build(FAMILIES[name]), wide_loss)
    assert row["outcome"] == "right", row
    assert row["probe_gradients"] == (3 if name == "bloom" else 0), "a custom function is probed, the rest costs nothing"


def test_a_model_that_cannot_be_differentiated_is_refused_with_a_remedy() -> None:
    pytest.importorskip("transformers")
    row = judged(*build(FAMILIES["rwkv"]), wide_loss)
    assert row["outcome"] == "refused"
    assert "use operations that are not in place" in row["error"]


@pytest.mark.parametrize("name", inner_gradients())
def test_a_loss_that_takes_a_gradient_inside_is_right_and_passes_the_doctor(name: str) -> None:
    model_of, loss = inner_gradients()[name]
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        row, found = judged(model_of(), x, loss, BY_DEFINITION.get(name)), diagnosed(model_of(), x, loss)
    assert row["outcome"] == "right", row
    assert found["passed"], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3"])
def test_the_doctor_passes_decoders_that_cast_their_logits(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    model, batch = build(FAMILIES[name])
    found = diagnosed(model.to(dtype), batch, None)
    assert found["passed"] and not found["said"], found


@pytest.mark.parametrize("name", planted())
def test_the_doctor_finds_a_planted_fault(name: str) -> None:
    with torch.random.fork_rng():
        row = found_fault(*planted()[name])
    assert row["found"], row
