"""A page section for one's own kind of result is one function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sharpkit as sk
from sharpkit.cli.output import render_text
from sharpkit.reporting import sections


@pytest.fixture(autouse=True)
def _registered_kinds_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "_SECTIONS", dict(sections._SECTIONS))


class Coin:
    def to_dict(self) -> dict[str, object]:
        return {"kind": "coin", "heads": 4, "throws": 10}


def coin_section(document: dict[str, object]) -> sk.Section:
    section = sk.Section("A coin", columns=["heads", "throws"], rows=[[str(document["heads"]), str(document["throws"])]])
    section.draw, section.figure_label = lambda ax: ax.bar([0, 1], [6, 4]), "tails and heads"
    return section


def test_the_page_and_the_command_line_show_it_live_and_from_json(tmp_path: Path) -> None:
    sk.register_section("coin", coin_section)
    document = json.loads(json.dumps(Coin().to_dict()))
    live, saved = (sk.report(tmp_path / name, [result]).read_text() for name, result in (("a.html", Coin()), ("b.html", document)))
    for page in (live, saved):
        assert "A coin" in page and "tails and heads" in page and "<svg" in page
    assert "A coin" in render_text([document])


def test_a_heading_given_to_the_report_takes_the_place_of_the_sections(tmp_path: Path) -> None:
    sk.register_section("coin", coin_section)
    page = sk.report(tmp_path / "a.html", [("Mine", Coin())]).read_text()
    assert "Mine" in page and "A coin" not in page


def test_a_known_kind_can_be_shown_otherwise(tmp_path: Path) -> None:
    sk.register_section("estimate", lambda document: sk.Section("Only the title"))
    assert "Only the title" in sk.report(tmp_path / "a.html", [sk.Estimate(1.0, 0.1)]).read_text()


@pytest.mark.parametrize(
    ("kind", "make", "error", "match"),
    [("", coin_section, ValueError, "kind must be the text"), (3, coin_section, ValueError, "got 3"), ("coin", "A coin", TypeError, "str")],
)
def test_what_cannot_be_registered_is_refused(kind: object, make: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sk.register_section(kind, make)  # type: ignore[arg-type]


def test_a_function_that_returns_no_section_is_named(tmp_path: Path) -> None:
    sk.register_section("coin", lambda document: "heads")  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"registered for 'coin' must return a sharpkit\.Section, got str"):
        sk.report(tmp_path / "a.html", [Coin()])
