"""Two gloo processes, each with its own data: every number equals the one-process number, and an error on one is an error on both."""

from __future__ import annotations

import functools
import os
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import Problem, built, conv, gaussian, labels, mlp, relative_error, tied
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.objective import distributed

pytestmark = pytest.mark.distributed
WORLD = 2


def _worker(rank: int, folder: str, task: str) -> None:
    torch.set_num_threads(1)
    os.environ["SHARPKIT_TEST_FOLDER"] = folder  # here, since the process was forked from one that is older than the test
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD, timeout=timedelta(seconds=40))
    try:
        result: Any = {name: _outcome(part, rank) for name, part in TASKS[task]().items()}
        torch.save(result, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # gloo's threads may still be running when the interpreter tears down, and then abort a process that has done its work
    os._exit(0)


def _outcome(part: Callable[[int], Any], rank: int) -> Any:
    try:
        return part(rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}", traceback.format_exc()


@functools.cache
def _method() -> str:
    """How processes are started: forked from one that has imported everything once, where the system can."""
    if "forkserver" not in mp.get_all_start_methods():
        return "spawn"
    mp.set_forkserver_preload(["torch", "sharpkit", "sharpkit.linalg.lanczos", __name__])
    return "forkserver"


def on_two_ranks(folder: Path, task: str) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    mp.start_processes(_worker, (str(folder), task), nprocs=WORLD, start_method=_method())  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def plain(z: Tensor, t: Tensor) -> Tensor:
    """A loss whose average must be tried out."""
    return F.cross_entropy(z, t)


# -- the same numbers -----------------------------------------------------------------------------------------------------
def shards(batches: list[Any], rank: int, how: str) -> list[Any]:
    """``uneven``: the first batch here, the others there; ``empty``: everything on rank 0."""
    if how == "empty":
        return batches if rank == 0 else []
    return batches[:1] if rank == 0 else batches[1:]


def numbers(problem: Any, data: Any, loss: Any, **settings: Any) -> dict[str, Any]:
    objective = sk.Objective(problem.model, data, loss=loss, **settings)
    covariance = sk.GradientCovarianceOperator(objective)
    v = gaussian(objective.num_parameters)
    return {
        "value": objective.value(),
        "gradient": objective.gradient()[1],
        "hessian": sk.HessianOperator(objective).to_dense(),
        "gauss_newton": sk.GaussNewtonOperator(objective) @ v,
        "empirical": sk.EmpiricalFisherOperator(objective) @ v,
        "covariance": torch.stack([covariance @ v, covariance @ (2 * v)]),
        "targets": objective.num_targets,
        "samples": objective.num_samples,
        "values": sk.eigenpairs(sk.HessianOperator(objective), k=3, tol=1e-8).values,
        "signs": sk.generalized_sharpness(objective, "linf", num_starts=2, max_matvecs=4).value,
        "update": sk.update_curvature(objective, torch.optim.SGD(problem.model.parameters(), lr=0.1)).curvature,
        "rates": torch.tensor([float(limit) for limit in sk.layerwise.layer_rates(objective, tol=1e-8).together.values()]),
        "log z": sk.measures.logit_growth(objective).log_z,
    }


def same_numbers() -> dict[str, Callable[[int], Any]]:
    def part(rank: int, name: str, how: str, known: str) -> Any:
        problem = {"mlp": mlp, "tied": tied, "conv": conv}[name]()
        return numbers(problem, shards(problem.batches, rank, how), plain if (name, known) == ("mlp", "tried") else problem.loss)

    cases = ("mlp uneven known", "mlp empty tried", "tied uneven tried", "tied empty tried", "conv uneven known")
    return {case: functools.partial(lambda rank, case: part(rank, *case.split()), case=case) for case in cases}


def refusals() -> dict[str, Callable[[int], Any]]:
    x, y = gaussian(6, 4), labels(6)
    token_mean = lambda z, t: F.cross_entropy(z, t)  # noqa: E731
    squares = lambda z, t: F.cross_entropy(z, t, reduction="sum")  # noqa: E731

    def failing(rank: int) -> Any:
        problem = mlp()
        H = sk.HessianOperator(sk.Objective(problem.model, shards(problem.batches, rank, "uneven"), loss=problem.loss), retain=False)
        v = gaussian(H.size)
        before = H @ v
        if rank == 1:
            handle = problem.model[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(ArithmeticError("only here")))
        try:
            H @ v
            return "no error"
        except Exception as error:
            first = f"{type(error).__name__}: {error}"
        if rank == 1:
            handle.remove()
        return first, torch.equal(H @ v, before)

    def other_weights(rank: int) -> Any:
        return sk.Objective(built(lambda: nn.Linear(4, 3), seed=rank), (x, y), loss=F.cross_entropy)

    def alone(rank: int) -> Any:
        model = built(lambda: nn.Linear(4, 3), seed=rank)
        found = sk.Objective(model, (x, y), loss=F.cross_entropy, process_group=False).value()
        return abs(found - float(F.cross_entropy(model(x), y).detach())) < 1e-12

    def agreed(rank: int) -> Any:
        """Rank 0's data alone does not tell tokens from samples; rank 1's does."""
        problem = tied()
        full, padded = problem.batches[0][0][:3], problem.batches[1]
        data = [(full, labels(3, 4, classes=7))] if rank == 0 else [(padded[0], padded[1])]
        return sk.Objective(problem.model, data, loss=problem.loss).counted

    return {
        "product fails on one": failing,
        "making fails on one": lambda rank: sk.Objective(mlp().model, (x, y) if rank else iter([(x, y)]), loss=F.cross_entropy),
        "wrong argument on one": lambda rank: sk.Objective(mlp().model, (x, y), loss=F.cross_entropy, params="typo.*" if rank else None),
        "wrong mode on one": lambda rank: sk.Objective(mlp().model, (x, y), loss=F.cross_entropy, mode="trian" if rank else "eval"),
        "nan on one": lambda rank: sk.Objective(mlp().model, (x * float("nan") if rank else x, y), loss=F.cross_entropy),
        "disagreeing losses": lambda rank: sk.Objective(mlp().model, (x, y), loss=squares if rank else token_mean),
        "other weights": other_weights,
        "own group": alone,
        "agreed": agreed,
        "no data anywhere": lambda rank: sk.Objective(mlp().model, [], loss=F.cross_entropy),
    }


def disagreements() -> dict[str, Callable[[int], Any]]:
    """What differs between the ranks: each ends in an error on both, and the group still works afterwards."""
    problem = mlp()

    def operator(rank: int) -> sk.HessianOperator:
        return sk.HessianOperator(sk.Objective(problem.model, shards(problem.batches, rank, "uneven"), loss=problem.loss))

    def wrong_k(rank: int) -> Any:
        return sk.eigenpairs(operator(rank), k=0 if rank else 2)

    return {
        "k": lambda rank: sk.eigenpairs(operator(rank), k=2 + rank),
        "wrong k on one": wrong_k,
        "which": lambda rank: sk.eigenpairs(operator(rank), which="largest" if rank else "smallest"),
        "tol": lambda rank: sk.eigenpairs(operator(rank), tol=1e-3 if rank else 1e-4),
        "budget": lambda rank: sk.spectral_density(operator(rank), num_steps=5, num_probes=3, max_matvecs=12 + rank),
        "seconds": lambda rank: sk.trace(operator(rank), max_seconds=5.0 if rank else None),
        "seed": lambda rank: sk.diagonal(operator(rank), seed=rank),
        "probes": lambda rank: sk.measure(operator(rank).objective, num_probes=3 + rank, num_steps=4),
        "call": lambda rank: (sk.trace if rank else sk.eigenpairs)(operator(rank)),
        "evaluation": lambda rank: (operator(rank).objective.value if rank else functools.partial(sk.eigenpairs, operator(rank)))(),
        "parameters": lambda rank: sk.eigenpairs(operator(rank).block("0.*" if rank else "2.*")),
        "callback": lambda rank: float(sk.eigenpairs(operator(rank), callback=print if rank else None).values[0]) > 0,
    }


def lost() -> dict[str, Callable[[int], Any]]:
    """A process that goes away in the midst of a call."""
    problem = mlp()

    def killed(rank: int) -> Any:
        objective = sk.Objective(problem.model, shards(problem.batches, rank, "uneven"), loss=problem.loss)
        calls: list[int] = []

        def stop(_: Any) -> None:
            calls.append(1)
            if rank == 1 and len(calls) == 4:
                os._exit(0)

        began = time.monotonic()
        said = _outcome(lambda _: sk.eigenpairs(sk.HessianOperator(objective), k=3, callback=stop), rank)
        torch.save((said, time.monotonic() - began), Path(os.environ["SHARPKIT_TEST_FOLDER"]) / "said.pt")
        os._exit(0)

    return {"killed": killed}


def absent() -> dict[str, Callable[[int], Any]]:
    """A process that does not make the call, since its own code raised before it."""
    problem = mlp()

    def part(rank: int) -> Any:
        os.environ["SHARPKIT_RANK_TIMEOUT"] = "3"
        objective = sk.Objective(problem.model, shards(problem.batches, rank, "uneven"), loss=problem.loss)
        began = time.monotonic()
        said = "no error"
        if rank == 0:
            said = _outcome(lambda _: sk.eigenpairs(sk.HessianOperator(objective)), rank)[0]
        else:
            time.sleep(6)
        torch.save((said, time.monotonic() - began), Path(os.environ["SHARPKIT_TEST_FOLDER"]) / f"said{rank}.pt")
        os._exit(0)

    return {"absent": part}


def late() -> dict[str, Callable[[int], Any]]:
    """Saving a checkpoint takes one process longer than the others would wait by default."""
    problem = mlp()

    def part(rank: int, patience: str) -> Any:
        os.environ["SHARPKIT_RANK_TIMEOUT"] = patience
        distributed._PATIENCE = timedelta(seconds=1)
        objective = sk.Objective(problem.model, shards(problem.batches, rank, "uneven"), loss=problem.loss)
        if rank == 1:
            time.sleep(3)
        return objective.value()

    return {"late": lambda rank: part(rank, "20"), "nonsense": lambda rank: part(rank, "soon")}


# -- wrappers and sharded models ----------------------------------------------------------------------------------------------
def wrappers() -> dict[str, Callable[[int], Any]]:
    def ddp(rank: int, static: bool) -> Any:
        problem, twin = mlp(), mlp()
        wrapped = nn.parallel.DistributedDataParallel(problem.model, static_graph=static)
        x, y = problem.batches[0]
        twin_gradients = torch.autograd.grad(F.cross_entropy(twin.model(x), y), twin.params)
        F.cross_entropy(wrapped(x), y).backward()
        objective = sk.Objective(wrapped, shards(problem.batches, rank, "uneven"), loss=problem.loss)
        dense = sk.HessianOperator(objective).to_dense()
        errors = []
        for _ in range(3):
            problem.model.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            errors += [relative_error(p.grad, g) for p, g in zip(problem.params, twin_gradients, strict=True)]
        return dense, objective.layout.names, max(errors)

    def fully_sharded(rank: int) -> Any:
        from torch.distributed.fsdp import fully_shard

        def trains(problem: Problem) -> Any:
            x, y = problem.batches[0]
            try:
                F.cross_entropy(problem.model(x), y).backward()
            except AttributeError as error:
                return str(error)
            return all(p.grad is not None for p in problem.model.parameters())

        measured, untouched = mlp(), mlp()
        for problem in (measured, untouched):
            fully_shard(problem.model)
        objective = sk.Objective(measured.model, shards(measured.batches, rank, "uneven"), loss=measured.loss)
        return objective.layout.names, objective.gradient()[1].shape, trains(measured), trains(untouched)

    def tensor_parallel(rank: int) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        model = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
        parallelize_module(model, init_device_mesh("cpu", (WORLD,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return sk.Objective(model, (gaussian(6, 4), labels(6)), loss=F.cross_entropy).value()

    def one_sharded_part(rank: int) -> Any:
        from torch.distributed.fsdp import fully_shard

        problem = mlp()
        fully_shard(problem.model[0])
        return sk.Objective(problem.model, problem.batches[rank % 2], loss=problem.loss, params="2.*").gradient()[1].shape

    return {
        "ddp": lambda rank: ddp(rank, False),
        "static ddp": lambda rank: ddp(rank, True),
        "fsdp": fully_sharded,
        "tensor parallel": tensor_parallel,
        "one sharded part": one_sharded_part,
    }


# -- the monitor --------------------------------------------------------------------------------------------------------------
def monitored() -> dict[str, Callable[[int], Any]]:
    def run(rank: int, watched: bool, every: Any, metrics: list[str]) -> Any:
        model = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sk.SharpkitWarning)
            monitor = sk.Monitor(wrapped, optimizer, loss=F.cross_entropy, every=every, budget=0.5, metrics=metrics, tol=1e-6)
            x, y = gaussian(12, 4), labels(12)
            mine = slice(0, 5) if rank == 0 else slice(5, 12)
            for _ in range(6 if every != "auto" else 150):
                F.cross_entropy(wrapped(x[mine]), y[mine]).backward()
                if watched:
                    monitor.step((x[mine], y[mine]))
                optimizer.step()
                optimizer.zero_grad()
        values = [{name: m.value for name, m in record.values.items()} for record in monitor.history]
        steps = [record.step for record in monitor.history]
        return steps, values, [sorted(r.failed) for r in monitor.history], [p.detach().clone() for p in model.parameters()]

    metrics = ["lambda_max", "critical_sharpness", "batch_sharpness", "noise_scale"]
    return {
        "watched": lambda rank: run(rank, True, 2, metrics),
        "alone": lambda rank: run(rank, False, 2, metrics),
        "auto": lambda rank: run(rank, True, "auto", ["lambda_max", "batch_sharpness"]),
    }


def learning() -> dict[str, Callable[[int], Any]]:
    def run(rank: int) -> Any:
        model = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=100.0, momentum=0.9)
        learner = sk.CurvatureLearner(optimizer, model=wrapped, loss=F.cross_entropy, total_steps=60)
        x, y = gaussian(12, 4), labels(12)
        mine = slice(0, 6) if rank == 0 else slice(6, 12)
        for step in range(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(wrapped(x[mine]), y[mine])
            loss.backward()
            optimizer.step()
            # one process alone sees a loss that is lost: both must go back
            learner.step((x[mine], y[mine]), loss=float("nan") if rank == 1 and 40 <= step < 48 else loss)
        return [(d.step, d.lr, d.lambda_max) for d in learner.history], [p.detach().clone() for p in model.parameters()]

    def quietly(rank: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sk.SharpkitWarning)
            return run(rank)

    return {"learning": quietly}


TASKS = {
    "learning": learning,
    "disagreements": disagreements,
    "lost": lost,
    "absent": absent,
    "late": late,
    "same_numbers": same_numbers,
    "refusals": refusals,
    "wrappers": wrappers,
    "monitored": monitored,
}


def test_every_number_of_two_processes_equals_that_of_one(tmp_path: Path) -> None:
    ranks = on_two_ranks(tmp_path, "same_numbers")
    for name, found in ranks[0].items():
        assert isinstance(found, dict), (name, found)
        assert isinstance(ranks[1][name], dict), (name, ranks[1][name])
        problem = {"mlp": mlp, "tied": tied, "conv": conv}[name.split()[0]]()
        expected = numbers(problem, problem.batches, problem.loss)
        for what, number in expected.items():
            for rank in range(WORLD):
                other = ranks[rank][name][what]
                # 1e-8 for eigenvalues found to that tolerance; sums over two processes round otherwise by a few bits
                tolerance = 1e-7 if what in ("values", "rates") else 1e-11
                assert relative_error(torch.as_tensor(other), torch.as_tensor(number)) < tolerance, (name, what, rank)
                if isinstance(other, Tensor):
                    assert torch.equal(other, ranks[0][name][what]), (name, what, "the processes must hold the same bits")


def test_an_error_on_one_process_is_an_error_on_both_and_none_hangs(tmp_path: Path) -> None:
    zero, one = on_two_ranks(tmp_path, "refusals")
    assert zero["product fails on one"] == (
        "SharpkitError: the measurement failed on rank 1: see the error there; this is rank 0 of 2",
        True,
    )
    assert one["product fails on one"] == ("ArithmeticError: only here", True)
    for task, failing, kind in (
        ("making fails on one", 0, "ObjectiveError"),
        ("wrong argument on one", 1, "ValueError"),
        ("wrong mode on one", 1, "ValueError"),
        ("nan on one", 1, "NonFiniteError"),
    ):
        said = [zero[task][0], one[task][0]]
        assert said[failing].startswith(kind), said
        assert said[1 - failing].startswith(f"SharpkitError: the measurement failed on rank {failing}"), said
    for found in (zero, one):
        assert "the processes disagree on how the loss averages: rank 0" in found["disagreeing losses"][0]
        assert "rank 1 a sum" in found["disagreeing losses"][0]
        assert "parameters on rank 1 are not those of rank 0" in found["other weights"][0]
        assert found["own group"] is True
        assert found["agreed"] == "labels other than -100"
        assert "holds nothing that counts" in found["no data anywhere"][0]


def test_processes_that_disagree_all_say_so(tmp_path: Path) -> None:
    zero, one = on_two_ranks(tmp_path, "disagreements")
    said = {
        "k": "call eigenpairs with different arguments: k is 2 on rank 0 and 3 on rank 1",
        "wrong k on one": "k is 2 on rank 0 and 0 on rank 1",
        "which": "which is 'smallest' on rank 0 and 'largest' on rank 1",
        "tol": "tol is 0.0001 on rank 0 and 0.001 on rank 1",
        "budget": "call spectral_density with different arguments: max_matvecs is 12 on rank 0 and 13 on rank 1",
        "seconds": "max_seconds is None on rank 0 and 5.0 on rank 1",
        "seed": "call diagonal with different arguments: seed is 0 on rank 0 and 1 on rank 1",
        "probes": "num_probes is 3 on rank 0 and 4 on rank 1",
        "call": "the processes make different calls: rank 0 eigenpairs, rank 1 trace",
        "evaluation": "the processes do different things: rank 0 at a new call, rank 1 at the start of an evaluation",
        "parameters": "size is ",
    }
    for rank, found in enumerate((zero, one)):
        for name, sentence in said.items():
            assert isinstance(found[name], tuple), (name, found[name])
            assert found[name][0].startswith("SharpkitError: "), (name, found[name])
            assert sentence in found[name][0], (name, found[name])
            assert f"this is rank {rank} of 2" in found[name][0]
        assert found["callback"] is True, "one may show its progress"


def _without_a_result(folder: Path, task: str) -> None:
    context = mp.get_context(_method())
    processes = [context.Process(target=_worker, args=(rank, str(folder), task)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)


def test_a_process_that_does_not_come_is_an_error_on_the_other(tmp_path: Path) -> None:
    assert timedelta(seconds=30) >= distributed._PATIENCE, "by default"
    _without_a_result(tmp_path, "absent")
    said, seconds = torch.load(tmp_path / "said0.pt", weights_only=False)
    assert said.startswith("SharpkitError: a process did not come to a new call within 3 s: it raised an error, ended, makes other calls,")
    assert "torch.distributed.barrier()" in said and "SHARPKIT_RANK_TIMEOUT to more seconds" in said
    assert 3 <= seconds < 6


def test_a_process_that_comes_late_is_waited_for_as_long_as_the_environment_says(tmp_path: Path) -> None:
    problem = mlp()
    truth = sk.Objective(problem.model, problem.batches, loss=problem.loss).value()
    for found in on_two_ranks(tmp_path, "late"):
        assert found["late"] == pytest.approx(truth, rel=1e-12)
        assert "SHARPKIT_RANK_TIMEOUT must be a positive number of seconds, got 'soon'" in found["nonsense"][0]


def test_processes_joined_by_nccl_need_the_model_on_a_gpu() -> None:
    ranks = distributed.Ranks(size=2, rank=1, needs_cuda=True)
    with pytest.raises(sk.SharpkitError, match=r"joined by NCCL, which sends from GPUs alone, but the model is on the cpu.* rank 1 of 2"):
        ranks.sum_numbers([1.0], device=torch.device("cpu"))


def test_a_process_that_is_killed_is_an_error_on_the_other_within_half_a_minute(tmp_path: Path) -> None:
    _without_a_result(tmp_path, "lost")
    (said, _), seconds = torch.load(tmp_path / "said.pt", weights_only=False)
    assert said.startswith("SharpkitError: ")
    assert "the connection to another process was lost, as when it is killed" in said
    assert seconds < 30


def test_data_parallel_wrappers_are_measured_and_so_are_sharded_models(tmp_path: Path) -> None:
    problem = mlp()
    expected = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)).to_dense()
    both = on_two_ranks(tmp_path, "wrappers")
    for found in both:
        for name in ("ddp", "static ddp"):
            dense, names, gradient_error = found[name]
            assert relative_error(dense, expected) < 1e-12
            assert names == ("0.weight", "0.bias", "2.weight", "2.bias")
            assert gradient_error < 1e-12, "training through the wrapper goes on with the right gradients"
        *_, trains, untouched_trains = found["fsdp"]
        # torch 2.6 itself cannot run a fully sharded model on the CPU: then the measured one fails exactly as an untouched one does
        assert trains is True or trains == untouched_trains == "'Stream' object has no attribute 'record_event'", trains
    sizes = [found["fsdp"][1][0] for found in both]
    assert sum(sizes) == sum(p.numel() for p in problem.params), "each process holds its part of the vector"


def test_a_monitor_measures_the_batch_of_all_processes_and_they_agree_when(tmp_path: Path) -> None:
    zero, one = on_two_ranks(tmp_path, "monitored")
    model = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    whole = sk.Objective(model, (gaussian(12, 4), labels(12)), loss=F.cross_entropy)
    assert isinstance(zero["watched"][0], list), zero["watched"]
    assert zero["watched"][0] == one["watched"][0] == [0, 2, 4]
    assert zero["watched"][1] == one["watched"][1], "every process has the same numbers"
    first = zero["watched"][1][0]
    assert first["lambda_max"] == pytest.approx(float(sk.eigenpairs(sk.HessianOperator(whole), tol=1e-8).values[0]), rel=1e-6)
    g = whole.gradient()[1]
    assert first["batch_sharpness"] == pytest.approx(float(g @ (sk.HessianOperator(whole) @ g) / (g @ g)), rel=1e-6)
    assert zero["watched"][2] == [["noise_scale"]] * 3, "drawing samples works on one process: recorded, not hung"
    for found in (zero, one):
        assert all(torch.equal(a, b) for a, b in zip(found["watched"][3], found["alone"][3], strict=True))
    assert zero["auto"][0] == one["auto"][0] and len(zero["auto"][0]) >= 1


def test_a_learner_decides_the_same_on_every_process(tmp_path: Path) -> None:
    zero, one = on_two_ranks(tmp_path, "learning")
    assert isinstance(zero["learning"][0], list), zero["learning"]
    # repr, because decisions that measured nothing hold NaN
    assert repr(zero["learning"][0]) == repr(one["learning"][0])
    assert any(step == 48 for step, *_ in zero["learning"][0]), "the loss of one process sent both back"
    assert all(torch.equal(a, b) for a, b in zip(zero["learning"][1], one["learning"][1], strict=True))
