"""A figure as inline SVG that takes the page's font, text colour and width."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

_INK = "#010203"  # stands for the page's text colour


def inline_svg(draw: Callable[[Any], Any], *, key: str, size: tuple[float, float]) -> str:
    """Draw on fresh axes and return the SVG element.

    Args:
        draw: fills the axes it is given.
        key: letters and digits that make ids unique within the page.
        size: width and height in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK)
    settings: Any = {
        **ink,
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.size": 10,
        "font.family": ["DejaVu Sans"],
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return _adapt(buffer.getvalue(), key)


def _adapt(text: str, key: str) -> str:
    svg = text[text.index("<svg") :]
    prefix = key
    svg = re.sub(r"\bid=\"", f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r"href=\"#", f'href="#{prefix}-', svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return re.sub(
        r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" xmlns="http://www.w3.org/2000/svg" aria-hidden="true">', svg, count=1
    )
