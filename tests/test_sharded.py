"""Models sharded over gloo processes by fully_shard, tensor parallelism or both: every number is the one-process number."""

from __future__ import annotations

import functools
import os
import signal
import threading
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
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk

pytestmark = pytest.mark.distributed
has_fsdp_on_cpu = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
needs_fsdp = pytest.mark.skipif(not has_fsdp_on_cpu, reason="this torch cannot run fully_shard on the CPU")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y, shape = self.norm(x), (*x.shape[:2], -1, x.shape[2] // self.heads)  # the number of heads is read off
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class TinyGPT(nn.Module):
    """Tied input and output embeddings, plain layer norms between parallel layers."""

    def __init__(self, width: int = 8, heads: int = 4, layers: int = 2, vocabulary: int = 11) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(8, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y))


def gpt() -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT().double()


def tokens() -> list[tuple[Tensor, Tensor]]:
    """Three batches, so that two processes have uneven shares; some targets are masked."""
    generator = torch.Generator().manual_seed(1)
    batches = [tuple(torch.randint(11, (3, 5), generator=generator) for _ in range(2)) for _ in range(3)]
    for i, (_, t) in enumerate(batches):
        t[0, : i + 1] = -100
    return batches  # type: ignore[return-value]


def loss(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


def fully_sharded(model: TinyGPT, world: int, **kwargs: Any) -> TinyGPT:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **kwargs)
    fully_shard(model, **kwargs)
    return model


def tensor_parallel(model: TinyGPT, mesh: Any) -> TinyGPT:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "up": ColwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, {**plan, "out": RowwiseParallel(), "down": RowwiseParallel()})
    return model


def sharded(kind: str, rank: int, world: int) -> tuple[TinyGPT, list[tuple[Tensor, Tensor]]]:
    """A sharded model and this process's batches."""
    from torch.distributed.device_mesh import init_device_mesh

    if kind == "fsdp":
        return fully_sharded(gpt(), world), tokens()[rank::world]
    if kind == "tp":
        return tensor_parallel(gpt(), init_device_mesh("cpu", (world,))), tokens()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(gpt(), mesh["tp"])
    return fully_sharded(model, world, mesh=mesh["dp"]), tokens()[rank // 2 :: world // 2]


def numbers(kind: str, rank: int, world: int) -> dict[str, Any]:
    model, batches = sharded(kind, rank, world)
    one = sk.Objective(gpt(), tokens(), loss=loss, process_group=False)
    objective = sk.Objective(model, batches, loss=loss)
    hessian, expected = sk.HessianOperator(objective), sk.HessianOperator(one)
    whole, own = (h.random_vectors(1, generator=torch.Generator().manual_seed(3))[:, 0] for h in (expected, hessian))
    right, gradient = expected @ whole, one.gradient()[1]
    told: dict[str, Any] = {"counts": (objective.num_parameters == one.num_parameters, objective.num_targets == one.num_targets)}
    told["samples"] = objective.num_samples == one.num_samples
    told["length"] = hessian.length
    told["value"] = abs(objective.value() / one.value() - 1)
    told["vector"] = torch.equal(own, objective.layout.own_rows(whole))
    told["gradient"] = relative(objective.gradient()[1], objective.layout.own_rows(gradient), gradient)
    told["products"] = [relative(hessian @ own, objective.layout.own_rows(right), right) for _ in range(2)]
    blocks = [sk.eigenpairs(h.block("blocks.1.*"), k=1, tol=0.1).values for h in (hessian, expected)]
    told["block"] = float((blocks[0] / blocks[1] - 1).abs().max())
    pairs, right_pairs = (sk.eigenpairs(h, k=2, tol=1e-3) for h in (hessian, expected))
    told["eigenvalues"] = float((pairs.values / right_pairs.values - 1).abs().max())
    told["products made"] = (pairs.num_matvecs, right_pairs.num_matvecs)
    told["trace"] = abs(sk.trace(hessian, max_matvecs=6).value / sk.trace(expected, max_matvecs=6).value - 1)
    density = [sk.spectral_density(h, num_probes=2, num_steps=4) for h in (hessian, expected)]
    told["density"] = float((density[0].nodes - density[1].nodes).abs().max() / density[1].nodes.abs().max())
    told["differences"] = relative(sk.HessianOperator(objective, product="differences") @ own, objective.layout.own_rows(right), right)
    return told


def relative(part: Tensor, expected: Tensor, whole: Tensor) -> float:
    return float((part - expected).norm() / whole.norm())


def check_numbers(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert each["counts"] == (True, True)
        assert each["samples"]
        assert each["vector"], "a seed draws the same vector for any number of processes"
        assert max(each["value"], each["gradient"], *each["products"]) < 1e-12, each
        assert max(each["block"], each["eigenvalues"], each["trace"], each["density"]) < 1e-9, each
        assert each["differences"] < 1e-6
        assert each["products made"][0] == each["products made"][1]
    lengths = [each["length"] for each in told]
    assert max(lengths) < 1.2 * sum(lengths) / len(lengths), "vectors are divided evenly"
    assert sum(lengths) == sum(p.numel() for p in gpt().parameters())


def trained(kind: str, rank: int, watched: bool, one: bool = False, steps: int = 2) -> tuple[list[Tensor], list[dict[str, float]]]:
    """A short AdamW run, on two processes or with all their data on one."""
    model = gpt() if one else sharded(kind, rank, 2)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = tokens()
    metrics = ["preconditioned_lambda_max", "batch_sharpness", "critical_sharpness", "directional_sharpness"]
    group = False if one else None
    monitor = sk.Monitor(model, optimizer, loss=loss, every=1, metrics=metrics, tol=1e-2, process_group=group) if watched else None
    for step in range(steps):
        mine = batches[:2] if one or kind == "tp" else [batches[rank]]
        x, t = (torch.cat(parts).clamp_min(0) for parts in zip(*mine, strict=True))  # nothing masked: a mean over processes is one over all
        value = loss(model(x), t)
        value.backward()
        if monitor is not None:
            monitor.step((x, t))
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            with torch.no_grad():  # as in validation: a fully sharded model keeps its root whole after it
                model(x)
    weights = [(p.to_local() if hasattr(p, "to_local") else p).detach().clone() for p in model.parameters()]
    records = [] if monitor is None else [{"step": r.step, **{k: v.value for k, v in r.values.items()}} for r in monitor.history.records]
    assert monitor is None or not any(r.failed for r in monitor.history.records), monitor.history.records
    return weights, records


def monitored(kind: str, rank: int, world: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SharpkitWarning)
        alone, _ = trained(kind, rank, watched=False)
        weights, records = trained(kind, rank, watched=True)
        _, expected = trained(kind, rank, watched=True, one=True)
    same = all(torch.equal(a, b) for a, b in zip(alone, weights, strict=True))
    return {"same": same, "records": records, "expected": expected}


def learned(rank: int, world: int) -> dict[str, Any]:
    """Rates of the curvature learner over a short run, on all processes and with all their data on one."""

    def rates(one: bool) -> list[float]:
        model = gpt() if one else sharded("fsdp", rank, world)[0]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        settings: dict[str, Any] = {"total_steps": 24, "interval": 4, "process_group": False if one else None}
        learner, told = sk.CurvatureLearner(optimizer, model=model, loss=loss, **settings), []
        for _ in range(24):
            mine = tokens()[:world] if one else [tokens()[rank]]
            x, t = (torch.cat(parts).clamp_min(0) for parts in zip(*mine, strict=True))
            optimizer.zero_grad()
            value = loss(model(x), t)
            value.backward()
            optimizer.step()
            learner.step((x, t), loss=value)
            told.append(learner.lr)
        return told

    return {"rates": rates(False), "expected": rates(True)}


class Fails(nn.Module):
    """Raises on one process, in the middle of a forward pass."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layer, self.rank, self.armed = nn.Linear(4, 4), rank, False

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        if self.armed and self.rank == 0:
            raise RuntimeError("a fault of one process")
        return self.layer(y)


class ReadsWidth(nn.Module):
    """Computes with the number of features that it sees, which is another one on parts of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        return self.second(y * y.shape[-1])


class Doubles(nn.Module):
    """Has twice the gradient that its values have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        return self.second(2 * y - y.detach())


def faults(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x, t, mesh = torch.ones(3, 4), torch.zeros(3, 4), init_device_mesh("cpu", (world,))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}

    def parallel(model: nn.Module, plan: dict[str, Any]) -> Any:
        return parallelize_module(model, mesh, plan)

    def failing() -> None:
        from torch.distributed.tensor import Replicate

        model = parallel(Fails(rank), {"layer": ColwiseParallel(output_layouts=Replicate())})
        objective = sk.Objective(model, (x, t), loss=F.mse_loss)
        model.armed = True
        objective.gradient()

    def other_models() -> None:
        model = nn.Sequential(nn.Linear(4, 8 + rank), nn.Linear(8 + rank, 2))
        sk.Objective(parallel(model, plan), (x, t[:, :2]), loss=F.mse_loss)

    def other_batches() -> None:
        model = parallel(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), plan)
        sk.Objective(model, (x + rank, t[:, :2]), loss=F.mse_loss)

    def other_function() -> None:
        model = parallel(ReadsWidth(), {"first": ColwiseParallel(), "second": RowwiseParallel()})
        sk.Objective(model, (x, t[:, :2]), loss=F.mse_loss)

    def cut_gradient() -> None:
        model = parallel(Doubles(), {"first": ColwiseParallel(), "second": RowwiseParallel()})
        hessian = sk.HessianOperator(sk.Objective(model, (x, t[:, :2]), loss=F.mse_loss))
        hessian @ torch.ones(hessian.length)

    def elsewhere() -> None:
        model = parallel(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), plan)
        objective = sk.Objective(model, (x, t[:, :2]), loss=F.mse_loss)
        for call in (sk.GaussNewtonOperator, sk.examine, lambda o: sk.batch_sharpness(o, batch_size=2)):
            with pytest.raises(sk.UnsupportedError, match="sharded over processes"):
                call(objective)
        with pytest.raises(sk.UnsupportedError, match="not written out"):
            sk.HessianOperator(objective).to_dense()
        with pytest.raises(sk.UnsupportedError, match="checkpoint= is not available"):
            sk.eigenpairs(sk.HessianOperator(objective), k=1, checkpoint=os.environ["SHARPKIT_TEST_FOLDER"] + "/kept")
        assert objective.value() == pytest.approx(sk.Objective(model, (x, t[:, :2]), loss=F.mse_loss).value())

    return {each.__name__: said(each) for each in (failing, other_models, other_batches, other_function, cut_gradient, elsewhere)}


def killed(rank: int, world: int) -> None:
    """Rank 1 is killed while products are made; what the other says lies in the folder."""
    hessian = sk.HessianOperator(sk.Objective(*sharded("tp", rank, world), loss=loss))
    vector = hessian.random_vectors(1, generator=torch.Generator().manual_seed(3))[:, 0]
    hessian @ vector
    if rank == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def products() -> None:
        while True:
            hessian @ vector

    torch.save(said(products), os.environ["SHARPKIT_TEST_FOLDER"] + "/said.pt")
    os._exit(0)


def said(part: Callable[[], None]) -> tuple[str, float]:
    began = time.perf_counter()
    try:
        part()
        text = ""
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if isinstance(error, (sk.SharpkitError, RuntimeError)) else traceback.format_exc()
    return text, time.perf_counter() - began


TASKS: dict[str, Callable[[int, int], Any]] = {
    "fsdp": lambda rank, world: {**numbers("fsdp", rank, world), **monitored("fsdp", rank, world)},
    "tp": lambda rank, world: {**numbers("tp", rank, world), "faults": faults(rank, world)},
    "killed": killed,
    "learned": learned,
    "uneven": lambda rank, world: numbers("fsdp", rank, world),
    "both": lambda rank, world: numbers("both", rank, world),
}


def _worker(rank: int, folder: str, task: str, world: int) -> None:
    torch.set_num_threads(1)
    os.environ["SHARPKIT_TEST_FOLDER"] = folder
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        torch.save(TASKS[task](rank, world), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still be running when the interpreter tears down


@functools.cache
def _method() -> str:
    """How processes are started: forked from one that has imported everything once, where the system can."""
    if "forkserver" not in mp.get_all_start_methods():
        return "spawn"
    mp.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "sharpkit.linalg.lanczos", __name__])
    return "forkserver"


def on_ranks(folder: Path, task: str, world: int) -> list[dict[str, Any]]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.start_processes(_worker, (str(folder), task, world), nprocs=world, start_method=_method())  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@needs_fsdp
def test_a_fully_sharded_model_has_the_one_process_numbers_and_its_monitored_run_is_bit_identical(tmp_path: Path) -> None:
    told = on_ranks(tmp_path, "fsdp", 2)
    check_numbers(told)
    for each in told:
        assert each["same"], "training with a monitor ends at the very same weights"
        assert len(each["records"]) == len(each["expected"]) == 2
        for record, expected in zip(each["records"], each["expected"], strict=True):
            assert record == pytest.approx(expected, rel=1e-9)
    assert told[0]["records"] == told[1]["records"], "every process has the same records"


def test_a_tensor_parallel_model_has_the_one_process_numbers_and_faults_are_told_on_all_processes(tmp_path: Path) -> None:
    told = on_ranks(tmp_path, "tp", 2)
    check_numbers(told)
    one, zero = (each["faults"] for each in told)
    assert "SharpkitError: the measurement failed on rank 0: see the error there" in zero["failing"][0], zero["failing"]
    assert "a fault of one process" in one["failing"][0]
    for each in (zero, one):
        assert all(seconds < 30 for _, seconds in each.values())
        assert "hold parts of the same tensors but other batches" in each["other_batches"][0], each["other_batches"]
        assert "its loss on whole tensors differs" in each["other_function"][0], each["other_function"]
        assert "the gradient is not that of the loss" in each["cut_gradient"][0], each["cut_gradient"]
        assert each["elsewhere"][0] == "", each["elsewhere"]
        assert "the processes hold different models: parameter 0 is ('0.weight', (8, 4)" in each["other_models"][0], each["other_models"]


@needs_fsdp
@pytest.mark.slow
@pytest.mark.parametrize(("task", "world"), [("uneven", 3), ("both", 4)])
def test_uneven_shards_and_meshes_of_two_dimensions_have_the_one_process_numbers(tmp_path: Path, task: str, world: int) -> None:
    check_numbers(on_ranks(tmp_path, task, world))


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_with_a_message(tmp_path: Path) -> None:
    context = mp.get_context(_method())  # whose processes are not ended when one is lost
    processes = [context.Process(target=_worker, args=(rank, str(tmp_path), "killed", 2)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert processes[1].exitcode == -signal.SIGKILL
    text, seconds = torch.load(tmp_path / "said.pt", weights_only=False)
    assert text.startswith("SharpkitError: the connection to another process was lost, as when it is killed"), text
    assert seconds < 30


@needs_fsdp
@pytest.mark.slow
def test_the_learner_decides_as_on_one_process(tmp_path: Path) -> None:
    for told in on_ranks(tmp_path, "learned", 2):
        assert told["rates"] == pytest.approx(told["expected"], rel=1e-9)
