"""Every argument of the public functions with values of the wrong kind or size, and with unusual ones that mean something."""

from __future__ import annotations

import fractions
import importlib.util
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._fuzz import Input

# fmt: off
# Tables with many values to a line.
Values = list[Any]
_NOT_A_NUMBER: Values = ["3", None, [1], {}, 2j, object(), torch.tensor([1, 2]), b"1", float("nan")]


# -- kinds of arguments -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """Values that mean nothing for an argument, values that mean the usual one, and values that are open."""

    wrong: Values
    alike: Values = field(default_factory=list)
    open: Values = field(default_factory=list)


def whole(usual: int, *, least: int = 1, none: bool = False, most: int | None = None) -> Kind:
    wrong = [v for v in _NOT_A_NUMBER if not (v is None and none)] + [least - 1, least - 7, usual + 0.5, True, math.inf, -math.inf]
    wrong += [most + 1] if most is not None else []
    return Kind(wrong, [np.int64(usual), np.int32(usual), torch.tensor(usual)], [float(usual), *([None] if none else [])])


def real(usual: float, *, above: float = 0.0, below: float = math.inf, none: bool = False, edge: Values | None = None) -> Kind:
    wrong = [v for v in _NOT_A_NUMBER if not (v is None and none)] + [above - 1.0, -math.inf, True]
    wrong += [above] if edge is None else edge
    wrong += [below, below + 1] if below < math.inf else []
    alike = [
        np.float64(usual), np.float32(usual), torch.tensor(usual, dtype=torch.float64), fractions.Fraction(usual).limit_denominator(10**6),
    ]
    return Kind(wrong, alike, [None] if none else [])


def seed() -> Kind:
    return Kind(["0", None, [0], 0.5, 2j, float("nan"), 2**70, object(), torch.Generator(), True], [np.int64(0), np.uint8(0)], [-1, 2**40])


def choice(*values: str) -> Kind:
    return Kind(
        [values[0].upper(), values[0] + "x", "", 3, [values[0]], {}, b"auto", object(), 1.5, *([None] if None not in values else [])]
    )


def flag() -> Kind:
    return Kind(["yes", "no", 2, -1, 0.5, [], "", math.nan, object()], [], [np.bool_(False), 0, 1])


CALLBACK = Kind([3, "print", [], True, object(), {"a": 1}], [], [None])
FUNCTION = Kind([3, "mse", [], True, object(), nn.Linear, int, {"a": 1}])


# -- the usual problem --------------------------------------------------------------------------------------------------------
def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64), torch.randint(2, (n,), generator=generator)


def objective(n: int = 24, **settings: Any) -> sk.Objective:
    return sk.Objective(network(), data(n), loss=F.cross_entropy, **settings)


def sgd(model: nn.Module, lr: Any = 0.1, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, **settings)


def optimizers(model: nn.Module, *, none: bool, rates: bool = True) -> Kind:
    scheduler = torch.optim.lr_scheduler.StepLR(sgd(model), 10)
    wrong: Values = [3, "sgd", torch.optim.SGD, [sgd(model)], {}, model, lambda p: sgd(model), object(), scheduler, True]
    broken = []
    for lr in (-1.0, math.nan, math.inf, "0.1"):
        each = sgd(model)
        each.param_groups[0]["lr"] = lr
        broken.append(each)
    without = sgd(model)
    without.param_groups[0].pop("lr")
    fits: Values = [sgd(model, torch.tensor(0.1)), torch.optim.LBFGS(model.parameters()), torch.optim.Rprop(model.parameters())]
    lr_none = sgd(model)
    lr_none.param_groups[0]["lr"] = None
    strange: Values = [sgd(network(3)), *broken]  # where there is a model that it must train
    return Kind([*wrong, *(strange if rates else []), *([] if none else [None])], [], [*fits, without, lr_none, sgd(model, 0.0), *strange])


OBJECTIVES = Kind([None, 3, "model", network(), data(), object(), F.cross_entropy, torch.eye(3), [objective()], sk.Objective])


def matrix(n: int = 12) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return q @ torch.diag(torch.linspace(-1.0, 5.0, n, dtype=torch.float64)) @ q.T


def operators() -> Kind:
    from scipy import sparse
    from scipy.sparse.linalg import aslinearoperator

    a = matrix()
    lower = torch.tril(torch.ones(12, 12, dtype=torch.float64))
    wrong: Values = [
        None, 3, "A", [[1.0]], {}, object(), network(), torch.randn(3, 4), torch.randn(3), torch.randn(2, 2, 2), torch.tensor(1.0),
        torch.zeros(0, 0), a.to(torch.complex128), a.numpy().astype(complex), lower, lower.numpy(), a * math.nan, a + math.inf, lambda v: v,
        lambda: 1, torch.eye, np.eye(3)[:2], np.array(["a"]), np.array([[None]]), sparse.csr_array(np.ones((3, 2))), a.to("meta"),
        torch.Tensor, sk.HessianOperator, sk.Objective, sparse.csr_array(a.numpy() * 1j), np.zeros((0, 0)),
    ]
    alike: Values = [
        a.clone(), a.numpy(), sk.as_operator(a), sparse.csr_array(a.numpy()), aslinearoperator(a.numpy()), nn.Parameter(a),
        np.asfortranarray(a.numpy()), a.T,
    ]
    open_: Values = [
        a.half(), a.to(torch.bfloat16), a > 0.0, (a > 10).int(), a.to_sparse(), objective(), a.numpy().tolist(), torch.eye(1), a.float(),
    ]
    return Kind(wrong, alike, open_)


# -- the functions ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Subject:
    """A public function, its usual call, the kinds of its arguments, and what its usual result is by another road.

    Attributes:
        true: result -> whether it is right for usual arguments; None compares with nothing but the absence of errors.
    """

    name: str
    call: Callable[..., Any]
    kinds: dict[str, Kind]
    true: Callable[[Any], bool] | None = None

    def inputs(self) -> Iterator[Input]:
        for argument, kind in self.kinds.items():
            for values, meaning in ((kind.wrong, None), (kind.alike, self.true or True), (kind.open, True)):
                for value in values:
                    yield Input(self.name, f"{argument}={shown(value)}", _with(self.call, argument, value), meaning)


def _with(call: Callable[..., Any], argument: str, value: Any) -> Callable[[], Any]:
    return lambda: call(**{argument: value})


def shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)} {value.dtype}" if value.numel() != 1 else f"tensor({value.tolist()})"
    if isinstance(value, np.ndarray):
        return f"array{value.shape} {value.dtype}"
    text = re.sub(r"\s+| at 0x[0-9a-f]+", " ", repr(value))  # one line, and the same on every run
    return f"{type(value).__name__} {text[:60]}"


def near(a: float, b: float, rtol: float) -> bool:
    return abs(a - b) <= rtol * max(abs(a), abs(b), 1e-12)


def subjects() -> list[Subject]:
    a = matrix()
    values = torch.linalg.eigvalsh(a)
    top = float(values[-1])
    of_matrix = {"operator": operators(), "seed": seed(), "callback": CALLBACK, "max_matvecs": whole(500, none=True)}
    of_matrix["max_seconds"] = real(100.0, none=True)
    o = objective()
    model: Any = o.model
    tried = {"objective": OBJECTIVES, "seed": seed(), "callback": CALLBACK}
    optimizer = optimizers(model, none=True)
    needed = optimizers(model, none=False)
    vectors = Kind(
        [
            3, "v", [1.0], torch.randn(5), torch.randn(2, 12), torch.zeros(12, 0), torch.randn(12, 2, 2), torch.full((12,), math.nan),
            torch.ones(12, dtype=torch.complex64), np.ones(12), torch.ones(12, device="meta"), True,
        ],
        [torch.ones(12, dtype=torch.float64), torch.ones(12, 2), torch.ones(12).half(), torch.ones(12).int()], [None, torch.zeros(12)],
    )

    def on(function: Callable[..., Any], *usual: Any, **settings: Any) -> Callable[..., Any]:
        def call(**changed: Any) -> Any:
            first = [changed.pop(name) if name in changed else value for name, value in usual]
            return function(*first, **{**settings, **changed})

        return call

    mat, obj, opt = ("operator", a), ("objective", o), ("optimizer", sgd(model))
    norm, total = float(a.norm()), float(a.trace())
    found = [
        Subject(
            "eigenpairs", on(sk.eigenpairs, mat, k=2),
            {
                **of_matrix, "k": whole(2, most=12), "which": choice("largest", "smallest", "magnitude"), "tol": real(1e-3, below=1.0),
                "initial": vectors, "basis_size": whole(12, none=True), "offload": flag(),
            },
            lambda r: len(r.values) == 2 and near(float(r.values[0]), top, 2e-3),
        ),
        Subject(
            "power_iteration", on(sk.power_iteration, mat, k=1),
            {**of_matrix, "k": whole(1, most=12), "tol": real(1e-3, below=1.0), "initial": vectors},
            lambda r: near(float(r.values[0]), top, 2e-3),
        ),
        Subject(
            "trace", on(sk.trace, mat, rtol=0.1),
            {
                **of_matrix, "rtol": real(0.1, edge=[-0.1]), "atol": real(0.0, above=0.0, edge=[-0.1]),
                "method": choice("auto", "hutchinson"), "num_matvecs": whole(12, least=2, none=True),
            },
            lambda r: abs(r.value - total) <= 6 * r.stderr + 0.3 * abs(total),
        ),
        Subject(
            "diagonal", on(sk.diagonal, mat), {**of_matrix, "num_probes": whole(100, least=2)},
            lambda r: bool(((r.value - a.diag()).abs() <= 7 * r.stderr + 0.5).all()),
        ),
        Subject(
            "frobenius_norm", on(sk.frobenius_norm, mat, rtol=0.1), {**of_matrix, "rtol": real(0.1)}, lambda r: near(r.value, norm, 0.5)
        ),
        Subject(
            "spectral_density", on(sk.spectral_density, mat, num_probes=3, num_steps=12),
            {**of_matrix, "num_probes": whole(3), "num_steps": whole(12), "distribution": choice("rademacher", "normal")},
            lambda r: near(float(r.frobenius_norm.value), norm, 0.5),
        ),
        Subject(
            "as_operator", on(sk.as_operator, ("matrix", a)),
            {
                "matrix": operators(), "size": whole(12, none=True),
                "dtype": Kind(["float32", 3, torch.int64, torch.complex64, float, np.float32, "x"], [torch.float64], [torch.float32, None]),
                "device": Kind(["cuda", "gpu", 3.5, [], object(), "cpu:x", -7], ["cpu"], [None]), "check": flag(),
            },
            lambda r: torch.allclose(r.to_dense(), a),
        ),
        Subject(
            "SymmetricOperator @", on(lambda v: sk.as_operator(a) @ v, ("vector", torch.ones(12, dtype=torch.float64))),
            {
                "vector": Kind(
                    [
                        3, None, "v", [1.0] * 12, torch.ones(5), torch.ones(1, 12), torch.ones(12, 1, 1), torch.ones(12),
                        torch.ones(12).half(), torch.ones(12, device="meta"), np.ones(12), torch.full((12,), math.nan, dtype=torch.float64),
                        torch.ones(12).int(), torch.tensor(1.0), torch.ones(12, dtype=torch.complex128),
                    ],
                    [], [torch.zeros(12, dtype=torch.float64), torch.ones(12, 0, dtype=torch.float64)],
                )
            },
        ),
        Subject(
            "SymmetricOperator.block", on(lambda p: sk.HessianOperator(o).block(p), ("pattern", "0.*")),
            {
                "pattern": Kind(
                    [3, "nothing.*", [], [3], object(), lambda: True, lambda n, p: False, "", b"0.*", torch.ones(3), {"a": 1}, ["0.*", 5]],
                    ["0.*", ["0.*"], ("0.weight", "0.bias"), lambda n, p: n.startswith("0.")], [None],
                )
            },
        ),
        Subject(
            "SymmetricOperator + - * /",
            on(lambda x: sk.as_operator(a) * x if not isinstance(x, sk.SymmetricOperator) else sk.as_operator(a) + x, ("other", 2.0)),
            {
                "other": Kind(
                    ["2", None, [1], math.nan, math.inf, 2j, torch.ones(3), object(), True, sk.as_operator(torch.eye(3)), a],
                    [2, np.float32(2), torch.tensor(2.0)], [0, sk.as_operator(a)],
                )
            },
        ),
        Subject(
            "SymmetricOperator", on(lambda s, **kw: _Twice(s, **kw).to_dense(), ("size", 3)),
            {
                "size": whole(3), "dtype": Kind(["float32", 3, torch.int64, torch.complex64, float, None], [torch.float64]),
                "device": Kind(["cuda", "gpu", 3.5, [], None], ["cpu"]),
            },
        ),
        Subject(
            "measure", on(sk.measure, obj, num_probes=3, num_steps=8),
            {
                **tried, "optimizer": optimizer, "num_probes": whole(3, least=3), "num_steps": whole(8, least=2),
                "tol": real(1e-3, below=1.0), "max_matvecs": whole(500, none=True), "max_seconds": real(100.0, none=True),
            },
            lambda r: near(r.lambda_max.value, _top(o), 5e-3),
        ),
        Subject(
            "per_layer", on(sk.per_layer, obj, trace_rtol=0.5),
            {**tried, "tol": real(1e-3, below=1.0), "trace_rtol": real(0.5), "name": Kind([3, [], object(), b"x"], ["model"], [""])},
        ),
        Subject("examine", on(sk.examine, obj), tried),
        Subject(
            "stable_learning_rate", on(sk.stable_learning_rate, ("lambda_max", 4.0)),
            {
                "lambda_max": Kind(
                    ["4", None, [4.0], 4j, math.nan, math.inf, object(), torch.ones(2), True, b"4"],
                    [4, np.float32(4), torch.tensor(4.0), fractions.Fraction(4)], [-1.0, 0.0],
                ),
                "optimizer": optimizers(model, none=True, rates=False), "momentum": real(0.0, below=1.0, edge=[-0.1]),
                "dampening": real(0.0, edge=[]), "nesterov": flag(), "weight_decay": real(0.0, edge=[-1.0]), "decoupled": flag(),
                "error": real(0.1, none=True, edge=[-0.1]),
            },
            lambda r: near(float(r), 0.5, 1e-6),
        ),
        Subject(
            "critical_learning_rate", on(sk.critical_learning_rate, obj, opt),
            {
                "objective": OBJECTIVES, "optimizer": needed, "guess": real(0.5, none=True), "rtol": real(0.0625, below=1.0),
                "gradient": Kind(
                    [
                        3, "g", torch.ones(3), torch.ones(26, 1), torch.full((26,), math.nan), np.ones(26),
                        torch.ones(26, dtype=torch.complex64), torch.ones(26, device="meta"),
                    ],
                    [], [None, torch.ones(26), torch.zeros(26)],
                ),
            },
        ),
        Subject("directional_sharpness", on(sk.directional_sharpness, obj, opt), {"objective": OBJECTIVES, "optimizer": needed}),
        Subject(
            "batch_sharpness", on(sk.batch_sharpness, obj, batch_size=4, rtol=0.5, max_batches=20),
            {
                "objective": OBJECTIVES, "seed": seed(), "batch_size": whole(4, most=24), "optimizer": optimizer, "rtol": real(0.5),
                "max_batches": whole(20),
            },
        ),
        Subject(
            "gradient_noise_interaction", on(sk.gradient_noise_interaction, obj, batch_size=4, rtol=0.5, max_batches=20),
            {"objective": OBJECTIVES, "seed": seed(), "batch_size": whole(4, most=24), "rtol": real(0.5), "max_batches": whole(20)},
        ),
        Subject(
            "gradient_noise_scale", on(sk.gradient_noise_scale, obj),
            {
                "objective": OBJECTIVES, "seed": seed(), "group_size": whole(4, none=True, most=24), "with_curvature": flag(),
                "max_groups": whole(64),
            },
        ),
        Subject(
            "batch_size_tests", on(sk.batch_size_tests, obj),
            {
                "objective": OBJECTIVES, "seed": seed(), "norm": real(0.5), "inner_product": real(0.5), "orthogonality": real(5.84),
                "batch_size": whole(4, none=True, most=24),
            },
        ),
        Subject(
            "sharpness_bracket", on(sk.sharpness_bracket, obj, rtol=0.5),
            {**tried, "rtol": real(0.5), "start": whole(8), "max_samples": whole(24, none=True), "k": whole(5)},
        ),
        Subject(
            "learning_rate_curve", on(sk.learning_rate_curve, ("objective", None), ("optimizer", None)),
            {
                **{k: Kind(v.wrong) for k, v in tried.items()}, "optimizer": Kind(needed.wrong),
                "batch_sizes": Kind(
                    [
                        3, "48", [4], [], [4, 4], [0, 8], [4, -8], [4.5, 8], ["4", "8"], [4, 100], [None, 4], [True, 4], object(),
                        [4, math.nan], torch.tensor([4.5, 8.0]), {},
                    ]
                ),
                "pilot": Kind(whole(100).wrong), "calibrate": Kind(["yes", 3, [3.5], [-1], ["a"], object(), [100], [None], 2.5, math.nan]),
                "max_samples": Kind(whole(4096).wrong),
            },
        ),
        Subject(
            "scale_learning_rate", on(sk.scale_learning_rate, ("lr", 0.1), ("batch_size", 8), ("new_batch_size", 16)),
            {
                "lr": real(0.1), "batch_size": real(8), "new_batch_size": real(16), "rule": choice("linear", "sqrt"),
                "momentum": real(0.9, below=1.0, none=True, edge=[-0.1]),
                "betas": Kind(
                    [
                        0.9, (0.9,), "ab", (0.9, 1.5), (0.9, -1), (0.9, None), (math.nan, 0.9), ("a", "b"), [[], []], (0.9, 0.99, 0.9),
                        object(),
                    ],
                    [(0.9, 0.99), [0.9, 0.99]], [None],
                ),
                "eps": real(1e-8, none=True, edge=[-1e-8]), "weight_decay": real(0.01, none=True, edge=[-1.0]),
            },
        ),
        Subject(
            "safe_damping", on(sk.safe_damping, ("lr", 0.1), ("batch_size", 8), ("bulk_trace", 3.0)),
            {"lr": real(0.1), "batch_size": real(8), "bulk_trace": Kind([*_NOT_A_NUMBER, math.inf, True], [3, np.float32(3)], [-1.0, 0.0])},
        ),
        Subject(
            "refined_schedule", on(lambda n, **kw: sk.refined_schedule(n, **kw)(0.5), ("norms", [1.0, 2.0, 1.0])),
            {
                "norms": Kind(
                    [3, "abc", [], None, [math.nan], [-1.0, 1.0], ["a"], [0.0, 0.0], [math.inf, 1], object(), [None, 1], [[1.0]], {}, [1j]],
                    [[1, 2, 1], np.array([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0]), (1.0, 2.0, 1.0)], [[1.0]],
                ),
                "power": whole(2),
            },
        ),
        Subject(
            "UpdateRule", on(lambda **kw: sk.UpdateRule(**kw).max_learning_rate(4.0)),
            {
                "momentum": real(0.0, below=1.0, edge=[-0.1]), "dampening": real(0.0, edge=[]), "nesterov": flag(),
                "weight_decay": real(0.0, edge=[-1.0]), "decoupled": flag(), "adaptive": flag(), "name": Kind([3, None, [], object()]),
                "matrix": Kind([3, None, [], object()]),
            },
            lambda r: near(float(r), 0.5, 1e-6),
        ),
        Subject(
            "register_optimizer", on(sk.register_optimizer, ("cls", _Own), rule=lambda s: sk.UpdateRule()),
            {
                "cls": Kind([3, None, "SGD", sgd(model), nn.Linear, object, []]), "rule": Kind(FUNCTION.wrong[:5]),
                "preconditioner": Kind(FUNCTION.wrong[:5], [], [None]),
            },
        ),
        Subject(
            "register_metric", on(sk.register_metric, ("name", "fuzzed"), ("function", lambda o, p: 1.0)),
            {
                "name": Kind([3, None, "", [], object(), b"x"]), "function": Kind([*FUNCTION.wrong[:5], None]),
                "gradients": real(4.0, edge=[]), "limit": Kind(FUNCTION.wrong[:5], [], [None]),
            },
        ),
        Subject(
            "register_section", on(sk.register_section, ("kind", "fuzzed"), ("make", lambda d: sk.Section("x"))),
            {"kind": Kind([3, None, "", [], object()]), "make": Kind([*FUNCTION.wrong[:5], None])},
        ),
        *_operators(o, on), *_documents(o), *_training(), *_transfer(),
    ]
    return found


def _operators(o: sk.Objective, on: Callable[..., Any]) -> Iterable[Subject]:
    a, ones, model = matrix(), torch.ones(26, dtype=torch.float64), o.model
    kept = {
        "objective": OBJECTIVES, "retain": Kind(["yes", "Auto", None, 2, [], 0.5, object()], [], [True, False, "auto"]),
        "memory_limit": real(1e9, none=True, edge=[-1.0]),
    }

    def times(cls: Any) -> Callable[..., Any]:
        return on(lambda objective, **kw: cls(objective, **kw) @ ones, ("objective", o))

    for name in ("HessianOperator", "GaussNewtonOperator", "EmpiricalFisherOperator", "GradientCovarianceOperator"):
        yield Subject(name, times(getattr(sk, name)), kept)
    likelihood = Kind([3, "normal", "", [], True, object(), b"x"], [], [None, "categorical", "gaussian"])
    yield Subject("FisherOperator", times(sk.FisherOperator), {**kept, "num_draws": whole(1), "likelihood": likelihood, "seed": seed()})
    adam = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(data()[0]), data()[1]).backward()  # type: ignore[no-untyped-call]
    adam.step()
    model.zero_grad()
    vector = Kind(
        [
            3, "d", [1.0], torch.ones(5), torch.ones(26, 1), -ones, ones * math.nan, torch.ones(26, dtype=torch.complex64), np.ones(26),
            0 * ones, torch.ones(26, device="meta"), True,
        ],
        [ones], [ones.float(), None],
    )
    base = Kind([None, 3, "H", model, o, object(), torch.eye(3), []])

    def preconditioned(base: Any, **kw: Any) -> Any:
        return sk.PreconditionedOperator(base, **(kw or {"optimizer": adam})) @ ones

    yield Subject(
        "PreconditionedOperator", on(preconditioned, ("base", sk.HessianOperator(o))),
        {
            "base": base, "diagonal": vector,
            "optimizer": Kind(
                [3, "adam", torch.optim.Adam, [], object(), lambda p: adam, torch.optim.Adam(network(4).parameters())], [adam],
                [None, sgd(model)],
            ),
        },
    )
    yield Subject(
        "AdaptiveOperator",
        on(lambda base, **kw: sk.AdaptiveOperator(base, **kw) @ torch.ones(12, dtype=torch.float64), ("base", sk.as_operator(a))),
        {
            "base": Kind([None, 3, "H", model, o, object(), []]),
            "weights": Kind(
                [
                    3, "w", [1.0], torch.ones(5), torch.ones(12, 1), np.ones(12), True, torch.full((12,), math.nan),
                    torch.ones(12, device="meta"), torch.ones(12, dtype=torch.complex64),
                ],
                [], [None, torch.ones(12, dtype=torch.float64)],
            ),
        },
    )
    op = sk.as_operator(a)
    yield Subject(
        "SymmetricOperator.deflate", on(op.deflate, ("vectors", torch.ones(12, 1, dtype=torch.float64)), ("values", torch.ones(1))),
        {
            "vectors": Kind(
                [3, None, "v", [1.0], torch.ones(5, 1), torch.ones(12), np.ones((12, 1)), torch.ones(12, 1, dtype=torch.complex64)]
            ),
            "values": Kind([3, None, "v", [1.0], torch.ones(2), torch.tensor(1.0), np.ones(1), torch.ones(1, dtype=torch.complex64)]),
        },
    )
    yield Subject(
        "UpdateRule.max_learning_rate", sk.UpdateRule().max_learning_rate,
        {"curvature": Kind(["4", None, [4.0], 4j, object(), True, torch.ones(2)], [4, np.float32(4)], [0.0, -1.0, math.inf, math.nan])},
    )
    yield Subject(
        "UpdateRule.max_curvature", sk.UpdateRule().max_curvature,
        {"lr": Kind(["4", None, [4.0], 4j, object(), True, torch.ones(2), 0.0, -1.0], [4, np.float32(4)], [math.inf, math.nan])},
    )
    density = sk.spectral_density(a, num_probes=2, num_steps=5)
    yield Subject("SpectralDensity.plot", density.plot, {"ax": Kind([3, "ax", [], object(), True, {}])})
    record = sk.Record(0, {})
    yield Subject("Record[]", lambda name: record[name], {"name": Kind(["zzz", 3, None, object()])})


def _top(o: sk.Objective) -> float:
    x, y = data()
    params = list(o.model.parameters())
    flat = torch.cat([p.reshape(-1) for p in params]).detach()

    def f(w: Tensor) -> Tensor:
        named, start = {}, 0
        for name, p in o.model.named_parameters():
            named[name] = w[start : start + p.numel()].view_as(p)
            start += p.numel()
        return F.cross_entropy(torch.func.functional_call(o.model, named, (x,)), y)

    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(f, flat))[-1])


class _Twice(sk.SymmetricOperator):
    def matvec(self, vector: Tensor) -> Tensor:
        return 2 * vector


class _Own(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


# -- reports, run files, sinks --------------------------------------------------------------------------------------------------
def _documents(o: sk.Objective) -> Iterable[Subject]:
    folder = Path(tempfile.mkdtemp(prefix="sharpkit-fuzz-"))
    measured = sk.trace(torch.eye(3), rtol=0.1)
    density = sk.spectral_density(matrix(), num_probes=2, num_steps=5)
    path = str(folder / "x.html")
    places = [3, None, [], 1.5, object(), "", str(folder), str(folder / "none" / "x.html"), b"\0", "a\0b", True, {}]
    made = sk.UpdateRule()

    def report(**changed: Any) -> Any:
        where, results = changed.pop("path", path), changed.pop("results", [density])
        return sk.report(where, results, **changed)

    kinds = {
        "path": Kind(places, [Path(path), path]),
        "results": Kind(
            [3, None, "abc", [3], [None], ["x"], [object()], [{}], made, [made], [float("nan")], [torch.ones(3)]],
            [[density], (density,), iter([density])], [[], density, [measured]],
        ),
        "title": Kind([3, None, [], object(), b"x"], ["t"], [""]), "command": Kind([3, [], object(), b"x"], ["c"], [None]),
        "seed": Kind(["0", [0], 0.5, object(), math.nan], [0], [None]),
        "notes": Kind([3, None, [3], "note", object(), [None]], [["a"], ()]),
        "machine": Kind([3, "m", [1], object(), {1: 2}, {"a": 3}], [{"a": "b"}], [None]),
    }
    yield Subject("report", report, kinds)
    documents: Values = [
        3, None, "x", [], {}, {"kind": "zzz"}, {"kind": 3}, {"kind": "estimate"}, {"kind": "sharpness", "version": 99}, object(), b"x",
        math.nan, {"version": 1},
    ]
    for cls in (
        sk.Sharpness, sk.Estimate, sk.SpectralDensity, sk.LearningRateCurve, sk.transfer.Verdict, sk.MonitorHistory, sk.Record,
        sk.RaceResult,
    ):
        if hasattr(cls, "from_dict"):
            yield Subject(f"{cls.__name__}.from_dict", lambda document, cls=cls: cls.from_dict(document), {"document": Kind(documents)})
    for name, make in (("jsonl", sk.sinks.jsonl), ("csv", sk.sinks.csv)):
        file = str(folder / f"run.{name}")

        def sink(make: Any = make, file: Any = file, **changed: Any) -> Any:
            made = make(changed.pop("path", file), **changed)
            made.close()
            return made

        yield Subject(
            f"sinks.{name}", sink,
            {
                "path": Kind([3, None, [], 1.5, object(), "", str(folder), b"\0", "a\0b", True, {}], [Path(file)]),
                "sync_seconds": real(5.0, edge=[-1.0]), "max_waiting": whole(1000),
            },
        )
    yield Subject(
        "sinks.tensorboard", lambda target: sk.sinks.tensorboard(target).close(), {"target": Kind([3, None, [], object(), True, 1.5])}
    )
    yield Subject("sinks.wandb", lambda run: sk.sinks.wandb(run).close(), {"run": Kind([3, None, [], object(), True, "x"])})
    for name in ("expectation", "total"):
        function = getattr(density, name)
        yield Subject(
            f"SpectralDensity.{name}", lambda function, of=function: of(function),
            {
                "function": Kind(
                    [
                        3, None, "x", [], lambda: 1, lambda x: None, lambda x: "a", lambda x: x[:1, :1, None], lambda x: x[:1, :2],
                        lambda x: x * 1j, lambda x, y: x, lambda x: {},
                    ],
                    [np.exp, torch.exp, lambda x: x], [lambda x: 1.0],
                )
            },
        )
    yield Subject(
        "SpectralDensity.density", lambda grid=(0.0, 1.0), bandwidth=None: density.density(grid, bandwidth),
        {
            "grid": Kind(
                [None, "x", object(), ["a"], [1j], np.ones((2, 2)), torch.ones(2, 2), [None], {}], [[0.0, 1.0], torch.linspace(0, 1, 3)],
                [3.0, []],
            ),
            "bandwidth": real(0.1, none=True),
        },
    )
    yield Subject(
        "Objective.with_params", lambda params: o.with_params(params),
        {"params": Kind([3, "nothing.*", [], [3], object(), "", b"x", lambda: 1], ["0.*", ["0.*"]], [None])},
    )


# -- monitor, learner, race ------------------------------------------------------------------------------------------------------
def _training() -> Iterable[Subject]:
    x, y = data(16)

    def parts(changed: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
        """Model, optimizer, batch and loss of a step, taken out of what is changed or as usual."""
        model = changed.pop("model") if "model" in changed else network()
        given = "optimizer" in changed
        optimizer = changed.pop("optimizer") if given else sgd(model if isinstance(model, nn.Module) else network())
        if callable(optimizer) and not isinstance(optimizer, type):
            optimizer = optimizer(model)
        return model, optimizer, changed.pop("batch", (x, y)), changed.pop("step_loss", None)

    def monitored(**changed: Any) -> Any:
        model, optimizer, batch, loss = parts(changed)
        settings = {"loss": F.cross_entropy, "every": 1, "metrics": ["lambda_max"], **changed}
        with sk.Monitor(model, optimizer, **settings) as monitor:
            return monitor.step(batch, loss=loss)

    batches = Kind(
        [
            3, None, "x", object(), (x,), (x, y, y), {"a": x}, [x], (x, y[:3]), (x[:, :2], y), (x.float(), y), (x.int(), y),
            (x, y.double()), [], (x[:0], y[:0]), (x * math.nan, y), (x, y + 5), (None, y), (x, None), ("a", "b"), (x.to("meta"), y), x,
            (x.to(torch.complex64), y), (y, x),
        ],
        [[(x, y)], (x, y), [x, y]],
    )
    broken = [lambda m, lr=lr: _rated(m, lr) for lr in (-1.0, math.nan, math.inf, "0.1")]
    wrong_optimizers: Values = [3, None, "sgd", torch.optim.SGD, [], object(), lambda m: m, lambda m: sgd(network(3)), True, *broken]
    common = {
        "loss": Kind([3, "mse", nn.CrossEntropyLoss, [], True, object()], [nn.CrossEntropyLoss()], [lambda o, t: F.cross_entropy(o, t)]),
        "closure": Kind([3, "mse", lambda m, b: F.cross_entropy(m(b[0]), b[1])]), "count": Kind([3, "x", [], True]),
        "params": Kind([3, "nothing.*", [], [3], object(), ""], ["0.*"], [None]), "mode": choice("train", "eval"),
        "autocast": Kind(["bf16", "bfloat16", 16, True, torch.float64, torch.int8, float, object(), "float16"], [], [None, torch.bfloat16]),
        "process_group": Kind(["x", 3, object()], [False], [None]), "seed": seed(),
        "model": Kind([3, "m", nn.Linear, lambda x: x, [network()], object(), {}]),
    }
    yield Subject(
        "Monitor", monitored,
        {
            **common, "optimizer": Kind(wrong_optimizers), "batch": batches,
            "metrics": Kind(
                [
                    3, "lambda_max", [], ["lambda"], [3], [None], {}, object(), [nn.Linear(2, 2)], [lambda: 1], [lambda o, p: "x"],
                    [lambda o, p: None], ["lambda_max", "zzz"], ["probe_lambda_max"],
                ],
                [["lambda_max"], ("lambda_max",)], [None, ["lambda_max", lambda o, p: 1.0]],
            ),
            "every": whole(1), "budget": real(0.05, below=1.0), "tol": real(0.02, below=1.0), "max_samples": whole(16, none=True),
            "max_interval": whole(1000), "top_k": whole(5),
            "probe": Kind([3, "x", object(), (x,), [], (x, y[:3]), iter([])], [], [None, (x, y)]),
            "sinks": Kind([3, object(), [3], [None], True, 1.5, {}], [[]], [None]),
            "step_loss": Kind(["1", [1], object(), torch.ones(3), True, 1j], [0.5, torch.tensor(0.5)], [None, math.nan]),
        },
    )

    def learned(**changed: Any) -> Any:
        model, optimizer, batch, loss = parts(changed)
        learner = sk.CurvatureLearner(optimizer, model=model, **{"loss": F.cross_entropy, "total_steps": 40, **changed})
        for _ in range(4):
            learner.step(batch, loss=loss)
        return learner

    yield Subject(
        "CurvatureLearner", learned,
        {
            **common, "optimizer": Kind(wrong_optimizers), "batch": batches, "total_steps": whole(40, least=20), "interval": whole(5),
            "budget": real(0.05, below=1.0), "safety": real(0.25, below=1.0), "warmup": real(0.1, below=1.0),
            "decay": Kind(["lin", 3, [], object(), None, True], ["linear"], [lambda z: 1.0]),
            "schedule": Kind([3, "cosine", [], object(), lambda: 1, lambda o: None, lambda o: 3, True], [], [None]),
            "momentum": choice("keep", "polyak"),
            "bulk": Kind(["x", 0.5, -1, None, [], math.nan, object(), True, 1j], [1000], ["mean", "median"]), "per_group": flag(),
            "max_lr": Kind([-1, 0, "1", math.nan, None, [], 1j, object(), True], [math.inf, 1e9], [0.1]),
            "step_loss": Kind(["1", [1], object(), torch.ones(3), True, 1j], [0.5, torch.tensor(0.5)], [None, math.nan]),
        },
    )

    settings = {name: kind for name, kind in common.items() if name not in ("model", "params")}
    settings["closure"] = Kind([3, "mse", [], object(), nn.Linear], [], [lambda m, b: m(b)])
    spans = {"budget": real(0.05, below=1.0), "process_group": Kind(["x", 3, object()], [False], [None])}
    for module in ("lightning", "transformers"):
        if importlib.util.find_spec(module) is None:
            continue
        yield Subject(
            f"{module}.SharpnessCallback", partial(_callback, module, "SharpnessCallback"),
            {**settings, **spans, "every": whole(1), "tol": real(0.02, below=1.0), "max_interval": whole(1000), "top_k": whole(5)},
        )
        yield Subject(
            f"{module}.LearnerCallback", partial(_callback, module, "LearnerCallback"),
            {
                **settings, **spans, "interval": whole(5), "safety": real(0.25, below=1.0), "warmup": real(0.1, below=1.0),
                "per_group": flag(), "momentum": choice("keep", "polyak"),
                "max_lr": Kind([-1, 0, "1", math.nan, None, [], 1j, object(), True], [math.inf]),
            },
        )

    def problem(**changed: Any) -> Any:
        given = {"model": network, "optimizer": torch.optim.SGD, "data": [(x, y)], "loss": F.cross_entropy, **changed}
        return sk.RaceProblem(**given)

    datas = Kind(
        [
            3, None, "x", object(), [], iter([(x, y)]), (b for b in [(x, y)]), [(x,)], [3], {"x": x}, [None],
            torch.utils.data.TensorDataset(x, y),
        ],
        [[(x, y)], (x, y)],
    )
    yield Subject(
        "RaceProblem", problem,
        {
            "model": Kind([3, None, "x", network(), []]), "optimizer": Kind([3, None, "sgd", [], sgd(network())]), "data": datas,
            "loss": Kind([3, "mse", nn.CrossEntropyLoss, []]), "closure": Kind([3, "x", lambda m, b: 1]),
        },
    )

    def raced(**changed: Any) -> Any:
        kept = {key: changed.pop(key) for key in ("max_gradients", "seeds", "rates", "callback", "problem") if key in changed}
        given = kept.pop("problem") if "problem" in kept else problem(**changed)
        return sk.race(given, **{"max_gradients": 60, "seeds": 1, "rates": [0.1, 0.2], **kept})

    rates = Kind([3, "ab", [], [0.1, -1], [0.1, "b"], [math.nan, 0.1], [None], object(), [[0.1]], [0.1, 1j], [True, 0.1]])
    yield Subject(
        "race", raced,
        {
            "problem": Kind([3, None, "x", object(), network(), {}]), "max_gradients": Kind(whole(60).wrong), "seeds": _SEEDS,
            "rates": rates, "callback": Kind(CALLBACK.wrong),
            "model": Kind([lambda s: None, lambda: network(), lambda s: 3, nn.Linear, lambda s: nn.Identity()]),
            "optimizer": Kind([lambda p, lr: None, lambda p: sgd(network()), lambda p, lr: 3]),
            "loss": Kind([lambda o, t: None, lambda o, t: 1.0, lambda o: o, lambda o, t: o, F.mse_loss]),
        },
    )


_SEEDS = Kind([0, -1, 1.5, "3", None, [], [1.5], ["a"], [-1], True, object(), [True], math.nan, [None], 2j, [2**70]])


def _callback(module: str, name: str, **settings: Any) -> Any:
    return getattr(importlib.import_module(f"sharpkit.integrations.{module}"), name)(**settings)  # imported when one is drawn


def _rated(model: nn.Module, lr: Any) -> torch.optim.Optimizer:
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = lr
    return optimizer


# -- transfer ---------------------------------------------------------------------------------------------------------------------
def _transfer() -> Iterable[Subject]:
    x, y = data(16)

    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()

    def optimizer(model: nn.Module, width: int) -> torch.optim.Optimizer:
        return sgd(model)

    sizes = Kind(
        [
            3, None, "48", [], [4], [4, 4], [0, 8], [-4, 8], [4.5, 8], ["4", "8"], object(), [None, 8], [True, 8], {}, [math.nan, 8],
            torch.tensor([4.5, 8.0]),
        ],
        [(4, 8), np.array([4, 8]), torch.tensor([4, 8]), range(4, 6)],
    )
    kinds = {
        "build": Kind([3, None, "x", build(4), [], lambda w: None, lambda w: 3, lambda: build(3), lambda w: nn.Identity(), nn.Identity()]),
        "widths": sizes,
        "optimizer": Kind(
            [3, None, "sgd", [], sgd(build(4)), lambda m, w: None, lambda m, w: 3, lambda m: sgd(m), lambda m, w: sgd(build(3))]
        ),
        "data": Kind(
            [
                3, None, "x", object(), [], iter([(x, y)]), [(x,)], [3], (x, y[:3]), (x[:, :2], y), (x.float(), y), [None], (x, y.double()),
                (x, y + 7), (x * math.nan, y),
            ],
            [[(x, y)], (x, y)],
        ),
        "loss": Kind(
            [
                3, "mse", nn.CrossEntropyLoss, [], lambda o, t: None, lambda o, t: 1.0, lambda o: o, lambda o, t: o,
                lambda o, t: o.detach().sum(),
            ],
            [nn.CrossEntropyLoss()],
        ),
        "closure": Kind([3, "x", lambda m, b: F.cross_entropy(m(b[0]), b[1])]), "seeds": _SEEDS, "callback": CALLBACK,
    }

    def call(function: Callable[..., Any], **usual: Any) -> Callable[..., Any]:
        def of(**changed: Any) -> Any:
            given = {
                "build": build, "widths": [4, 8], "optimizer": optimizer, "data": [(x, y)], "loss": F.cross_entropy, "seeds": 1, **usual,
                **changed,
            }
            return function(given.pop("build"), given.pop("widths"), **given)

        return of

    def diagnose(build: Any, widths: Any, **given: Any) -> Any:
        return sk.transfer.diagnose(build, widths=widths, **given)

    steps, dimension = whole(2), {"dimension": choice("width", "depth")}
    t = sk.transfer
    yield Subject(
        "transfer.coordinate_check", call(t.coordinate_check, steps=2), {**kinds, "steps": steps, "tolerance": real(0.25), **dimension}
    )
    yield Subject("transfer.find_culprits", call(t.find_culprits, steps=2), {**kinds, "steps": steps, **dimension})
    yield Subject(
        "transfer.learning_rate_transfer", call(t.learning_rate_transfer, steps=4, factors=[0.5, 1.0, 2.0]),
        {
            **_wrong(kinds), "steps": _only_wrong(whole(4)),
            "factors": Kind([3, "ab", [], [0.0, 1.0], [-1.0, 1.0], ["a"], [math.nan, 1.0], [None], object(), [[1.0]], [1j]]),
            "store": Kind([3, [], object(), 1.5, True, b"\0", "a\0b"]), "until_certain": _only_wrong(flag()),
            "max_runs": _only_wrong(whole(3, none=True)), **_wrong(dimension),
        },
    )
    yield Subject(
        "transfer.sharpness_transfer", call(t.sharpness_transfer, steps=4, every=2),
        {
            **_wrong(kinds), "steps": _only_wrong(whole(4)), "every": _only_wrong(whole(2)),
            "probe": Kind([3, "x", object(), (x,), [], (x, y[:3])]), "warmup": _only_wrong(whole(1, least=0, none=True)),
            "lr_factor": _only_wrong(real(1.0)), "top_k": _only_wrong(whole(1)), "preconditioned": Kind(["yes", 3, None, [], object()]),
            "with_trace": _only_wrong(flag()), "with_ntk": _only_wrong(flag()), "tol": _only_wrong(real(0.01, below=1.0)),
            **_wrong(dimension),
        },
    )
    yield Subject(
        "transfer.diagnose", call(diagnose),
        {
            **_wrong(kinds), "depths": Kind([3, "48", [], [4], [0, 2], [1.5, 2], object()]), "mode": choice("quick", "full"),
            "store": Kind([3, [], object(), 1.5, True, b"\0"]),
        },
    )
    yield Subject(
        "transfer.Family",
        lambda **kw: t.Family(**{"build": build, "optimizer": optimizer, "data": [(x, y)], "loss": F.cross_entropy, **kw}),
        {
            "build": Kind([3, None, "x", build(4), []]), "optimizer": Kind([3, None, "sgd", [], sgd(build(4))]),
            "data": Kind([3, None, "x", object(), [], iter([(x, y)]), [(x,)], [3], [None]], [(x, y)]),
            "loss": Kind([3, "mse", nn.CrossEntropyLoss, []]), "closure": Kind([3, "x", lambda m, b: 1]), **dimension,
        },
    )
    yield Subject(
        "transfer.log_slope", lambda sizes: t.log_slope(sizes),
        {
            "sizes": Kind(
                [
                    3, None, [], "x", {"a": [1.0], "b": [2.0]}, {0: [1.0], 8: [2.0]}, {-4: [1.0], 8: [1.0]}, {4: ["a"], 8: ["b"]}, object(),
                    [(4, 1.0)],
                ],
                [{4: [1.0, 1.1], 8: [2.0, 2.1]}],
                [{}, {4: [1.0]}, {4: [], 8: []}, {4: 1.0, 8: 2.0}, {4: [-1.0], 8: [1.0]}, {4: [math.nan], 8: [1.0]}],
            )
        },
    )


def _only_wrong(kind: Kind) -> Kind:
    return Kind(kind.wrong)


def _wrong(kinds: dict[str, Kind]) -> dict[str, Kind]:
    return {name: Kind(kind.wrong) for name, kind in kinds.items()}
