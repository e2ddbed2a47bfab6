"""The page and the picture of a monitored run: every event, failure, limit and error is in them, from a file or from memory."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

import sharpkit as sk
from sharpkit.cli.main import main
from sharpkit.monitor.findings import run_findings
from sharpkit.plots.runs import panels_of, plot_monitor, plot_runs_together

HEADER = {
    "kind": "monitor_run", "version": 1, "sharpkit": "0.1.0", "model": "Sequential", "num_parameters": 12345, "optimizer": "SGD",
    "condition": "SGD: lambda_max(H) <= 2 / lr", "budget": 0.05, "every": "auto", "mode": "train", "seed": 11,
}  # fmt: skip
EVENT = {"kind": "loss_spike", "step": 40, "text": "Loss spike: <it> jumped."}


def entry(value: float, *, limit: float | None = None, stderr: float = 0.1, converged: bool = True) -> dict[str, Any]:
    return {
        "value": value,
        "stderr": stderr,
        "limit": limit,
        "num_matvecs": 2,
        "seconds": 0.01,
        "converged": converged,
        "method": "Lanczos",
    }


def record(step: int, **changes: Any) -> dict[str, Any]:
    values = {"lambda_max": entry(5 + step / 4, limit=20.0)}
    plain = {"kind": "monitor_record", "version": 1, "step": step, "loss": 1 / (1 + step), "lr": 0.1, "values": values, "failed": {}}
    return {**plain, "events": [], "seconds": 0.02, "overhead": 0.04, **changes}


def run(*records: dict[str, Any], **header: Any) -> dict[str, Any]:
    return {"kind": "monitor_history", "version": 1, "header": {**HEADER, **header}, "records": list(records)}


@pytest.fixture
def whole() -> dict[str, Any]:
    """A run with everything in it."""
    records = []
    for step in range(0, 100, 10):
        limit = 20.0 if step < 50 else 40.0
        values = {
            "lambda_max": entry(5 + step / 4, limit=limit, converged=step != 30),
            "batch_sharpness": entry(4 + step / 5, limit=limit / 2),
            "lambda_1": entry(5 + step / 4),
            "lambda_2": entry(3.0),
            "trace": entry(100.0),
            "noise_scale": entry(64.0),
            "lambda_max/head": entry(2.0),
        }
        failed = {"critical_sharpness": "NonFiniteError: no crossing"} if step in (20, 70) else {}
        records.append(record(step, values=values, failed=failed, events=[EVENT] if step == 40 else []))
    return run(*records)


def write(path: Path, document: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(d) + "\n" for d in (document["header"], *document["records"])))
    return path


# -- the picture --------------------------------------------------------------------------------------


def test_the_limit_in_use_is_drawn_where_the_rate_changed(whole: dict[str, Any]) -> None:
    ax = plot_monitor(whole)
    dashed = {str(line.get_label()): line for line in ax.get_lines() if line.get_linestyle() == "--"}
    assert set(dashed) == {"limit of lambda_max", "limit of batch sharpness"}
    steps, limits = np.asarray(dashed["limit of lambda_max"].get_xdata()), np.asarray(dashed["limit of lambda_max"].get_ydata())
    assert np.interp([0, 40, 50, 90], steps, limits).tolist() == [20.0, 20.0, 40.0, 40.0]
    plt.close("all")


def test_every_metric_has_axes_with_those_of_its_unit_and_the_loss_is_below(whole: dict[str, Any]) -> None:
    labels = [label for label, _ in panels_of(whole)]
    members = dict(panels_of(whole))
    assert members["curvature (loss / parameter²)"] == ["lambda_max", "batch_sharpness", "lambda_1", "lambda_2"]
    ax = plot_monitor(whole)
    axes = ax.figure.axes
    assert [a.get_ylabel() for a in axes] == [*labels, "loss"]
    assert axes[-1].get_xlabel() == "optimizer steps"
    assert all(a.get_xlim() == ax.get_xlim() for a in axes)
    plt.close("all")


def test_curvature_of_another_matrix_has_its_own_axes() -> None:
    values = {name: entry(3.0, limit=5.0) for name in ("lambda_max", "preconditioned_lambda_max", "critical_sharpness")}
    panels = dict(panels_of(run(record(0, values=values))))
    assert list(panels.values()) == [["preconditioned_lambda_max"], ["critical_sharpness"], ["lambda_max"]]


@pytest.mark.parametrize(
    ("condition", "name", "axis"),
    [
        ("Adam: lambda_max(D^-1 H) <= 2 (1 + beta) / ((1 - 0.9) lr), beta = 0.9", "lambda_max of D^-1 H", "curvature of D^-1 H"),
        ("SGD: lambda_max(R H) <= 2 / lr, R the groups' rates over that of the first", "lambda_max of R H", "curvature of R H"),
        ("no limit: unknown", "preconditioned lambda_max", "preconditioned curvature"),
    ],
)
def test_the_matrix_is_named_by_the_condition_everywhere(condition: str, name: str, axis: str, tmp_path: Path) -> None:
    values = {"preconditioned_lambda_max": entry(3.0, limit=5.0), "lambda_max": entry(3.0, limit=None)}
    failed = {"preconditioned_lambda_max": "NonFiniteError: nan"}
    document = run(record(0, values=values), record(1, values=values), record(2, failed=failed), condition=condition)
    ax = plot_monitor(document)
    assert ax.get_ylabel() == axis and name in ax.get_legend_handles_labels()[1]
    plt.close("all")
    said = run_findings(document["header"], document["records"])
    assert said[0].startswith(f"{name} went from 3") and any(s.startswith(f"{name} could not be measured once") for s in said)
    page = html.unescape(sk.report(tmp_path / "page.html", [("Run", document)], command="x").read_text())
    assert all(other not in page for other in {"lambda_max of D^-1 H", "lambda_max of R H", "preconditioned lambda_max"} - {name})
    assert page.count(name) > 3


def test_error_bars_are_the_errors() -> None:
    ax = plot_monitor(run(*(record(s, values={"lambda_max": entry(10.0, stderr=0.5, limit=20.0)}) for s in (0, 10))))
    bars = next(c for c in ax.collections if type(c).__name__ == "LineCollection")
    assert [sorted(float(y) for _, y in segment) for segment in bars.get_segments()] == [[9.5, 10.5]] * 2  # type: ignore[attr-defined]
    plt.close("all")


def test_events_are_numbered_and_those_too_near_share_a_label() -> None:
    steps = (100, 102, 500, 900)
    events = {step: [{"kind": "loss_spike", "step": step, "text": "x"}] for step in steps}
    ax = plot_monitor(run(*(record(s, events=events.get(s, [])) for s in range(0, 1000, 2))))
    assert [text.get_text() for text in ax.texts] == ["1-2", "3", "4"]
    plt.close("all")


def test_a_long_run_is_thinned_without_losing_its_peak() -> None:
    records = [record(s, values={"lambda_max": entry(999.0 if s == 7777 else 10 + s % 7, stderr=0.0, limit=20.0)}) for s in range(20_000)]
    ax = plot_monitor(run(*records))
    line = next(line for line in ax.get_lines() if line.get_label() == "lambda_max")
    assert len(np.asarray(line.get_xdata())) < 1000
    assert np.asarray(line.get_ydata()).max() == 999.0
    plt.close("all")


def test_given_axes_are_used_in_a_grid_and_freely_placed(whole: dict[str, Any]) -> None:
    figure, grid = plt.subplots(1, 2)
    assert plot_monitor(whole, ax=grid[0]) is grid[0]
    assert all(a.get_position().x1 < grid[1].get_position().x0 for a in figure.axes if a is not grid[1])
    free = plt.figure().add_axes((0.1, 0.2, 0.8, 0.6))
    plot_monitor(whole, ax=free)
    boxes = [a.get_position() for a in free.figure.axes]
    assert min(b.y0 for b in boxes) == pytest.approx(0.2)
    assert max(b.y1 for b in boxes) == pytest.approx(0.8)
    plt.close("all")


def test_values_that_are_missing_or_not_finite_are_left_out_and_nothing_fails() -> None:
    odd = [{"lambda_max": entry(5.0, stderr=math.inf)}, {"lambda_max": {"value": "inf", "stderr": None, "limit": None}}, {}]
    ax = plot_monitor(run(*(record(i, values=values, loss=None) for i, values in enumerate(odd))))
    assert [a.get_ylabel() for a in ax.figure.axes] == ["curvature (loss / parameter²)"]
    with pytest.raises(ValueError, match="no records yet"):
        plot_monitor(run())
    plt.close("all")


# -- the sentences --------------------------------------------------------------------------------------


def test_findings_tell_the_course_the_limit_and_the_cost(whole: dict[str, Any]) -> None:
    found = run_findings(whole["header"], whole["records"])
    assert found[0] == (
        "lambda_max went from 5 +- 0.1 (step 0) to 27.5 +- 0.1 (step 90), 0.69 times the limit 40; no measurement reached the limit."
    )
    assert "critical sharpness could not be measured twice, last at step 70: NonFiniteError: no crossing" in found
    assert "1 of 10 values of lambda_max were not computed to the tolerance; their error bars are wider." in found
    assert found[-1] == "Measuring took 4.0% of the training time, within the budget of 5.0%."


def test_a_budget_that_was_not_kept_is_said() -> None:
    assert run_findings(HEADER, [record(0, overhead=0.09)])[-1] == "Measuring took 9.0% of the training time, ABOVE the budget of 5.0%."


def test_where_it_settled_is_mean_and_deviation_of_the_last_third() -> None:
    values = [5.0] * 6 + [18.0, 20.0, 22.0]
    records = [record(10 * i, values={"lambda_max": entry(v, limit=20.0)}) for i, v in enumerate(values)]
    assert any("steps 60 to 80, lambda_max lay at 1.00 +- 0.1 of its limit" in sentence for sentence in run_findings({}, records))


@pytest.mark.parametrize("records", [[], [record(0, values={})], [record(0, values={"trace": entry(3.0)})]])
def test_a_run_without_curvature_has_findings_as_well(records: list[dict[str, Any]]) -> None:
    assert run_findings({}, records)


# -- the page -------------------------------------------------------------------------------------------


def test_report_makes_the_page_of_a_run(whole: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.jsonl", whole)
    assert main(["report", str(path), "--html", str(tmp_path / "out.html")]) == 0
    page = (tmp_path / "out.html").read_text()
    assert page.count("<svg ") == 1
    assert "Monitored run: run.jsonl" in page
    assert "Sequential with 12,345 parameters, trained by SGD." in page
    for tile in ("27.5", "at learning rate 0.1", "below it, beyond the error", "4.0%"):
        assert tile in page
    assert "Step 40: Loss spike: &lt;it&gt; jumped." in page
    assert "critical sharpness: NonFiniteError: no crossing (2 x, steps 20 to 70)" in page
    assert "seed 11" in page
    assert "10 measurements, 0.2 s" in page


def test_the_page_of_a_file_is_that_of_the_records_in_memory(whole: dict[str, Any], tmp_path: Path) -> None:
    read = sk.sinks.read_run(write(tmp_path / "run.jsonl", whole))
    texts = [sk.report(tmp_path / f"{i}.html", [("Run", r)], command="x").read_text() for i, r in enumerate((whole, read))]
    bodies = [text[text.index("<main>") : text.index("</main>")] for text in texts]
    assert bodies[0] == bodies[1]


def test_several_runs_share_a_page(whole: dict[str, Any], tmp_path: Path) -> None:
    paths = [str(write(tmp_path / name, whole)) for name in ("a.jsonl", "b.jsonl")]
    assert main(["report", *paths, "--html", str(tmp_path / "out.html")]) == 0
    page = (tmp_path / "out.html").read_text()
    assert "Monitored run: a.jsonl" in page and "Monitored run: b.jsonl" in page


def test_a_run_that_only_has_a_header_or_was_torn_makes_a_page(whole: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(HEADER) + "\n" + json.dumps(record(0))[:60])
    assert main(["report", str(path), "--html", str(tmp_path / "out.html")]) == 0
    page = (tmp_path / "out.html").read_text()
    assert "Nothing was measured yet" in page
    assert "incomplete and was left out" in page


@pytest.mark.parametrize("content", ["hello\n", '{"kind": "monitor_run"}\nhello\n{"kind": "monitor_run"}\n'])
def test_report_refuses_a_file_that_is_no_run(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(content)
    assert main(["report", str(path), "--html", str(tmp_path / "out.html")]) == 2
    assert "run.jsonl, line" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_the_section_reads_as_text_as_well(whole: dict[str, Any]) -> None:
    from sharpkit.cli.output import render_text

    text = render_text([whole])
    assert "  1. Step 40: Loss spike" in text
    assert "batch sharpness" in text


def test_several_runs_share_axes_each_in_a_colour_that_a_further_run_leaves_as_it_is() -> None:
    runs = {name: run(record(0), record(40)) for name in ("slow", "middle", "fast")}

    def colours(names: list[str]) -> dict[str, Any]:
        axes = plot_runs_together({name: runs[name] for name in names})
        lines = {line.get_label(): line.get_color() for line in axes.get_lines()}
        dashed = [line.get_color() for line in axes.get_lines() if line.get_linestyle() == "--"]
        below = [line.get_color() for line in axes.figure.axes[-1].get_lines()]
        plt.close("all")
        shown = {name: lines[name] for name in names}
        assert dashed == below == list(shown.values()), "a run's limit and loss have the colour of its curvature"
        return shown

    two, three = colours(["slow", "middle"]), colours(["slow", "middle", "fast"])
    assert three == {**two, "fast": three["fast"]} and len(set(three.values())) == 3


def test_runs_judged_by_different_metrics_are_drawn_as_shares_of_their_limits() -> None:
    adaptive = run(record(0, values={"preconditioned_lambda_max": entry(5.0, limit=20.0)}))
    axes = plot_runs_together({"sgd": run(record(0)), "adam": adaptive})
    shares = {line.get_label(): float(line.get_ydata()[-1]) for line in axes.get_lines()}
    assert axes.get_ylabel() == "share of the limit"
    assert shares["sgd"] == shares["adam"] == pytest.approx(5 / 20)
    plt.close("all")


def test_a_page_of_several_runs_says_whose_each_finding_is(tmp_path: Path) -> None:
    one, other = run(record(0), record(40)), run(record(0), record(80))
    page = sk.report(tmp_path / "page.html", [("a & b", one), other, ("a & b", other)]).read_text()
    findings = html.unescape(page.partition('id="h-findings"')[2].partition("</section>")[0])
    named = [line.partition("<li>")[2] for line in findings.splitlines() if "<li>" in line]
    assert named and all(line.startswith(("a & b: ", "run 2: ", "a & b (3): ")) for line in named)
    assert page.count(">Runs together<") == 2, "the table of contents and the section"
    alone = sk.report(tmp_path / "alone.html", [("a", one), sk.Estimate(1.0, 0.1, 4)]).read_text()
    assert "Runs together" not in alone
