"""PyHessian's names on sharpkit: the shapes it returns, the right numbers, the model left alone; the library itself where it is there."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import conv, mlp, relative_error
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.compat.pyhessian import density_generate, get_esd_plot, hessian


def problem(samples: int = 30) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
        return model, torch.randn(samples, 6).double(), torch.randint(3, (samples,))


def test_numbers_are_those_of_the_dense_matrix_and_shapes_are_pyhessians() -> None:
    model, x, y = problem()
    measured = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=True)
    dense = sk.HessianOperator(sk.Objective(model, (x, y), loss=F.cross_entropy)).to_dense()
    exact = torch.linalg.eigvalsh(dense)
    by_size = exact[exact.abs().argsort(descending=True)]
    values, vectors = measured.eigenvalues(top_n=3, tol=1e-6)
    assert isinstance(values[0], float)
    assert torch.tensor(values).double() == pytest.approx(by_size[:3], rel=1e-5)
    assert [tuple(part.shape) for part in vectors[0]] == [tuple(p.shape) for p in measured.params]
    quotient, product = measured.dataloader_hv_product(vectors[0])
    assert quotient == pytest.approx(values[0], rel=1e-5)
    assert relative_error(torch.cat([p.reshape(-1) for p in product]), dense @ torch.cat([p.reshape(-1) for p in vectors[0]])) < 1e-12
    forms = measured.trace(maxIter=400, tol=1e-9)
    assert len(forms) == 400 and np.mean(forms) == pytest.approx(float(exact.sum()), abs=4 * np.std(forms) / 20)
    assert len(measured.trace(maxIter=400, tol=0.3)) < 100
    nodes, weights = measured.density(iter=20, n_v=4)
    assert len(nodes) == len(weights) == 4 and len(nodes[0]) == len(weights[0]) == 20
    assert [sum(row) for row in weights] == pytest.approx([1.0] * 4)
    mean = float(np.mean([np.dot(n, w) for n, w in zip(nodes, weights, strict=True)]))
    assert mean == pytest.approx(float(exact.mean()), abs=0.2 * float(exact.abs().max()))


def test_uneven_loaders_are_weighed_and_the_model_is_left_alone() -> None:
    model, x, y = problem()
    model.train()
    before = copy.deepcopy(model.state_dict())
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    one, several = hessian(model, nn.CrossEntropyLoss(), data=(x, y)), hessian(model, nn.CrossEntropyLoss(), dataloader=batches)
    v = [torch.randn_like(p) for p in one.params]
    assert one.dataloader_hv_product(v)[0] == pytest.approx(several.dataloader_hv_product(v)[0], rel=1e-12)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_torchs_seed_decides() -> None:
    model, x, y = problem()
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(hessian(model, nn.CrossEntropyLoss(), data=(x, y)).trace(maxIter=5))
    assert drawn[0] == drawn[1]


def test_densities_integrate_to_one_and_can_be_drawn(tmp_path: Path) -> None:
    density, grid = density_generate([[0.0, 1.0], [0.0, 1.0]], [[0.75, 0.25], [0.5, 0.5]])
    assert float(np.trapezoid(density, grid)) == pytest.approx(1.0, rel=1e-3)
    assert float(density[grid > 0.5].sum() / density.sum()) == pytest.approx(0.375, rel=1e-6)
    get_esd_plot([[0.0, 1.0]], [[0.75, 0.25]], str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_both_or_no_data_is_refused() -> None:
    model, x, y = problem()
    for data in ({}, {"data": (x, y), "dataloader": [(x, y)]}):
        with pytest.raises(ValueError, match="either data=, one batch of inputs and targets, or dataloader="):
            hessian(model, nn.CrossEntropyLoss(), **data)  # type: ignore[arg-type]


@pytest.mark.bench
@pytest.mark.parametrize("make", [mlp, conv])
def test_pyhessian_itself_says_the_same_of_one_batch(make: Any) -> None:
    theirs = pytest.importorskip("pyhessian").hessian
    case = make()
    batch = case.batches[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = theirs(copy.deepcopy(case.model), case.loss, data=batch, cuda=False)
        values, _ = peer.eigenvalues(maxIter=2000, tol=1e-9)
        trace = peer.trace(maxIter=500, tol=-np.inf)  # else a mean below 0 ends it at once
    ours = hessian(case.model, case.loss, data=batch, cuda=False)
    assert ours.eigenvalues(tol=1e-8)[0][0] == pytest.approx(values[0], rel=1e-4)
    mine = ours.trace(maxIter=500, tol=1e-12)
    assert np.mean(mine) == pytest.approx(np.mean(trace), abs=4 * (np.std(mine) + np.std(trace)) / np.sqrt(500))
