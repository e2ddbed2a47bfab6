"""Results side by side: what differs by more than its error is told, what does not is not; documents, names, the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import mlp

import sharpkit as sk
from sharpkit.cli.main import main


def measured(factor: float = 1.0, **settings: Any) -> sk.Sharpness:
    problem = mlp()
    objective = sk.Objective(problem.model, problem.batches, loss=lambda z, t: factor * problem.loss(z, t))
    return sk.measure(objective, num_probes=4, num_steps=12, **settings)


def test_what_differs_by_more_than_both_errors_is_told_and_nothing_else() -> None:
    comparison = sk.compare({"before": measured(), "again": measured(seed=1), "scaled": measured(3.0)})
    rows = dict(zip(comparison.quantities, comparison.differs, strict=True))
    assert rows["lambda_max"] == (False, False, True)
    assert rows["trace"][1] is False
    assert rows["loss"] == (False, False, True)
    assert rows["effective rank"] == (False, False, False)
    assert not any(name in rows for name in ("seconds", "num matvecs", "seed"))
    told = "\n".join(comparison.findings())
    assert "scaled: lambda_max is 3 times that of before" in told
    assert "again:" not in told
    assert "effective rank" in told.splitlines()[-1]
    assert comparison.table().splitlines()[0].split() == ["before", "again", "scaled"]


def test_two_standard_errors_of_the_difference_hold_equal_values_in_19_of_20_cases() -> None:
    generator = np.random.default_rng(0)
    pairs = generator.normal(10, [0.3, 0.4], size=(2000, 2))
    wrong = sum(sk.compare([sk.Estimate(a, 0.3), sk.Estimate(b, 0.4)]).differs[0][1] for a, b in pairs.tolist())
    assert 0.03 < wrong / 2000 < 0.065


@pytest.mark.parametrize(("gap", "differ"), [(0.29, False), (0.31, True)])
def test_bounds_add_up(gap: float, differ: bool) -> None:
    one, other = (sk.Estimate(value, error, error_kind="residual bound") for value, error in ((1.0, 0.1), (1.0 + gap, 0.2)))
    assert sk.compare([one, other]).differs == ((False, differ),)


def test_every_kind_that_has_numbers_can_be_compared_live_and_from_json() -> None:
    problem = mlp()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    hessian = sk.HessianOperator(objective)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    kinds = {
        "eigenpairs": (lambda: sk.eigenpairs(hessian, k=3), ["eigenvalue 1", "eigenvalue 2", "eigenvalue 3"]),
        "layers": (lambda: sk.per_layer(objective), ["lambda_max of 0", "lambda_max of 2", "trace of 0", "trace of 2"]),
        "rate": (lambda: sk.stable_learning_rate(4.0), ["value"]),
        "density": (lambda: sk.spectral_density(hessian, num_probes=3, num_steps=10), ["trace", "Frobenius norm", "negative mass"]),
        "critical": (lambda: sk.critical_learning_rate(objective, optimizer), ["value"]),
    }
    for name, (make, quantities) in kinds.items():
        result = make()
        saved = json.loads(json.dumps(result.to_dict()))
        comparison = sk.compare([result, saved])
        assert list(comparison.quantities) == quantities, name
        assert not any(any(row) for row in comparison.differs), name
        again = sk.Comparison.from_dict(json.loads(json.dumps(comparison.to_dict())))
        assert again == comparison


def test_names_travel_with_results() -> None:
    named = sk.Estimate(1.0, 0.1).named("wide")
    assert named == sk.Estimate(1.0, 0.1)
    assert sk.Estimate.from_dict(named.to_dict()).name == "wide"
    rate = sk.stable_learning_rate(4.0).named("narrow")
    assert (float(rate), rate.name, rate.upper) == (0.5, "narrow", 0.5)
    assert sk.Estimate(1.0, 0.1).to_dict().get("name") is None
    assert sk.compare([named, sk.Estimate(2.0, 0.1)]).names == ("wide", "B")
    with pytest.raises(TypeError, match="name must be text"):
        named.named(3)  # type: ignore[arg-type]


def test_a_picture_and_a_page_can_be_made(tmp_path: Path) -> None:
    comparison = sk.compare([measured(), measured(2.0)])
    axes = comparison.plot()
    assert {"A", "B"} <= set(axes.get_legend_handles_labels()[1])
    axes.figure.clear()
    page = sk.report(tmp_path / "page.html", [comparison]).read_text(encoding="utf-8")
    assert "Side by side: A, B" in page and "lambda_max is 2 times that of A" in page


def test_infinities_and_gaps() -> None:
    unbounded = sk.stable_learning_rate(0.0)
    assert math.isinf(unbounded)
    comparison = sk.compare([unbounded, sk.stable_learning_rate(1.0), sk.stable_learning_rate(0.0)])
    assert comparison.differs == ((False, True, False),)
    few, many = sk.eigenpairs(torch.diag(torch.arange(9.0).double()), k=1), sk.eigenpairs(torch.diag(torch.arange(9.0).double()), k=2)
    assert sk.compare([few, many]).quantities == ("eigenvalue 1",)


@pytest.mark.parametrize(
    ("results", "settings", "error", "says"),
    [
        ([sk.Estimate(1.0, 0.1)], {}, ValueError, "at least two results, got 1"),
        (["a", "b"], {}, TypeError, "a report is made of sharpkit results"),
        ("ab", {}, TypeError, "results must be a list"),
        ([sk.Estimate(1.0, 0.1)] * 2, {"names": ["x"]}, ValueError, "names must be 2 different ones"),
        ([sk.Estimate(1.0, 0.1)] * 2, {"names": ["x", "x"]}, ValueError, "names must be 2 different ones"),
        ({"a": sk.Estimate(1.0, 0.1), "b": sk.Estimate(1.0, 0.1)}, {"names": ["x", "y"]}, ValueError, "leave names out"),
        ([sk.Estimate(1.0, 0.1), sk.stable_learning_rate(1.0)], {}, ValueError, "only results of one kind"),
        ([{"kind": "eigenpairs"}] * 2, {}, sk.DocumentError, "the 'eigenpairs' document is not as this version"),
    ],
)
def test_what_cannot_be_compared_is_refused(results: Any, settings: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        sk.compare(results, **settings)


def test_the_command_compares_what_all_files_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, factor in (("before", 1.0), ("after", 2.0)):
        documents = [measured(factor).to_dict(), sk.Estimate(factor, 0.1).to_dict()]
        text = json.dumps({"kind": "run", "version": 1, "results": documents if name == "before" else documents[::-1]})
        (tmp_path / f"{name}.json").write_text(text.replace("NaN", "null"))
    files = [str(tmp_path / "before.json"), str(tmp_path / "after.json")]
    assert main(["compare", *files, "--html", str(tmp_path / "out.html")]) == 0
    said = capsys.readouterr().out
    assert "after: lambda_max is 2 times that of before" in said and "value" in said
    assert (tmp_path / "out.html").exists()
    assert main(["compare", files[0]]) == 2
    assert main(["compare", files[0], files[0]]) == 2
    (tmp_path / "other.json").write_text(json.dumps(sk.stable_learning_rate(1.0).to_dict()))
    assert main(["compare", files[0], str(tmp_path / "other.json")]) == 2
    assert "no results of the same kind (before: sharpness, estimate; other: stable_learning_rate)" in capsys.readouterr().err
