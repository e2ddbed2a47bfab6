"""Docstrings as the documentation site reads them: examples as code, names in roles as code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Changes what the site's reader sees; the source stays as it is."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Each object once it is read."""
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = re.sub(r"^References:$", "Note: References", text, flags=re.MULTILINE)
        # :class:`~sharpkit.linalg.results.Estimate` and :meth:`plot`: the last part of the name says it
        text = re.sub(r":(?:class|func|meth|mod|attr):`~?([\w.]+\.)?(\w+)`", r"`\2`", text)
        obj.docstring.value = text.replace("``", "`")
