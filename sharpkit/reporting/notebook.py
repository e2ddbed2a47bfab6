"""One result as a notebook shows it: the section of the page, small."""

from __future__ import annotations

import hashlib
from typing import Any

from sharpkit._errors import SharpkitError
from sharpkit.reporting import inline_svg, render
from sharpkit.reporting.documents import to_document
from sharpkit.reporting.sections import section_for

_MOST_ROWS = 12  # by judgement: the whole table is in the result


def fragment(result: Any) -> str | None:
    """HTML of a result, or None where it cannot be shown so, and the notebook falls back on its text."""
    try:
        document = to_document(result)
        section = section_for(document, title=str(document.get("name") or ""))
        key = "n" + hashlib.sha256(repr(document).encode()).hexdigest()[:12]  # ids are shared by all of a notebook
        if section.draw is not None:
            section.figure = inline_svg(section.draw, key=key, size=section.figure_size)
    except (SharpkitError, TypeError, ValueError, LookupError, AttributeError):
        return None
    return render("notebook.html.j2", section=section, most=_MOST_ROWS)
