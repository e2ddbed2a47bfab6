"""Models sharded over processes: do products, eigenvalues, trace and density agree with one process, and what do they take?

    python -m experiments.scale_sharded      # results/scale_sharded.jsonl, figures/scale_sharded.png

Rows of kind "accuracy": float64, relative distances from one process over the same data, uneven over the processes; the largest of all.
"cost": a small GPT in float32: seconds and messages of a product, bytes that a process receives in it, peak memory of a process beyond what
it holds before (resident, sampled each 2 ms), each also for a gradient by the model's own training step, and for Lanczos of 4 products.
"paper": the same counts for models that fit no machine here, from the formula that the "cost" rows are checked against.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import seeded
from sharpkit.objective import distributed
from sharpkit.objective.memory import used_memory

VOCABULARY = 32
# What a GPU and its network are taken to do, for the rows "paper": a half of an H100's dense bfloat16 rate, and 400 Gbit/s to each.
FLOPS, BANDWIDTH, LATENCY = 0.4e15, 50e9, 50e-6
GRADIENTS = 2.4  # compute of a product over a gradient's, as measured for a small GPT


class TiedGPT(nn.Module):
    """A GPT whose output layer is its embedding, and whose heads are read off the tensors' shapes."""

    def __init__(self, width: int = 24, layers: int = 2, head: int = 2, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.layers = nn.ModuleList(Layer(width, head) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for layer in self.layers:
            y = layer(y)
        return self.head(self.norm(y))


class Layer(nn.Module):
    """Attention and a two-layer network, before them one norm."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.norm, self.size = nn.LayerNorm(width), head
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


# -- models, data and ways to shard -------------------------------------------------------------------------------------------------
def model_of(name: str) -> nn.Module:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 8))

    def huggingface() -> nn.Module:
        import transformers

        if name == "GPT-2":
            config = transformers.GPT2Config(
                vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
            )
            return transformers.GPT2LMHeadModel(config)
        shape: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12}
        config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=12, max_position_embeddings=16, **shape)
        return transformers.LlamaForCausalLM(config)

    return seeded({"MLP": mlp, "tied GPT": TiedGPT}.get(name, huggingface)).double()


def data_of(name: str) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    if name == "MLP":
        return [
            (torch.randn(n, 16, generator=generator, dtype=torch.float64), torch.randint(8, (n,), generator=generator))
            for n in (9, 4, 7, 5, 6)
        ]
    batches = [torch.randint(VOCABULARY, (n, 8), generator=generator) for n in (3, 1, 2, 2, 3)]
    return [(x, x.roll(1, 1)) if name == "tied GPT" else {"input_ids": x, "labels": x} for x in batches]


def loss(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), t.flatten())


def next_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A Hugging Face model's loss in float64: its own casts logits to float32, which rounds sums of other parts of the data differently."""
    return loss(model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:])


def layers_of(model: nn.Module) -> list[nn.Module]:
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return lists[0] if lists else [m for m in model.children() if isinstance(m, nn.Linear)]


def sharded(model: nn.Module, way: str, rank: int, world: int) -> tuple[nn.Module, int, int]:
    """The model; this process's number among those of other data, and how many these are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def parallel(mesh: Any) -> None:
        if isinstance(model, nn.Sequential):
            parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        into = ("q", "k", "v", "up", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        out = ("out", "down", "self_attn.o_proj", "mlp.down_proj")
        for layer in layers_of(model):
            names = {name for name, _ in layer.named_modules()}
            plan = {name: ColwiseParallel() for name in into} | {name: RowwiseParallel() for name in out}
            parallelize_module(layer, mesh, {name: style for name, style in plan.items() if name in names})

    def fully(mesh: Any) -> None:
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    if way == "DDP":
        return (nn.parallel.DistributedDataParallel(model) if world > 1 else model), rank, world
    if way == "FSDP2":
        fully(init_device_mesh("cpu", (world,)))
        return model, rank, world
    if way == "TP":
        parallel(init_device_mesh("cpu", (world,)))
        return model, 0, 1
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    parallel(mesh["tensor"])
    fully(mesh["data"])
    return model, rank // (world // 2), 2


def ways_of(name: str, world: int) -> list[str]:
    ways = ["DDP", "FSDP2"]
    if name != "GPT-2" and world > 1:  # its fused Conv1D has no parallel style in torch
        ways.append("TP")
        if world == 4:
            ways.append("FSDP2 x TP")
    return ways


# -- accuracy ---------------------------------------------------------------------------------------------------------------------
def accuracy(rank: int, world: int, names: list[str]) -> list[Row]:
    rows = []
    for name in names:
        settings: dict[str, Any] = {"closure": next_tokens} if name in ("GPT-2", "Llama") else {"loss": loss}
        one = sk.HessianOperator(sk.Objective(model_of(name), data_of(name), process_group=False, **settings))
        whole = one.random_vectors(1, generator=torch.Generator().manual_seed(3))[:, 0]
        expected = one @ whole
        pairs, trace = sk.eigenpairs(one, k=5, tol=1e-3), sk.trace(one, max_matvecs=8, rtol=1e-9)
        density = sk.spectral_density(one, num_probes=2, num_steps=8)
        for way in ways_of(name, world):
            model, number, parts = sharded(model_of(name), way, rank, world)
            objective = sk.Objective(model, data_of(name)[number::parts], **settings)
            hessian = sk.HessianOperator(objective)
            own = hessian.random_vectors(1, generator=torch.Generator().manual_seed(3))[:, 0]
            right = objective.layout.own_rows(expected)
            gap = hessian @ own - right
            values, tr = sk.eigenpairs(hessian, k=5, tol=1e-3), sk.trace(hessian, max_matvecs=8, rtol=1e-9)
            nodes = sk.spectral_density(hessian, num_probes=2, num_steps=8).nodes
            gaps = {
                "product": math.sqrt(float(hessian.dot(gap, gap)) / float(hessian.dot(right, right))),
                "top_5": float((values.values / pairs.values - 1).abs().max()),
                "trace": abs(tr.value / trace.value - 1),
                "density": float((nodes - density.nodes).abs().max() / density.nodes.abs().max()),
            }
            told: list[Any] = [None] * world
            dist.all_gather_object(told, {**gaps, "length": hessian.length})
            row = {key: max(each[key] for each in told) for key in gaps}
            same = values.num_matvecs == pairs.num_matvecs
            lengths = [each["length"] for each in told]
            rows.append({"kind": "accuracy", "model": name, "way": way, "world": world, **row, "same_products": same, "lengths": lengths})
    return rows


# -- what it takes ------------------------------------------------------------------------------------------------------------------
class Traffic:
    """Counts what a process receives: bytes and messages of the collectives that sharpkit makes."""

    def __init__(self) -> None:
        self.bytes = self.messages = 0
        self._gather, self._scatter = distributed.dist.all_gather, distributed.dist.reduce_scatter_tensor

    def __enter__(self) -> Traffic:
        def gather(parts: list[Tensor], part: Tensor, **kwargs: Any) -> Any:
            self.bytes, self.messages = self.bytes + part.nbytes * (len(parts) - 1), self.messages + 1
            return self._gather(parts, part, **kwargs)

        def scatter(row: Tensor, rows: Tensor, **kwargs: Any) -> Any:
            self.bytes, self.messages = self.bytes + rows.nbytes - row.nbytes, self.messages + 1
            return self._scatter(row, rows, **kwargs)

        distributed.dist.all_gather, distributed.dist.reduce_scatter_tensor = gather, scatter  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        distributed.dist.all_gather, distributed.dist.reduce_scatter_tensor = self._gather, self._scatter  # type: ignore[assignment]


def peak(work: Callable[[], Any]) -> tuple[float, float]:
    """(bytes beyond what the process held before, seconds) of some work."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, highest, over = used_memory(torch.device("cpu")), 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.002):
            highest = max(highest, used_memory(torch.device("cpu")))

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    over.set()
    thread.join()
    return highest - before, seconds


def costs(rank: int, world: int, quick: bool) -> list[Row]:
    """One process's peaks, a model too large to be held whole for the time of a product."""
    width, layers = (64, 2) if quick else (512, 6)
    torch.manual_seed(0)
    model, number, _ = sharded(TiedGPT(width, layers, head=32, vocabulary=256), "FSDP2", rank, world)
    x = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(number))
    n = sum(p.numel() for p in model.parameters())

    def step() -> None:
        loss(model(x), x.roll(1, 1)).backward()
        model.zero_grad()

    objective = sk.Objective(model, (x, x.roll(1, 1)), loss=loss, check=False)
    hessian = sk.HessianOperator(objective, retain=False)
    vector = hessian.random_vectors(1, generator=torch.Generator().manual_seed(0))[:, 0]
    step()
    stages: dict[str, Callable[[], Any]] = {
        "training step": step,
        "gradient": objective.gradient,
        "product": lambda: hessian @ vector,
        "difference": lambda: sk.HessianOperator(objective, product="differences") @ vector,
        "Lanczos": lambda: sk.eigenpairs(hessian, k=1, tol=1e-9, max_matvecs=3 if quick else 4),
    }
    rows = []
    for name, work in stages.items():
        with Traffic() as traffic, warnings.catch_warnings():
            warnings.simplefilter("ignore", sk.ConvergenceWarning)  # the budgets are small
            nbytes, seconds = peak(work)
        told: list[Any] = [None] * world
        dist.all_gather_object(told, (nbytes, seconds))
        own, block = 4 * n / world, 4 * max(sum(p.numel() for p in layer.parameters()) for layer in layers_of(model))
        rows.append(
            {
                "kind": "cost",
                "stage": name,
                "world": world,
                "parameters": n,
                "blocks": layers,
                "peak_bytes": max(each[0] for each in told),
                "seconds": max(each[1] for each in told),
                "messages": traffic.messages,
                "bytes": traffic.bytes,
                "model_over_ranks": own,
                "largest_block": block,
            }
        )
    return rows


def predicted_bytes(parameters: int, world: int, passes: float) -> float:
    """What a process receives in a product, float32: so many times all that it does not hold."""
    return passes * 4 * parameters * (world - 1) / world


def paper(cost: list[Row]) -> list[Row]:
    """Products of models that were not measured: bytes by the passes over the parameters, seconds by what a GPU is taken to do."""
    product = next(row for row in cost if row["stage"] == "product" and row["world"] == max(r["world"] for r in cost))
    passes = product["bytes"] / predicted_bytes(product["parameters"], product["world"], 1.0)
    each = product["messages"] / (product["blocks"] + 1)
    rows = []
    for name, n, layers, tokens in (("GPT-2 124M", 124e6, 12, 8192), ("1.3 B", 1.3e9, 24, 8192), ("7 B", 6.7e9, 32, 8192)):
        for world in (8, 64):
            nbytes, messages = predicted_bytes(round(n), world, passes), each * (layers + 1)
            compute, network = GRADIENTS * 6 * n * tokens / FLOPS, nbytes / BANDWIDTH + messages * LATENCY
            row = {"bytes": nbytes, "messages": messages, "compute_seconds": compute, "network_seconds": network}
            bound = "network" if network > compute else "compute"
            rows.append({"kind": "paper", "model": name, "world": world, "tokens": tokens, "passes": passes, **row, "bound": bound})
    return rows


# -- processes --------------------------------------------------------------------------------------------------------------------
def _worker(rank: int, world: int, folder: str, task: str, quick: bool) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed goes back at once, so that peaks are those of tensors
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{task}{world}", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    names = ["MLP", "tied GPT"] if quick else ["MLP", "tied GPT", "Llama", "GPT-2"]
    rows = accuracy(rank, world, names) if task == "accuracy" else costs(rank, world, quick)
    if rank == 0:
        torch.save(rows, f"{folder}/{task}{world}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still be running when the interpreter tears down


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for task, worlds in (("accuracy", (2,) if quick else (1, 2, 3, 4)), ("cost", (2,) if quick else (2, 4))):
            for world in worlds:
                mp.start_processes(_worker, (world, folder, task, quick), nprocs=world, start_method="spawn")
                rows += torch.load(Path(folder) / f"{task}{world}.pt", weights_only=False)
                print(f"{task} on {world} processes", flush=True)
    return rows + paper([row for row in rows if row["kind"] == "cost"])


def draw(rows: list[Row], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    found = [row for row in rows if row["kind"] == "accuracy"]
    for key, mark in (("product", "o"), ("top_5", "x"), ("trace", "+"), ("density", ".")):
        left.semilogy([max(row[key], 1e-17) for row in found], mark, label=key)
    left.set(xlabel="model, way and number of processes", ylabel="relative distance from one process", title="Agreement, float64")
    left.legend()
    cost = [row for row in rows if row["kind"] == "cost"]
    for world in sorted({row["world"] for row in cost}):
        own = [row for row in cost if row["world"] == world]
        right.plot([row["stage"] for row in own], [row["peak_bytes"] / 2**20 for row in own], "o-", label=f"{world} processes")
    right.set(ylabel="MiB", title="Peak memory of a process beyond what it holds")
    right.tick_params(axis="x", rotation=20)
    right.legend()


if __name__ == "__main__":
    run_as_script("scale_sharded", measure, draw)
