"""Sharpness across widths on linear models, whose Hessian is known, and on small networks against dense matrices."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sharpkit._results import to_json
from sharpkit.operators.hessian import HessianOperator
from sharpkit.transfer.setup import Family
from sharpkit.transfer.sharpness import SharpnessTransfer, sharpness_transfer

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(12, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOP = float(torch.linalg.eigvalsh(2 * X.T @ X / len(X))[-1])  # of the Hessian of the mean squared error of a linear model


class Scaled(nn.Module):
    """A linear model whose output is multiplied: its Hessian by the square."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.w, self.factor = nn.Parameter(torch.zeros(3, 1, dtype=torch.float64)), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * (x @ self.w)


def linear(power: float, *, lr_power: float = 0.0) -> dict[str, Any]:
    """Hessian ~ width^power, rate ~ width^lr_power."""
    return {
        "build": lambda width: Scaled((width / 8) ** (power / 2)),
        "optimizer": lambda model, width: torch.optim.SGD(model.parameters(), lr=0.01 * (width / 8) ** lr_power, momentum=0.5),
        "data": [(X, Y)],
        "loss": nn.functional.mse_loss,
    }


def follow(family: dict[str, Any], widths: list[int], **options: Any) -> Any:
    family = dict(family)
    return sharpness_transfer(family.pop("build"), widths, **family, **{"steps": 6, "every": 2, **options})


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)).double()


def test_a_linear_models_sharpness_is_the_closed_form_at_every_time() -> None:
    found = follow(linear(0.0), [8, 16, 32])
    assert found.steps == (0, 2, 4, 6)
    for size in found.sizes:
        assert found.lambda_max[size] == pytest.approx(np.full((1, 4), TOP), rel=0.02)  # tol is 0.01
        assert found.limit[size] == pytest.approx(2 * 1.5 / 0.01)
    assert found.passed is True and found.spread_after < 0.02
    assert found.matrix == "lambda_max of H"


@pytest.mark.parametrize("power", [1.0, -0.5])
def test_growth_with_width_is_found_with_its_exponent(power: float) -> None:
    found = follow(linear(power), [8, 16, 32, 64])
    assert found.exponent_after.value == pytest.approx(power, abs=0.02)
    assert all(slope.value == pytest.approx(power, abs=0.02) for slope in found.exponents)
    shares = np.array([8.0, 16.0, 32.0, 64.0]) ** power
    assert found.spread_after == pytest.approx(shares.std() / shares.mean(), rel=0.03)
    assert found.extent[0] == pytest.approx((shares.max() - shares.min()) / shares.mean(), rel=0.03)


def test_what_is_compared_is_the_share_of_the_limit() -> None:
    found = follow(linear(1.0, lr_power=-1.0), [8, 16, 32])  # sharper by as much as the rate is smaller
    assert found.lambda_max[32][0, 0] / found.lambda_max[8][0, 0] == pytest.approx(4.0, rel=0.03)
    assert found.passed is True and found.spread_after < 0.02


def test_runs_that_diverge_fail_and_are_named() -> None:
    family = linear(0.0) | {"optimizer": lambda model, width: torch.optim.SGD(model.parameters(), lr=0.1 if width < 32 else 1e4)}
    found = follow(family, [8, 16, 32], steps=8)
    assert found.passed is False
    assert np.isnan(found.lambda_max[32][0, -1]) and np.isfinite(found.lambda_max[8]).all()
    assert "diverged at width 32" in found.findings()[0]
    json.loads(to_json(found.to_dict()))


def _dense(family: Family, size: int, steps: int) -> tuple[Tensor, Any]:
    """Hessian after some steps, by the same training."""
    run = family.start(size)
    for _ in range(steps):
        run.step()
    return HessianOperator(run.objective()).to_dense(), run


def test_adam_is_measured_on_its_preconditioned_matrix() -> None:
    family = Family(mlp, lambda model, width: torch.optim.Adam(model.parameters(), lr=1e-2), [(X, Y)], nn.functional.mse_loss)
    found = sharpness_transfer(
        mlp, [4, 6], optimizer=family.optimizer, data=family.batches, loss=family.loss, steps=6, every=3, top_k=2, with_trace=True
    )
    assert found.steps == (1, 3, 6)  # nothing before the first step: there is no second moment yet
    assert found.matrix == "lambda_max of D^-1 H"
    assert found.limit[4] == pytest.approx(2 * 1.9 / (0.1 * 1e-2))
    for column, steps in enumerate(found.steps):
        dense, run = _dense(family, 4, steps)
        state = run.optimizer.state
        d = torch.cat([(s["exp_avg_sq"] / (1 - 0.999**steps)).sqrt().flatten() + 1e-8 for s in (state[p] for p in run.model.parameters())])
        matrix = dense / (d.sqrt()[:, None] * d.sqrt()[None, :])
        values = torch.linalg.eigvalsh(matrix)
        assert found.lambda_max[4][0, column] == pytest.approx(float(values[-1]), rel=0.03)
        assert found.extra["lambda_2"][4][0, column] == pytest.approx(float(values[-2]), rel=0.03, abs=0.03 * float(values[-1]))
        spread = math.sqrt(2 / 12) * float(matrix.norm())  # standard error of twelve random probes at most
        assert found.extra["trace"][4][0, column] == pytest.approx(float(values.sum()), abs=4 * spread)


def test_groups_with_different_rates_are_scaled_and_any_order_gives_the_same_share() -> None:
    def optimizer(reverse: bool) -> Any:
        def make(model: Any, width: int) -> torch.optim.Optimizer:
            groups = [{"params": model[0].parameters(), "lr": 0.01 * width}, {"params": model[2].parameters(), "lr": 0.02}]
            return torch.optim.SGD(groups[::-1] if reverse else groups)

        return make

    one, two = (
        sharpness_transfer(mlp, [4, 6], optimizer=optimizer(r), data=[(X, Y)], loss=nn.functional.mse_loss, steps=2) for r in (0, 1)
    )
    assert one.matrix == "lambda_max of R H" and "lambda_max(R H)" in one.condition
    assert one.limit[6] == pytest.approx(2 / 0.06) and two.limit[6] == pytest.approx(2 / 0.02)
    for size in (4, 6):
        assert one.shares(size) == pytest.approx(two.shares(size), rel=0.02)


def test_the_ntk_is_the_gram_matrix_of_jacobians() -> None:
    family = Family(mlp, lambda model, width: torch.optim.SGD(model.parameters(), lr=0.01), [(X, Y)], nn.functional.mse_loss)
    found = sharpness_transfer(mlp, [4, 6], optimizer=family.optimizer, data=[(X, Y)], loss=family.loss, steps=1, with_ntk=True)
    model = family.start(4).model
    params = list(model.parameters())
    rows = [torch.autograd.grad(model(X[i : i + 1]).sum(), params) for i in range(len(X))]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert found.extra["ntk"][4][0, 0] == pytest.approx(float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1]) / len(X), rel=0.02)


def test_values_far_beyond_the_limit_while_training_goes_on_are_not_compared() -> None:
    class Rare(nn.Module):  # two inputs, of which the second is nonzero in the first batch alone: its second moment fades
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 1, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    often, rare = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1.0, 1.0]]).double()
    data = [(rare, torch.ones(1, 1).double()), *[(often, torch.ones(1, 1).double())] * 60]
    found = sharpness_transfer(
        lambda width: Rare(),
        [8, 16],
        optimizer=lambda model, width: torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.9, 0.5), eps=1e-12),
        data=data,
        loss=nn.functional.mse_loss,
        steps=60,
    )
    assert found.blurred and found.passed is None
    assert "divides by almost 0" in found.findings()[-1]


def test_an_optimizer_without_a_known_limit_is_compared_by_sharpness_itself() -> None:
    family = linear(0.0) | {"optimizer": lambda model, width: torch.optim.Rprop(model.parameters(), lr=1e-3)}
    found = follow(family, [8, 16])
    assert found.condition == "" and math.isnan(found.limit[8])
    assert found.passed is True
    assert not any("limit" in sentence for sentence in found.findings())


def test_measuring_leaves_training_as_it_is() -> None:
    family = Family(mlp, lambda model, width: torch.optim.Adam(model.parameters(), lr=1e-2), [(X, Y)], nn.functional.mse_loss)
    found = sharpness_transfer(mlp, [4, 6], optimizer=family.optimizer, data=[(X, Y)], loss=family.loss, steps=9, every=3)
    run = family.start(6)
    for _ in range(9):
        run.step()
    assert found.loss[6][0, -1] == run.final_loss()


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="every must be a whole number of at least 1"):
        follow(linear(0.0), [8, 16], every=0)
    with pytest.raises(ValueError, match="NTK needs the model's output"):
        sharpness_transfer(
            mlp, [4, 6], optimizer=linear(0.0)["optimizer"], data=[(X, Y)], closure=lambda m, b: m(b[0]).mean(), with_ntk=True
        )


def test_the_picture_shows_the_limit_and_the_section_every_size() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from sharpkit.reporting.sections import section_for

    found = follow(linear(0.0), [8, 16], seeds=2)
    ax = found.plot()
    assert "stability limit" in [text.get_text() for text in ax.get_legend().get_texts()]
    section = section_for(json.loads(to_json(found.to_dict())))
    assert [row[0] for row in section.rows] == ["8", "16"]


def test_the_document_reads_back() -> None:
    found = follow(linear(0.0), [8, 16], seeds=[3, 5], top_k=2)
    back = SharpnessTransfer.from_dict(json.loads(to_json(found.to_dict())))
    assert to_json(back.to_dict()) == to_json(found.to_dict())
    assert back.lambda_max[16].shape == (2, 4) and set(back.extra) == {"lambda_2"}
