"""The house, drawn from its source: modules by layer with their sizes, and whatever breaks the rules of the architecture.

    python tools/house.py                              # the whole picture
    python tools/house.py --check                      # nothing but the broken rules; exit code 1 if there are any
    python tools/house.py --json                       # the same as one document
    python tools/house.py --write docs/architecture.md # put the picture between the page's markers

The layers are read from import-linter's contract in pyproject.toml, so that the picture and the contract cannot differ. Standard library
alone; nothing is imported from the package that is drawn.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- house: written by `make house` -->", "<!-- house: end -->"

# A comment that only speaks to a tool, and a ruler that only divides the page, say nothing about why.
_DIRECTIVE = re.compile(r"#\s*(noqa|type:\s*ignore|pragma|pyright|mypy|ruff|fmt)\b(:?\s*[A-Z]+\d+(,\s*[A-Z]+\d+)*)?(\[[^\]]*\])?")
_RULER = re.compile(r"#\s*[-=*#]{2,}.*")
# Words by which a comment says where a number comes from: an experiment, a paper, a convention, or judgement.
_SOURCE = re.compile(r"judg|experiment|arxiv|et al|\b(19|20)\d\d\b|docs/|convention|format|definition|by theory", re.IGNORECASE)
_CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")
_PRIVATE = re.compile(r"_(?!_)\w*[^_]|_")
_NUMBER_MAKERS = {"frozenset", "set", "tuple", "range", "float", "int", "math.sqrt", "math.log", "math.log2", "math.exp"}
# A figure is drawn when it is asked for: these methods, and nothing else, may import upwards.
_DRAWING = re.compile(r"plot(_\w+)?|_repr_(html|png|svg)_")
_NAMEDTUPLE = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}  # public by convention in spite of the underscore


@dataclass(frozen=True)
class Import:
    """One module importing another, or a name of it."""

    importer: str
    imported: str
    line: int
    names: tuple[str, ...] = ()  # what `from imported import ...` takes, where they are no modules themselves
    scope: tuple[str, ...] = ()  # the classes and functions around it, outermost first
    in_class: bool = False
    type_checking: bool = False

    @property
    def in_drawing(self) -> bool:
        """Whether it stands in a method such as ``plot``."""
        return self.in_class and any(_DRAWING.fullmatch(name) for name in self.scope)

    def __str__(self) -> str:
        where = f" in {'.'.join(self.scope)}" if self.scope else ""
        taken = f" ({', '.join(self.names)})" if self.names else ""
        return f"{self.importer}:{self.line} -> {self.imported}{taken}{where}"


@dataclass(frozen=True)
class Place:
    """A line of a module, and what stands there."""

    module: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.what}"


@dataclass
class Module:
    """One file: its size by kind of line, and what it imports, defines and reads."""

    name: str
    path: Path
    is_package: bool
    idea: str = ""  # first line of the docstring
    lines: int = 0
    code: int = 0
    comments: int = 0
    docstrings: int = 0
    imports: list[Import] = field(default_factory=list)
    bare_constants: list[Place] = field(default_factory=list)  # without a comment
    vague_constants: list[Place] = field(default_factory=list)  # with one that names no source
    own_private: set[str] = field(default_factory=set)
    private_reads: list[tuple[str, int]] = field(default_factory=list)  # (attribute, line), the object being neither self nor cls

    @property
    def package(self) -> str:
        """The package it belongs to: itself where it is one."""
        return self.name if self.is_package else self.name.rpartition(".")[0]


# -- reading one file ---------------------------------------------------------------------------------------------------------
def _says_something(comment: str) -> bool:
    return not _RULER.fullmatch(comment) and any(c.isalpha() for c in _DIRECTIVE.sub("", comment))


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return lines


def line_kinds(source: str, tree: ast.Module) -> tuple[set[int], dict[int, str], set[int]]:
    """Line numbers of code, of comments that say something, with their text, and of docstrings. A line may hold code and a comment."""
    docstrings, code, comments = _docstring_lines(tree), set[int](), dict[int, str]()
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if _says_something(token.string):
                comments[token.start[0]] = token.string
        elif token.type not in layout:
            code.update(range(token.start[0], token.end[0] + 1))
    return code - docstrings, comments, docstrings


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING")


def _is_numeric(value: ast.expr) -> bool:
    """A number, or a tuple, list, set, dict or arithmetic expression with numbers for leaves, at least one of them written out."""
    leaves: list[ast.expr] = []

    def collect(node: ast.expr) -> bool:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return bool(node.elts) and all(map(collect, node.elts))
        if isinstance(node, ast.Dict):
            return bool(node.values) and all(map(collect, node.values))
        if isinstance(node, ast.UnaryOp):
            return collect(node.operand)
        if isinstance(node, ast.BinOp):
            return collect(node.left) and collect(node.right)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _NUMBER_MAKERS:
            return bool(node.args) and all(map(collect, node.args))
        leaves.append(node)
        return isinstance(node, (ast.Constant, ast.Name, ast.Attribute))

    if not collect(value):
        return False
    numbers = [leaf for leaf in leaves if isinstance(leaf, ast.Constant)]
    return bool(numbers) and all(isinstance(n.value, (int, float, complex)) and not isinstance(n.value, bool) for n in numbers)


def _constants(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        if names and all(map(_CONSTANT.fullmatch, names)) and _is_numeric(value):
            yield ", ".join(names), statement


def _said_of(statement: ast.stmt, code: set[int], comments: Mapping[int, str]) -> str:
    """The comments on a statement's lines and directly above it."""
    first = statement.lineno
    while first - 1 in comments and first - 1 not in code:
        first -= 1
    return " ".join(comments[line] for line in range(first, (statement.end_lineno or statement.lineno) + 1) if line in comments)


class _Reader(ast.NodeVisitor):
    """Collects a module's imports, the private names that it defines and those that it reads from elsewhere."""

    def __init__(self, module: Module, modules: set[str]) -> None:
        self.module, self.modules, self.root = module, modules, module.name.partition(".")[0]
        self.scope: list[tuple[str, bool]] = []  # name, is it a class
        self.typing = False

    def _add(self, imported: str, line: int, names: Iterable[str] = ()) -> None:
        if imported in self.modules and imported != self.module.name:
            scope = tuple(name for name, _ in self.scope)
            inside = any(is_class for _, is_class in self.scope)
            self.module.imports.append(Import(self.module.name, imported, line, tuple(names), scope, inside, self.typing))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if node.level:
            ancestors = self.module.package.split(".")
            base = ".".join(ancestors[: len(ancestors) - node.level + 1])
            source = f"{base}.{source}" if source else base
        names = []
        for alias in node.names:
            if f"{source}.{alias.name}" in self.modules:
                self._add(f"{source}.{alias.name}", node.lineno)
            else:
                names.append(alias.name)
        if names:
            self._add(source, node.lineno, names)

    def visit_If(self, node: ast.If) -> None:
        if not _is_type_checking(node.test):
            self.generic_visit(node)
            return
        before, self.typing = self.typing, True
        for child in node.body:
            self.visit(child)
        self.typing = before
        for child in node.orelse:
            self.visit(child)

    def _nested(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, is_class: bool) -> None:
        if _PRIVATE.fullmatch(node.name):
            self.module.own_private.add(node.name)
        self.scope.append((node.name, is_class))
        self.generic_visit(node)
        self.scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._nested(node, True)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._nested(node, False)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._nested(node, False)

    def visit_Name(self, node: ast.Name) -> None:
        # a field in a class body, or a name on the module's top level
        if isinstance(node.ctx, ast.Store) and _PRIVATE.fullmatch(node.id) and (not self.scope or self.scope[-1][1]):
            self.module.own_private.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if _PRIVATE.fullmatch(node.attr):
            self._private(node.value, node.attr, node.lineno, stored=isinstance(node.ctx, ast.Store))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        reads = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr") and len(node.args) > 1
        if reads and isinstance(name := node.args[1], ast.Constant) and isinstance(name.value, str) and _PRIVATE.fullmatch(name.value):
            self._private(node.args[0], name.value, node.lineno, stored=False)
        self.generic_visit(node)

    def _private(self, owner: ast.expr, name: str, line: int, *, stored: bool) -> None:
        own = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
        own = own or (isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id in ("super", "type"))
        if own and stored:
            self.module.own_private.add(name)
        elif not own and name not in _NAMEDTUPLE:
            self.module.private_reads.append((name, line))


def read_package(folder: Path) -> dict[str, Module]:
    """All modules below a package's folder, by name, in order of their paths.

    Args:
        folder: the package's folder; its name is the package's.
    """
    modules: dict[str, Module] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, path, is_package)
    for module in modules.values():
        source = module.path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        code, comments, docstrings = line_kinds(source, tree)
        module.idea = (ast.get_docstring(tree) or "").partition("\n")[0]
        module.lines, module.code = len(source.splitlines()), len(code)
        module.comments, module.docstrings = len(comments), len(docstrings)
        for constant, statement in _constants(tree):
            said = _said_of(statement, code, comments)
            if not said or not _SOURCE.search(said):
                places = module.vague_constants if said else module.bare_constants
                places.append(Place(module.name, statement.lineno, constant))
        _Reader(module, set(modules)).visit(tree)
    return modules


# -- what the rules say about all of them ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layer:
    """Rooms on one level. Independent ones may not import each other."""

    rooms: tuple[str, ...]
    independent: bool = True


def read_layers(pyproject: Path, package: str) -> list[Layer]:
    """The layers of a package, top to bottom, from import-linter's contract.

    Raises:
        ValueError: there is no layers contract with the package as its container.
    """
    contracts = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("tool", {}).get("importlinter", {}).get("contracts", [])
    for contract in contracts:
        if contract.get("type") == "layers" and package in contract.get("containers", []):
            rows = [(row, re.split(r"[|:]", row)) for row in contract["layers"]]
            return [Layer(tuple(room.strip(" ()") for room in rooms), ":" not in row) for row, rooms in rows]
    raise ValueError(f"{pyproject} has no import-linter contract of type layers with {package!r} among its containers")


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components with more than one member (Tarjan 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    answer: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                answer.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(answer)


@dataclass
class House:
    """Everything that is drawn and checked."""

    package: str
    modules: dict[str, Module]
    layers: list[Layer]

    def __post_init__(self) -> None:
        self.level = {room: i for i, layer in enumerate(self.layers) for room in layer.rooms}

    # -- the picture
    def room(self, module: str) -> str:
        """The package or module directly below the root to which a module belongs; the root itself has the empty name."""
        return module.split(".")[1] if "." in module else ""

    def in_room(self, room: str) -> list[Module]:
        """The modules of one room."""
        return [module for name, module in self.modules.items() if self.room(name) == room]

    def rooms(self) -> list[str]:
        """Packages and modules on the top level, ``__init__`` and ``__main__`` included."""
        return ["__init__", *sorted({self.room(name) for name in self.modules} - {""})]

    def unlayered(self) -> list[str]:
        """Modules that stand in no layer."""
        return [name for name in self.modules if self.room(name) and self.room(name) not in self.level]

    def missing(self) -> list[str]:
        """Layers that name no room."""
        there = set(self.rooms())
        return [room for layer in self.layers for room in layer.rooms if room not in there]

    # -- imports
    def imports(self, *, type_checking: bool = False) -> Iterator[Import]:
        """All imports within the package, those for type checkers alone left out unless asked for."""
        for module in self.modules.values():
            yield from (i for i in module.imports if type_checking or not i.type_checking)

    def _points_up(self, one: Import) -> bool:
        above, below = self.room(one.importer), self.room(one.imported)
        if above not in self.level or below not in self.level or above == below:
            return False
        here, there = self.level[above], self.level[below]
        return there < here or (there == here and self.layers[here].independent)

    def upward(self, *, drawing: bool = False) -> list[Import]:
        """Imports at run time that point up, or sideways within an independent layer.

        Args:
            drawing: the imports of ``plots`` within ``.plot()`` methods, which are allowed, instead of all others.
        """

        def allowed(one: Import) -> bool:
            return one.in_drawing and self.room(one.imported) == "plots"

        return [one for one in self.imports() if self._points_up(one) and allowed(one) == drawing]

    def upward_types(self) -> list[Import]:
        """Imports that point up for type checkers alone: no dependency at run time, but knowledge of a higher layer all the same."""
        return [one for one in self.imports(type_checking=True) if one.type_checking and self._points_up(one)]

    def circles(self) -> list[list[str]]:
        """Circles of modules that import each other at run time, also from within functions, be they methods that draw or not."""
        edges: dict[str, set[str]] = defaultdict(set)
        for one in self.imports():
            edges[one.importer].add(one.imported)
        return circles(edges)

    # -- private names
    def _may_know(self, importer: str, owner: str) -> bool:
        """Whether a module belongs to the package that owns something; what a module on the top level owns is for the top level alone."""
        package = self.modules[importer].package
        return package == owner or (owner != self.package and package.startswith(f"{owner}."))

    def private_imports(self) -> list[Import]:
        """Imports of an underscored module, or of an underscored name, of another package."""
        return [one for one in self.imports(type_checking=True) if self._private_module(one) or self._private_names(one)]

    def _private_module(self, one: Import) -> bool:
        parts = one.imported.split(".")
        owners = [".".join(parts[:i]) for i, part in enumerate(parts) if i and _PRIVATE.fullmatch(part)]
        # `_errors` on the top level is private to the whole package, as import-linter's private_modules contract has it
        return bool(owners) and owners[-1] != self.package and not self._may_know(one.importer, owners[-1])

    def _private_names(self, one: Import) -> bool:
        return any(map(_PRIVATE.fullmatch, one.names)) and not self._may_know(one.importer, self.modules[one.imported].package)

    def private_attributes(self) -> list[Place]:
        """Private attributes read from an object of another module's class: ``x._name``, with x neither ``self`` nor ``cls``."""
        owners: dict[str, set[str]] = defaultdict(set)
        for module in self.modules.values():
            for name in module.own_private:
                owners[name].add(module.name)
        return [
            Place(module.name, line, f"{name} of {', '.join(sorted(owners[name]))}")
            for module in self.modules.values()
            for name, line in sorted(module.private_reads, key=lambda read: read[1])
            if name not in module.own_private and owners.get(name)
        ]

    def bare_constants(self) -> list[Place]:
        """Numbers with a name and without a comment on their line or directly above it."""
        return [constant for module in self.modules.values() for constant in module.bare_constants]

    def vague_constants(self) -> list[Place]:
        """Numbers whose comment says what they are but not where they come from."""
        return [constant for module in self.modules.values() for constant in module.vague_constants]

    # -- sums
    def counts(self) -> dict[str, float]:
        """The figures of the picture."""
        everything = self.modules.values()
        code, comments = sum(m.code for m in everything), sum(m.comments for m in everything)
        return {
            "files": len(self.modules),
            "lines": sum(m.lines for m in everything),
            "code": code,
            "comments": comments,
            "docstrings": sum(m.docstrings for m in everything),
            "comments_per_100_code_lines": round(100 * comments / code, 1) if code else 0.0,
            "rooms": len(self.rooms()),
            "upward": len(self.upward()),
            "upward_in_plot": len(self.upward(drawing=True)),
            "upward_types": len(self.upward_types()),
            "circles": len(self.circles()),
            "private_imports": len(self.private_imports()),
            "private_attributes": len(self.private_attributes()),
            "constants_without_a_source": len(self.bare_constants()),
            "constants_whose_comment_names_no_source": len(self.vague_constants()),
            "modules_without_a_layer": len(self.unlayered()),
            "layers_without_a_module": len(self.missing()),
        }

    def broken(self) -> dict[str, list[str]]:
        """What ``--check`` refuses, by rule; empty lists are left out."""
        rules: dict[str, Iterable[object]] = {
            "circles": (" <-> ".join(circle) for circle in self.circles()),
            "imports that point up": self.upward(),
            "private names imported from another package": self.private_imports(),
            "private attributes of another module's class": self.private_attributes(),
            "modules without a layer": self.unlayered(),
            "layers without a module": self.missing(),
            "constants without a source": self.bare_constants(),
        }
        listed = {rule: [str(one) for one in offenders] for rule, offenders in rules.items()}
        return {rule: offenders for rule, offenders in listed.items() if offenders}

    def to_dict(self) -> dict[str, Any]:
        """Plain containers for JSON."""
        sizes = ("lines", "code", "comments", "docstrings")
        return {
            "package": self.package,
            "layers": [asdict(layer) for layer in self.layers],
            "modules": {m.name: {"idea": m.idea, **{size: getattr(m, size) for size in sizes}} for m in self.modules.values()},
            "counts": self.counts(),
            "plot_imports": [str(one) for one in self.upward(drawing=True)],
            "type_checking_imports_up": [str(one) for one in self.upward_types()],
            "vague_constants": [str(one) for one in self.vague_constants()],
            "broken": self.broken(),
        }


def build(folder: Path, pyproject: Path) -> House:
    """Read a package and its layers."""
    return House(folder.name, read_package(folder), read_layers(pyproject, folder.name))


# -- drawing ------------------------------------------------------------------------------------------------------------------
def draw(house: House) -> str:
    """The whole picture as text."""
    rows = [f"{'':34}{'code':>7}{'comments':>10}{'docstrings':>12}  idea"]
    for title, rooms in _storeys(house):
        rows.append(title)
        for room in rooms:
            modules = house.in_room(room)
            if len(modules) > 1 or (any(m.is_package for m in modules) and room):
                rows.append(_row(f"  {room}/", *(sum(getattr(m, size) for m in modules) for size in ("code", "comments", "docstrings"))))
            for module in modules:
                inside = ".".join(module.name.split(".")[2:]) or ("__init__" if module.is_package else "")
                indent = "    " if room and (len(modules) > 1 or module.is_package) else "  "
                rows.append(_row(f"{indent}{inside or room}", module.code, module.comments, module.docstrings, module.idea))
    counts = house.counts()
    rows += ["", *(f"{name.replace('_', ' '):40}{value:>7g}" for name, value in counts.items())]
    allowed = house.upward(drawing=True)
    rows += ["", "imports that point up, allowed in methods that draw", *(f"  {one}" for one in allowed)] if allowed else []
    typed = house.upward_types()
    rows += ["", "imports that point up for type checkers alone", *(f"  {one}" for one in typed)] if typed else []
    vague = house.vague_constants()
    rows += ["", "constants whose comment names no source", *(f"  {one}" for one in vague)] if vague else []
    return "\n".join([*rows, "", *_complaints(house)])


def _storeys(house: House) -> Iterator[tuple[str, list[str]]]:
    yield "the hall", [""]
    there = set(house.rooms())
    for i, layer in enumerate(house.layers):
        joint = " | " if layer.independent else " : "
        yield f"{len(house.layers) - i:>2}  {joint.join(layer.rooms)}", [room for room in layer.rooms if room in there]
    lost = sorted({house.room(name) for name in house.unlayered()})
    if lost:
        yield "in no layer", lost


def _row(name: str, code: int, comments: int, docstrings: int, idea: str = "") -> str:
    return f"{name:34}{code:>7}{comments:>10}{docstrings:>12}  {idea}".rstrip()


def _complaints(house: House) -> list[str]:
    rows = []
    for rule, offenders in house.broken().items():
        rows += [f"{rule}: {len(offenders)}", *(f"  {one}" for one in offenders), ""]
    return rows or ["every rule holds"]


def table(house: House, *, sizes: bool = True) -> str:
    """The picture of docs/architecture.md: layers top to bottom, their rooms, and the modules in them.

    Args:
        house: what is drawn.
        sizes: with lines of code, which change with every commit; without them the table changes only with the layout.
    """

    def size(lines: int) -> str:
        return f" {lines:,}" if sizes else ""

    rows = [f"| layer | room{' and lines of code' if sizes else ''} | modules |", "|---|---|---|"]
    for title, rooms in _storeys(house):
        level = "" if title[0].isalpha() else title.split()[0]
        for room in rooms:
            modules = house.in_room(room)
            inner = [f"{m.name.split('.', 2)[2]}{size(m.code)}" for m in modules if m.name.count(".") > 1]
            # a package whose __init__ holds code of its own says so
            inner += [f"`__init__`{size(m.code)}" for m in modules if room and m.is_package and m.name.count(".") == 1 and m.code > 1]
            name = f"`{room}/`" if any(m.is_package for m in modules) and room else f"`{room or '__init__'}`"
            rows.append(f"| {level} | {name}{size(sum(m.code for m in modules))} | {', '.join(inner)} |")
            level = ""
    return "\n".join(rows)


def page_part(house: House) -> str:
    """What stands between the markers of docs/architecture.md."""
    counts = house.counts()
    figures = (
        f"{counts['files']:g} files, {counts['lines']:,} lines: {counts['code']:,} of code, {counts['docstrings']:,} of docstrings, "
        f"{counts['comments']:,} with a comment ({counts['comments_per_100_code_lines']} per 100 lines of code). {counts['rooms']:g} rooms."
    )
    return f"{BEGIN}\n{table(house)}\n\n{figures}\n{END}"


def rewritten(page: str, house: House) -> str:
    """A page with its part between the markers drawn anew.

    Raises:
        ValueError: the page lacks the markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}, between which the picture goes")
    return f"{before}{page_part(house)}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description="modules by layer with their sizes, and whatever breaks the rules of the architecture")
    parser.add_argument("--package", type=Path, default=root / "sharpkit", help="folder of the package (default: sharpkit)")
    parser.add_argument("--pyproject", type=Path, default=root / "pyproject.toml", help="file with the layers contract")
    parser.add_argument("--check", action="store_true", help="print only broken rules; exit code 1 if there are any")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="draw the picture between the markers of this page")
    chosen = parser.parse_args(arguments)
    house = build(chosen.package, chosen.pyproject)
    if chosen.write:
        chosen.write.write_text(rewritten(chosen.write.read_text(encoding="utf-8"), house), encoding="utf-8")
    if chosen.json:
        print(json.dumps(house.to_dict(), indent=2))
    else:
        print("\n".join(_complaints(house)) if chosen.check else draw(house))
    return 1 if chosen.check and house.broken() else 0


if __name__ == "__main__":
    sys.exit(main())
