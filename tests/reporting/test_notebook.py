"""What a notebook shows of results: figure, numbers, findings; text where there is no section, and never an error."""

from __future__ import annotations

import re

import torch
from problems import mlp

import sharpkit as sk


def test_results_show_figure_table_and_findings() -> None:
    problem = mlp()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    shown = sk.measure(objective, num_probes=3, num_steps=8).named("<early>")._repr_html_()
    assert shown is not None
    assert "&lt;early&gt;" in shown and "<svg" in shown and "lambda_max" in shown and "Cost:" in shown
    again = sk.measure(objective, num_probes=3, num_steps=8, seed=1)._repr_html_()
    ids = [set(re.findall(r'id="([^"]+)"', html)) for html in (shown, again or "")]
    assert ids[0] and not ids[0] & ids[1], "two figures in one notebook share no id"


def test_long_tables_are_cut_and_a_line_of_text_stays_one() -> None:
    pairs = sk.eigenpairs(torch.diag(torch.arange(40.0).double()), k=20)._repr_html_()
    assert pairs is not None and "8 more rows." in pairs
    rate = sk.stable_learning_rate(4.0)._repr_html_()
    assert rate is None or "0.5" in rate


def test_what_cannot_be_drawn_falls_back_on_text() -> None:
    broken = sk.Eigenpairs.__new__(sk.Eigenpairs)
    object.__setattr__(broken, "name", "x")
    assert broken._repr_html_() is None
