"""The section of a race on the report page: who trained how far, at what cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sharpkit._json import number
from sharpkit.training._baselines import LEARNER
from sharpkit.training.race import COUNTING, RaceResult

Document = Mapping[str, Any]


def fill_race(section: Any, document: Document) -> None:
    """Fill a page section from a race."""
    result = RaceResult.from_dict(document)
    section.title = section.title or "Learning rates raced"
    count = len(result.seeds)
    section.intro = (
        f"The same problem trained from scratch in every way, with {result.budget} gradients each, "
        f"{count} seed{'' if count == 1 else 's'}. {COUNTING}"
    )
    section.findings = [*result.findings(), *(f"Not started: {name} ({why})." for name, why in result.skipped.items())]
    section.columns = list(result.columns)
    section.rows = [finish.cells() for finish in result.finishes]
    best = result.finishes[0]
    section.tiles = [("lowest training loss", f"{best.train_loss:.3g}", best.name)]
    mine = [f for f in result.finishes if f.name == LEARNER]
    if mine and math.isfinite(mine[0].train_loss):
        place = result.finishes.index(mine[0]) + 1
        section.tiles.append(("the learner", f"{mine[0].train_loss:.3g}", f"place {place} of {len(result.finishes)}"))
    section.draw, section.figure_label = lambda ax: result.plot(ax=ax), "Training loss against gradients spent"
    section.wide, section.figure_size = True, (9.0, 4.6)
    section.cost = f"{number(document['seconds']):.3g} s"
