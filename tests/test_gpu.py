"""The same numbers on a GPU as on the host, and nothing left behind there.

`make gpu` runs these tests on the machine's own torch. The same bodies run on any other device that torch knows, so that they can be tried
where there is no GPU: SHARPKIT_GPU_TESTS_DEVICE=cpu python -m pytest -m gpu tests/test_gpu.py
"""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import PROBLEMS, Attention, Problem, built, gaussian, labels
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from traces import untouched

import sharpkit as sk
from sharpkit.optimizers import rates_at_hand

DEVICE = torch.device(os.environ.get("SHARPKIT_GPU_TESTS_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),  # on a machine without a GPU nothing can be pinned
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),  # a loader's worker, Python 3.12
]
gpu_only = pytest.mark.skipif(not ON_GPU, reason="only a GPU has this")

# Host and device round differently in the last digits of float64, and sums over some hundred entries keep that below 1e-12.
PRODUCT = 1e-10
# An iteration amplifies it, and its results are compared with each other, not with the truth, so that its tolerance does not enter.
ITERATED = 1e-6

Place = torch.device | str


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """TF32, which keeps three digits, is on for convolutions by default."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def off(there: Tensor, here: Tensor) -> float:
    """Relative error of a vector on the device against the host's, in float64."""
    assert there.device.type == DEVICE.type
    return float((there.cpu().double() - here.double()).norm() / here.double().norm())


def objective_of(problem: Problem, place: Place, **settings: Any) -> sk.Objective:
    """The problem's model moved, its data left on the host: an objective moves the batches itself."""
    loss = copy.deepcopy(problem.loss).to(place) if isinstance(problem.loss, nn.Module) else problem.loss
    return sk.Objective(copy.deepcopy(problem.model).to(place), problem.batches, loss=loss, **settings)


def probes(operator: sk.SymmetricOperator, k: int = 2) -> Tensor:
    return operator.random_vectors(k, generator=torch.Generator().manual_seed(1))


def difference(make: Callable[[Place], sk.SymmetricOperator]) -> float:
    """How far the product of an operator on the device is from that of the same operator on the host."""
    here, there = make("cpu"), make(DEVICE)
    assert there.device.type == DEVICE.type
    return off(there @ probes(there), here @ probes(here))


X, Y = gaussian(64, 6, seed=11), labels(64, classes=4, seed=12)


def network(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    return built(lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 4)), dtype=dtype)


def classifier(place: Place, dtype: torch.dtype = torch.float64, **settings: Any) -> sk.Objective:
    return sk.Objective(network(dtype).to(place), (X.to(dtype), Y), loss=F.cross_entropy, **settings)


def hessian(place: Place, dtype: torch.dtype = torch.float64, **settings: Any) -> sk.HessianOperator:
    return sk.HessianOperator(classifier(place, dtype, **settings))


# -- products ---------------------------------------------------------------------------------------------------------------
OPERATORS: dict[str, Callable[[sk.Objective, Problem], sk.SymmetricOperator]] = {
    "Hessian": lambda objective, _: sk.HessianOperator(objective),
    "Gauss-Newton": lambda objective, _: sk.GaussNewtonOperator(objective),
    "Fisher": lambda objective, problem: sk.FisherOperator(objective, num_draws=2, likelihood=problem.likelihood),
    "empirical Fisher": lambda objective, _: sk.EmpiricalFisherOperator(objective),
    "gradient covariance": lambda objective, _: sk.GradientCovarianceOperator(objective),
    "|w| H |w|": lambda objective, _: sk.AdaptiveOperator(sk.HessianOperator(objective)),
}
WITHOUT_LIKELIHOOD = ("huber", "weighted")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_products_equal_those_on_the_host(name: str, operator: str) -> None:
    if operator == "Fisher" and name in WITHOUT_LIKELIHOOD:
        pytest.skip("this loss has no likelihood to draw labels from")
    problem = PROBLEMS[name]()
    assert difference(lambda place: OPERATORS[operator](objective_of(problem, place), problem)) < PRODUCT


def test_per_sample_gradients_of_a_closure_equal_those_on_the_host() -> None:
    def make(place: Place) -> sk.SymmetricOperator:
        objective = sk.Objective(network().to(place), (X, Y), closure=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
        return sk.EmpiricalFisherOperator(objective)

    assert difference(make) < PRODUCT


def test_value_and_gradient_equal_those_on_the_host() -> None:
    here, there = classifier("cpu"), classifier(DEVICE)
    assert there.value() == pytest.approx(here.value(), rel=PRODUCT)
    assert there.gradient()[0] == pytest.approx(here.gradient()[0], rel=PRODUCT)
    assert off(there.gradient()[1], here.gradient()[1]) < PRODUCT


def test_batch_statistics_in_train_mode_equal_those_on_the_host() -> None:
    problem = PROBLEMS["conv"]()
    assert difference(lambda place: sk.HessianOperator(objective_of(problem, place, mode="train"))) < PRODUCT


def test_dropout_masks_on_the_device_are_fixed_by_the_seed() -> None:
    objective = sk.Objective(network(dropout=0.5).to(DEVICE), (X, Y), loss=F.cross_entropy, mode="train")
    operator = sk.HessianOperator(objective)
    first = operator @ probes(operator)
    operator.forget_graphs()
    torch.randn(100, device=DEVICE)  # the masks do not depend on the state of the device's generator
    assert torch.equal(operator @ probes(operator), first)


def test_graphs_rebuilt_and_batches_cut_give_the_product_on_the_host() -> None:
    assert difference(lambda place: sk.HessianOperator(classifier(place), retain=False)) < PRODUCT
    assert difference(lambda place: hessian(place, micro_batch_size=7)) < PRODUCT


def test_graphs_follow_parameters_changed_on_the_device() -> None:
    operators = [hessian(place) for place in ("cpu", DEVICE)]
    for operator in operators:
        operator @ probes(operator)
        with torch.no_grad():
            operator.objective.model[0].weight.mul_(1.5)
        operator.objective.model[3].bias.data += 1.0  # behind autograd's back
    here, there = operators
    assert off(there @ probes(there), here @ probes(here)) < PRODUCT


def test_blocks_sums_and_deflation_equal_those_on_the_host() -> None:
    def derived(place: Place) -> sk.SymmetricOperator:
        objective = classifier(place)
        mixed = 2 * sk.HessianOperator(objective) - sk.GaussNewtonOperator(objective) / 3 + 0.1
        span = torch.linalg.qr(probes(mixed, 3).cpu())[0].to(place)
        return mixed.deflate(span, torch.arange(3.0, dtype=torch.float64, device=place))

    assert difference(derived) < PRODUCT
    assert difference(lambda place: hessian(place).block("0.*")) < PRODUCT


def test_a_matrix_on_the_device_is_an_operator() -> None:
    matrix = torch.diag(torch.tensor([5.0, 5.0, 3.0, 1.0, -7.0], dtype=torch.float64, device=DEVICE))
    assert sk.eigenpairs(matrix, k=3).values.tolist() == pytest.approx([5, 5, 3])
    assert sk.eigenpairs(sk.as_operator(matrix).to_scipy(), k=3).values.tolist() == pytest.approx([5, 5, 3])


def test_a_model_with_layers_on_both_devices() -> None:
    class Halves(nn.Module):
        def __init__(self, place: Place) -> None:
            super().__init__()
            layers = network()
            self.first, self.second, self.place = layers[0], layers[3].to(place), place

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)).to(self.place))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.to(output.device))

    here, there = (sk.HessianOperator(sk.Objective(Halves(place), (X, Y), loss=loss)) for place in ("cpu", DEVICE))
    expected = here @ probes(here)
    assert float(((there @ probes(there)).cpu() - expected).norm() / expected.norm()) < PRODUCT


def test_compiled_and_checkpointed_models_give_the_plain_product() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    plain = hessian("cpu")
    expected = plain @ probes(plain)
    for wrap in (torch.compile, Checkpointed):  # the wrapper of torch.compile is taken off before anything is compiled
        wrapped = sk.HessianOperator(sk.Objective(wrap(network().to(DEVICE)), (X, Y), loss=F.cross_entropy))
        assert off(wrapped @ probes(wrapped), expected) < PRODUCT


# -- data ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_pinned_loader_gives_the_product_of_its_batches(num_workers: int) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=24, pin_memory=True, num_workers=num_workers)
    here = sk.HessianOperator(sk.Objective(network(), list(DataLoader(TensorDataset(X, Y), batch_size=24)), loss=F.cross_entropy))
    there = sk.HessianOperator(sk.Objective(network().to(DEVICE), loader, loss=F.cross_entropy))
    assert there.objective.num_samples == 64
    assert off(there @ probes(there), here @ probes(here)) < PRODUCT


def test_data_may_already_be_on_the_device() -> None:
    there = sk.HessianOperator(sk.Objective(network().to(DEVICE), (X.to(DEVICE), Y.to(DEVICE)), loss=F.cross_entropy))
    here = hessian("cpu")
    assert off(there @ probes(there), here @ probes(here)) < PRODUCT


# -- precision ----------------------------------------------------------------------------------------------------------------
# One rounding is 6e-8 in float32 and 4e-3 in bfloat16; a product of this small model takes some ten of them one after another.
def test_float32_products_are_right_to_rounding() -> None:
    here, there = hessian("cpu"), hessian(DEVICE, torch.float32)
    assert off(there @ probes(here).to(there.device, torch.float32), here @ probes(here)) < 1e-5


def test_bfloat16_autocast_changes_the_forward_pass_and_not_the_vectors() -> None:
    here, plain, cast = hessian("cpu"), hessian(DEVICE, torch.float32), hessian(DEVICE, torch.float32, autocast=torch.bfloat16)
    v = probes(here).to(plain.device, torch.float32)
    product = cast @ v
    assert product.dtype == torch.float32
    assert 1e-4 < off(product, here @ probes(here)) < 0.1
    assert sk.eigenpairs(cast, tol=0.02).values[0] == pytest.approx(float(sk.eigenpairs(here).values[0]), rel=0.05)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):  # the user's own autocast does not enter
        assert torch.equal(plain @ v, hessian(DEVICE, torch.float32) @ v)


def test_a_model_in_bfloat16_is_measured_with_float32_vectors() -> None:
    here, there = hessian("cpu"), hessian(DEVICE, torch.bfloat16)
    assert there.dtype == torch.float32
    assert off(there @ probes(here).to(there.device, torch.float32), here @ probes(here)) < 0.1


@pytest.mark.parametrize(("autocast", "tolerance"), [(None, 1e-5), (torch.bfloat16, 0.1)])
def test_attention_that_would_run_a_fused_kernel(autocast: torch.dtype | None, tolerance: float) -> None:
    """Heads of 16 entries, as the flash and memory-efficient kernels take them; neither can be differentiated twice."""
    x, y = gaussian(5, 24, 32, seed=13), labels(5, seed=14)
    here = sk.HessianOperator(sk.Objective(built(lambda: Attention(32)), (x, y), loss=F.cross_entropy))
    model = built(lambda: Attention(32), dtype=torch.float32).to(DEVICE)
    with untouched(model):
        there = sk.HessianOperator(sk.Objective(model, (x.float(), y), loss=F.cross_entropy, autocast=autocast))
        product = there @ probes(here).to(there.device, torch.float32)
    assert off(product, here @ probes(here)) < tolerance


# -- algorithms ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_eigenpairs_equal_those_on_the_host(which: Any) -> None:
    (here, there), operator = (sk.eigenpairs(hessian(place), k=4, which=which, tol=1e-8) for place in ("cpu", DEVICE)), hessian(DEVICE)
    assert there.values.device.type == "cpu"
    assert bool(there.converged.all())
    assert torch.allclose(there.values, here.values, rtol=ITERATED)
    v = there.vectors
    assert torch.allclose((operator @ v).cpu(), v.cpu() * there.values, atol=1e-7 * float(there.values.abs().max()))


def test_eigenpairs_warm_started_need_fewer_products() -> None:
    cold = sk.eigenpairs(hessian(DEVICE), k=1)
    for initial in (cold.vectors, cold.vectors.cpu()):
        assert sk.eigenpairs(hessian(DEVICE), k=1, initial=initial).num_matvecs < cold.num_matvecs


@pytest.mark.parametrize("settings", [{}, {"basis_size": 15}], ids=["whole basis", "restarted"])
def test_the_basis_can_be_offloaded_to_the_host(settings: dict[str, Any]) -> None:
    here, there = (sk.eigenpairs(hessian(DEVICE), k=5, tol=1e-8, offload=offload, **settings) for offload in (False, True))
    assert there.vectors.device.type == DEVICE.type
    assert there.num_matvecs == here.num_matvecs
    assert torch.allclose(here.values, there.values, rtol=ITERATED)


def test_power_iteration_equals_that_on_the_host() -> None:
    here, there = (sk.power_iteration(hessian(place), k=2, tol=1e-4) for place in ("cpu", DEVICE))
    assert torch.allclose(there.values, here.values, rtol=1e-4)


@pytest.mark.parametrize("method", ["auto", "hutchinson", "hutch++", "xtrace"])
def test_the_trace_equals_that_on_the_host(method: Any) -> None:
    here, there = (sk.trace(hessian(place), method=method, num_matvecs=24) for place in ("cpu", DEVICE))
    assert there.value == pytest.approx(here.value, rel=ITERATED)
    assert there.stderr == pytest.approx(here.stderr, rel=1e-3, abs=ITERATED * abs(here.value))


def test_diagonal_and_norm_equal_those_on_the_host() -> None:
    here, there = (sk.diagonal(hessian(place)) for place in ("cpu", DEVICE))
    assert off(there.value, here.value) < ITERATED
    norms = [sk.frobenius_norm(hessian(place)).value for place in ("cpu", DEVICE)]
    assert norms[1] == pytest.approx(norms[0], rel=ITERATED)


def test_the_density_equals_that_on_the_host() -> None:
    here, there = (sk.spectral_density(hessian(place), num_probes=3, num_steps=12) for place in ("cpu", DEVICE))
    assert there.nodes.device.type == "cpu"
    # Weights of the smallest nodes are the most sensitive to rounding, so the moments of the density are compared: means over it of x^j.
    for power in (0, 1, 2):
        moments = [float((density.weights * density.nodes**power).sum()) for density in (here, there)]
        assert moments[1] == pytest.approx(moments[0], rel=ITERATED)
    assert float(there.nodes.max()) == pytest.approx(float(here.nodes.max()), rel=ITERATED)


# -- measuring ----------------------------------------------------------------------------------------------------------------
def stepped(place: Place, make: Callable[[Any], torch.optim.Optimizer], *, steps: int = 3) -> tuple[sk.Objective, torch.optim.Optimizer]:
    """The classifier after some steps of an optimizer."""
    objective = classifier(place)
    optimizer = make(objective.model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(objective.model(X.to(place)), Y.to(place)).backward()
        optimizer.step()
    return objective, optimizer


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, **settings)


@pytest.mark.parametrize("make", [momentum, adamw])
def test_measure_agrees_with_the_host_and_leaves_no_trace(make: Any) -> None:
    here = sk.measure(stepped("cpu", make)[0])
    objective, optimizer = stepped(DEVICE, make)
    with untouched(objective.model, optimizer=optimizer):
        there = sk.measure(objective, optimizer=optimizer)
    assert there.lambda_max.value == pytest.approx(here.lambda_max.value, rel=1e-4)
    assert there.trace.value == pytest.approx(here.trace.value, rel=1e-4)


@gpu_only
def test_rates_that_are_tensors_are_noted_without_waiting_for_the_device() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2, device=DEVICE))], lr=torch.tensor(0.25, device=DEVICE), capturable=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rates = rates_at_hand(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    optimizer.param_groups[0]["lr"].fill_(1.0)
    assert rates is not None and float(rates[0]) == 0.25


@pytest.mark.parametrize(
    "settings",
    [
        {"foreach": False},
        {"foreach": True},
        {"fused": True},
        pytest.param({"capturable": True}, marks=gpu_only),
        pytest.param({"capturable": True, "lr": torch.tensor(0.01)}, marks=gpu_only),
    ],
    ids=["foreach off", "foreach", "fused", "capturable", "capturable, rate a tensor"],
)
def test_every_implementation_of_an_optimizer_is_read_alike(settings: dict[str, Any]) -> None:
    def on_device(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, **{"lr": 0.01, **settings})

    (here, first), (there, second) = stepped("cpu", adamw), stepped(DEVICE, on_device)
    # A capturable optimizer corrects its moments in float32, and its path leaves the host's by 3e-6: the host's is put where it came to.
    here.model.load_state_dict(there.model.state_dict())
    first.load_state_dict(second.state_dict())
    operators = [sk.PreconditionedOperator(sk.HessianOperator(o), optimizer) for o, optimizer in ((here, first), (there, second))]
    assert off(operators[1] @ probes(operators[1]), operators[0] @ probes(operators[0])) < 1e-12
    with untouched(there.model, optimizer=second):
        critical = sk.critical_learning_rate(there, second)
    assert critical.value == pytest.approx(sk.critical_learning_rate(here, first).value, rel=1e-6)
    assert sk.directional_sharpness(there, second) == pytest.approx(sk.directional_sharpness(here, first), rel=1e-6)


def test_sharpness_along_steps_and_noise_equal_those_on_the_host() -> None:
    def numbers(place: Place) -> list[float]:
        objective, optimizer = stepped(place, momentum)
        with untouched(objective.model, optimizer=optimizer):
            found = [
                sk.batch_sharpness(objective, batch_size=16, optimizer=optimizer, max_batches=20).value,
                sk.gradient_noise_interaction(objective, batch_size=16, max_batches=20).value,
                sk.gradient_noise_scale(objective, group_size=8).trace.value,
                *(test.statistic for test in sk.batch_size_tests(objective)),
                *(layer.value for layer in sk.per_layer(objective, tol=1e-6).lambda_max),
            ]
        return [float(value) for value in found]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.ConvergenceWarning)  # twenty batches are few
        here, there = numbers("cpu"), numbers(DEVICE)
    assert there == pytest.approx(here, rel=1e-5)


def test_the_learning_rate_curve_equals_that_on_the_host() -> None:
    def limits(place: Place) -> list[float]:
        objective, optimizer = stepped(place, momentum)
        with untouched(objective.model, optimizer=optimizer):
            curve = sk.learning_rate_curve(objective, optimizer, batch_sizes=[4, 16, 64], pilot=20, calibrate=False)
        return [curve.by_curvature(size) for size in (4, 16, 64)]

    assert limits(DEVICE) == pytest.approx(limits("cpu"), rel=1e-3)


def test_the_bracket_holds_the_same_interval_as_on_the_host() -> None:
    def ends(place: Place) -> tuple[float, float]:
        found = sk.sharpness_bracket(classifier(place), start=16)
        return found.lower, found.upper

    assert ends(DEVICE) == pytest.approx(ends("cpu"), rel=1e-3)


def test_the_doctor_finds_nothing_wrong_on_the_device() -> None:
    for dtype in (torch.float64, torch.float32):
        assert not [str(check) for check in sk.examine(classifier(DEVICE, dtype)).checks if check.status in ("warning", "failed")]


@gpu_only
def test_the_doctor_warns_of_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True  # put back by the fixture
    assert "rounding" in [check.name for check in sk.examine(classifier(DEVICE, torch.float32)).checks if check.status == "warning"]


def test_coordinates_over_widths_equal_those_on_the_host() -> None:
    def exponents(place: Place) -> list[float]:
        check = sk.transfer.coordinate_check(
            lambda n: nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 4)).to(place),
            [16, 32, 64],
            optimizer=lambda model, n: torch.optim.SGD(model.parameters(), lr=0.01),
            data=(X.float(), Y),
            loss=F.cross_entropy,
            steps=2,
            seeds=2,
        )
        return [coordinate.level.value for coordinate in check.coordinates]

    assert exponents(DEVICE) == pytest.approx(exponents("cpu"), abs=1e-3)


# -- nothing left behind ------------------------------------------------------------------------------------------------------
def test_the_random_state_of_the_device_is_left_alone() -> None:
    model = network(torch.float32, dropout=0.5).to(DEVICE).train()
    optimizer = momentum(model.parameters())
    F.cross_entropy(model(X.float().to(DEVICE)), Y.to(DEVICE)).backward()  # gradients and a generator that has been used
    with untouched(model, optimizer=optimizer):
        objective = sk.Objective(model, (X.float(), Y), loss=F.cross_entropy, mode="train")
        sk.eigenpairs(sk.HessianOperator(objective), k=2)
        sk.trace(sk.GaussNewtonOperator(objective), rtol=0.1)
        sk.critical_learning_rate(objective, optimizer)
        sk.measure(objective, optimizer=optimizer)


@gpu_only
def test_no_memory_of_the_device_is_kept() -> None:
    def measured() -> None:
        objective = classifier(DEVICE, torch.float32)
        sk.measure(objective)
        sk.trace(sk.GaussNewtonOperator(objective), rtol=0.1)

    measured()  # libraries reserve workspaces of their own at the first call
    gc.collect()
    before = torch.cuda.memory_allocated()
    measured()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


@gpu_only
def test_a_batch_that_does_not_fit_is_cut_until_it_does() -> None:
    """Capped memory: the whole batch runs out, pieces of it do not."""
    model = nn.Sequential(nn.Linear(64, 2048), nn.Tanh(), nn.Linear(2048, 2048), nn.Tanh(), nn.Linear(2048, 10)).to(DEVICE)
    data = (torch.randn(16384, 64), torch.randint(10, (16384,)))
    whole = sk.HessianOperator(sk.Objective(model, data, loss=F.cross_entropy, micro_batch_size=512), retain=False)
    v = torch.ones(whole.size, device=whole.device) / whole.size**0.5
    expected = whole @ v
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    # One activation of the whole batch takes 128 MiB, and the graph of the gradient keeps six.
    cap = torch.cuda.memory_reserved() + 600 * 2**20
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
        operator = sk.HessianOperator(sk.Objective(model, data, loss=F.cross_entropy))
        product = operator @ v
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    pieces = operator.objective.micro_batch_size
    assert pieces is not None and pieces < 16384
    assert float((product - expected).norm() / expected.norm()) < 1e-4


# -- beside a training ------------------------------------------------------------------------------------------------------------
METRICS = [
    "lambda_max",
    "lambda_min",
    "top_k",
    "trace",
    "batch_sharpness",
    "critical_sharpness",
    "directional_sharpness",
    "noise_scale",
    "per_layer",
]
Beside = Callable[[nn.Module, torch.optim.Optimizer], Any]


def trained(
    place: Place,
    make: Callable[[Any], torch.optim.Optimizer],
    beside: Beside | None,
    *,
    steps: int,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    interrupted_at: int | None = None,
) -> tuple[nn.Module, Any]:
    """A training with a monitor or a learner beside it, saved to a file and read back on the host once if asked."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = network(dtype, dropout).to(place).train()
        optimizer = make(model.parameters())
        observer = beside(model, optimizer) if beside is not None else None
        for step in range(steps):
            if step == interrupted_at:
                file = io.BytesIO()
                torch.save(observer.state_dict(), file)
                file.seek(0)
                observer = beside(model, optimizer)  # type: ignore[misc]
                observer.load_state_dict(torch.load(file, map_location="cpu"))
            chosen = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:32]
            x, y = X[chosen].to(place, dtype), Y[chosen].to(place)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if isinstance(observer, sk.Monitor):
                observer.step((x, y), loss=loss)
                optimizer.step()
            else:
                optimizer.step()
                if observer is not None:
                    observer.step((x, y), loss=loss)
    return model, observer


def monitored(**settings: Any) -> Beside:
    return lambda model, optimizer: sk.Monitor(model, optimizer, loss=F.cross_entropy, **settings)


@pytest.mark.parametrize("make", [momentum, adamw])
def test_the_monitor_records_the_numbers_of_the_host(make: Any) -> None:
    metrics = [*METRICS, "preconditioned_lambda_max"] if make is adamw else METRICS
    (_, here), (_, there) = (trained(place, make, monitored(every=1, metrics=metrics, tol=1e-4), steps=4) for place in ("cpu", DEVICE))
    for expected, record in zip(here.history, there.history, strict=True):
        assert not record.failed
        assert record.loss == pytest.approx(expected.loss, rel=ITERATED)
        assert set(record.values) == set(expected.values)
        for name, measurement in record.values.items():
            assert measurement.value == pytest.approx(expected[name].value, rel=1e-3, nan_ok=True), name


def test_the_monitor_leaves_the_training_alone() -> None:
    """With dropout, whose masks come from the device's own generator: a single number drawn for a measurement would change them all."""
    plain, _ = trained(DEVICE, adamw, None, steps=6, dtype=torch.float32, dropout=0.3)
    watched, monitor = trained(DEVICE, adamw, monitored(every=2, metrics=METRICS), steps=6, dtype=torch.float32, dropout=0.3)
    assert [record.step for record in monitor.history] == [0, 2, 4]
    for expected, p in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.allclose(p, expected, rtol=1e-6, atol=1e-7)


def test_the_monitor_keeps_to_its_budget_of_time() -> None:
    """Kernels run on after the call that started them: without waiting for them, the measurements would seem to cost nothing."""
    _, monitor = trained(DEVICE, momentum, monitored(budget=0.3, metrics=["lambda_max"], mode="eval"), steps=400, dtype=torch.float32)
    assert monitor.history
    assert 0 < monitor.overhead < 1


def test_a_monitor_resumed_from_a_file_goes_on() -> None:
    (_, whole), (_, resumed) = (
        trained(DEVICE, momentum, monitored(every=1, metrics=["lambda_max"], tol=1e-4), steps=6, interrupted_at=at) for at in (None, 3)
    )
    values = [[record["lambda_max"].value for record in monitor.history] for monitor in (whole, resumed)]
    assert values[1] == pytest.approx(values[0], rel=ITERATED)


def learning(model: nn.Module, optimizer: torch.optim.Optimizer) -> sk.CurvatureLearner:
    return sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=40)


@pytest.mark.parametrize("make", [momentum, adamw])
def test_the_learner_sets_the_rates_of_the_host(make: Any) -> None:
    (_, here), (_, there) = (trained(place, make, learning, steps=40) for place in ("cpu", DEVICE))
    assert not [decision.reason for decision in there.history if "not measured" in decision.reason]
    assert [d.step for d in there.history] == [d.step for d in here.history]
    assert [d.lr for d in there.history] == pytest.approx([d.lr for d in here.history], rel=1e-3)


def test_a_learner_resumed_from_a_file_goes_on_and_can_go_back() -> None:
    _, whole = trained(DEVICE, momentum, learning, steps=40)
    model, resumed = trained(DEVICE, momentum, learning, steps=40, interrupted_at=30)
    assert resumed.lr == pytest.approx(whole.lr, rel=ITERATED)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1e3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SharpkitWarning)  # it warns that it goes back
        for _ in range(8):
            resumed.step((X[:32].to(DEVICE), Y[:32].to(DEVICE)), loss=math.nan)
    assert all(p.device.type == DEVICE.type and float(p.detach().abs().max()) < 10 for p in model.parameters())


def test_the_lightning_callback_on_the_device() -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from sharpkit.integrations.lightning import SharpnessCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(torch.float32)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = SharpnessCallback(every=1, metrics=["lambda_max"])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about workers and log intervals
        trainer = pl.Trainer(accelerator="gpu" if ON_GPU else "cpu", devices=1, max_steps=3, callbacks=[callback], **quiet)
        trainer.fit(Module(), DataLoader(TensorDataset(X.float(), Y), 16))
    assert [record.step for record in callback.history] == [0, 1, 2]
    assert all(record["lambda_max"].value > 0 and not record.failed for record in callback.history)


def test_the_hugging_face_callback_on_the_device(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from sharpkit.integrations.transformers import SharpnessCallback

    transformers.logging.set_verbosity_error()
    shape = {"vocab_size": 40, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = built(lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)), dtype=torch.float32)
    tokens = labels(16, 10, classes=40)
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "log_level": "error", "use_cpu": not ON_GPU}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, bf16=True, **quiet)
    callback = SharpnessCallback(every=1, metrics=["batch_sharpness"])
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    trainer.pop_callback(transformers.PrinterCallback)
    trainer.train()
    assert [record.step for record in callback.history] == [0, 1, 2]
    assert all(np.isfinite(record["batch_sharpness"].value) and not record.failed for record in callback.history)
