"""The page: complete in one file, the same from live and saved results, never half written."""

from __future__ import annotations

import errno
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import sharpkit as sk
from sharpkit._results import json_ready
from sharpkit.cli.main import main
from sharpkit.measuring.doctor import Check
from sharpkit.reporting import to_document


def results() -> list[Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(16, 3, generator=generator), torch.randint(2, (16,), generator=generator)
    objective = sk.Objective(model, data, loss=torch.nn.functional.cross_entropy)
    hessian = sk.HessianOperator(objective)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return [
        ("Whole model", sk.measure(objective, optimizer=optimizer)),
        ("Spectrum", sk.spectral_density(hessian, num_probes=2, num_steps=8)),
        sk.eigenpairs(hessian, k=2),
        sk.trace(hessian, rtol=0.5),
        sk.per_layer(objective),
        sk.CurvatureHistory((0, 1), (1.0, 0.5), (3.0, float("inf")), (0.1, float("nan")), (20.0, 20.0), (0.1, 0.1), name="<b>MLP</b>"),
        sk.Diagnosis("a model", (Check("dropout", "failed", "products differ by 66 %", "use mode='eval'"),)),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = sk.report(
        tmp_path_factory.mktemp("report") / "out.html", results(), title="A & B", seed=7, command="python train.py", notes=["noted"]
    )
    return path.read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Open tags at the end, ids, and every address that a browser would fetch."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "use", "rect", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.append(str(values["id"]))
        self.fetched += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data") and not str(v).startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_self_contained_and_has_unique_ids(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.fetched == []
    assert len(outline.ids) == len(set(outline.ids))
    assert not re.search(r"@import|<script[^>]*\bsrc|<link|url\(\s*['\"]?(?!#)", page)


def test_every_reference_inside_a_figure_has_its_target(page: str) -> None:
    wanted = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", page))
    assert wanted
    assert wanted <= set(re.findall(r"\bid=\"([^\"]+)\"", page))


def test_figures_follow_the_page_in_colour_and_width(page: str) -> None:
    assert page.count("<svg ") == 4  # sharpness, density, layers, history
    assert "#010203" not in page
    assert "currentColor" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_text_is_escaped(page: str) -> None:
    assert "<b>MLP</b>" not in page
    assert "&lt;b&gt;MLP" in page
    assert "<title>A &amp; B</title>" in page


def test_the_footer_tells_how_to_make_it_again(page: str) -> None:
    footer = page[page.index("<footer>") :]
    assert f"torch {torch.__version__}" in footer
    assert "seed 7" in footer
    assert "python train.py" in footer


def test_numbers_come_with_error_and_cost(page: str) -> None:
    assert "matrix-vector products" in page
    assert "±" in page
    assert "products differ by 66 %" in page
    assert "use mode=&#39;eval&#39;" in page


def test_the_page_of_saved_results_is_the_page_of_the_live_ones(tmp_path: Path) -> None:
    import json

    live = results()
    saved = []
    for item in live:
        heading, result = item if isinstance(item, tuple) else ("", item)
        saved.append((heading, json.loads(json.dumps(json_ready(to_document(result)), allow_nan=False))))
    texts = [sk.report(tmp_path / f"{i}.html", r, command="x").read_text() for i, r in enumerate((live, saved))]
    bodies = [text[text.index("<main>") : text.index("</main>")] for text in texts]
    assert bodies[0] == bodies[1]


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got float"):
        sk.report(tmp_path / "x.html", [3.0])
    with pytest.raises(ValueError, match="at least one result"):
        sk.report(tmp_path / "x.html", [])
    with pytest.raises(ValueError, match="'estimate' document"):
        sk.report(tmp_path / "x.html", [{"kind": "estimate"}])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_of_result_becomes_a_table(tmp_path: Path) -> None:
    text = sk.report(tmp_path / "x.html", [{"kind": "batch_curve", "crossover": 128, "note": "b < c"}]).read_text()
    assert "Batch curve" in text
    assert "<td>128</td>" in text
    assert "b &lt; c" in text


def test_a_missing_folder_and_a_folder_as_target_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist; make it first"):
        sk.report(tmp_path / "missing" / "x.html", [sk.Estimate(1.0, 0.1)])
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        sk.report(tmp_path, [sk.Estimate(1.0, 0.1)])


def test_a_full_disk_leaves_the_existing_page_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.html"
    target.write_text("the old page")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; the file that was there is unchanged"):
        sk.report(target, [sk.Estimate(1.0, 0.1)])
    assert target.read_text() == "the old page"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_to_the_page_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "link.html").symlink_to("real.html")
    sk.report(tmp_path / "link.html", [sk.Estimate(1.0, 0.1)])
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").read_text() != "old"


def test_a_pipe_a_device_and_what_a_link_points_to_are_never_replaced(tmp_path: Path) -> None:
    pipe, link, page = tmp_path / "pipe.html", tmp_path / "link.html", tmp_path / "page.html"
    os.mkfifo(pipe)
    link.symlink_to(page)
    for place in (pipe, Path("/dev/null"), Path("/dev/stdout")):
        if place.exists() and not place.is_file():  # stdout may be a file here
            with pytest.raises(OSError, match=r"it is a pipe, a socket or a device, which the page would replace; name a file"):
                sk.report(place, [sk.Estimate(1.0, 0.1)])
            assert not place.is_file()
    assert sk.report(link, [sk.Estimate(1.0, 0.1)]) == page.resolve()
    assert link.is_symlink()


def test_the_page_holds_its_results_and_no_name_ends_them_early(tmp_path: Path) -> None:
    named = sk.Estimate(3.0, 0.1).named("</script><script>alert(1)</script>")
    page = sk.report(tmp_path / "a.html", [named, ("Own heading", sk.Estimate(float("inf"), 0.1))]).read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    inside = re.search(r'<script type="application/json" id="results">(.*?)</script>', page, flags=re.DOTALL)
    assert inside
    run = json.loads(inside[1])
    assert [document["title"] for document in run["results"]] == [f"{named.name}: Estimate", "Own heading"]
    assert sk.Estimate.from_dict(run["results"][0]) == named
    assert (tmp_path / "run.json").write_text(inside[1])
    assert main(["report", str(tmp_path / "run.json"), "--html", str(tmp_path / "b.html")]) == 0


def test_long_pages_have_a_table_of_contents(tmp_path: Path) -> None:
    four = [(f"Number {i}", sk.Estimate(float(i), 0.1)) for i in range(4)]
    pages = [sk.report(tmp_path / f"{n}.html", four[:n]).read_text(encoding="utf-8") for n in (3, 4)]
    assert "<nav" not in pages[0] and pages[1].count('<li><a href="#h-') == 4
