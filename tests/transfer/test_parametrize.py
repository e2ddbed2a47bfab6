"""parametrize: factors of the muP table, models that the culprits' search then passes, files of base shapes, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit._errors import SharpkitError, UnsupportedError
from sharpkit.transfer.parametrize import Parametrization, parametrize

BASE, WIDTHS = 32, (32, 64, 128, 256)
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long() + 2 * (X[:, 2] > 0).long()
DATA = [(X[:32], Y[:32]), (X[32:], Y[32:])]
OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.004),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.004, weight_decay=0.1),
    "coupled": lambda params: torch.optim.Adam(params, lr=0.004, weight_decay=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
}


def mlp(width: int) -> nn.Module:
    """Layers as PyTorch initialises them, the logits small so that widths from 32 on are wide."""
    model = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    with torch.no_grad():
        model[4].weight.mul_(0.3)
    return model


def done(width: int, optimizer: str = "adam", base: Any = None) -> tuple[nn.Module, torch.optim.Optimizer, Parametrization]:
    torch.manual_seed(width)
    model = mlp(width)
    made = OPTIMIZERS[optimizer](model.parameters())
    return model, made, parametrize(model, mlp(BASE) if base is None else base, made)


@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [
        ("adam", {"0.weight": 1, "0.bias": 1, "2.weight": 1 / 4, "2.bias": 1, "4.weight": 1 / 4, "4.bias": 1}),
        ("sgd", {"0.weight": 4, "0.bias": 4, "2.weight": 1, "2.bias": 4, "4.weight": 1 / 4, "4.bias": 1}),
    ],
)
def test_rates_are_those_of_table_3(optimizer: str, rates: dict[str, float]) -> None:
    model, made, result = done(4 * BASE, optimizer)
    assert {t.name: t.lr for t in result.tensors} == pytest.approx(rates)
    base = OPTIMIZERS[optimizer](model.parameters()).param_groups[0]["lr"]
    held = {id(p): g["lr"] for g in made.param_groups for p in g["params"]}
    assert {name: held[id(p)] / base for name, p in model.named_parameters()} == pytest.approx(rates)


def test_initial_deviations_follow_the_base() -> None:
    torch.manual_seed(0)
    narrow = mlp(BASE)
    model, _, result = done(4 * BASE, base=narrow)
    std = lambda m, name: float(m.get_parameter(name).detach().std())  # noqa: E731
    assert std(model, "2.weight") == pytest.approx(std(narrow, "2.weight") / 2, rel=0.1)
    assert std(model, "4.weight") == pytest.approx(std(narrow, "4.weight") / 4, rel=1e-5)
    assert std(model, "2.bias") == pytest.approx(std(narrow, "2.bias"), rel=1e-5)
    assert {t.name: t.init for t in result.tensors}["2.weight"] == 1.0  # PyTorch's own law is the rule already


def test_decay_and_eps_follow_what_they_stand_beside() -> None:
    _, _, adamw = done(4 * BASE, "adamw")
    assert all(t.lr * t.weight_decay == pytest.approx(1.0) for t in adamw.tensors)
    assert {t.name: t.eps for t in adamw.tensors}["2.weight"] == pytest.approx(1 / 4)
    _, _, coupled = done(4 * BASE, "coupled")
    decay = {t.name: t.weight_decay for t in coupled.tensors}
    assert (decay["0.weight"], decay["2.weight"], decay["4.weight"]) == pytest.approx((1 / 4, 1 / 2, 4))


def test_a_model_of_the_bases_size_is_left_as_it_is() -> None:
    torch.manual_seed(1)
    model = mlp(BASE)
    before = [p.detach().clone() for p in model.parameters()]
    adam = OPTIMIZERS["adam"](model.parameters())
    parametrize(model, model, adam)
    assert len(adam.param_groups) == 1 and adam.param_groups[0]["lr"] == 0.004
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_what_it_makes_has_no_culprit(optimizer: str) -> None:
    def of(model: nn.Module, width: int) -> torch.optim.Optimizer:
        made = OPTIMIZERS[optimizer](model.parameters())
        torch.manual_seed(BASE)
        parametrize(model, mlp(BASE), made)
        return made

    arguments: dict[str, Any] = {"data": DATA, "loss": F.cross_entropy, "steps": 3}
    assert sk.transfer.find_culprits(mlp, WIDTHS, optimizer=of, **arguments) == ()
    plain = sk.transfer.find_culprits(mlp, WIDTHS, optimizer=lambda m, w: OPTIMIZERS[optimizer](m.parameters()), **arguments)
    assert plain  # one rate for all widths


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muons_steps_keep_their_spectral_norm_and_the_rest_has_another_optimizer() -> None:
    model, narrow = mlp(4 * BASE), mlp(BASE)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    muons = [torch.optim.Muon(matrices, lr=0.02, adjust_lr_fn=kind) for kind in ("original", "match_rms_adamw")]
    adam = torch.optim.Adam([p for p in model.parameters() if p.ndim < 2], lr=1e-3)
    for muon, expected in zip(muons, ((1, 1, 1 / 2), (1, 1 / 2, 1 / 4)), strict=True):
        # a step of norm sqrt(fan_out / fan_in): input (128, 12), hidden (128, 128), readout (4, 128)
        rates = {t.name: t.lr for t in parametrize(model, narrow, [muon, adam]).tensors}
        assert (rates["0.weight"], rates["2.weight"], rates["4.weight"]) == pytest.approx(expected, rel=0.01)
        adam = torch.optim.Adam([p for p in model.parameters() if p.ndim < 2], lr=1e-3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize(
    ("parametrized", "rules"), [pytest.param(True, [], marks=pytest.mark.slow), (False, ["readout multiplier", "hidden learning rate"])]
)
def test_muons_rules_are_told_apart(parametrized: bool, rules: list[str]) -> None:
    def build(width: int) -> nn.Module:
        model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in ((12, width), (width, width), (width, 4))))
        with torch.no_grad():
            model[2].weight.mul_(0.3)
        return model

    def muon(model: nn.Module, width: int) -> torch.optim.Optimizer:
        # a step in which every entry has one size whatever the shape, as Adam's; its own decay of 0.1 beside the step is checked too
        made = torch.optim.Muon(model.parameters(), lr=0.01, weight_decay=0.1 if parametrized else 0.0, adjust_lr_fn="match_rms_adamw")
        if parametrized:
            torch.manual_seed(0)
            parametrize(model, build(BASE), made)
        return made

    found = sk.transfer.find_culprits(build, WIDTHS, optimizer=muon, data=DATA, loss=F.cross_entropy, steps=3)
    assert [c.rule for c in found] == rules


class Tied(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(10, width), nn.Linear(width, 10, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.token(tokens))


def test_a_tied_readout_gets_a_multiplier_on_its_input() -> None:
    import pickle

    model = Tied(64)
    tokens = torch.arange(10)
    before = model(tokens).detach()
    result = parametrize(model, Tied(16), torch.optim.Adam(model.parameters()))
    (rule,) = result.tensors
    assert (rule.role, rule.lr, rule.multiplier) == ("input", 1.0, 0.25)
    scale = rule.init**2  # both uses are of the same table
    torch.testing.assert_close(model(tokens), before * 0.25 * scale)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(tokens), model(tokens))


def llama(width: int, *, heads: int | None = None) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=heads or width // 8,
        num_key_value_heads=heads or width // 8,
        vocab_size=32,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def test_a_llama_from_its_config_is_parametrized() -> None:
    """Constant initial deviations of .02, heads that grow: both are mended."""
    model, narrow = llama(64, heads=2), llama(16, heads=2)
    result = parametrize(model, narrow, torch.optim.AdamW(model.parameters(), lr=1e-3))
    roles = {t.name.removeprefix("model."): t.role for t in result.tensors}
    assert roles["embed_tokens.weight"] == "input" and roles["lm_head.weight"] == "readout"
    assert roles["layers.0.mlp.down_proj.weight"] == "hidden" and roles["norm.weight"] == "vector"
    init = {t.name: t.init for t in result.tensors}
    assert init["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(1 / 2, rel=0.15)
    assert init["lm_head.weight"] == pytest.approx(1 / 4, rel=0.15)
    attention = model.model.layers[0].self_attn
    assert attention.scaling == pytest.approx(8**-0.5 * 8 / 32)
    assert result.attention == ("model.layers.0.self_attn",)
    many = llama(64)
    assert parametrize(many, llama(16), torch.optim.AdamW(many.parameters())).attention == ()  # heads of the same dimension


def test_base_shapes_are_read_and_written_as_microsofts_package_does(tmp_path: Path) -> None:
    path = tmp_path / "base.bsh"
    sk.transfer.write_base_shapes(path, mlp(BASE), mlp(2 * BASE))
    assert sk.transfer.read_base_shapes(path) == {
        "0.weight": (BASE, None),
        "0.bias": (BASE,),
        "2.weight": (BASE, BASE),
        "2.bias": (BASE,),
        "4.weight": (None, BASE),
        "4.bias": (None,),
    }
    _, _, by_file = done(4 * BASE, base=str(path))
    _, _, by_model = done(4 * BASE)
    assert [(t.name, t.role, t.lr) for t in by_file.tensors] == [(t.name, t.role, t.lr) for t in by_model.tensors]
    assert {t.name: t.init for t in by_file.tensors}["4.weight"] == pytest.approx(1 / 2)  # of PyTorch's 1/sqrt(fan_in)
    other = tmp_path / "flow.yaml"
    other.write_text("# a comment\nlayer.weight: [64, null]\n'layer.bias':\n    - 64\n")
    assert sk.transfer.read_base_shapes(other) == {"layer.weight": (64, None), "layer.bias": (64,)}
    other.write_text("layer.weight:\n- sixty\n")
    with pytest.raises(SharpkitError, match=r"line 2 of .* is no base shape"):
        sk.transfer.read_base_shapes(other)


def test_microsofts_package_reads_the_file(tmp_path: Path) -> None:
    mup = pytest.importorskip("mup")
    path = tmp_path / "base.bsh"
    sk.transfer.write_base_shapes(path, mlp(BASE), mlp(2 * BASE))
    model = mlp(4 * BASE)
    model[4] = mup.MuReadout(4 * BASE, 4)
    mup.set_base_shapes(model, str(path))
    assert model[2].weight.infshape.width_mult() == 4
    mup.shape.save_base_shapes(model, str(path))
    assert sk.transfer.read_base_shapes(path)["4.weight"] == (None, BASE)


class Raw(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, width) / math.sqrt(width))


def test_what_cannot_be_told_is_refused_with_the_remedy() -> None:
    model = mlp(64)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="Give it the same depth"):
        parametrize(model, nn.Sequential(*list(mlp(32))[:3]), adam)
    with pytest.raises(TypeError, match="base must be a narrow model"):
        parametrize(model, 3, adam)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer"):
        parametrize(model, mlp(32), torch.optim.Adam)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="Adafactor"):
        parametrize(model, mlp(32), torch.optim.Adafactor(model.parameters()))
    with pytest.raises(ValueError, match="make the optimizer from the model"):
        parametrize(model, mlp(32), torch.optim.Adam(mlp(64).parameters()))
    parametrize(model, mlp(32), adam)
    with pytest.raises(ValueError, match="was parametrized before"):
        parametrize(model, mlp(32), adam)
    stepped = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    stepped.step()
    with pytest.raises(ValueError, match="has stepped already"):
        parametrize(model, mlp(32), stepped)
    raw = Raw(64)
    with pytest.raises(UnsupportedError, match=r"roles=\{'w': 'input'\}"):
        parametrize(raw, Raw(16), torch.optim.Adam(raw.parameters()))
    told = parametrize(raw, Raw(16), torch.optim.Adam(raw.parameters()), roles={"w": "readout"})
    assert told.tensors[0].lr == pytest.approx(1 / 4) and told.tensors[0].role == "readout"
    with pytest.raises(ValueError, match="no parameter of the model"):
        parametrize(raw, Raw(16), torch.optim.Adam(raw.parameters()), roles={"v": "readout"})
    heads = nn.TransformerEncoderLayer(32, 2, 32)
    with pytest.raises(UnsupportedError, match="Keep the heads' dimension"):
        parametrize(heads, nn.TransformerEncoderLayer(16, 2, 16), torch.optim.Adam(heads.parameters()))


def test_the_result_says_what_was_done() -> None:
    _, _, result = done(4 * BASE)
    assert str(result).startswith("muP for Adam: 5 of 6 tensors changed")
    assert "readout" in result.table() and Parametrization.from_dict(result.to_dict()) == result
