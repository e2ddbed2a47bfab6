"""Real architectures at tiny size, built from their configurations in transformers, and losses that take a gradient inside.

timm and peft add their own where they are installed. Weights are random, seeded; no file is fetched.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Case = tuple[nn.Module, Any]  # model and batch
Loss = Callable[[nn.Module, Any], Tensor]

_TOKENS, _LENGTH, _LABELS = 33, 7, 3
# Sizes by the names that configurations give them; a configuration takes those that it has.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "encoder_vocab_size"), _TOKENS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "lru_width", "embed_dim"), 16),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("num_encoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 2),
    **dict.fromkeys(
        ("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 2
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 1),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 24),
    **dict.fromkeys(("ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_positions", "max_position_embeddings", "max_seq_len", "context_length", "n_ctx"), 32),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 0),
    **dict.fromkeys(("eos_token_id", "decoder_start_token_id"), 1),
    "image_size": 32,
}


@dataclass(frozen=True)
class Family:
    """One architecture: its configuration's name, what its head does, and settings beside the small sizes."""

    name: str
    task: str
    settings: dict[str, Any]


def _families(task: str, names: str, **settings: dict[str, Any]) -> list[Family]:
    return [Family(name, task, settings.get(name, {})) for name in names.split()]


DECODERS = _families(
    "causal",
    "gpt2 gpt_neo gpt_neox gptj opt bloom llama mistral mixtral qwen2 qwen3 qwen2_moe gemma gemma2 phi phi3 falcon mpt stablelm starcoder2 "
    "olmo cohere granite codegen biogpt olmo2 mamba rwkv recurrent_gemma gpt_oss deepseek_v3",
    gptj={"rotary_dim": 4},
    codegen={"rotary_dim": 4, "n_head": 4},
    gpt_neo={"attention_types": [[["global", "local"], 1]], "window_size": 4},
    mamba={"intermediate_size": 32, "time_step_rank": 2, "state_size": 4},
    rwkv={"attention_hidden_size": 16},
    recurrent_gemma={"num_key_value_heads": 2, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    bloom={"n_head": 2},
    falcon={"num_kv_heads": 2},
    qwen2_moe={"num_key_value_heads": 2, "decoder_sparse_step": 1},
    deepseek_v3={
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
)
_SPEECH = {
    "conv_dim": [8, 8],
    "conv_kernel": [4, 4],
    "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
OTHERS = [
    *_families(
        "masked",
        "bert roberta distilbert albert electra deberta deberta-v2 mobilebert roformer mpnet convbert fnet big_bird longformer",
        mobilebert={"intra_bottleneck_size": 16, "num_feedforward_networks": 1},
        roformer={"embedding_size": 16},
        big_bird={"attention_type": "original_full"},
        longformer={"attention_window": [4, 4]},
        fnet={"type_vocab_size": 2},
    ),
    *_families("seq2seq", "t5 bart pegasus marian", t5={"num_layers": 2, "d_kv": 8, "decoder_start_token_id": 1}),
    *_families(
        "image",
        "vit beit swin convnext convnextv2 resnet regnet mobilevit poolformer segformer dinov2 mobilenet_v2 bit",
        vit={"patch_size": 8},
        beit={"patch_size": 8},
        dinov2={"patch_size": 8},
        swin={"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        convnext={"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
        resnet={"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        regnet={"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
        mobilevit={"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "num_attention_heads": 2},
        poolformer={
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "padding": [1, 1],
        },
        segformer={
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "num_attention_heads": [1, 2],
            "sr_ratios": [2, 1],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "mlp_ratios": [2, 2],
        },
        mobilenet_v2={"depth_multiplier": 0.1, "finegrained_output": False},
        convnextv2={"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
        bit={"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 8},
    ),
    *_families("ctc", "wav2vec2 hubert", wav2vec2=_SPEECH, hubert=_SPEECH),
]
_HEADS = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image": "AutoModelForImageClassification",
    "ctc": "AutoModelForCTC",
}


def build(family: Family, *, seed: int = 0) -> Case:
    """The model in float32 and eval mode, and a batch with labels."""
    import transformers

    own = transformers.AutoConfig.for_model(family.name).to_dict()
    settings = {**{key: value for key, value in _SMALL.items() if key in own}, **family.settings}
    if family.task == "image":
        settings["num_labels"] = _LABELS
    config = transformers.AutoConfig.for_model(family.name, **settings)
    torch.manual_seed(seed)
    model = getattr(transformers, _HEADS[family.task]).from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # the usual .02 leaves tiny networks all but linear
            p.add_(0.1 * torch.randn(p.shape))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernel takes no float64
    return model.eval(), _batch(family.task, getattr(config, "image_size", 32), torch.Generator().manual_seed(seed))


def _batch(task: str, image_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    if task == "image":
        pixels = torch.randn(4, 3, image_size, image_size, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(_LABELS, (4,), generator=generator)}
    if task == "ctc":
        return {"input_values": torch.randn(2, 120, generator=generator), "labels": torch.randint(2, _TOKENS, (2, 4), generator=generator)}
    ids = torch.randint(2, _TOKENS, (3, _LENGTH), generator=generator)
    labels = torch.randint(2, _TOKENS, (3, _LENGTH), generator=generator) if task != "causal" else ids
    mask = torch.ones_like(ids)
    if task == "masked":
        mask[1, 5:] = 0
        labels = labels.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def extras() -> dict[str, Callable[[], Case]]:
    """Models of timm and adapters of peft, where they are installed."""
    cases: dict[str, Callable[[], Case]] = {}
    if importlib.util.find_spec("timm"):
        for name in ("resnet10t", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"):
            cases[f"timm {name}"] = lambda name=name: _of_timm(name)  # type: ignore[misc]
    if importlib.util.find_spec("peft"):
        cases["peft LoRA on llama"] = _of_peft
    return cases


class _WithLoss(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        return type("Output", (), {"loss": F.cross_entropy(self.body(pixel_values), labels)})()


def _of_timm(name: str) -> Case:
    import timm

    torch.manual_seed(0)
    size = {"img_size": 64} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=_LABELS, **size)
    with torch.no_grad():
        for p in model.parameters():  # norms that start at 0 put every ReLU behind them on its kink
            p.add_(0.02 * torch.randn(p.shape))
    return _WithLoss(model).eval(), _batch("image", 64, torch.Generator().manual_seed(0))


def _of_peft() -> Case:
    from peft import LoraConfig, get_peft_model

    model, batch = build(next(f for f in DECODERS if f.name == "llama"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:  # zero at first, where half the Hessian is
                p.normal_(std=0.1)
    return adapted.eval(), batch


class Wide(TorchFunctionMode):
    """Models that cast to float32 inside (norms, softmax, the loss) stay in float64, so that a reference to 1e-6 can be had."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss."""
    loss: Tensor = model(**batch).loss
    return loss


def wide_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss, in float64 throughout."""
    with Wide():
        return own_loss(model, batch)


# -- losses that take a gradient inside ------------------------------------------------------------------------------------------
def _penalty(model: nn.Module, x: Tensor) -> Tensor:
    """Of a critic, as in WGAN-GP."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean() + model(x).mean()


def _poisson(model: nn.Module, x: Tensor) -> Tensor:
    """u'' = -sin, with both ends at 0: a physics-informed residual with two derivatives inside."""
    x = x[:, :1].clone().requires_grad_()
    u = model(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    ends = model(torch.tensor([[0.0], [torch.pi]]).to(x))
    return ((second + torch.sin(x)) ** 2).mean() + (ends**2).mean()


def _forces(model: nn.Module, x: Tensor) -> Tensor:
    """Energies and forces of points, from the distances between two halves of them."""
    x = x.clone().requires_grad_()
    distances = torch.cdist(x[:6], x[6:])
    (force,) = torch.autograd.grad(model(distances.view(1, -1).sigmoid()).sum(), x, create_graph=True)
    return ((force - 0.1) ** 2).mean()


def _forces_by_definition(model: nn.Module, x: Tensor) -> Tensor:
    """The same with a distance that PyTorch can differentiate twice."""
    x = x.clone().requires_grad_()
    distances = (x[:6, None] - x[None, 6:]).square().sum(-1).sqrt()
    (force,) = torch.autograd.grad(model(distances.view(1, -1).sigmoid()).sum(), x, create_graph=True)
    return ((force - 0.1) ** 2).mean()


def _meta(model: nn.Module, x: Tensor) -> Tensor:
    """The loss after one inner step of gradient descent (MAML)."""
    first, second = x.chunk(2)
    names = [name for name, _ in model.named_parameters()]
    params = dict(model.named_parameters())
    inner = torch.func.functional_call(model, params, first).square().mean()
    stepped = {
        n: params[n] - 0.1 * g for n, g in zip(names, torch.autograd.grad(inner, list(params.values()), create_graph=True), strict=True)
    }
    return torch.func.functional_call(model, stepped, second).sub(1).square().mean()


def _jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """A contractive loss by torch.func."""
    jacobian = torch.func.vmap(torch.func.jacrev(model))(x)
    return model(x).square().mean() + 0.1 * jacobian.square().mean()


def _score(model: nn.Module, x: Tensor) -> Tensor:
    """Sliced score matching of an energy."""
    x = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    along = torch.linspace(-1, 1, x.numel()).to(x).view_as(x)
    (bend,) = torch.autograd.grad((score * along).sum(), x, create_graph=True)
    return (0.5 * score.square().sum(1) + (bend * along).sum(1)).mean()


def _mlp(*middle: nn.Module, inputs: int = 4, outputs: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), *middle, nn.Tanh(), nn.Linear(8, outputs))


BY_DEFINITION: dict[str, Loss] = {"forces, cdist": _forces_by_definition}  # where PyTorch itself cannot give the reference's gradient


def inner_gradients() -> dict[str, tuple[Callable[[], nn.Module], Loss]]:
    """Ten losses that take a gradient inside: name -> (model, loss of a (12, 4) batch)."""
    norm = nn.utils.parametrizations.weight_norm
    return {
        "penalty, plain": (lambda: _mlp(), _penalty),
        "penalty, LayerNorm": (lambda: _mlp(nn.LayerNorm(8)), _penalty),
        "penalty, InstanceNorm": (lambda: _mlp(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()), _penalty),
        "penalty, BatchNorm": (lambda: _mlp(nn.BatchNorm1d(8)), _penalty),
        "penalty, weight_norm": (lambda: nn.Sequential(norm(nn.Linear(4, 8)), nn.Tanh(), norm(nn.Linear(8, 1))), _penalty),
        "Poisson, two derivatives": (lambda: _mlp(inputs=1), _poisson),
        "forces, cdist": (lambda: _mlp(inputs=36), _forces),
        "one inner step": (lambda: _mlp(nn.LayerNorm(8)), _meta),
        "Jacobian by torch.func": (lambda: _mlp(outputs=2), _jacobian),
        "score matching": (lambda: _mlp(), _score),
    }
