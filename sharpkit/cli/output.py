"""What the command line shows: one JSON document, plain tables; remarks go to stderr."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sharpkit._results import Progress

if TYPE_CHECKING:
    from sharpkit.reporting.documents import Document
    from sharpkit.reporting.sections import Section


def all_converged(document: Any) -> bool:
    """Whether no result in the document says that it did not converge."""
    if isinstance(document, Mapping):
        flag = document.get("converged", True)
        return all(flag) if isinstance(flag, list) else bool(flag) and all(all_converged(v) for v in document.values())
    if isinstance(document, (list, tuple)):
        return all(all_converged(v) for v in document)
    return True


def render_text(documents: Iterable[Document]) -> str:
    """The sections of a report as plain text for a terminal."""
    from sharpkit.reporting.sections import section_for  # loads torch, which --help need not wait for

    return "\n\n".join(_section_text(section_for(document)) for document in documents)


def _section_text(section: Section) -> str:
    lines = [section.title, "-" * len(section.title)]
    if section.intro:
        lines.append(textwrap.fill(section.intro, 100))
    rows = [section.columns, *section.rows]
    # The last column may be long prose: it sets no width and is wrapped under itself.
    widths = [max(len(row[j]) for row in rows) for j in range(len(section.columns) - 1)] if section.columns else []
    for row in rows if section.rows else []:
        head = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        indent = " " * (len(head) + 2 if widths else 0)
        narrow = max(40, 120 - len(indent))  # by judgement: beside wide columns the prose keeps 40 characters, past the edge if need be
        last = textwrap.wrap(row[-1], narrow) or [""]
        lines.append((f"{head}  " if widths else "") + f"\n{indent}".join(last))
    lines += [textwrap.fill(f"* {finding}", 100, subsequent_indent="  ") for finding in section.findings]
    for heading, sentences in section.lists:
        lines.append(f"{heading}:")
        lines += [textwrap.fill(f"{i:3d}. {sentence}", 100, subsequent_indent="     ") for i, sentence in enumerate(sentences, start=1)]
    if section.cost:
        lines.append(f"cost: {section.cost}")
    return "\n".join(line.rstrip() for line in lines)


def say(line: str) -> None:
    """One line to stderr, at once: stdout is for the answer alone."""
    print(line, file=sys.stderr, flush=True)


def tell(progress: Progress) -> None:
    """The ``callback`` of calls that report in sentences: the text alone, a line each, to stderr."""
    say(progress.text)
