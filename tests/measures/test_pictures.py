"""What the pictures and pages of measures show."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit import measures

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def objective() -> sk.Objective:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        return sk.Objective(model, (torch.randn(20, 4).double(), torch.randint(3, (20,))), loss=nn.functional.cross_entropy)


def test_the_picture_of_m_sharpness_shows_every_rise_and_the_slope(objective: sk.Objective) -> None:
    found = measures.m_sharpness(objective, rho=[0.1, 0.2, 0.4], m=10)
    ax = found.plot()
    shown = ax.containers[0].lines[0].get_xydata()
    assert shown[:, 0].tolist() == [0.1, 0.2, 0.4]
    assert shown[:, 1].tolist() == [value.value for value in found.values]
    assert "the slope alone" in [text.get_text() for text in ax.get_legend().get_texts()]
    again = measures.m_sharpness(objective, rho=[0.1], m=10, perturbation="gaussian").plot(ax)
    assert again is ax


def test_the_picture_of_layers_has_a_point_for_each_layer_bit_width_and_prediction(objective: sk.Objective) -> None:
    found = measures.layer_sensitivity(objective, bits=[2, 4])
    lines = [line for line in found.plot().lines if line.get_linestyle() == "None"]
    assert [len(line.get_xdata()) for line in lines] == [3] * 4
    assert list(lines[1].get_xdata()) == [row[0] for row in found.quadratic]
    unchecked = measures.layer_sensitivity(objective, bits=[2, 4], check=False).plot()
    assert [label.get_text() for label in unchecked.get_yticklabels()] == ["0.weight", "2.weight", "4.weight"]


def test_the_example_of_the_page_on_measures_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "measures.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    with torch.random.fork_rng():
        exec(compile(block, page.name, "exec"), {})
    assert "worst case" in (said := capsys.readouterr().out) and "nan" not in said


def test_pages_show_both_with_their_numbers(objective: sk.Objective, tmp_path: Path) -> None:
    near = measures.m_sharpness(objective, rho=[0.1, 0.2], m=10)
    layers = measures.layer_sensitivity(objective, bits=[2])
    page = sk.report(tmp_path / "page.html", [near, layers, measures.sam_sharpness(objective)]).read_text(encoding="utf-8")
    assert "Worst case near the weights" in page and "Rounding each layer" in page and page.count("<svg") >= 2
    assert str(near.values[1]) in page and "2.weight" in page
