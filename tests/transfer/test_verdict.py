"""The verdict: muP transfers, one rate for all widths does not; what ends early, what is said, what is drawn."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments._transfer_models import MLP, Rules, digit_batches, mlp_family
from sharpkit._results import Progress
from sharpkit.fits import Slope
from sharpkit.transfer.setup import Family
from sharpkit.transfer.verdict import Verdict, diagnose

WIDTHS = [32, 64, 128]  # narrower ones are undecided, and measured a second time


def family(parametrisation: str) -> Family:
    return mlp_family(parametrisation=parametrisation, optimizer="adam", lr=1e-2, base_width=32, batches=digit_batches()[:8])


def run(parametrisation: str, **options: Any) -> Verdict:
    made = family(parametrisation)
    return diagnose(made.build, optimizer=made.optimizer, data=made.batches, loss=made.loss, **{"widths": WIDTHS, **options})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Verdict, list[Progress], Path]:
    said: list[Progress] = []
    store = tmp_path_factory.mktemp("store") / "runs.jsonl"
    return run("mup", callback=said.append, store=store, seeds=2), said, store


@pytest.fixture(scope="module")
def bad() -> tuple[Verdict, list[Progress]]:
    said: list[Progress] = []
    return run("sp", callback=said.append, widths=[32, 64, 128, 256]), said


def test_a_correct_parametrisation_is_never_said_to_fail(good: tuple[Verdict, list[Progress], Path]) -> None:
    verdict, said, _ = good
    assert verdict.passed is not False
    assert not verdict.culprits and all(not check.failed for check in verdict.checks)
    assert verdict.rates and verdict.sharpness is not None
    assert said[0].text.startswith("cost over widths, from a timed step")
    # of the coordinate check, of sharpness, of the learning rates (more if the drift had to be measured again)
    runs = 2 * 3 + 3 + sum(rates.num_runs + rates.num_reused for rates in verdict.rates)
    assert said[0].done == 0 and said[-1].done >= runs and {p.unit for p in said} == {"runs"}
    assert all(before.done <= after.done <= after.expected for before, after in pairwise(said))


def test_it_never_says_a_bare_yes(good: tuple[Verdict, list[Progress], Path]) -> None:
    verdict, _, _ = good
    text = str(verdict)
    assert "95 % interval" in text and "nothing is claimed" in text
    assert verdict.reach is not None
    assert verdict.reach.lower <= verdict.reach.value <= verdict.reach.upper


@pytest.mark.slow
def test_a_store_makes_a_second_verdict_repeat_no_run(good: tuple[Verdict, list[Progress], Path]) -> None:
    first, _, store = good
    lines = store.read_text().splitlines()
    again = run("mup", store=store, seeds=2)
    assert again.rates[0].num_runs == 0 and store.read_text().splitlines() == lines
    assert again.rates[0].drift == first.rates[0].drift


def test_one_rate_for_all_widths_fails_early_with_its_culprit(bad: tuple[Verdict, list[Progress]]) -> None:
    verdict, said = bad
    assert verdict.passed is False
    assert "hidden learning rate" in [culprit.rule for culprit in verdict.culprits]
    assert "DO NOT TRANSFER" in verdict.headline and "hidden learning rate" in verdict.headline
    assert not verdict.rates and verdict.sharpness is None and "ended here" in verdict.ended
    assert "broken rules: " in said[-1].text


def test_a_certain_cost_is_a_fail_and_doubt_is_neither(good: tuple[Verdict, list[Progress], Path]) -> None:
    verdict, _, _ = good
    (rates,) = verdict.rates

    def with_cost(low: float, high: float) -> Verdict:
        optima = tuple(dataclasses.replace(rates.optima[0], interior=True) for _ in range(3))
        curves, drift = (rates.curves[0],) * 3, Slope(-1.0, 0.1, 0.2, 9)
        changed = dataclasses.replace(rates, optima=optima, curves=curves, drift=drift, penalty=((low + high) / 2, low, high))
        return dataclasses.replace(verdict, rates=(changed,))

    assert with_cost(0.3, 0.6).passed is False
    assert with_cost(0.0, 0.6).passed is None
    assert with_cost(0.0, 0.1).passed is (True if all(check.passed for check in verdict.checks) else None)
    assert "UNDECIDED" in with_cost(0.0, 0.6).headline


def test_documents_are_strict_json_and_make_a_page(
    good: tuple[Verdict, list[Progress], Path], bad: tuple[Verdict, list[Progress]], tmp_path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from sharpkit.reporting import report
    from sharpkit.reporting.sections import section_for

    for verdict in (good[0], bad[0]):
        document = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
        assert document["kind"] == "transfer_verdict" and document["findings"][0] == verdict.headline
        sections = [section_for(document), *(section_for(part) for part in document["parts"])]
        assert all(section.title and section.findings for section in sections)
        page = report(tmp_path / "page.html", [document, *document["parts"]]).read_text(encoding="utf-8")
        assert "<svg" in page
        assert verdict.plot().get_title() == {True: "transfers", False: "does not transfer", None: "undecided"}[verdict.passed]


def test_depths_are_checked_with_a_build_that_takes_them() -> None:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    class Residual(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.input, self.head = nn.Linear(4, width), nn.Linear(width, 1)
            self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.input(x)
            for block in self.blocks:
                x = x + torch.tanh(block(x))
            return self.head(x)

    verdict = diagnose(
        lambda width, depth=1: Residual(width, depth),
        widths=[8, 16, 32],
        depths=[1, 2, 4],
        optimizer=lambda model, width: torch.optim.Adam(model.parameters(), lr=1e-3),
        data=(x, x[:, :1]),
        loss=nn.functional.mse_loss,
    )
    assert [check.dimension for check in verdict.checks] == ["width", "depth"]
    assert "and depth 1 to 4" in verdict.headline


def test_arguments_are_checked() -> None:
    rules = Rules()
    options: dict[str, Any] = {"optimizer": lambda m, w: torch.optim.SGD(m.parameters(), lr=0.1), "data": digit_batches()[:1]}
    options["loss"] = nn.functional.cross_entropy
    with pytest.raises(ValueError, match="at least 3 different"):
        diagnose(lambda w: MLP(w, rules), widths=[8, 16], **options)
    with pytest.raises(ValueError, match="'quick', 'full'"):
        diagnose(lambda w: MLP(w, rules), widths=[8, 16, 32], mode="slow", **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"build\(width, depth=...\)"):
        diagnose(lambda w: MLP(w, rules), widths=[8, 16, 32], depths=[1, 2, 3], **options)
