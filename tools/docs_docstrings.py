"""Docstrings as the documentation site reads them: examples as code, names in roles as code, arguments that share a line one by one."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SHARED = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n        .*)*)", flags=re.MULTILINE)  # as "momentum, dampening: ..."
_RETURNS = re.compile(r"^Returns:\n((?:    .*\n?)+)", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes what the site's reader sees; the source stays as it is."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Each object once it is read."""
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = re.sub(r"^References:$", "Note: References", text, flags=re.MULTILINE)
        text = _SHARED.sub(lambda found: "\n".join(f"    {name}: {found[2]}" for name in found[1].split(", ")), text)
        # the type stands in the signature, and a colon in the sentence would be read as the end of one
        text = _RETURNS.sub(lambda found: f"**Returns:** {' '.join(found[1].split())}\n", text)
        # :class:`~sharpkit.linalg.results.Estimate` and :meth:`plot`: the last part of the name says it
        text = re.sub(r":(?:class|func|meth|mod|attr):`~?([\w.]+\.)?(\w+)`", r"`\2`", text)
        obj.docstring.value = text.replace("``", "`")
