"""The monitor: right numbers beside the right limits, nothing changed in the training, nothing raised into it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import dense_hessian, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk

X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3


def network(*, dropout: float = 0.0, norm: bool = False, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(8, 3)
        )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    monitor: sk.Monitor | None,
    *,
    steps: int = 12,
    start: int = 0,
    after_backward: Callable[[], None] = lambda: None,
) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        chosen = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:12]
        loss = F.cross_entropy(model(X[chosen]), Y[chosen])
        loss.backward()
        after_backward()
        if monitor is not None:
            monitor.step((X[chosen], Y[chosen]), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def state_of(*things: Any) -> list[Any]:
    """Every tensor of models and optimizers, and the random states."""
    found: list[Any] = [torch.get_rng_state()]
    for thing in things:
        state = thing.state_dict()
        found += [state[key].clone() if isinstance(state[key], Tensor) else copy.deepcopy(state[key]) for key in sorted(state)]
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


# -- the numbers -----------------------------------------------------------------------------------------------------------
def test_every_metric_of_one_batch_equals_its_dense_reference() -> None:
    problem = mlp()
    x, y = problem.batches[0]
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.5)
    metrics = ["lambda_max", "lambda_min", "top_k", "trace", "directional_sharpness", "batch_sharpness", "critical_sharpness", "per_layer"]
    monitor = sk.Monitor(problem.model, optimizer, loss=problem.loss, every=1, tol=1e-6, top_k=3, metrics=metrics)
    record = monitor.step((x, y))
    H = dense_hessian(lambda: problem.unit(problem.model(x), y) / problem.count(y), problem.params)
    eigenvalues = torch.linalg.eigvalsh(H).flip(0)
    loss = problem.unit(problem.model(x), y) / problem.count(y)
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, problem.params)])
    along = float(g @ H @ g / (g @ g))
    assert record is not None and not record.failed
    assert record.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert record["lambda_max"].value == pytest.approx(float(eigenvalues[0]), rel=1e-6)
    assert record["lambda_min"].value == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert [record[f"lambda_{j}"].value for j in (1, 2, 3)] == pytest.approx(eigenvalues[:3].tolist(), rel=1e-6)
    assert abs(record["trace"].value - float(H.trace())) <= 4 * record["trace"].stderr + 1e-9
    assert record["directional_sharpness"].value == pytest.approx(along, rel=1e-6), "without a buffer yet, the step is the gradient"
    assert record["batch_sharpness"].value == pytest.approx(along, rel=1e-6)
    assert record["critical_sharpness"].value > 0
    first = len(problem.params[0].reshape(-1)) + len(problem.params[1].reshape(-1))
    assert record["lambda_max/0"].value == pytest.approx(float(torch.linalg.eigvalsh(H[:first, :first])[-1]), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "name", "limit"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "lambda_max", 20.0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "lambda_max", 38.0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "lambda_max", 38.0 / 2.8),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3), "lambda_max", 19.7),
        (lambda p: torch.optim.Adam(p, lr=0.1), "preconditioned_lambda_max", 380.0),
    ],
    ids=["SGD", "momentum", "Nesterov", "weight decay", "Adam"],
)
def test_the_limit_is_that_of_the_optimizer_in_use(make: Any, name: str, limit: float) -> None:
    model = network()
    optimizer = make(model.parameters())
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=[name])
    train(model, optimizer, monitor, steps=3)
    assert monitor.history[-1][name].limit == pytest.approx(limit)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), {"lambda_max", "batch_sharpness", "critical_sharpness"}),
        (lambda p: torch.optim.AdamW(p, lr=0.01), {"preconditioned_lambda_max", "lambda_max", "critical_sharpness"}),
        (lambda p: Lion(p, lr=0.001), {"generalized_sharpness", "critical_sharpness"}),
    ],
    ids=["SGD", "AdamW", "Lion"],
)
def test_what_is_measured_by_default_means_something_for_the_optimizer(make: Any, names: set[str]) -> None:
    model = network()
    optimizer = make(model.parameters())
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1)
    train(model, optimizer, monitor, steps=3)
    assert set(monitor.history[-1].values) == names and not monitor.history[-1].failed


class Lion(torch.optim.Optimizer):
    """Signs of a mix of the gradient and its mean; known by its name."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(torch.sign(0.9 * mean + 0.1 * p.grad), alpha=group["lr"])
                mean.lerp_(p.grad, 0.01)


def test_steps_of_a_fixed_length_are_measured_in_their_own_norm_against_the_gradients_dual_norm() -> None:
    model = network().double()
    optimizer, x, y = Lion(model.parameters(), lr=1e-3), X.double(), Y
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=["generalized_sharpness", "batch_sharpness"])
    for step in range(16):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if step == 15:
            params = list(model.parameters())
            dual = sum(float(p.grad.abs().sum()) for p in params if p.grad is not None)
            objective = sk.Objective(model, (x, y), loss=F.cross_entropy)
            best = sk.generalized_sharpness(objective, optimizer, num_starts=8).value
        monitor.step((x, y), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    measured = monitor.history[-1]["generalized_sharpness"]
    assert measured.limit == pytest.approx(2 * dual / 1e-3)
    assert 0.93 * best <= measured.value <= 1.05 * best, "from the last direction, in ten products"
    assert measured.num_matvecs <= 10 and measured.method == "lower bound in the linf norm"
    assert monitor.history[-1]["batch_sharpness"].limit is None, "it is along the gradient, and the step goes elsewhere"
    assert "2 ||g||_* / lr" in monitor.history.header["condition"]
    said = monitor.history.findings()[0]
    assert said.startswith("sharpness in the steps' norm went from"), said
    again = sk.Monitor(model, Lion(model.parameters(), lr=1e-3), loss=F.cross_entropy, every=1, metrics=["generalized_sharpness"])
    again.load_state_dict(monitor.state_dict())


def test_an_optimizer_without_steps_of_a_fixed_length_has_no_sharpness_in_their_norm() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=["generalized_sharpness"])
    with pytest.warns(Warning, match="none that sharpkit knows"):
        train(model, optimizer, monitor, steps=1)
    assert "preconditioned_lambda_max" in monitor.history[0].failed["generalized_sharpness"]


def test_an_adaptive_optimizers_curvature_is_that_of_its_live_state_and_comes_after_its_first_step() -> None:
    model = network().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = X.double(), Y
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, tol=1e-6)
    for step in range(4):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if step == 3:
            params = list(model.parameters())
            H = dense_hessian(lambda: F.cross_entropy(model(x), y), params)
            states = [optimizer.state[p] for p in params]
            t = float(states[0]["step"])
            D = torch.cat([((s["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8).reshape(-1) for s in states])
            truth = float(torch.linalg.eigvalsh(H / (D[:, None] * D).sqrt())[-1])
        monitor.step((x, y), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    assert "preconditioned_lambda_max" not in monitor.history[0]
    assert monitor.history[-1]["preconditioned_lambda_max"].value == pytest.approx(truth, rel=1e-6)


def test_a_scheduler_moves_the_limit_and_groups_have_their_own() -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.5, "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    monitor = sk.Monitor(
        model, optimizer, loss=F.cross_entropy, every=1, metrics=["groups", "preconditioned_lambda_max", "lambda_max"], tol=1e-4
    )
    for _ in range(2):
        train(model, optimizer, monitor, steps=1)
        scheduler.step()
    first, second = monitor.history
    assert (first["lambda_max/group0"].limit, second["lambda_max/group0"].limit) == (pytest.approx(20.0), pytest.approx(40.0))
    assert first["lambda_max/group1"].limit == pytest.approx(3.8 / 0.5)
    assert first["lambda_max"].limit is None, "one lambda_max has no one limit where groups have other rates"
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:12]
    fresh = network()
    H = dense_hessian(lambda: F.cross_entropy(fresh(X[chosen]), Y[chosen]), list(fresh.parameters()))
    n = 6 * 8 + 8
    rates = torch.cat([torch.full((n,), 0.1), torch.full((len(H) - n,), 0.5 / 1.9)])  # momentum 0.9 allows 1.9 times the curvature
    scaled = (H * rates.sqrt()).T * rates.sqrt()
    assert first["lambda_max/group1"].value == pytest.approx(float(torch.linalg.eigvalsh(H[n:, n:])[-1]), rel=1e-3)
    assert first["preconditioned_lambda_max"].value == pytest.approx(float(torch.linalg.eigvalsh(scaled)[-1]) / 0.1, rel=1e-3)


def test_a_probe_set_serves_the_slow_metrics() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = ["probe_lambda_max", "batch_sharpness", "gradient_noise_interaction", "trace", "noise_scale"]
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=metrics, probe=(X, Y), tol=1e-4)
    record = monitor.step((X[:12], Y[:12]))
    H = dense_hessian(lambda: F.cross_entropy(model(X), Y), list(model.parameters()))
    assert record is not None and not record.failed, record
    assert record["probe_lambda_max"].value == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)
    # 200 batches in any case: an error small beside the one under test
    expected = sk.batch_sharpness(sk.Objective(model, (X, Y), loss=F.cross_entropy), batch_size=12, max_batches=200, rtol=1e-3)
    found = record["batch_sharpness"]
    assert abs(found.value - expected.value) <= 3 * math.hypot(found.stderr, expected.stderr)
    assert "probe set" in found.method


def test_micro_batches_of_one_step_are_one_batch() -> None:
    def measured(batch: Any) -> float:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        record = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=["lambda_max"], tol=1e-6).step(batch)
        assert record is not None and record.num_samples == 24
        return record["lambda_max"].value

    assert measured([(X[:7], Y[:7]), (X[7:], Y[7:])]) == pytest.approx(measured((X, Y)), rel=1e-5)


def test_micro_batches_that_come_after_a_single_batch_weigh_what_their_losses_average_over() -> None:
    """A single batch need not say how several weigh: that is learned from the first list."""

    def masked(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, y, mask = batch
        return ((model(x) - y) ** 2 * mask).sum() / mask.sum()

    def drawn(seed: int, kept: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(12, size, generator=g, dtype=torch.float64) for size in (4, 1))
        return x, y, (torch.arange(12) < kept).double()[:, None]

    model = nn.Linear(4, 1).double()
    monitor = sk.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), closure=masked, every=1, metrics=["lambda_max"], tol=1e-6)
    monitor.step(drawn(0, 12))
    record = monitor.step([drawn(1, 3), drawn(2, 11)])
    x, _, mask = (torch.cat(parts) for parts in zip(drawn(1, 3), drawn(2, 11), strict=True))
    rows = torch.cat([x, torch.ones(24, 1, dtype=torch.float64)], dim=1)
    assert record is not None
    assert record["lambda_max"].value == pytest.approx(float(torch.linalg.eigvalsh(2 * rows.T @ (mask * rows) / 14)[-1]), rel=1e-5)


def test_own_functions_are_metrics() -> None:
    def gradient_norm(objective: sk.Objective, optimizer: torch.optim.Optimizer) -> float:
        return float(objective.gradient()[1].norm())

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=["lambda_max", gradient_norm]).step((X, Y))
    loss = F.cross_entropy(model(X), Y)
    norm = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()
    assert record is not None and record["gradient_norm"].value == pytest.approx(float(norm), rel=1e-5)


# -- leaves no trace -----------------------------------------------------------------------------------------------------------
def sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.1, momentum=0.9)


def adamw(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=1e-2)


ALL = ["lambda_max", "batch_sharpness", "critical_sharpness", "directional_sharpness", "noise_scale", "trace", "lambda_min", "groups"]
CASES: dict[str, Any] = {
    "SGD": lambda: (network(), sgd),
    "AdamW": lambda: (network(), adamw),
    "dropout": lambda: (network(dropout=0.3), sgd),
    "BatchNorm": lambda: (network(norm=True), sgd),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_is_bit_identical_with_and_without_the_monitor(case: str, mode: str) -> None:
    states = []
    for watched in (False, True):
        torch.manual_seed(5)
        model, make = CASES[case]()
        optimizer = make(model.parameters())
        monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=2, metrics=ALL, mode=mode) if watched else None
        losses = train(model, optimizer, monitor)
        states.append([losses, *state_of(model, optimizer), model.training])
        if monitor is not None:
            assert len(monitor.history) == 6
            assert not {name for r in monitor.history for name in r.failed}, monitor.history[-1].failed
    assert same(*states)


def run_special(kind: str, watched: bool) -> list[Any]:
    torch.manual_seed(5)
    model = network(dropout=0.2)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    trained: Any = torch.compile(model, backend="aot_eager") if kind == "compiled" else model
    optimizer = adamw(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=kind == "autocast and GradScaler")
    monitor = sk.Monitor(trained, optimizer, loss=F.cross_entropy, every=2, metrics=["lambda_max", "critical_sharpness", "noise_scale"])
    for step in range(8):
        micro = []
        for part in range(2 if kind == "accumulation" else 1):
            chosen = torch.randperm(24, generator=torch.Generator().manual_seed(10 * step + part))[:12]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast and GradScaler"):
                loss = F.cross_entropy(trained(X[chosen]), Y[chosen])
            scaler.scale(loss).backward()
            micro.append((X[chosen], Y[chosen]))
        if kind == "clipping":
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if watched:
            monitor.step(micro if kind == "accumulation" else micro[0], loss=loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)
        average.update_parameters(model)
    if watched:
        assert len(monitor.history) == 4
        assert not monitor.history[-1].failed, monitor.history[-1].failed
    grads = [p.grad.clone() for p in model.parameters()]
    return [*state_of(model, optimizer, average, scaler), grads]


@pytest.mark.parametrize("kind", ["autocast and GradScaler", "accumulation", "clipping", "compiled"])
def test_training_is_bit_identical_also_with(kind: str) -> None:
    assert same(run_special(kind, False), run_special(kind, True))


def test_the_order_of_a_shuffling_loader_is_not_changed() -> None:
    seen = []
    for watched in (False, True):
        torch.manual_seed(7)
        model = network()
        optimizer = sgd(model.parameters())
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=6, shuffle=True)
        monitor, order = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=["lambda_max", "noise_scale"]), []
        for _ in range(2):
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
                order.append(x.clone())
                if watched:
                    monitor.step((x, y))
                optimizer.step()
                optimizer.zero_grad()
        seen.append(order)
    assert same(*seen)


# -- resuming ------------------------------------------------------------------------------------------------------------------
def comparable(history: sk.MonitorHistory) -> list[Any]:
    """All that does not depend on the clock."""
    return [(r.step, r.loss, r.lr, {n: (m.value, m.stderr, m.limit, m.num_matvecs) for n, m in r.values.items()}) for r in history]


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_resumed_run_continues_the_series_exactly(make: Any, tmp_path: Any) -> None:
    metrics = ["lambda_max", "batch_sharpness", "critical_sharpness", "noise_scale"]

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, sk.Monitor]:
        model = network(dropout=0.1)
        optimizer = make(model.parameters())
        return model, optimizer, sk.Monitor(model, optimizer, loss=F.cross_entropy, every=2, metrics=metrics)

    torch.manual_seed(0)
    model, optimizer, monitor = fresh()
    train(model, optimizer, monitor, steps=7)
    torch.save([model.state_dict(), optimizer.state_dict(), monitor.state_dict(), torch.get_rng_state()], tmp_path / "saved.pt")
    train(model, optimizer, monitor, steps=7, start=7)
    expected = comparable(monitor.history)

    model, optimizer, monitor = fresh()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    for thing, state in zip((model, optimizer, monitor), saved[:3], strict=True):
        thing.load_state_dict(state)
    torch.set_rng_state(saved[3])
    train(model, optimizer, monitor, steps=7, start=7)
    assert comparable(monitor.history) == expected


def test_a_state_of_another_version_is_refused() -> None:
    model = network()
    monitor = sk.Monitor(model, sgd(model.parameters()), loss=F.cross_entropy)
    with pytest.raises(ValueError, match="version"):
        monitor.load_state_dict({"version": 99})


# -- failures ----------------------------------------------------------------------------------------------------------------------
def test_a_failing_measurement_is_recorded_warned_of_once_and_never_stops_training() -> None:
    def broken(objective: sk.Objective, optimizer: torch.optim.Optimizer) -> float:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    plain, watched = network(), network()
    expected = train(plain, sgd(plain.parameters()), None)
    optimizer = sgd(watched.parameters())
    monitor = sk.Monitor(watched, optimizer, loss=F.cross_entropy, every=2, metrics=["lambda_max", broken])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train(watched, optimizer, monitor) == expected
    assert [str(w.message).startswith("the monitor could not measure broken at step 0") for w in caught] == [True]
    assert all("out of memory" in record.failed["broken"] for record in monitor.history)
    assert all("lambda_max" in record for record in monitor.history)


def test_a_nan_loss_is_recorded_and_later_batches_are_measured() -> None:
    model = network()
    monitor = sk.Monitor(model, sgd(model.parameters()), loss=F.cross_entropy, every=1, metrics=["lambda_max"])
    monitor.step((X, Y))
    with pytest.warns(sk.SharpkitWarning, match="NonFiniteError"):
        record = monitor.step((X * math.nan, Y))
    assert record is not None and "NonFiniteError" in record.failed["lambda_max"]
    again = monitor.step((X, Y))
    assert again is not None and "lambda_max" in again


def test_a_batch_of_the_wrong_kind_is_a_warning_not_a_crash() -> None:
    model = network()
    monitor = sk.Monitor(model, sgd(model.parameters()), loss=F.cross_entropy, every=1)
    with pytest.warns(sk.SharpkitWarning, match="could not measure objective at step 0: TypeError: .*input, target"):
        monitor.step({"x": X})


def test_a_metric_that_can_never_work_is_left_out_after_one_warning() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=["lambda_max", "noise_scale"])
    with pytest.warns(sk.SharpkitWarning, match="left out from now on"):
        monitor.step((X[:2], Y[:2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step((X[:2], Y[:2]))
    assert "4" in monitor.history[-1].failed["noise_scale"], "the reason stays on record"


def test_parameters_unfrozen_in_mid_run_are_taken_in() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = sgd(model.parameters())
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=["lambda_max"], tol=1e-5)
    before = monitor.step((X, Y))
    model[0].requires_grad_(True)
    after = monitor.step((X, Y))
    assert before is not None and after is not None and not after.failed
    assert after["lambda_max"].value > before["lambda_max"].value
    H = dense_hessian(lambda: F.cross_entropy(model(X), Y), list(model.parameters()))
    assert after["lambda_max"].value == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"every": "often"}, "every must be"),
        ({"budget": 5}, "share of training time"),
        ({"metrics": ["sharpness"]}, "there is no metric 'sharpness'; there are lambda_max"),
        ({"metrics": []}, "at least one"),
        ({"metrics": ["probe_lambda_max"]}, "pass probe="),
        ({"tol": 2.0}, "it is a relative error"),
        ({"max_samples": 0}, "max_samples"),
    ],
)
def test_settings_without_sense_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        sk.Monitor(model, sgd(model.parameters()), loss=F.cross_entropy, **settings)


def test_an_optimizer_that_is_none_is_refused_and_an_unknown_one_has_no_limit() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        sk.Monitor(model, object(), loss=F.cross_entropy)  # type: ignore[arg-type]
    optimizer = torch.optim.Rprop(model.parameters())
    record = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1, metrics=["lambda_max"]).step((X, Y))
    assert record is not None and record["lambda_max"].limit is None


# -- sinks, records, reading ------------------------------------------------------------------------------------------------------
def test_sinks_get_a_header_and_every_record_and_a_broken_one_stops_nothing() -> None:
    class Sink:
        def __init__(self) -> None:
            self.lines: list[Any] = []

        def open_run(self, header: dict[str, Any]) -> None:
            self.lines.append(header)

        def write(self, document: dict[str, Any]) -> None:
            self.lines.append(document)

        def close(self) -> None:
            self.lines.append({"kind": "closed"})

    def full(document: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    model, sink = network(), Sink()
    optimizer = sgd(model.parameters())
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=4, sinks=[sink, full], metrics=["lambda_max"])
    with pytest.warns(sk.SharpkitWarning, match="No space left"):
        train(model, optimizer, monitor)
    monitor.close()
    assert [line["kind"] for line in sink.lines] == ["monitor_run", *["monitor_record"] * 3, "closed"]
    assert sink.lines[0]["condition"].startswith("SGD: lambda_max(H) <= 2 (1 + beta) / lr")
    assert [line["step"] for line in sink.lines[1:-1]] == [0, 4, 8]


def test_history_reads_as_series_and_survives_its_document() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=3)
    train(model, optimizer, monitor)
    series = monitor.history.series("lambda_max")
    assert series.steps.tolist() == [0, 3, 6, 9]
    assert series.limits.tolist() == pytest.approx([38.0] * 4)
    back = sk.MonitorHistory.from_dict(monitor.history.to_dict())
    assert comparable(back) == comparable(monitor.history)
    assert "of the limit 38" in repr(back[-1])
    with pytest.raises(KeyError, match="never measured; measured were lambda_max"):
        back.series("trace")
    with pytest.raises(KeyError, match="was not measured at step 9"):
        back[-1]["trace"]


def test_a_monitor_stepped_by_a_hook_of_the_model_measures_nothing_and_says_why() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, metrics=["lambda_max"], every=1)
    model[1].register_forward_hook(lambda *_: [monitor.step((X, Y)), None][1])
    with pytest.warns(sk.SharpkitWarning, match="started while another one evaluates it"):
        model(X)
    assert len(monitor.history) == 1, "not one more for each forward pass of the measurement"
    assert "forward hook" in " ".join(monitor.history[-1].failed.values())


# -- what is said ------------------------------------------------------------------------------------------------------------------
def watched(
    rates: Callable[[int], float], *, loss_of: Callable[[int, float], float] = lambda _, loss: loss, groups: int = 1, tensor: bool = False
) -> sk.Monitor:
    """Least squares by gradient descent, lambda_max 4 or so, a record every 20 steps."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)).double() if groups > 1 else nn.Linear(4, 1).double()
    x = torch.randn(32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True) + torch.randn(32, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sets = [{"params": part.parameters()} for part in model] if groups > 1 else model.parameters()
    optimizer = torch.optim.SGD(sets, lr=0.05)  # type: ignore[arg-type]
    monitor = sk.Monitor(model, optimizer, loss=F.mse_loss, every=20, metrics=["preconditioned_lambda_max", "lambda_max"][groups == 1 :])
    for step in range(75):
        optimizer.param_groups[-1]["lr"] = torch.tensor(rates(step)) if tensor else rates(step)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        monitor.step((x, y), loss=loss_of(step, loss.item()))
        optimizer.step()
    monitor.close()
    return monitor


def spikes(monitor: sk.Monitor) -> list[str]:
    return [event.text for event in monitor.history.events if event.kind == "loss_spike"]


@pytest.mark.parametrize("tensor", [False, True], ids=["", "rates are tensors"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_spike_after_a_rate_raised_between_measurements_in_any_group_is_explained_by_it(groups: int, tensor: bool) -> None:
    monitor = watched(lambda step: 30.0 if 45 <= step < 48 else 0.05, groups=groups, tensor=tensor)
    (text,) = spikes(monitor)[:1]
    assert "Explained by the learning rate" in text and "look at the data" not in text
    assert watched(lambda _: 0.05, groups=groups).history.events == ()


def test_a_spike_at_a_steady_rate_is_not_explained_by_it() -> None:
    (text,) = spikes(watched(lambda _: 0.05, loss_of=lambda step, loss: 50 * loss if step == 46 else loss))
    assert "Not explained by the limit" in text and "raised" not in text


def test_what_the_last_losses_show_is_told_on_closing() -> None:
    monitor = watched(lambda _: 0.05, loss_of=lambda step, loss: math.nan if step >= 70 else loss)
    assert monitor.history[-1].step == 75 and not monitor.history[-1].values
    assert [text.partition(".")[0] for text in spikes(monitor)] == ["The loss is nan at step 70"]
    assert "The loss is nan at step 70." in monitor.history.findings()
    records = len(monitor.history)
    monitor.close()
    assert len(monitor.history) == records
    quiet = watched(lambda _: 0.05)
    assert quiet.history[-1].values and not any("The loss" in sentence for sentence in quiet.history.findings())


def test_a_loss_that_the_monitor_finds_not_finite_itself_is_told() -> None:
    model = network()
    monitor = sk.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=F.cross_entropy, every=1)
    monitor.step((X, Y))
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.warns(sk.SharpkitWarning, match="could not measure"):
        monitor.step((X, Y))
    assert [text.partition(".")[0] for text in spikes(monitor)] == ["The loss is nan at step 1"]


def test_no_sinks_may_be_said_with_none() -> None:
    model = network()
    monitor = sk.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=F.cross_entropy, every=1, sinks=None)
    assert monitor.step((X, Y)) is not None
    monitor.close()


def test_a_density_comes_with_its_record_and_is_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (torch.randn(16, 3).double(), torch.randint(2, (16,)))
    path, options = tmp_path / "run.jsonl", {"every": 2, "mode": "eval", "metrics": ["lambda_max", "density"]}
    with sk.Monitor(model, optimizer, loss=F.cross_entropy, sinks=path, **options) as monitor:
        for _ in range(3):
            monitor.step(batch)
    hessian = sk.HessianOperator(sk.Objective(model, batch, loss=F.cross_entropy))
    dense = torch.stack([hessian @ row for row in torch.eye(hessian.size, dtype=torch.float64)])
    eigenvalues = torch.linalg.eigvalsh(dense)
    *_, last = monitor.history
    assert last.density is not None
    below = float((eigenvalues < -1e-3 * eigenvalues.abs().max()).double().mean())
    assert abs(last["negative_mass"].value - below) <= 3 * last["negative_mass"].stderr + 1e-9
    assert float(last.density.nodes.max()) == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    read = sk.sinks.read_run(path).records[-1]
    assert sk.Record.from_dict(read).density.to_dict() == last.density.to_dict()  # type: ignore[union-attr]
    assert sk.Record.from_dict(last.to_dict()).to_dict() == last.to_dict()


def test_the_header_names_the_unit_of_every_metric() -> None:
    assert all(metric.unit for metric in sk.METRICS.values())
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = sk.Monitor(model, optimizer, loss=F.mse_loss, metrics=["lambda_max", "noise_scale", lambda objective, optimizer: 1.0])
    units = monitor.history.header["units"]
    assert (units["lambda_max"], units["noise_scale"], units["<lambda>"]) == ("loss / parameter^2", "samples", "not said")
    assert set(units) >= {"loss", "lr", "overhead"}
