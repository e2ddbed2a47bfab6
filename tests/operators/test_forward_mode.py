"""J v by recorded forward mode: the same matrices, taken only where it is right and faster, and no trace in the model."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contracts.operator_contract import check_operator
from problems import (
    PROBLEMS,
    LastStep,
    Problem,
    Square,
    built,
    classified,
    conv,
    dense_covariance,
    dense_empirical_fisher,
    dense_gauss_newton,
    gaussian,
    labels,
    mlp,
    relative_error,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from traces import untouched

import sharpkit as sk
from sharpkit.operators import forward_mode
from sharpkit.operators.forward_mode import ForwardMode, Recording


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network is tried, and what is timed second, the recording, takes half the time."""
    ticks = itertools.cycle([0.0, 2.0, 0.0, 1.0])
    monkeypatch.setattr(forward_mode, "seconds_now", lambda device: next(ticks))
    monkeypatch.setattr(ForwardMode, "count", lambda self, output: setattr(self, "_products", self._products + 1))


def gauss_newton(problem: Problem, **settings: Any) -> sk.GaussNewtonOperator:
    return sk.GaussNewtonOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss), **settings)


def tried(operator: Any) -> Any:
    """The operator after three products, the last of which has tried recording."""
    for _ in range(3):
        operator @ gaussian(operator.size, dtype=operator.dtype)
    return operator


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_recorded_products_are_those_of_the_dense_matrix(name: str) -> None:
    problem = PROBLEMS[name]()
    expected = dense_gauss_newton(problem)
    for settings in ({}, {"retain": False}):
        G = tried(gauss_newton(problem, **settings))
        check_operator(G, expected, model=problem.model)
        assert G.forward_mode.used


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    ("kind", "dense"), [(sk.EmpiricalFisherOperator, dense_empirical_fisher), (sk.GradientCovarianceOperator, dense_covariance)]
)
def test_recorded_products_serve_the_other_matrices(kind: Any, dense: Callable[[Problem], Tensor]) -> None:
    problem = conv()
    operator = tried(kind(sk.Objective(problem.model, problem.batches, loss=problem.loss)))
    check_operator(operator, dense(problem), model=problem.model)
    assert operator.forward_mode.used


@pytest.mark.usefixtures("faster")
def test_a_recorded_fisher_matrix_has_the_same_draws() -> None:
    problem = conv()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    twice, recorded = sk.FisherOperator(objective, num_draws=3), sk.FisherOperator(objective, num_draws=3)
    twice.forward_mode.used = False
    assert relative_error(tried(recorded).to_dense(), twice.to_dense()) < 1e-13
    assert recorded.forward_mode.used


@pytest.mark.usefixtures("faster")
def test_dropout_and_batch_statistics_of_train_mode_are_recorded_as_they_are() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Flatten(), nn.Linear(32, 3))

    model, batch = built(make), (gaussian(6, 1, 6, 6), labels(6))
    objective = sk.Objective(model, batch, loss=F.cross_entropy, mode="train")
    twice, recorded = sk.GaussNewtonOperator(objective), sk.GaussNewtonOperator(objective)
    twice.forward_mode.used = False
    V = gaussian(recorded.size, 5)
    with untouched(model):
        products = [torch.stack([recorded @ v for v in V.T.contiguous()], dim=1) for _ in range(2)]
    assert recorded.forward_mode.used
    assert relative_error(products[0], twice @ V) < 1e-12
    assert relative_error(products[1], products[0]) < 1e-14


@pytest.mark.usefixtures("faster")
def test_graphs_recorded_for_other_values_are_made_anew() -> None:
    problem = conv()
    G = tried(gauss_newton(problem))
    with torch.no_grad():
        for p in problem.params:
            p.mul_(1.1)
    assert relative_error(tried(G).to_dense(), dense_gauss_newton(problem)) < 1e-12
    assert G.forward_mode.used


@pytest.mark.usefixtures("faster")
def test_several_recorded_products_at_once_and_strided_vectors() -> None:
    problem = conv()
    problem.batches = [(torch.cat([x for x, _ in problem.batches]), torch.cat([y for _, y in problem.batches]))]
    G, expected = gauss_newton(problem), dense_gauss_newton(problem)
    V = gaussian(G.size, 4)
    for _ in range(3):
        assert relative_error(G @ V[:, 0], expected @ V[:, 0]) < 1e-12
    (product,) = G._kept.values()
    pieces = product.multiply(G.layout.split(V), True)
    total = torch.zeros_like(V)
    G.layout.add_flat_(total, pieces, product.weight)
    assert relative_error(total, expected @ V) < 1e-12


def test_it_is_tried_at_the_third_product_with_convolutions_and_without_group_norms() -> None:
    passes = 0

    def counted(module: Any, inputs: Any, output: Any) -> None:
        nonlocal passes
        passes += 1

    normed = classified(
        "group norm", lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 3)), gaussian(6, 1, 6)
    )
    for problem, tried in ((conv(), True), (mlp(), False), (normed, False)):
        G = gauss_newton(problem)
        vector = gaussian(G.size)
        G @ vector
        assert G.forward_mode.used is None
        handle, passes = problem.model.register_forward_hook(counted), 0
        for _ in range(6):
            G @ vector
        assert (G.forward_mode.used is not None) is tried
        assert ("J v" in G.choices()) is tried
        # three for the trial: both ways, and the graph that is kept; the parts of a batch go one by one where it is kept as before
        assert (passes > 0) is tried
        handle.remove()


@pytest.mark.parametrize("fault", ["slower", "wrong"])
def test_a_recording_that_is_slower_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    problem = conv()
    expected = dense_gauss_newton(problem)
    ticks = itertools.cycle([0.0, 1.0, 0.0, 2.0] if fault == "slower" else [0.0, 2.0, 0.0, 1.0])
    monkeypatch.setattr(forward_mode, "seconds_now", lambda device: next(ticks))
    if fault == "wrong":
        play = Recording.__call__
        monkeypatch.setattr(Recording, "__call__", lambda self, vectors, batched=False: 1.001 * play(self, vectors, batched))
    G = gauss_newton(problem)
    assert relative_error(tried(G).to_dense(), expected) < 1e-12
    assert G.forward_mode.used is False


class WithJvp(Square):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 3 * t  # wrong


class Assigned(nn.Module):
    """Writes into a tensor that is no function of the parameters."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        out[:, 1:] = x[:, 1:]
        return out


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "a custom function": lambda: Applied(Square.apply),
    "a custom function with a wrong forward rule": lambda: Applied(WithJvp.apply),
    "a checkpoint": lambda: Applied(lambda x: checkpoint(torch.tanh, x, use_reentrant=False)),
    "a slice assigned": Assigned,
    "an operation in place": lambda: nn.SiLU(inplace=True),
    "a tensor detached": lambda: Applied(lambda x: x * x.detach().exp()),
    "a dual number unpacked": lambda: Applied(lambda x: x * 2 if forward_ad.unpack_dual(x).tangent is None else x * 3),
    "a value read": lambda: Applied(lambda x: x * 2 if x.sum().item() > -1e9 else x),
}


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("middle", MIDDLES)
def test_what_cannot_be_recorded_goes_as_before(middle: str) -> None:
    model = built(lambda: nn.Sequential(nn.Conv1d(1, 2, 3), MIDDLES[middle](), nn.Flatten(), nn.Linear(8, 3)))
    objective = sk.Objective(model, (gaussian(5, 1, 6), labels(5)), loss=F.cross_entropy, check=False)
    twice, G = sk.GaussNewtonOperator(objective), sk.GaussNewtonOperator(objective)
    twice.forward_mode.used = False
    with untouched(model):
        assert relative_error(tried(G).to_dense(), twice.to_dense()) < 1e-12
    refused = middle.startswith(("a custom", "a checkpoint", "a dual"))
    assert not (refused and G.forward_mode.used)
    assert forward_ad._current_level == -1


@pytest.mark.usefixtures("faster")
def test_an_lstm_in_float32_which_has_no_forward_rule_goes_as_before() -> None:
    model = built(LastStep, dtype=torch.float32)
    objective = sk.Objective(model, (gaussian(5, 3, 2, dtype=torch.float32), labels(5, classes=2)), loss=F.cross_entropy)
    twice, G = sk.GaussNewtonOperator(objective), sk.GaussNewtonOperator(objective)
    twice.forward_mode.used = False
    assert torch.equal(tried(G).to_dense(), twice.to_dense())
    assert G.forward_mode.used is False


@pytest.mark.usefixtures("faster")
def test_a_batch_that_takes_another_branch_is_not_played_back_unseen() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(1, 2, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x).flatten(1)
            return self.head(torch.tanh(z) if x[0, 0, 0] > 0 else torch.sin(z))

    x = gaussian(6, 1, 6).abs()
    x[3:, 0, 0] *= -1
    model, y = built(Branching), labels(6)
    objective = sk.Objective(model, [(x[:3], y[:3]), (x[3:], y[3:])], loss=F.cross_entropy, micro_batch_size=None)
    twice, G = sk.GaussNewtonOperator(objective), sk.GaussNewtonOperator(objective)
    twice.forward_mode.used = False
    assert relative_error(tried(G).to_dense(), twice.to_dense()) < 1e-12
    assert G.forward_mode.used
    used = [product.multiply.__closure__ for product in G._kept.values()]
    jacobians = [cell.cell_contents for closure in used for cell in closure or () if hasattr(cell.cell_contents, "transpose")]
    assert [j._recording is not None for j in jacobians if hasattr(j, "_recording")] == [True, False]


@pytest.mark.usefixtures("faster")
def test_an_interruption_leaves_the_model_as_it_was() -> None:
    class Interrupting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if forward_ad._current_level >= 0:
                raise KeyboardInterrupt
            return x

    model = built(lambda: nn.Sequential(nn.Conv1d(1, 2, 3), Interrupting(), nn.Flatten(), nn.Linear(8, 3)))
    G = sk.GaussNewtonOperator(sk.Objective(model, (gaussian(5, 1, 6), labels(5)), loss=F.cross_entropy))
    vector = gaussian(G.size)
    expected = G @ vector
    G @ vector
    params = list(model.parameters())
    with untouched(model), pytest.raises(KeyboardInterrupt):
        G @ vector
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    assert forward_ad._current_level == -1
    assert relative_error(G @ vector, expected) < 1e-14


@pytest.mark.usefixtures("faster")
def test_the_old_weight_norm_keeps_its_own_tensor() -> None:
    with pytest.warns(FutureWarning):
        model = built(lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv1d(1, 2, 3)), nn.Flatten(), nn.Linear(8, 3)))
    objective = sk.Objective(model, (gaussian(5, 1, 6), labels(5)), loss=F.cross_entropy)
    twice, G = sk.GaussNewtonOperator(objective), sk.GaussNewtonOperator(objective)
    twice.forward_mode.used = False
    assert relative_error(tried(G).to_dense(), twice.to_dense()) < 1e-12
    assert forward_ad.unpack_dual(model[0].weight).tangent is None


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("spare", [0, 10**9])
def test_it_is_not_tried_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, spare: int) -> None:
    problem = conv()
    G = gauss_newton(problem)
    monkeypatch.setattr(G, "free_memory", lambda host=False: 3.0 * G.bytes_kept() + spare)
    assert relative_error(tried(G).to_dense(), dense_gauss_newton(problem)) < 1e-12
    assert G.forward_mode.used is (spare > 0)


@pytest.mark.usefixtures("faster")
def test_what_a_recording_keeps_is_counted() -> None:
    problem = conv()
    G = gauss_newton(problem)
    vector = gaussian(G.size)
    kept = [(G @ vector, G.bytes_kept())[1] for _ in range(4)]
    assert kept[0] == kept[1]
    assert 0 < kept[3] <= kept[0], "no more than the double-backward trick"
    short = gauss_newton(problem, memory_limit=kept[0])
    for _ in range(4):
        short @ vector
    assert short.forward_mode.used
    assert short.bytes_kept() <= kept[0]


def test_nothing_imports_the_compiler() -> None:
    code = """
import sys, torch
import sharpkit as sk
model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 3))
objective = sk.Objective(model, (torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])), loss=torch.nn.functional.cross_entropy)
G = sk.GaussNewtonOperator(objective)
for _ in range(4):
    G @ torch.ones(G.size)
assert G.forward_mode.used is not None
print("torch._dynamo" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
