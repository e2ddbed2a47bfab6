"""The sections of transfer results on the report page: verdict, coordinate check, sharpness and learning rates across sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sharpkit._results import number
from sharpkit.transfer.coordinates import CoordinateCheck
from sharpkit.transfer.fits import Slope

Document = Mapping[str, Any]
_MOST_ROWS = 40  # of a table, by judgement: the document holds them all
_PASSED = {True: "yes", False: "NO", None: "undecided"}
_WORDS = {True: "transfers", False: "does not transfer", None: "undecided"}


def fill_verdict(section: Any, document: Document) -> None:
    """The verdict with its culprits; the picture only where the measurements are in the same document."""
    section.title = section.title or f"Do hyperparameters transfer? {_WORDS[document['passed']].capitalize()}"
    section.intro = f"The rule ({document['mode']} mode): {document['rule']}."
    section.findings, section.wide = list(document["findings"]), True
    section.findings += [sentence for part in document.get("parts", ()) for sentence in part["findings"]]
    section.tiles = [("verdict", _WORDS[document["passed"]], f"widths {document['widths'][0]} to {document['widths'][-1]}")]
    if found := document["reach"]:
        cap = number(found["cap"])
        value, low = number(found["value"]), number(found["lower"])
        remark = f"95 %: at least {low:.0f}" + (f"; no claim beyond {cap:.0f}" if value >= cap else "")
        section.tiles.append(("one learning rate does up to width", f"{value:.0f}{' or more' if value >= cap else ''}", remark))
    section.tiles.append(("broken rules", str(len(document["culprits"])), ""))
    if document["culprits"]:
        section.columns = ["broken rule", "exponent", "asked for", "confidence", "where"]
        for c in document["culprits"]:
            slope = str(Slope.from_dict(c["slope"]))
            section.rows.append([c["rule"], slope, f"{c['expected']:g}", f"{c['confidence']:.1%}", ", ".join(c["where"][:4])])
    if document.get("parts"):
        from sharpkit.plots.transfer import plot_transfer_verdict, verdict_size

        section.draw, section.figure_size = lambda ax: plot_transfer_verdict(document, ax=ax), verdict_size(document)
        section.figure_label = "Coordinates, sharpness and learning rates across sizes"
    section.cost = f"{number(document['seconds']):.3g} s"


def fill_coordinates(section: Any, document: Document) -> None:
    """Exponents of every module's output."""
    check = CoordinateCheck.from_dict(document)
    size = check.dimension
    section.title = section.title or f"Coordinate check over {size}s"
    section.intro = (
        f"How the outputs of modules, and their changes in the first {check.num_steps} steps, grow with {size} {check.sizes[0]} to "
        f"{check.sizes[-1]} ({check.num_seeds} seeds): exponents with standard errors. Where rates transfer, all are 0; outputs and "
        "attention logits may be smaller at initialisation."
    )
    section.findings = [f"{s[0].upper()}{s[1:]}{'' if s.endswith('.') else '.'}" for s in document["findings"]]
    section.draw = lambda ax: check.plot(ax=ax)
    section.figure_label, section.wide, section.figure_size = f"Updates of coordinates against {size}", True, (9.0, 3.8)
    section.columns = ["coordinate", "at initialisation", "while training", "its updates", "verdict"]
    shown = sorted(check.coordinates, key=lambda c: c.verdict not in ("grows", "vanishes", "unclear"))
    section.rows = [[c.name, str(c.initial), str(c.level), str(c.update), c.verdict] for c in shown[:_MOST_ROWS]]
    if len(shown) > _MOST_ROWS:
        section.findings.append(f"{len(shown) - _MOST_ROWS} further coordinates are in the document only.")


def fill_rates(section: Any, document: Document) -> None:
    """Optimum and sensitivity at each size."""
    from sharpkit.plots.transfer import plot_learning_rate_transfer

    size = document["dimension"]
    section.title = section.title or f"Best learning rate across {size}s"
    section.intro = (
        f"Loss against one factor on all learning rates. Loss: mean training loss of the last quarter of {document['steps']} steps, "
        f"{document['num_seeds']} seeds around each optimum; diverged runs count as the loss they started from."
    )
    section.findings = list(document["findings"])
    section.draw = lambda ax: plot_learning_rate_transfer(document, ax=ax)
    section.figure_label = f"Loss against learning rate by {size}"
    section.tiles = [("transfers", _PASSED[document["passed"]], "")]
    drift, half = number(document["drift"]["value"]), number(document["drift"]["half_width"])
    section.tiles.append(("drift, octaves per doubling", f"{drift:+.2f}", f"+- {half:.2f} (95 %)" if math.isfinite(half) else ""))
    section.columns = [size, "best factor", "95 % interval", "rate of the first group", "lowest loss", "sensitivity"]
    for best, rate, sensitivity in zip(document["optima"], document["rates"], document["sensitivity"], strict=True):
        factor, low, high = (2.0 ** number(best[key]) for key in ("log2", "lower", "upper"))
        section.rows.append(
            [
                str(best["size"]),
                f"{factor:.3g}" if best["interior"] else f"{factor:.3g} (edge)",
                f"{low:.3g} - {high:.3g}",
                f"{factor * number(rate):.3g}",
                f"{number(best['loss']):.4g}",
                f"{number(sensitivity):.3g}",
            ]
        )
    section.cost = f"{document['num_runs']} runs ({document['num_reused']} more from the store), {number(document['seconds']):.3g} s"


def fill_sharpness(section: Any, document: Document) -> None:
    """Sharpness at each size at the end."""
    from sharpkit.plots.transfer import plot_sharpness_transfer

    size = document["dimension"]
    section.title = section.title or f"Sharpness across {size}s"
    section.intro = (
        f"{document['matrix']} on a fixed batch along training, as a share of the stability limit."
        if document["condition"]
        else f"{document['matrix']} on a fixed batch along training."
    )
    section.findings = list(document["findings"])
    section.draw, section.figure_size = lambda ax: plot_sharpness_transfer(document, ax=ax), (5.8, 4.6)
    section.figure_label = f"Sharpness over time by {size}"
    section.tiles = [("spread after warm-up", f"{number(document['spread_after']):.1%}", f"from step {document['warmup']} on")]
    section.columns = [size, f"lambda_max at step {document['steps'][-1]}", "limit", "loss"]
    for name in map(str, document["sizes"]):
        top, loss = (_last_mean(document[key][name]) for key in ("lambda_max", "loss"))
        section.rows.append([name, f"{top:.4g}", f"{number(document['limit'][name]):.4g}", f"{loss:.4g}"])
    section.cost = f"{document['num_matvecs']} matrix-vector products, {number(document['seconds']):.3g} s"


def _last_mean(runs: list[list[Any]]) -> float:
    return sum(number(run[-1]) for run in runs) / len(runs)


FILLERS = {
    "transfer_verdict": fill_verdict,
    "coordinate_check": fill_coordinates,
    "learning_rate_transfer": fill_rates,
    "sharpness_transfer": fill_sharpness,
}
