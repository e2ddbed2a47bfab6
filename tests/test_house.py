"""`make house` sees what breaks the rules of the architecture, and this package breaks none."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


house = _tool()

PYPROJECT = """
[[tool.importlinter.contracts]]
name = "Layers"
type = "layers"
containers = ["toy"]
layers = ["shop", "plots", "kitchen | cellar", "_errors"]
"""

# A small package that breaks every rule once. The comments name the rule.
TOY = {
    "__init__.py": '"""The toy."""\n',
    "_errors.py": '"""Errors."""\n\n\nclass ToyError(Exception):\n    """Of the toy."""\n',
    "attic.py": '"""In no layer."""\n',
    "plots/__init__.py": '"""Figures."""\n\n\ndef draw() -> None:\n    pass\n',
    "shop/__init__.py": '"""The shop."""\n',
    "shop/counter.py": (
        '"""The counter."""\n\n'
        "from toy._errors import ToyError\n"  # allowed: private to the whole package
        "from toy.kitchen import _recipes\n"  # another package's private module
        "from toy.kitchen.oven import Oven, _heat\n"  # another package's private name
        "from toy.shop import _till\n\n\n"  # allowed: the own package's
        "def sell(oven: Oven) -> object:\n"
        "    raise ToyError(oven._temperature, _heat, _recipes, _till)\n"  # another class's private attribute
    ),
    "shop/_till.py": '"""The till."""\n',
    "kitchen/__init__.py": '"""The kitchen."""\n',
    "kitchen/_recipes.py": '"""Recipes."""\n',
    "kitchen/oven.py": (
        '"""The oven.\n\nOf four docstring lines.\n"""\n\n'
        "from __future__ import annotations\n\n"
        "from typing import TYPE_CHECKING\n\n"
        "if TYPE_CHECKING:\n"
        "    from toy.shop.counter import sell\n\n"  # for type checkers alone: not at run time
        "# from the toy's manual\n"
        "HOT = 200.0\n"
        "WARM = 60  # by judgement\n"
        "COLD = (4, 8)\n"  # a number without a source
        'NAME = "oven"\n'
        "_heat = HOT\n\n\n"
        "class Oven:\n"
        '    """An oven."""\n\n'
        "    def __init__(self) -> None:\n"
        "        self._temperature = HOT\n\n"
        "    def plot(self) -> None:\n"
        "        from toy.plots import draw\n\n"  # allowed: drawing
        "        draw()\n\n"
        "    def bake(self) -> None:\n"
        "        from toy.plots import draw\n\n"  # points up
        "        from toy.kitchen import pan\n\n"  # one half of a circle
        "        draw(pan)  # noqa: F821\n"
        "        # -- a ruler -----------\n"
    ),
    "kitchen/pan.py": (
        '"""The pan."""\n\n'
        "from toy.cellar import wine\n"  # sideways between independent rooms
        "from toy.kitchen.oven import Oven\n\n\n"  # the other half of the circle
        "def fry(oven: Oven) -> object:\n"
        "    return wine, oven\n"
    ),
    "cellar/__init__.py": '"""The cellar."""\n',
    "cellar/wine.py": '"""Wine."""\n',
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name, source in TOY.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    return tmp_path


def built(toy: Path):  # type: ignore[no-untyped-def]
    return house.build(toy / "toy", toy / "pyproject.toml")


def test_each_planted_fault_is_seen_once_and_nothing_else(toy: Path) -> None:
    broken = built(toy).broken()
    assert {rule: len(offenders) for rule, offenders in broken.items()} == {
        "circles": 1,
        "imports that point up": 2,
        "private names imported from another package": 2,
        "private attributes of another module's class": 1,
        "modules without a layer": 1,
        "constants without a source": 1,
    }
    assert broken["circles"] == ["toy.kitchen.oven <-> toy.kitchen.pan"]
    assert "Oven.bake" in broken["imports that point up"][0]
    assert "toy.cellar.wine" in broken["imports that point up"][1]
    assert ["_recipes" in one or "_heat" in one for one in broken["private names imported from another package"]] == [True, True]
    assert broken["private attributes of another module's class"] == ["toy.shop.counter:10 _temperature of toy.kitchen.oven"]
    assert broken["modules without a layer"] == ["toy.attic"]
    assert broken["constants without a source"] == ["toy.kitchen.oven:16 COLD"]


def test_a_figure_may_be_imported_by_the_method_that_draws_it(toy: Path) -> None:
    (allowed,) = built(toy).upward(drawing=True)
    assert allowed.scope == ("Oven", "plot")


def test_a_comment_that_names_no_source_is_listed_but_no_fault(toy: Path) -> None:
    oven = toy / "toy" / "kitchen" / "oven.py"
    oven.write_text(oven.read_text().replace("# from the toy's manual\n", "# degrees\n"))
    house_of_toys = built(toy)
    assert [str(one) for one in house_of_toys.vague_constants()] == ["toy.kitchen.oven:14 HOT"]
    assert house_of_toys.broken()["constants without a source"] == ["toy.kitchen.oven:16 COLD"]


def test_imports_for_type_checkers_are_listed_apart(toy: Path) -> None:
    (only_types,) = built(toy).upward_types()
    assert (only_types.importer, only_types.imported) == ("toy.kitchen.oven", "toy.shop.counter")


def test_lines_are_code_comments_or_docstrings(toy: Path) -> None:
    oven = built(toy).modules["toy.kitchen.oven"]
    assert oven.idea == "The oven."
    assert oven.docstrings == 4 + 1
    assert oven.comments == 2  # neither the ruler nor the noqa
    assert oven.code == 19


def test_a_renamed_room_is_a_layer_without_a_module(toy: Path) -> None:
    (toy / "toy" / "cellar").rename(toy / "toy" / "basement")
    broken = built(toy).broken()
    assert broken["layers without a module"] == ["cellar"]
    assert "toy.basement.wine" in broken["modules without a layer"]


def test_layers_come_from_the_contract(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT.replace("kitchen | cellar", "kitchen : (cellar)"))
    layers = house.read_layers(tmp_path / "pyproject.toml", "toy")
    assert [layer.rooms for layer in layers] == [("shop",), ("plots",), ("kitchen", "cellar"), ("_errors",)]
    assert not layers[2].independent
    with pytest.raises(ValueError, match="no import-linter contract of type layers"):
        house.read_layers(tmp_path / "pyproject.toml", "another")


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}, [["a", "b", "c"]]),
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}}, [["a", "b"], ["c", "d"]]),
    ],
)
def test_circles_are_strongly_connected_components(edges: dict[str, set[str]], expected: list[list[str]]) -> None:
    assert house.circles(edges) == expected


def test_the_exit_code_says_whether_a_rule_is_broken(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--package", str(toy / "toy"), "--pyproject", str(toy / "pyproject.toml")]
    assert house.main([*where, "--check"]) == 1
    assert house.main(where) == 0
    capsys.readouterr()
    assert house.main([*where, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["counts"]["circles"] == 1 and document["modules"]["toy.cellar.wine"]["idea"] == "Wine."


def test_the_picture_goes_between_the_markers(toy: Path) -> None:
    page = toy / "page.md"
    page.write_text(f"before\n{house.BEGIN}\nold\n{house.END}\nafter\n")
    house.main(["--package", str(toy / "toy"), "--pyproject", str(toy / "pyproject.toml"), "--write", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 2 | `kitchen/`" in text
    with pytest.raises(ValueError, match="needs the lines"):
        house.rewritten("no markers", built(toy))


# -- the real house -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real():  # type: ignore[no-untyped-def]
    return house.build(ROOT / "sharpkit", ROOT / "pyproject.toml")


def test_the_architecture_page_shows_the_layers_and_modules_of_today(real) -> None:  # type: ignore[no-untyped-def]
    """Names and order alone: line counts change with every commit, and `make house` brings them up to date."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.findall(r"^\|.*\|$", page.partition(house.BEGIN)[2].partition(house.END)[0], flags=re.MULTILINE)
    names = [re.sub(r"(?<=[\w`]) [\d,]*\d(?=[ ,])", "", row) for row in drawn[2:]]
    assert names == house.table(real, sizes=False).splitlines()[2:], "run `make house`"


def test_the_readme_names_every_room(real) -> None:  # type: ignore[no-untyped-def]
    tree = re.search(r"## Where things are\n+```\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), flags=re.DOTALL)
    assert tree is not None
    assert [room for room in real.rooms() if room != "__main__" and not re.search(rf"^  {room}(/|\.py)", tree[1], flags=re.MULTILINE)] == []


def test_what_linalg_may_not_know_is_listed_in_full(real) -> None:  # type: ignore[no-untyped-def]
    """import-linter has no "all but": the contract lists every module of objective and operators that knows a model, data or a matrix."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (forbidden,) = (set(c["forbidden_modules"]) for c in contracts if c["type"] == "forbidden")
    inside = {m.name for room in ("objective", "operators") for m in real.in_room(room) if not m.is_package}
    assert forbidden == inside - {"sharpkit.objective.memory", "sharpkit.operators.base"} | {"sharpkit.optimizers"}


def test_nothing_is_ignored_but_what_plot_methods_import() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    ignored = {one for contract in contracts for one in contract.get("ignore_imports", [])}
    assert {one for one in ignored if not one.endswith("-> sharpkit.plots.*")} == set()
    assert not any("(" in layer for contract in contracts for layer in contract.get("layers", [])), "no layer is optional"
    assert all(contract["exhaustive"] for contract in contracts if contract["type"] == "layers")


def test_no_rule_of_the_house_is_broken(real) -> None:  # type: ignore[no-untyped-def]
    assert real.broken() == {}
