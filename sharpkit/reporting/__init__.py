"""One self-contained HTML page from any results: figures, numbers with errors and cost, findings. No network needed to view it."""

from __future__ import annotations

import io
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sharpkit
from sharpkit._arguments import as_path, as_seed, as_text, shown, texts
from sharpkit._results import RUN_VERSION, to_json
from sharpkit.reporting.documents import to_document as to_document

_NAMED = ("layer_sharpness", "curvature_history")  # whose own sections say their name
_GENERATOR = "sharpkit"  # what a page says it was made by, and is known again by
_HEAD_BYTES = 2048  # the head of a page up to its style is a quarter of it
# Stands for the page's text colour, which matplotlib cannot name: a colour that no picture uses, replaced by currentColor afterwards.
_INK = "#010203"


def inline_svg(draw: Callable[[Any], Any], *, key: str, size: tuple[float, float]) -> str:
    """The SVG element of what ``draw`` draws on axes of a size in inches; ``key``, letters and digits, makes ids unique on the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK)
    # Text stays text (fonttype none): small, searchable, in the page's own font. A fixed salt makes the same results the same bytes.
    settings: Any = {**ink, "svg.fonttype": "none", "svg.hashsalt": key, "axes.facecolor": "none"}
    settings |= {"font.size": 10, "font.family": ["DejaVu Sans"]}  # the font that matplotlib brings: no warning where others are missing
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")  # not pyplot's: nothing stays open, no backend is chosen
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return _adapt(buffer.getvalue(), key)


def _adapt(text: str, key: str) -> str:
    """Make a standalone SVG file a part of the page."""
    svg = text[text.index("<svg") :]  # behind the XML declaration, which HTML does not know
    # matplotlib numbers the parts of every figure alike (axes_1, patch_2), and an id may be on a page only once
    for name in ('\\bid="', "url\\(#", 'href="#'):
        svg = re.sub(name, lambda at: f"{at.group()}{key}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # in the page's own font
    return re.sub(
        r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" xmlns="http://www.w3.org/2000/svg" aria-hidden="true">', svg, count=1
    )


def environment() -> dict[str, str]:
    """Versions and machine that a number depends on.

    Example:
        >>> sorted(environment())
        ['numpy', 'platform', 'python', 'scipy', 'sharpkit', 'torch']
    """
    return {
        "sharpkit": sharpkit.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),  # says which build, the package's metadata does not
        "numpy": metadata.version("numpy"),
        "scipy": metadata.version("scipy"),
    }


def report(
    path: str | os.PathLike[str],
    results: Iterable[Any],
    *,
    title: str = "Curvature report",
    command: str | None = None,
    seed: int | None = None,
    notes: Iterable[str] = (),
    machine: Mapping[str, str] | None = None,
) -> Path:
    """Write results as one HTML page that needs no other file and no network.

    The page is written beside its target and moved there when it is complete: on any failure an existing report stays as it was.

    Args:
        path: where the page goes; its folder must exist.
        results: results, their ``to_dict()``, or ``(heading, result)`` pairs, in the order of the page.
        title: of the page.
        command: how to make it again; by default the running program's command line.
        seed: shown in the footer.
        notes: sentences shown under the title.
        machine: versions to show in place of this process's, for results measured elsewhere.

    Returns:
        The absolute path of the page.

    Raises:
        TypeError: something that is no result.
        ValueError: no results at all.
        OSError: the page could not be written; the message says why.

    Example:
        >>> import tempfile, sharpkit as sk
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = sk.report(f"{folder}/out.html", [("Trace", sk.Estimate(3.0, 0.1, 40))])
        ...     "3 ± 0.1" in page.read_text(encoding="utf-8")
        True
    """
    # they know every kind of result: what only needs documents does not load all that
    from sharpkit.reporting.sections import runs_together, section_for

    target = page_place(as_path("path", path))  # before the figures are drawn
    as_text("title", title)
    if command is not None:
        as_text("command", command)
    seed = None if seed is None else as_seed(seed)
    notes, shown_machine = texts("notes", notes), environment() if machine is None else _checked_machine(machine)
    if isinstance(results, (str, bytes)) or not isinstance(results, Iterable):
        raise TypeError(f"results must be a list of results or of (heading, result) pairs, got {shown(results)}")
    sections, documents = [], []
    runs: dict[str, tuple[int, Any]] = {}  # monitored runs with records: name on the page -> place among the sections, document
    for i, item in enumerate(results):
        heading, result = item if isinstance(item, (tuple, list)) and len(item) == 2 else ("", item)
        document = to_document(result)
        section = section_for(document, title=str(heading))
        name = str(document.get("name") or "")
        if name and not heading and name not in section.title and document["kind"] not in _NAMED:
            section.title = f"{name}: {section.title}"
            section.findings = [f"{name}: {finding}" for finding in section.findings]
        if document["kind"] == "monitor_history" and document["records"]:
            said = str(heading) or name or f"run {len(runs) + 1}"
            runs[said if said not in runs else f"{said} ({i + 1})"] = (i, document)
        documents.append({**document, "title": section.title})
        if section.draw is not None:
            section.figure = inline_svg(section.draw, key=f"figure{i}", size=section.figure_size)
        sections.append(section)
    if len(runs) > 1:
        for said, (i, _) in runs.items():
            prefix = f"{said}: "
            sections[i].findings = [each if each.startswith(prefix) else prefix + each for each in sections[i].findings]
        if (together := runs_together({said: document for said, (_, document) in runs.items()})) is not None and together.draw is not None:
            together.figure = inline_svg(together.draw, key="runs", size=together.figure_size)
            sections.insert(0, together)  # drawn from the runs' own documents, so it has none in the page's JSON
    if not sections:
        raise ValueError("a report needs at least one result, got none")
    page = render(
        "report.html.j2",
        title=title,
        generator=f"{_GENERATOR} {sharpkit.__version__}",
        sections=sections,
        # as `sharpkit report` reads it; no "</script>" of a name ends it early
        results=to_json({"kind": "run", "version": RUN_VERSION, "environment": shown_machine, "results": documents}).replace(
            "<", "\\u003c"
        ),
        notes=notes,
        command=command or shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),  # python's own options are in orig_argv alone
        seed=seed,
        environment=shown_machine,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomically(target, page)
    return target


def _checked_machine(machine: Any) -> dict[str, str]:
    if not isinstance(machine, Mapping) or not all(isinstance(part, str) for item in machine.items() for part in item):
        raise TypeError(f"machine must be a dict of texts, such as {{'torch': '2.13'}}, got {shown(machine)}")
    return dict(machine)


def render(template: str, **context: Any) -> str:
    """One of the package's templates as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # autoescape: names of models and files are other people's text; strict: a misspelt field is an error, not a gap on the page
    strict: Any = {"autoescape": True, "undefined": StrictUndefined}
    templates = Environment(loader=PackageLoader("sharpkit.reporting"), trim_blocks=True, lstrip_blocks=True, **strict)
    return templates.get_template(template).render(**context)


def page_place(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a page to be written, through links: replacing a link would leave what it points to as it was.

    Raises:
        OSError: the folder does not exist, or there is something at the path that is no file and that a move would replace.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {target.parent} does not exist; make it first or name another place")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it, such as {target / 'report.html'}")
    if os.path.exists(path) and not os.path.isfile(path):  # asked of the path: a pipe behind /dev/stdout has no name to follow to
        raise OSError(f"cannot write {path}: it is a pipe, a socket or a device, which the page would replace; name a file")
    return target


def is_page(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a page that :func:`report` wrote; False where it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return f'<meta name="generator" content="{_GENERATOR} '.encode() in stream.read(_HEAD_BYTES)
    except OSError:
        return False


def write_atomically(target: Path, text: str) -> None:
    """Write beside the target, then move: a reader sees the old file or the whole new one, never half of it.

    Args:
        target: the file to make or replace.
        text: its contents, written as UTF-8.

    Raises:
        OSError: the folder is missing, the disk is full, the place is read-only ...; an existing target is unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "a.txt", "hello")
        ...     (Path(folder) / "a.txt").read_text()
        'hello'
    """
    target = page_place(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")  # in the same folder: a move between file systems is a copy
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            # without it a power cut may leave the new name with no content: file systems order names and data by themselves
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        kept = "; the file that was there is unchanged" if target.exists() else ""
        raise OSError(error.errno, f"cannot write {target}: {error.strerror or error}{kept}") from error
    finally:
        temporary.unlink(missing_ok=True)
