"""Real architectures: is a Hessian product right to 1e-6, refused with a remedy, or neither? Is the doctor quiet where all is well?

Part 1, per architecture (transformers from configurations at tiny size; timm and peft where they are installed; losses that take a gradient
inside): a product with a random vector against fourth-order central differences of first gradients, in float64 throughout (casts to float32
inside the model are widened, and the widened loss is what both sides see). Outcome: "right" (relative gap below 1e-6), "refused" (a
sharpkit error, its text in the row) or "unclear" (anything else).

Part 2, the doctor on each decoder as its users have it (float32, and float64 with the casts left in), and on the losses that take a
gradient inside: a sound objective that does not pass is a false alarm. Then planted faults: each must fail, be warned of, or be named.

    python -m experiments.architectures      # results/architectures.jsonl, figures/architectures.png
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkit as sk
from experiments._architectures import BY_DEFINITION, DECODERS, OTHERS, Loss, build, extras, inner_gradients, own_loss, wide_loss
from experiments._common import Row, run_as_script

_RIGHT = 1e-6
_STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8)  # relative to |w| / |v|; the best of them counts, since kinks want small ones


def wide(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    return {key: wide(value) for key, value in batch.items()}


def differences(loss: Callable[[], Tensor], params: list[Tensor], vector: list[Tensor], step: float) -> Tensor:
    """(8 (g(h) - g(-h)) - (g(2h) - g(-2h))) / 12 h, along the vector."""
    here = [p.detach().clone() for p in params]

    def gradient(times: float) -> Tensor:
        for p, start, v in zip(params, here, vector, strict=True):
            p.data = start + times * step * v
        torch.manual_seed(0)
        parts = torch.autograd.grad(loss(), params, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(parts, params, strict=True)])

    total = (8 * (gradient(1) - gradient(-1)) - (gradient(2) - gradient(-2))) / (12 * step)
    for p, start in zip(params, here, strict=True):
        p.data = start
    return total


def judged(model: nn.Module, batch: Any, loss: Loss, reference: Loss | None = None) -> Row:
    """A product of sharpkit's against differences of gradients, of the reference loss if there is one."""
    reference = reference or loss
    model, batch = model.double(), wide(batch)
    try:
        H = sk.HessianOperator(sk.Objective(model, batch, closure=loss, mode="train" if model.training else "eval"))
        vector = torch.randn(H.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for name, m in model.named_modules():  # torch gives the padding row of an embedding no gradient
            if isinstance(m, nn.Embedding) and m.padding_idx is not None and f"{name}.weight" in H.layout.names:
                H.layout.split(vector)[H.layout.names.index(f"{name}.weight")][m.padding_idx] = 0
        product = H @ vector
    except sk.SharpkitError as error:
        return {"outcome": "refused", "error": f"{type(error).__name__}: {error}"}
    except Exception as error:
        return {"outcome": "unclear", "error": f"{type(error).__name__}: {str(error)[:200]}"}
    params: list[Tensor] = list(H.layout.params)
    scale = float(H.layout.current().norm() / vector.norm())
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels' rounding is above 1e-6
        gaps = [
            float(
                (differences(lambda: reference(model, batch), params, H.layout.split(vector), c * scale) - product).norm() / product.norm()
            )
            for c in _STEPS
        ]
    known = H.objective.second_order
    return {
        "outcome": "right" if min(gaps) < _RIGHT else "unclear",
        "gap": min(gaps),
        "n": H.size,
        "doubts": sorted(known.doubts),
        "probe_gradients": known.probe_gradients,
        "replaced": sorted(known.replaced),
    }


def diagnosed(model: nn.Module, batch: Any, loss: Loss | None) -> Row:
    """The doctor's verdict; the objective is sound if PyTorch can train it at all."""
    loss = loss or own_loss
    try:
        torch.autograd.grad(loss(model, batch), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        sound = True
    except RuntimeError:
        sound = False
    try:
        diagnosis = sk.examine(sk.Objective(model, batch, closure=loss, mode="train" if model.training else "eval"))
    except sk.SharpkitError as error:
        return {"sound": sound, "passed": False, "said": [f"{type(error).__name__}: {str(error)[:200]}"]}
    return {
        "sound": sound,
        "passed": diagnosis.passed,
        "said": [str(c)[:240] for c in diagnosis.checks if c.status in ("failed", "warning")],
    }


# -- planted faults -----------------------------------------------------------------------------------------------------------------
class _CutSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with torch.no_grad():
            return grad * 2 * ctx.saved_tensors[0]


class _Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def planted() -> dict[str, tuple[Callable[[], nn.Module], str]]:
    """Faults by name: (model, a word that the doctor must say of it)."""

    def net(*middle: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3))

    def hooked() -> nn.Module:
        model = net()
        model[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
        return model

    def shared() -> nn.Module:
        model = net(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        model[3].weight.data = model[1].weight.data
        return model

    def lost() -> nn.Module:
        model = net(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        model[3].weight.data = model[1].weight.data.clone()
        return model

    def normed() -> nn.Module:
        return nn.Sequential(nn.utils.parametrizations.weight_norm(net()[0]), nn.Tanh(), nn.Linear(5, 3))

    return {
        "no_grad backward": (lambda: net(_Applied(_CutSquare.apply)), "_CutSquare"),
        "weight_norm": (normed, "weight_norm"),
        "straight-through": (lambda: net(_Applied(lambda z: z + (z.round() - z).detach())), "straight-through"),
        "hook": (hooked, "hook"),
        "dropout that is always on": (lambda: net(_Applied(lambda z: F.dropout(z, 0.5))), "random"),
        "tie by memory": (shared, "share memory"),
        "tie that was lost": (lost, "equal values"),
    }


def found_fault(make: Callable[[], nn.Module], word: str) -> Row:
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(20, 4, generator=generator), torch.randint(3, (20,), generator=generator))
    checks = sk.examine(sk.Objective(make(), data, loss=F.cross_entropy)).checks
    said = [str(c) for c in checks if c.status != "ok" and word in str(c)]
    return {"found": bool(said), "said": said[:1]}


def measure(quick: bool) -> list[Row]:
    """All rows; quick: every fifth architecture."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    every, rows = 5 if quick else 1, []
    for family in [*DECODERS, *OTHERS][::every]:
        rows.append({"part": "architecture", "name": family.name, "task": family.task, **judged(*build(family), wide_loss)})
        print(rows[-1], flush=True)
    for name, make in extras().items():
        rows.append({"part": "architecture", "name": name, "task": "extra", **judged(*make(), wide_loss)})
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    for name, (model_of, loss) in list(inner_gradients().items())[::every]:
        torch.manual_seed(0)
        rows.append(
            {"part": "architecture", "name": name, "task": "inner gradient", **judged(model_of(), x, loss, BY_DEFINITION.get(name))}
        )
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            rows.append({"part": "doctor", "name": name, "dtype": str(dtype), **diagnosed(model_of().to(dtype), x.to(dtype), loss)})
        print(*rows[-3:], sep="\n", flush=True)
    for family in DECODERS[::every]:
        for dtype in (torch.float32, torch.float64):
            model, batch = build(family)
            rows.append({"part": "doctor", "name": family.name, "dtype": str(dtype), **diagnosed(model.to(dtype), batch, None)})
            print(rows[-1], flush=True)
    rows += [{"part": "planted", "name": name, **found_fault(*case)} for name, case in planted().items()]
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Left: the gaps of what is right, sorted, with the number of each outcome; right: the doctor."""
    left, right = figure.subplots(1, 2)
    judged_rows = [r for r in rows if r["part"] == "architecture"]
    gaps = sorted(max(r["gap"], 1e-16) for r in judged_rows if "gap" in r)
    left.semilogy(range(len(gaps)), gaps, ".", color="C0")
    left.axhline(_RIGHT, color="0.6", lw=1)
    counts = {outcome: sum(r["outcome"] == outcome for r in judged_rows) for outcome in ("right", "refused", "unclear")}
    left.set(
        xlabel="architectures and losses, sorted",
        ylabel="product against differences",
        title=", ".join(f"{n} {o}" for o, n in counts.items()),
    )
    doctor, faults = [r for r in rows if r["part"] == "doctor" and r["sound"]], [r for r in rows if r["part"] == "planted"]
    bars = {
        f"sound, passed ({len(doctor)})": sum(r["passed"] for r in doctor),
        "false alarms": sum(not r["passed"] for r in doctor),
        f"faults found (of {len(faults)})": sum(r["found"] for r in faults),
    }
    right.barh(list(bars), list(bars.values()), color=["C2", "C3", "C0"])
    right.bar_label(right.containers[0])
    right.set(title="the doctor", xlim=(0, 1.2 * max(bars.values())))


if __name__ == "__main__":
    run_as_script("architectures", measure, draw)
