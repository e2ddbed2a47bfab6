"""A measurement leaves no trace, whatever interrupts it, and nothing around it has an influence on it."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import built, dense_hessian, gaussian, labels, mlp, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset
from traces import untouched

import sharpkit as sk
from sharpkit.objective.guard import turn
from sharpkit.objective.params import moved


class Bad(torch.autograd.Function):
    """Identity whose backward raises what it is told to."""

    error: BaseException | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if Bad.error is not None:
            raise Bad.error
        return g.clone()


class Everything(nn.Module):
    """BatchNorm, dropout, buffers shared, tied, absent and made on the fly, three kinds of randomness, and a switch that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("absent", None)
        self.alias = nn.Module()
        self.alias.register_buffer("steps", self.steps)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.absent = torch.ones(1)
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(1))
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())  # noqa: NPY002
        hidden = self.drop(torch.tanh(self.norm(self.first(x))))
        if self.error is not None:
            raise self.error
        return Bad.apply(self.last(hidden)) * scale


def everything() -> tuple[Everything, torch.optim.Optimizer]:
    """With gradients, optimizer state, hooks and mixed flags as in the middle of a training run."""
    model = built(Everything)
    assert isinstance(model, Everything)
    model._buffers.pop("late", None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    F.cross_entropy(model(gaussian(5, 4)), labels(5)).backward()
    optimizer.step()
    model._buffers.pop("late", None)
    model._buffers["absent"] = None
    model.train()
    model.drop.eval()
    model.last.weight.grad = None
    model.first.weight.register_hook(lambda g: g * 7)
    return model, optimizer


DATA = [(gaussian(5, 4), labels(5)), (gaussian(3, 4, seed=8), labels(3, seed=8))]


def measurements(model: nn.Module, mode: str) -> dict[str, Callable[[], object]]:
    objective = sk.Objective(model, DATA, loss=F.cross_entropy, mode=mode)
    operators = {"hessian": sk.HessianOperator(objective), "rebuilt": sk.HessianOperator(objective, retain=False)}
    operators["gauss_newton"], operators["fisher"] = sk.GaussNewtonOperator(objective), sk.FisherOperator(objective)
    if mode == "eval":
        operators["covariance"] = sk.GradientCovarianceOperator(objective)
    v = gaussian(objective.num_parameters)
    calls: dict[str, Callable[[], object]] = {name: (lambda A=A: (A @ v, A @ v)) for name, A in operators.items()}
    return calls | {
        "value": objective.value,
        "gradient": objective.gradient,
        "block": lambda: operators["hessian"].block("last.*") @ v[:21],
    }


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_measurement_leaves_the_model_bit_for_bit_as_found(mode: str) -> None:
    model, optimizer = everything()
    with untouched(model, optimizer=optimizer):
        calls = measurements(model, mode)
    for call in calls.values():
        with untouched(model, optimizer=optimizer):
            call()


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_interruption_in_mid_product_leaves_the_model_as_found_and_the_operator_usable(error: BaseException, where: str) -> None:
    model, optimizer = everything()
    for name, call in measurements(model, "train").items():
        if where == "backward" and name == "value":
            continue
        try:
            model.error, Bad.error = (error, None) if where == "forward" else (None, error)
            with untouched(model, optimizer=optimizer), pytest.raises((type(error), sk.OutOfMemoryError)):
                call()
        finally:
            model.error = Bad.error = None
        with untouched(model, optimizer=optimizer):
            call()


def test_an_interrupted_product_does_not_change_the_next_one() -> None:
    model, _ = everything()
    H = sk.HessianOperator(sk.Objective(model, DATA, loss=F.cross_entropy, mode="train"))
    expected = H.to_dense()
    H.forget_graphs()
    v = gaussian(H.size)
    original, calls = model.norm.forward, []

    def interrupted(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:  # the first batch's graph is kept by then
            raise KeyboardInterrupt
        return original(x)

    model.norm.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        H @ v
    model.norm.forward = original  # type: ignore[method-assign]
    assert relative_error(H.to_dense(), expected) < 1e-12


def test_making_an_objective_leaves_no_trace_also_when_it_fails() -> None:
    model, optimizer = everything()
    model.error = ValueError("in the middle")
    with untouched(model, optimizer=optimizer), pytest.raises(ValueError, match="in the middle"):
        sk.Objective(model, DATA, loss=F.cross_entropy)


def test_the_users_hooks_on_parameters_are_silent_in_a_product_and_work_after_it() -> None:
    problem = mlp()
    expected = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)).to_dense()
    weight, seen = problem.model[0].weight, []
    handle = weight.register_hook(lambda g: (seen.append("tensor"), g * 100)[1])
    late = weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    found = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)).to_dense()
    assert torch.equal(found, expected)
    assert seen == []
    problem.value().backward()
    assert seen == ["tensor", "accumulated"]
    assert float(weight.grad.norm()) > 10 * float(problem.model[2].weight.grad.norm()), "the hook scaled it"
    handle.remove()
    late.remove()
    problem.value().backward()
    assert seen == ["tensor", "accumulated"], "handles still remove their hooks"


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_gradient_modes_and_autocast_around_a_measurement_have_no_influence(around: Callable[[], Any]) -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), dtype=torch.float32)
    x, y = gaussian(6, 4, dtype=torch.float32), labels(6)
    v = gaussian(43, dtype=torch.float32)
    outside = sk.HessianOperator(sk.Objective(model, (x, y), loss=F.cross_entropy)) @ v
    with around(), untouched(model):
        objective = sk.Objective(model, (x.clone(), y.clone()), loss=F.cross_entropy)
        H = sk.HessianOperator(objective)
        inside, again = H @ v.clone(), H @ v
        value, (_, gradient) = objective.value(), objective.gradient()
    assert torch.equal(inside, outside)
    assert torch.equal(again, outside)
    assert not inside.is_inference()
    assert value == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-6)
    assert gradient.abs().sum() > 0


def test_the_generators_of_a_loader_are_put_back() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(gaussian(8, 4), labels(8)), batch_size=4, generator=generator)
    problem = mlp()
    with untouched(problem.model, generators=(generator,)):
        H = sk.HessianOperator(sk.Objective(problem.model, loader, loss=F.cross_entropy), retain=False)
        H @ gaussian(H.size)


def test_a_sampler_with_its_own_generator_is_put_back_and_refused() -> None:
    class Shuffled(SequentialSampler):
        def __init__(self, source: Dataset[Any], generator: torch.Generator) -> None:
            super().__init__(source)
            self.generator = generator

        def __iter__(self) -> Any:
            return iter(torch.randperm(len(self.data_source), generator=self.generator).tolist())

    data = TensorDataset(gaussian(8, 4), labels(8))
    generator = torch.Generator().manual_seed(3)
    problem = mlp()
    with untouched(problem.model, generators=(generator,)), pytest.raises(sk.NonDeterministicError, match="shuffles or augments"):
        sk.Objective(problem.model, DataLoader(data, batch_size=4, sampler=Shuffled(data, generator)), loss=F.cross_entropy)


def test_seeding_leaves_no_seed_behind_for_a_device_not_yet_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed queues a seed for a CUDA context to come, which no guard could take back."""
    problem = mlp()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("torch.manual_seed was called"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("torch.cuda.manual_seed_all was called"))
    sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)) @ gaussian(43)


def test_products_do_not_depend_on_random_states_found_outside() -> None:
    model, _ = everything()
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        results.append(sk.HessianOperator(sk.Objective(model, DATA, loss=F.cross_entropy, mode="train")) @ gaussian(63))
    assert torch.equal(*results)


def test_nested_guards_put_back_each_its_own() -> None:
    model, _ = everything()
    objective = sk.Objective(model, DATA, loss=F.cross_entropy)
    with untouched(model), objective.undisturbed():
        inner = objective.value()
        assert model.first.weight.grad is None
        assert not model.norm.training
    assert inner == pytest.approx(objective.value(), rel=1e-12)


# -- hooks of modules, and modules kept in eval mode -----------------------------------------------------------------------------
def test_backward_hooks_of_modules_are_silent_in_a_product_and_work_after_it() -> None:
    problem, seen = mlp(), []
    expected = dense_hessian(problem.value, problem.params)
    full = problem.model[1].register_full_backward_hook(lambda m, gi, go: (seen.append("full"), (gi[0] * 2,))[1])
    before = problem.model[0].register_full_backward_pre_hook(lambda m, go: (seen.append("pre"), (go[0] * 3,))[1])
    found = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)).to_dense()
    assert relative_error(found, expected) < 1e-10
    assert seen == []
    problem.value().backward()
    assert {"full", "pre"} <= set(seen), "they run in training as before"
    full.remove()
    before.remove()
    seen.clear()
    problem.value().backward()
    assert seen == [], "handles still remove their hooks"


class SelfFreezing(nn.Sequential):
    """Keeps its batch norm in eval mode, as people override ``train()`` to do."""

    def train(self, mode: bool = True) -> SelfFreezing:
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("how", ["eval() on a part", "overridden train()", "overridden train(), model in eval"])
def test_a_frozen_batch_norm_stays_frozen_in_train_mode(how: str) -> None:
    parts = (nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 3))
    model = built(lambda: (nn.Sequential if how.startswith("eval") else SelfFreezing)(*parts))
    model[1].running_mean += 0.3
    model[1].running_var *= 2.5
    x, y = gaussian(12, 4), labels(12)
    model.train()
    model[1].eval()
    expected = dense_hessian(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    if how.endswith("in eval"):
        model.eval()
    objective = sk.Objective(model, (x, y), loss=F.cross_entropy, mode="train")
    with untouched(model):
        found = sk.HessianOperator(objective).to_dense()
    assert relative_error(found, expected) < 1e-10
    assert objective.in_eval == {"1"}
    assert objective.may_separate, "fixed statistics couple no samples"


def test_the_mode_of_each_part_is_captured_when_the_objective_is_made() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))).train()
    objective = sk.Objective(model, (gaussian(12, 4), labels(12)), loss=F.cross_entropy, mode="train")
    before = objective.value()
    model.eval()
    assert objective.value() == before


# -- other threads, calls from inside the model, random states, memory -------------------------------------------------------------
def test_threads_that_measure_one_model_leave_it_as_it_was_and_get_the_right_numbers() -> None:
    model, optimizer = everything()
    H = sk.HessianOperator(sk.Objective(model, DATA, loss=F.cross_entropy, mode="train"))
    v, results = gaussian(H.size), []
    expected = H @ v

    def work() -> None:
        other = sk.HessianOperator(sk.Objective(model, DATA, loss=F.cross_entropy, mode="train"), retain=False)
        results.extend(other @ v for _ in range(4))

    with untouched(model, optimizer=optimizer):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 12
    assert all(torch.equal(found, expected) for found in results), "no thread saw the masks or the mode of another"


def test_threads_that_measure_two_models_leave_the_process_as_it_was() -> None:
    models = [built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))) for _ in range(2)]
    objectives = [sk.Objective(m, (gaussian(6, 4), labels(6)), loss=F.cross_entropy, mode="train") for m in models]
    filters = list(warnings.filters)

    def work(objective: sk.Objective) -> None:
        for _ in range(10):
            objective.gradient()

    with untouched(models[0]), untouched(models[1]):
        threads = [threading.Thread(target=work, args=(objective,)) for objective in objectives]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert warnings.filters == filters


def test_ctrl_c_ends_the_wait_for_another_thread_that_measures() -> None:
    model, objective = everything()[0], sk.Objective(mlp().model, mlp().batches, loss=mlp().loss)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with objective.undisturbed():
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(20)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with untouched(model), pytest.raises(KeyboardInterrupt):
            sk.Objective(model, DATA, loss=F.cross_entropy)
    finally:
        leave.set()
        thread.join()
        timer.join()
    assert sk.Objective(model, DATA, loss=F.cross_entropy).value() > 0


@pytest.mark.parametrize("where", ["hook", "closure", "part"])
def test_a_measurement_that_is_started_by_a_measurement_of_the_same_model_is_refused(where: str) -> None:
    model, (x, y) = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), DATA[0]
    loss = F.cross_entropy

    def again(*_: Any) -> None:
        sk.Objective(model[0] if where == "part" else model, (x, gaussian(5, 5) if where == "part" else y), loss=F.mse_loss).value()

    if where == "closure":
        with pytest.raises(sk.ObjectiveError, match="started while another one evaluates it"):
            sk.Objective(model, [(x, y)], closure=lambda m, batch: (again(), loss(m(batch[0]), batch[1]))[1])
        return
    model[1].register_forward_hook(again)
    with untouched(model), pytest.raises(sk.ObjectiveError, match="started while another one evaluates it"):
        sk.Objective(model, (x, y), loss=loss)


def test_modes_that_an_interruption_left_pushed_are_popped() -> None:
    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model, _ = everything()
    objective = sk.Objective(model, DATA, loss=F.cross_entropy)
    with untouched(model), objective.undisturbed():
        for mode in (Functions(), Dispatches(), Functions()):
            mode.__enter__()
    assert torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("retain", [False, True])
def test_a_thread_that_moves_the_parameters_keeps_others_waiting(retain: bool) -> None:
    """As the finite-difference probe does where a model cannot be copied: it moves the live ones."""
    problem = mlp()
    H = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss), retain=retain)
    v, results = gaussian(H.size), []
    expected = H @ v
    for context in (moved(H.layout, H.layout.split(torch.ones_like(v)), 0.1), turn()):  # also if it has not moved them yet
        thread = threading.Thread(target=lambda: results.append(H @ v))
        with context:
            thread.start()
            thread.join(timeout=0.5)
            assert thread.is_alive() and not results
        thread.join()
        assert torch.equal(results.pop(), expected)


def test_a_loss_may_measure_another_model() -> None:
    other = sk.Objective(mlp().model, mlp().batches, loss=mlp().loss)
    model, (x, y) = built(lambda: nn.Linear(4, 3)), DATA[0]
    objective = sk.Objective(model, [(x, y)], closure=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]) * other.value())
    assert objective.value() == pytest.approx(float(F.cross_entropy(model(x), y)) * other.value(), rel=1e-10)


def test_going_through_a_loader_moves_no_random_state() -> None:
    problem = mlp()
    loader = DataLoader(TensorDataset(gaussian(16, 4), labels(16)), batch_size=4)
    objective = sk.Objective(problem.model, loader, loss=F.cross_entropy)
    calls: list[Callable[[], object]] = [lambda: list(objective.batches()), lambda: next(iter(objective.batches()))]
    calls += [lambda: sk.batch_sharpness(objective, batch_size=4), lambda: sk.gradient_noise_scale(objective)]
    calls += [lambda: sk.batch_size_tests(objective), lambda: sk.examine(objective), lambda: sk.sharpness_bracket(objective)]
    calls += [lambda: sk.measure(objective, num_probes=3, num_steps=4)]
    for call in calls:
        with untouched(problem.model):
            call()


def test_augmentation_by_the_global_random_state_is_noticed() -> None:
    class Augmented(Dataset):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return gaussian(16, 4)[i] + 0.1 * torch.randn(4, dtype=torch.float64), labels(16)[i]

        def __len__(self) -> int:
            return 16

    problem = mlp()
    with untouched(problem.model), pytest.raises(sk.NonDeterministicError, match="shuffles or augments"):
        sk.Objective(problem.model, DataLoader(Augmented(), batch_size=4), loss=F.cross_entropy)


@pytest.mark.parametrize("given", ["loss", "closure", "own"])
def test_objectives_and_operators_are_freed_without_the_cycle_collector(given: str) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return SimpleNamespace(loss=F.cross_entropy(super().forward(x), y))

    (x, y), model = DATA[0], built(lambda: Own(4, 3) if given == "own" else nn.Linear(4, 3))
    data = {"loss": (x.clone(), y), "closure": [(x.clone(), y)], "own": {"x": x.clone(), "y": y}}[given]
    how = {"loss": {"loss": F.cross_entropy}, "closure": {"closure": lambda m, b: F.cross_entropy(m(b[0]), b[1])}, "own": {}}[given]
    gc.collect()
    gc.disable()
    try:
        objective = sk.Objective(model, data, **how)
        H = sk.HessianOperator(objective)
        H @ gaussian(H.size)
        pairs = sk.eigenpairs(H, k=1)
        seen = [
            weakref.ref(objective),
            weakref.ref(H),
            weakref.ref(next(iter(data.values())) if given == "own" else objective.gradient()[1]),
        ]
        del objective, H, data
        assert [ref() for ref in seen] == [None] * 3
        assert pairs.converged.all()
    finally:
        gc.enable()


@pytest.mark.parametrize("kept", [True, False], ids=["gradients kept", "gradients anew"])
@pytest.mark.parametrize("operator", [sk.EmpiricalFisherOperator, sk.GradientCovarianceOperator, sk.FisherOperator, sk.GaussNewtonOperator])
@pytest.mark.parametrize("given", ["loss", "closure"])
def test_operators_of_first_derivatives_are_freed_without_it_too(given: str, operator: Any, kept: bool, monkeypatch: Any) -> None:
    if given == "closure" and operator in (sk.FisherOperator, sk.GaussNewtonOperator):
        pytest.skip("Fisher and Gauss-Newton matrices are made of the model's output, which a closure does not show: they refuse it")
    (x, y), model = DATA[0], built(lambda: nn.Linear(4, 3))
    if not kept:
        monkeypatch.setattr(operator, "free_memory", lambda self: 0)
    gc.collect()
    gc.disable()
    try:
        seen = weakref.ref(x := x.clone())
        how = {"loss": F.cross_entropy} if given == "loss" else {"closure": lambda m, b: F.cross_entropy(m(b[0]), b[1])}
        A = operator(sk.Objective(model, (x, y), **how))
        A @ gaussian(A.size)
        del A, x
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["gauss_newton", "measure", "monitor", "learner", "curve", "doctor"])
def test_the_data_is_freed_with_what_was_made_of_it(what: str) -> None:
    model = mlp().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = gaussian(24, 4), labels(24)
    gc.collect()
    gc.disable()
    try:
        seen = weakref.ref(x)
        objective: Any = sk.Objective(model, (x, y), loss=F.cross_entropy)
        if what == "gauss_newton":
            sk.GaussNewtonOperator(objective) @ gaussian(objective.num_parameters)
        elif what == "measure":
            sk.measure(objective, num_probes=3, num_steps=4)
        elif what == "doctor":
            sk.examine(objective)
        elif what == "curve":
            sk.learning_rate_curve(objective, optimizer, batch_sizes=[4, 8], pilot=10, calibrate=False)
        elif what == "monitor":
            objective = sk.Monitor(model, optimizer, loss=F.cross_entropy, every=1)
            objective.step((x, y))
        else:
            objective = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=60)
            objective.step((x, y), loss=torch.tensor(1.0))
        del objective, x, y
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("made", ["script", "trace"])
def test_models_in_torchscript_are_measured_and_left_as_they_were(made: str) -> None:
    model, x, y = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))), gaussian(6, 3), labels(6, classes=2)
    try:
        compiled = torch.jit.script(model.eval()) if made == "script" else torch.jit.trace(model.eval(), x)
    except Exception as error:
        pytest.skip(f"this PyTorch does not make it: {error}")  # TorchScript is deprecated, and not there for every Python
    expected = sk.HessianOperator(sk.Objective(model, (x, y), loss=F.cross_entropy)).to_dense()
    buffers = {name: b.clone() for name, b in compiled.named_buffers()}
    operator = sk.HessianOperator(sk.Objective(compiled, (x, y), loss=F.cross_entropy))
    assert relative_error(operator.to_dense(), expected) < 1e-12
    assert operator.all_kept
    assert all(torch.equal(b, buffers[name]) for name, b in compiled.named_buffers())
    assert {name for name, _ in compiled.named_buffers()} == set(buffers)
