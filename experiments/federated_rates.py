"""Client rates from each client's own curvature in federated averaging, against one tuned rate and a hypergradient's.

    python -m experiments.federated_rates          # results/federated_rates.jsonl, figures/federated_rates.png

Digits over 10 clients, unevenly (labels by a Dirichlet distribution of 0.3, the pixels' contrast of each client its own), a small network,
30 rounds of 10 local SGD steps. Ways: one client rate; a client rate of c times its own limit 2 / lambda_max, measured at the start of each
round; the first with a server rate that grows while successive updates point the same way (FedHyper-G, arXiv 2310.03156, held to 1 to 3).
Every number is tuned on a grid with two seeds, then run with five.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import sharpkit as sk
from experiments._batch_models import digits
from experiments._common import Row, run_as_script, searched
from experiments._models import mlp, seeded

CLIENTS, ROUNDS, LOCAL, BATCH = 10, 30, 10, 16
GRIDS = {
    "one rate": (0.1, 0.2, 0.4, 0.8),
    "a share of each client's limit": (0.1, 0.2, 0.4, 0.8),
    "one rate, server rate by hypergradient": (0.1, 0.2, 0.4, 0.8),
}
SEEDS = (0, 1, 2, 3, 4)
_SEARCHED, _REACH = 2, 4  # seeds that a grid is searched with, and how many factors of 2 it may move on


@cache
def clients(seed: int) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Each client's data, and held-out data."""
    x, y, _ = digits()
    rng, parts = np.random.default_rng(seed), [list[int]() for _ in range(CLIENTS)]
    for label in range(10):
        own = rng.permutation(np.flatnonzero(y[:1400].numpy() == label))
        shares = np.cumsum(rng.dirichlet([0.3] * CLIENTS))[:-1]
        for part, chosen in zip(parts, np.split(own, (shares * len(own)).astype(int)), strict=True):
            part += chosen.tolist()
    contrast = np.exp(rng.uniform(-1, 1, CLIENTS))  # what makes the clients' curvatures differ
    data = [(x[p] * float(c), y[p]) for p, c in zip(parts, contrast, strict=True) if len(p) >= BATCH]
    return data, (x[1400:], y[1400:])


def trained(way: str, number: float, seed: int, rounds: int) -> tuple[float, list[float], int]:
    """(held-out loss, client rates of the last round, products spent)."""
    model = seeded(lambda: mlp((64, 32, 10)), seed)
    data, held_out = clients(seed)
    generator, server, last, products = torch.Generator().manual_seed(seed), 1.0, None, 0
    rates = list[float]()
    for _ in range(rounds):
        total, weights, rates = None, sum(len(y) for _, y in data), []
        start = [p.detach().clone() for p in model.parameters()]
        for x, y in data:
            local = copy.deepcopy(model)
            rate = number
            if way.startswith("a share"):
                hessian = sk.HessianOperator(sk.Objective(local, (x, y), loss=F.cross_entropy, check=False))
                top = sk.eigenpairs(hessian, k=1, tol=0.1)
                products += hessian.num_matvecs
                rate = min(number * 2 / max(float(top.values[0]), 1e-6), 10.0)
            rates.append(rate)
            optimizer = torch.optim.SGD(local.parameters(), lr=rate)
            for _ in range(LOCAL):
                chosen = torch.randint(len(y), (BATCH,), generator=generator)
                optimizer.zero_grad()
                F.cross_entropy(local(x[chosen]), y[chosen]).backward()
                optimizer.step()
            moved = [len(y) / weights * (p.detach() - s) for p, s in zip(local.parameters(), start, strict=True)]
            total = moved if total is None else [a + b for a, b in zip(total, moved, strict=True)]
        assert total is not None
        if way.endswith("hypergradient"):
            flat = torch.cat([t.flatten() for t in total])
            if last is not None:
                server = min(max(server + float(flat @ last), 1.0), 3.0)
            last = flat
        with torch.no_grad():
            for p, s, t in zip(model.parameters(), start, total, strict=True):
                p.copy_(s + server * t)
    loss = float(F.cross_entropy(model(held_out[0]), held_out[1]).detach())
    return loss if math.isfinite(loss) else math.inf, rates, products


def measure(quick: bool) -> list[Row]:
    """One row for each way and seed, at its best number."""
    torch.set_num_threads(1)
    rows, rounds, seeds = list[Row](), 3 if quick else ROUNDS, SEEDS[: 1 if quick else None]
    for way, grid in GRIDS.items():

        def mean(number: float, way: str = way) -> float:
            return float(np.mean([trained(way, number, seed, rounds)[0] for seed in seeds[:_SEARCHED]]))

        losses = searched(mean, grid[:1] if quick else grid, reach=0 if quick else _REACH)
        best = min(losses, key=losses.__getitem__)
        for seed in seeds:
            loss, rates, products = trained(way, best, seed, rounds)
            row = {"way": way, "seed": seed, "number": best, "loss": loss, "client rates": sorted(rates), "products": products}
            rows.append({**row, "searched": sorted(losses.items())})
    return rows


def draw(rows: list[Row], canvas: Any) -> None:
    """Held-out losses of all seeds by way, their means; client rates of the first seed."""
    left, right = canvas.subplots(1, 2)
    ways = list(dict.fromkeys(row["way"] for row in rows))
    for at, way in enumerate(ways):
        own = [row for row in rows if row["way"] == way]
        left.plot([row["loss"] for row in own], [at] * len(own), "o", color="#2563a8", alpha=0.5)
        left.plot([np.mean([row["loss"] for row in own])] * 2, [at - 0.25, at + 0.25], color="#d1662b")
        right.plot(own[0]["client rates"], "o-", label=way, markersize=3)
    left.set_yticks(range(len(ways)), labels=[way.replace(", ", ",\n").replace(" each", "\neach") for way in ways])
    left.invert_yaxis()
    left.set_xlabel("held-out loss (nats)")
    right.set(xlabel="client, by rate", ylabel="client rate in the last round", yscale="log")
    right.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    run_as_script("federated_rates", measure, draw)
