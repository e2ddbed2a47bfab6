"""Can this objective's curvature be trusted? Examines the user's own model, loss and data, and says what to change."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sharpkit._arguments import as_seed, check_callback
from sharpkit._calls import public_call
from sharpkit._errors import OutOfMemoryError
from sharpkit._results import Progress, ProgressCallback, Result
from sharpkit.measuring.plan import plan
from sharpkit.objective.distributed import Ranks
from sharpkit.objective.guard import random_fingerprint
from sharpkit.objective.memory import available_memory, human_bytes
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.probe import first_batches, float64_copy, precision_of, probe_derivatives

Outcome = tuple[str, str] | tuple[str, str, str]  # status, message and, where something should be changed, the remedy

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid)
_KINKED = (*_ACTIVATIONS, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_FEW = 10.0  # times the noise of finite differences, by judgement: a smaller gap may be that noise
_SERIOUS_ROUNDING, _HARMLESS_ROUNDING = 0.3, 1e-2  # of a product on a random vector, by judgement


_MARKS = {"ok": "ok      ", "note": "note    ", "warning": "WARNING ", "failed": "FAILED  "}


@dataclass(frozen=True)
class Check(Result):
    """One thing looked at.

    Attributes:
        name: what is checked.
        status: ``"ok"``, ``"note"`` (worth knowing), ``"warning"`` (numbers need care) or ``"failed"`` (numbers cannot be trusted).
        message: the result, with numbers.
        remedy: what to change; empty where nothing need be.
    """

    name: str
    status: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{_MARKS[self.status]} {self.name}: {self.message}" + (f"\n          -> {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Diagnosis(Result, kind="diagnosis", saved=("passed", "objective", "checks")):
    """Everything :func:`examine` looked at.

    Attributes:
        objective: in words.
        checks: all, in order.
    """

    objective: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether measurements can be trusted: no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def findings(self) -> list[str]:
        """The verdict and everything that asks for care, in sentences."""
        verdict = (
            "Curvature of this objective can be trusted." if self.passed else "Curvature of this objective can NOT be trusted as it stands."
        )
        return [verdict, *(f"{c.name}: {c.message} {c.remedy}".strip() for c in self.checks if c.status in ("warning", "failed"))]

    def __str__(self) -> str:
        return "\n".join([self.objective, *(str(check) for check in self.checks), self.findings()[0]])

    def __repr__(self) -> str:
        counts = ", ".join(f"{sum(c.status == s for c in self.checks)} {s}" for s in _MARKS)
        return f"Diagnosis({'passed' if self.passed else 'FAILED'}: {counts})"


@public_call
def examine(objective: Objective, *, seed: int = 0, callback: ProgressCallback | None = None, name: str = "") -> Diagnosis:
    """Examine an objective before trusting its curvature: about ten Hessian products and twenty gradients.

    Looks at: whether two passes agree, products are symmetric, linear and equal to finite differences of gradients, and those to
    differences of the loss (in float64, on a copy, where the model allows it), how far float32 rounding goes, attention kernels, dropout
    and batch statistics, hooks, unused, frozen, tied and doubled parameters, integer buffers, kinked activations, how batches are weighted,
    memory and time.

    Args:
        objective: as made for measuring.
        seed: seeds the test vectors.
        callback: called with a :class:`sharpkit.Progress` before each check, named in its text.
        name: of the result, which pages and comparisons show.

    Returns:
        the diagnosis; a check that raises counts as failed, with the error as its message.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(3, 2)
        >>> data = (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> sk.examine(sk.Objective(model, data, loss=torch.nn.functional.cross_entropy)).passed
        True
    """
    check_callback(callback)
    check_objective(objective, "examine")
    started, hessian, checks, seed = time.perf_counter(), HessianOperator(objective), [], as_seed(seed)
    for done, (name, function) in enumerate(CHECKS.items()):
        if callback is not None:  # what remains is not told: the checks differ in cost by orders of magnitude
            callback(Progress(done, len(CHECKS), time.perf_counter() - started, math.nan, name, unit="checks"))
        try:
            checks.append(Check(name, *function(hessian, seed)))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            first = next((c.name for c in checks if c.message == said), None)
            checks.append(Check(name, "failed", said if first is None else f"stopped by the same error as the check {first!r}"))
    return Diagnosis(repr(objective), tuple(checks))


# -- the checks: each takes the Hessian and a seed ------------------------------------------------------------------------------
def _probes(hessian: HessianOperator, seed: int, k: int = 2) -> Tensor:
    return hessian.random_vectors(k, generator=torch.Generator().manual_seed(seed))


def _relative(hessian: HessianOperator, difference: Tensor, reference: Tensor) -> float:
    scale = float(hessian.dot(reference, reference)) ** 0.5
    return float(hessian.dot(difference, difference)) ** 0.5 / scale if scale > 0 else float(difference.abs().max())


def _rounding(hessian: HessianOperator) -> float:
    """What products may differ by: rounding of the coarsest type in the graph; logits may be cast to float32 in a float64 model."""
    eps = precision_of(hessian.objective)[0]
    if eps > 1e-4:  # half precision
        return 3e-2  # a few times the 8e-3 of bfloat16, since errors of a product add up over layers; the others likewise
    return 1e-9 if eps < 1e-10 else 2e-4


def _check_repeats(hessian: HessianOperator, seed: int) -> Outcome:
    vector = _probes(hessian, seed, 1)[:, 0]
    first = hessian @ vector
    hessian.forget_graphs()  # a kept graph would give the same product whatever the data does
    gap = _relative(hessian, hessian @ vector - first, first)
    if gap > _rounding(hessian):
        said = f"two passes over the data gave products that differ by {gap:.2g}"
        return "failed", said, "remove randomness that torch.manual_seed does not control"
    return "ok", f"two passes over the data agree to {gap:.1g}"


def _check_symmetric(hessian: HessianOperator, seed: int) -> Outcome:
    probes = _probes(hessian, seed)
    products = hessian @ probes
    gap = abs(float(hessian.dot(probes[:, 0], products[:, 1])) - float(hessian.dot(probes[:, 1], products[:, 0])))
    # against |u| |Hv|, not against u.Hv, which may be 0 by chance
    size = (float(hessian.dot(products[:, 0], products[:, 0])) * float(hessian.dot(probes[:, 1], probes[:, 1]))) ** 0.5
    relative = gap / size if size > 0 else 0.0
    if relative > _rounding(hessian):
        said = f"u.Hv and v.Hu differ by {relative:.2g} of |u||Hv|"
        return "failed", said, "some operation in the model has a wrong second derivative (a custom autograd.Function?)"
    return "ok", f"u.Hv = v.Hu to {relative:.1g}"


def _check_linear(hessian: HessianOperator, seed: int) -> Outcome:
    u, v = _probes(hessian, seed).T
    expected = 2.0 * (hessian @ u) - 0.5 * (hessian @ v)
    gap = _relative(hessian, hessian @ (2.0 * u - 0.5 * v) - expected, expected)
    if gap > _rounding(hessian):
        said = f"H(2u - v/2) differs from 2Hu - Hv/2 by {gap:.2g}"
        return "failed", said, "the function changes between calls: look for state in the model or the closure"
    return "ok", f"products are linear to {gap:.1g}"


def _check_finite_differences(hessian: HessianOperator, seed: int) -> Outcome:
    probe = probe_derivatives(hessian.objective, HessianOperator, seed=seed, patient=True)
    gradient, product = probe.gradient, probe.product
    where = "float64 copy" if probe.copied else "the model itself, which has no float64 copy that runs"
    if gradient.wrong:
        said = f"the gradient differs from finite differences of the loss by {gradient.gap:.2g} of its length ({where})"
        return ("failed", said, "look for a straight-through estimator, gradient reversal, or .detach() / .data in the model or the loss")
    if product is None:
        return "failed", "the objective cannot be differentiated twice", "see the error of the first check"
    if product.wrong:
        said = f"finite differences of gradients differ from the product by {product.gap:.2g} ({where})"
        return "failed", said, "an operation has a wrong second derivative: a custom backward, or .detach() / .data inside the model"
    mended = ", ".join(sorted(hessian.objective.second_order.replaced))
    done = f"; {mended} computed by definition, as PyTorch's own second derivative is wrong or missing" if mended else ""
    if product.right:
        return ("note" if mended else "ok"), f"finite differences of gradients agree to {product.gap:.1g} ({where}){done}"
    said = f"finite differences of gradients differ by {product.gap:.2g}, and among themselves by {product.noise:.2g} ({where})"
    if product.gap <= _FEW * product.noise and not probe.kinked:
        return "note", f"{said}: this precision shows no more{done}"
    said += f"; kinks crossed within the step ({_names(hessian, _KINKED) or 'in the graph'}) can do that{done}"
    return ("warning", said, "replace kinked activations by smooth ones to be sure")


def _check_rounding(hessian: HessianOperator, seed: int) -> Outcome:
    if hessian.objective.device.type == "cuda" and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32):
        said = "TF32 is on: products carry only about three digits"
        return "warning", said, "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False"
    if hessian.dtype == torch.float64:
        return "ok", "the model computes in float64"
    vector, batches = _probes(hessian, seed, 1)[:, 0], first_batches(hessian.objective)
    try:
        twin = float64_copy(hessian.objective, batches)
        exact = HessianOperator(twin) @ vector.double() if twin is not None else None
    except Exception:
        exact = None
    if exact is None:
        return "note", "not compared: the model cannot be copied or run in float64"
    own = HessianOperator(hessian.objective.with_data(batches, ranks=Ranks()))  # the copy holds no more batches
    gap = _relative(hessian, (own @ vector).double() - exact, exact)
    if gap > _SERIOUS_ROUNDING:
        said = f"a product differs by {gap:.2g} from float64 on a random vector: small eigenvalues and the trace are rounding noise"
        return "warning", said, "measure a float64 copy: model.double()"
    return ("ok" if gap < _HARMLESS_ROUNDING else "note"), f"a product on a random vector is right to {gap:.1g} (against float64)"


class _Recorder(TorchFunctionMode):
    """Counts calls of attention, directly or through nn.MultiheadAttention."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            self.calls += 1
        return func(*args, **(kwargs or {}))


def _check_attention(hessian: HessianOperator, seed: int) -> Outcome:
    objective = hessian.objective
    recorder = _Recorder()
    with objective.undisturbed():
        for piece in itertools.islice(objective.pieces(), 1):  # one shows which operations a forward pass calls
            with recorder:
                objective.evaluate(piece)
    if recorder.calls:
        kernel = "the math kernel, the only one with a second derivative"
        return "note", f"{recorder.calls} fused attention calls run with {kernel}: memory grows with the square of the sequence length"
    return "ok", "no fused attention kernel in the way"


def _names(hessian: HessianOperator, kinds: Any) -> str:
    names = [f"{name or 'model'} ({type(m).__name__})" for name, m in hessian.objective.model.named_modules() if isinstance(m, kinds)]
    return _few(names)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_randomness(hessian: HessianOperator, seed: int) -> Outcome:
    objective = hessian.objective
    with objective.undisturbed():
        for piece in itertools.islice(objective.pieces(), 1):
            objective.seed_for(piece.key[0])
            before = random_fingerprint(objective.device)
            objective.evaluate(piece)
            draws = random_fingerprint(objective.device) != before
    dropout = [m for m in objective.model.modules() if isinstance(m, _DROPOUT) and m.p > 0]
    norms = [m for m in objective.model.modules() if isinstance(m, _BATCH_NORM)]
    if draws and objective.mode == "eval":
        said = "the loss draws random numbers in eval mode: one fixed draw of them is measured, not their mean"
        return "warning", said, "look for dropout that is always on, such as F.dropout without training=self.training"
    if not dropout and not norms:
        if draws:
            return "note", "the loss draws random numbers, fixed by the seed"
        return "ok", "no dropout and no batch statistics: train and eval mode are the same function"
    parts = [text for text, present in ((f"{len(dropout)} dropout", dropout), (f"{len(norms)} batch-norm", norms)) if present]
    what = f"{' and '.join(parts)} layers, measured in {objective.mode} mode"
    if objective.mode == "eval":
        said = f"{what}: dropout off, running statistics used; training itself sees another function"
        return "note", said, "mode='train' measures that one, with fixed masks"
    if objective.in_eval:
        names = sorted(objective.in_eval)
        what += (
            f" but for {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}, kept in eval mode as you put them"
        )
    if objective.couples_samples and objective.num_batches > 1:  # over one batch the statistics are those of all the data
        said = f"{what}: batch statistics make the function depend on how the data is cut into batches"
        return "warning", said, "mode='eval', or keep the batch size of training"
    return "note", f"{what}: masks fixed by the seed"


def _check_hooks(hessian: HessianOperator, seed: int) -> Outcome:
    model = hessian.objective.model
    hooked = [f"parameter {name}" for name, p in model.named_parameters() if p._backward_hooks]
    hooked += [f"module {name or 'model'}" for name, m in model.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    if not hooked:
        return "ok", "no backward hooks"
    said = (
        f"backward hooks are silent in a measurement ({', '.join(hooked[:3])}{f' and {len(hooked) - 3} more' if len(hooked) > 3 else ''})"
    )
    return "warning", f"{said}: where they change gradients, training follows others than the loss's", "remove those that do not only log"


def _check_parameters(hessian: HessianOperator, seed: int) -> Outcome:
    objective, notes = hessian.objective, []
    with objective.undisturbed():
        touched = {id(p): False for p in objective.layout.params}
        for piece in objective.pieces():
            gradients = torch.autograd.grad(objective.evaluate(piece), objective.layout.params, allow_unused=True)
            for p, g in zip(objective.layout.params, gradients, strict=True):
                touched[id(p)] = touched[id(p)] or g is not None
    unused = [name for name, p in zip(objective.layout.names, objective.layout.params, strict=True) if not touched[id(p)]]
    if unused:
        notes.append(f"{len(unused)} unused (zero rows): {', '.join(unused[:3])}")
    frozen = sum(not p.requires_grad for p in objective.model.parameters())
    if frozen:
        notes.append(f"{frozen} frozen (left out)")
    # a tied parameter has several names in the model, and one place in the vector
    tied = len(list(objective.model.named_parameters(remove_duplicate=False))) - len(list(objective.model.named_parameters()))
    if tied:
        notes.append(f"{tied} tied (counted once)")
    integers = [name for name, b in objective.model.named_buffers() if not b.is_floating_point()]
    if integers:
        notes.append(f"{len(integers)} integer buffers (left alone)")
    if shared := _shared_memory(objective):
        said = f"parameters share memory but are separate ({shared}): a step moves both, while each counts as free in the Hessian"
        return "failed", said, "tie them by assigning one parameter to both places, or clone one"
    if equal := _equal_values(objective):
        notes.append(f"{equal} hold equal values but are separate: if they are to be tied, assign one parameter to both places")
    head = f"{len(objective.layout.names)} tensors, {objective.num_parameters:,} parameters"
    return ("note" if notes else "ok"), "; ".join([head, *notes])


def _shared_memory(objective: Objective) -> str:
    """Names of two parameters that lie in the same memory, as ``a.data = b.data`` makes them; empty if there are none."""
    places: dict[int, str] = {}
    for name, p in zip(objective.layout.names, objective.layout.params, strict=True):
        if p.numel() and (first := places.setdefault(p.data_ptr(), name)) != name:
            return f"{first} and {name}"
    return ""


def _equal_values(objective: Objective) -> str:
    """Names of two matrices with the same entries: a tie that was lost, for instance in a copy; empty if there are none."""
    matrices: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
    for name, p in zip(objective.layout.names, objective.layout.params, strict=True):
        if p.ndim > 1 and p.numel() > 1 and float(p.detach().std()) > 0:  # not constants, which are often alike
            for other, q in matrices.setdefault((p.shape, p.dtype, p.device), []):
                if torch.equal(p, q):
                    return f"{other} and {name}"
            matrices[p.shape, p.dtype, p.device].append((name, p))
    return ""


def _check_smoothness(hessian: HessianOperator, seed: int) -> Outcome:
    if kinked := _names(hessian, _KINKED):
        said = f"piecewise-smooth layers: {kinked}. The Hessian is that between kinks; curvature that sits in the kinks is not in it"
        return "note", said
    return "ok", "no layer with kinks among the known modules"


def _check_weights(hessian: HessianOperator, seed: int) -> Outcome:
    objective = hessian.objective
    text = (
        f"the loss is a {objective.reduction} over {objective.num_targets:g} {objective.counted} in {objective.num_batches} "
        f"batch{'' if objective.num_batches == 1 else 'es'}"
    )
    if objective.couples_samples:
        return "note", f"{text}; batch statistics couple the samples of a batch"
    if not objective.may_separate:
        said = f"{text}, but is no mean or sum over samples: it cannot be cut into smaller batches"
        # one batch need not be cut, unless memory asks for it
        return ("note" if objective.num_batches == 1 else "warning"), said, "use one batch, or a loss that averages over samples"
    return "ok", text


def _check_memory(hessian: HessianOperator, seed: int) -> Outcome:
    free = human_bytes(available_memory(hessian.device))
    try:
        made = plan(hessian.objective, "measure", seed=seed)
    except OutOfMemoryError as error:
        return "warning", f"measure() does not fit: {error}", "select parameters with params=, or keep vectors in a file with offload="
    kept = made.choices.get("graphs", "")
    text = f"graphs: {kept}, {free} free; measure() takes about {made.num_matvecs} products, {made.seconds:.2g} s"
    return ("ok" if kept.startswith("all kept") else "note"), f"{text} and {human_bytes(made.peak_bytes)} at most"


CHECKS: dict[str, Callable[[HessianOperator, int], Outcome]] = {
    "repeatable": _check_repeats,
    "symmetric": _check_symmetric,
    "linear": _check_linear,
    "finite differences": _check_finite_differences,
    "rounding": _check_rounding,
    "weights": _check_weights,
    "parameters": _check_parameters,
    "randomness": _check_randomness,
    "hooks": _check_hooks,
    "attention": _check_attention,
    "smoothness": _check_smoothness,
    "memory and time": _check_memory,
}
