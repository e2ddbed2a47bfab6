"""One result as a notebook shows it: the section of the page, small."""

from __future__ import annotations

import hashlib
from typing import Any

from sharpkit._errors import SharpkitError
from sharpkit.reporting import inline_svg
from sharpkit.reporting.documents import to_document
from sharpkit.reporting.sections import section_for

_MOST_ROWS = 12  # by judgement: the whole table is in the result


def fragment(result: Any) -> str | None:
    """HTML of a result, or None where it cannot be shown so, and the notebook falls back on its text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    try:
        document = to_document(result)
        section = section_for(document, title=str(document.get("name") or ""))
        key = "n" + hashlib.sha256(repr(document).encode()).hexdigest()[:12]  # ids are shared by all of a notebook
        if section.draw is not None:
            section.figure = inline_svg(section.draw, key=key, size=section.figure_size)
    except (SharpkitError, TypeError, ValueError, LookupError, AttributeError):
        return None
    strict: Any = {"autoescape": True, "undefined": StrictUndefined}
    templates = Environment(loader=PackageLoader("sharpkit.reporting"), trim_blocks=True, lstrip_blocks=True, **strict)
    html: str = templates.get_template("notebook.html.j2").render(section=section, most=_MOST_ROWS)
    return html
