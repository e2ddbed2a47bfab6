"""measure() agrees with the dense spectrum, within its stated errors, and changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk


def _objective(dtype: torch.dtype = torch.float64) -> sk.Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(dtype)
    return sk.Objective(model, (3 * torch.randn(50, 6, dtype=dtype), torch.randint(4, (50,))), loss=F.cross_entropy)


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    return torch.linalg.eigvalsh(sk.HessianOperator(_objective()).to_dense())


def test_every_number_is_the_dense_one_within_its_error(dense: torch.Tensor) -> None:
    s = sk.measure(_objective())
    assert abs(s.lambda_max.value - dense[-1]) <= max(s.lambda_max.stderr, 1e-9)
    assert abs(s.lambda_min.value - dense[0]) <= max(s.lambda_min.stderr, 1e-9)
    assert abs(s.trace.value - dense.sum()) <= 4 * s.trace.stderr
    assert abs(s.frobenius_norm.value - dense.norm()) <= 4 * s.frobenius_norm.stderr
    assert abs(s.effective_rank.value - dense.abs().sum() / dense.abs().max()) <= 4 * s.effective_rank.stderr
    assert s.stable_lr == pytest.approx(2 / float(dense[-1]), rel=1e-6)
    assert s.converged


@pytest.mark.slow
def test_standard_errors_of_the_shared_pass_are_calibrated(dense: torch.Tensor) -> None:
    hessian = sk.HessianOperator(_objective())
    matrix = hessian.to_dense()
    matrix = (matrix + matrix.T) / 2
    from sharpkit.linalg.overview import spectral_overview

    truths = {"trace": float(dense.sum()), "frobenius_norm": float(dense.norm()), "absolute_trace": float(dense.abs().sum())}
    hits = dict.fromkeys(truths, 0)
    for seed in range(100):
        overview = spectral_overview(matrix, num_probes=5, num_steps=12, seed=seed)
        for name, truth in truths.items():
            estimate = getattr(overview, name)
            hits[name] += abs(estimate.value - truth) <= 2 * estimate.stderr
    # 95 % intervals; 100 draws leave +-3 sigma = 6.5 around 95, and the widened errors err on the safe side
    assert all(88 <= count <= 100 for count in hits.values()), hits


def test_the_loss_and_gradient_norm_are_reported() -> None:
    objective = _objective()
    s = sk.measure(objective)
    loss, gradient = objective.gradient()
    assert s.loss == loss and s.grad_norm == pytest.approx(float(gradient.norm()))


def test_the_optimizer_decides_the_stable_rate_and_is_only_read() -> None:
    objective = _objective()
    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=1e-3)
    (x, y), model = next(iter(objective._source)), objective.model
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    s = sk.measure(objective, optimizer=optimizer)
    top = torch.linalg.eigvalsh(sk.PreconditionedOperator(sk.HessianOperator(objective), optimizer).to_dense())[-1]
    assert s.preconditioned_lambda_max is not None
    assert s.preconditioned_lambda_max.value == pytest.approx(float(top), rel=1e-3)
    assert s.stable_lr == pytest.approx(sk.stable_learning_rate(float(top), optimizer=optimizer), rel=1e-3)
    assert s.lr == 1e-3
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(after["state"][key][k])) for k in state)


def test_coupled_decay_is_part_of_what_adam_preconditions() -> None:
    objective = _objective()
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=1e-3, weight_decay=0.5)
    (x, y), model = next(iter(objective._source)), objective.model
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    hessian = sk.HessianOperator(objective)
    top = torch.linalg.eigvalsh(sk.PreconditionedOperator(hessian + 0.5, optimizer).to_dense())[-1]
    found = sk.measure(objective, optimizer=optimizer).preconditioned_lambda_max
    assert found is not None and found.value == pytest.approx(float(top), rel=1e-3)


def test_a_budget_returns_what_is_there_flagged() -> None:
    with pytest.warns(sk.ConvergenceWarning):
        s = sk.measure(_objective(), max_matvecs=20)
    assert not s.converged and s.num_matvecs <= 20
    assert any("tolerance" in sentence for sentence in s.findings())


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, second = (sk.measure(_objective(), seed=3).to_dict() for _ in range(2))
    assert first["trace"]["value"] == second["trace"]["value"] and first["lambda_max"]["value"] == second["lambda_max"]["value"]


def test_results_serialise_and_read_well() -> None:
    s = sk.measure(_objective(torch.float32), optimizer=None)
    assert json.loads(json.dumps(s.to_dict()))["kind"] == "sharpness"
    assert "lambda_max" in repr(s) and "Hessian products" in repr(s)
    assert len(s.findings()) >= 3


def test_the_findings_name_the_edge_of_stability() -> None:
    objective = _objective()
    limit = float(sk.measure(objective).stable_lr)
    for factor, word in ((0.5, "50%"), (0.97, "edge of stability"), (1.5, "1.50 times")):
        optimizer = torch.optim.SGD(objective.model.parameters(), lr=factor * limit)
        assert any(word in sentence for sentence in sk.measure(objective, optimizer=optimizer).findings())


class Quadratic(nn.Module):
    """A sum of h w^2 / 2, for each sample the same: its Hessian is diag(h)."""

    def __init__(self, curvatures: torch.Tensor) -> None:
        super().__init__()
        self.curvatures, self.weights = curvatures, nn.Parameter(torch.ones_like(curvatures))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.curvatures * self.weights**2).sum() / 2 * torch.ones_like(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("low", "said"),
    [
        (-5000.0, "There is negative curvature: lambda_min is -5000"),
        (-8.7, "There is slight negative curvature: lambda_min is -8.7"),
        (0.0, "There is no negative curvature to speak of"),
        (3.0, "There is no negative curvature to speak of"),
    ],
)
def test_negative_curvature_is_judged_by_its_own_error_however_large_the_largest_is(low: float, said: str, dtype: torch.dtype) -> None:
    curvatures = torch.cat([torch.tensor([9791.0, 4000, 900]), torch.linspace(3.5, 20, 30), torch.tensor([low])]).to(dtype)
    s = sk.measure(sk.Objective(Quadratic(curvatures), (torch.ones(2, dtype=dtype), torch.ones(2)), loss=lambda out, y: out.mean()))
    (sentence,) = (sentence for sentence in s.findings() if "negative curvature" in sentence)
    assert sentence.startswith(said) and ("convex" in sentence) is (low >= 0)
    unknown = dataclasses.replace(s, lambda_min=sk.Estimate(-1.0, 1.5, converged=False, error_kind="residual bound"))
    assert any(sentence.startswith("Whether there is negative curvature is not known") for sentence in unknown.findings())


def test_progress_is_reported_with_an_estimate_of_the_rest() -> None:
    seen: list[sk.Progress] = []
    sk.measure(_objective(), callback=seen.append)
    assert [p.num_matvecs for p in seen] == sorted(p.num_matvecs for p in seen) and seen[0].num_matvecs == 1
    assert all(p.remaining >= 0 for p in seen) and seen[-1].remaining <= seen[0].remaining + seen[-1].elapsed


def test_too_few_probes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_probes"):
        sk.measure(_objective(), num_probes=2)
