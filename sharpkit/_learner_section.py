"""The section of a learner's run on the report page: where the rate settled, the picture, every decision with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sharpkit._json import number

Document = Mapping[str, Any]
_MOST_ROWS = 60


def fill_learner(section: Any, document: Document) -> None:
    """Fill a page section from a learner's history."""
    from sharpkit.plots import plot_learner

    rows = document["decisions"]
    section.title = section.title or "Learned learning rate"
    section.intro = "The rate grows until it meets its share of the batch's stability limit, is held there, and decays."
    if not rows:
        section.findings = ["No decision was made yet."]
        return
    last, back = rows[-1], [row for row in rows if "the loss rose" in row["reason"]]
    section.tiles = [("learned rate", f"{number(last['lr']):.3g}", f"at step {last['step']}")]
    if math.isfinite(limit := number(last["max_lr"])):
        section.tiles.append(("stability limit", f"{limit:.3g}", f"on a batch of {last['batch_size']}"))
    section.tiles.append(("products", str(sum(int(row["num_matvecs"]) for row in rows)), f"in {len(rows)} decisions"))
    section.findings = [f"Step {row['step']}: {row['reason']}." for row in back] or ["The run never had to go back."]
    section.columns = ["step", "rate", "lambda_max", "limit", "loss", "reason"]
    shown = ("lr", "lambda_max", "max_lr", "loss")
    for row in rows[-_MOST_ROWS:]:
        numbers = [f"{number(row[name]):.3g}" if math.isfinite(number(row[name])) else "" for name in shown]
        section.rows.append([str(row["step"]), *numbers, str(row["reason"])])
    section.draw, section.figure_label = lambda ax: plot_learner(document, ax=ax), section.title
