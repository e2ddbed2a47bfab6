"""The base that writes and reads every result and every state, and the numbers with errors that they hold.

A :class:`Result` is written to a plain dictionary and read back by its type hints. A :class:`State` is the mutable part of a run: what it
saves, it goes on from. Both take what they write from one tuple, ``saved``, given as a class keyword.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from sharpkit._errors import DocumentError

if TYPE_CHECKING:
    import numpy as np

# What the error of a number is: one standard deviation of a random estimate; a bound that some eigenvalue keeps (the residual of a Ritz
# pair); or half the width of an interval found by bisection.
ErrorKind = Literal["standard error", "residual bound", "half bracket"]

P = TypeVar("P", bound="State")
T = TypeVar("T")


# -- JSON -------------------------------------------------------------------------------------------------------------------
def json_ready(value: Any) -> Any:
    """Strict JSON: NaN becomes null, infinities the strings "inf" and "-inf", tuples lists.

    Example:
        >>> json_ready({"a": (1.0, float("nan"), float("-inf"))})
        {'a': [1.0, None, '-inf']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        return json_ready(value.tolist())
    return value


def to_json(document: Mapping[str, Any]) -> str:
    """One line of valid JSON.

    Example:
        >>> to_json({"loss": float("inf")})
        '{"loss": "inf"}'
    """
    return json.dumps(json_ready(document), allow_nan=False)  # Python would write NaN as a bare word, which no other reader takes


RUN_VERSION = 1  # of a run's JSON document: counts up when a field changes its meaning
# Bytes of one JSON document, by judgement: the largest results, spectra of many probes, are a hundredth of it.
MAX_JSON = 256 * 2**20


def parse_json(text: str | bytes, where: str) -> Any:
    """A document from JSON that may come from anywhere.

    Args:
        text: the document, at most ``MAX_JSON`` long.
        where: names the file, and the line of it, in the message.

    Raises:
        DocumentError: it is no JSON, too long, or nested too deeply to be read.

    Example:
        >>> parse_json("[1, 2", "run.jsonl, line 3")
        Traceback (most recent call last):
        sharpkit._errors.DocumentError: run.jsonl, line 3: not JSON (Expecting ',' delimiter: line 1 column 6 (char 5)): '[1, 2'
    """
    if len(text) > MAX_JSON:
        raise DocumentError(f"{where}: longer than {MAX_JSON / 2**20:.0f} MiB, which no document of sharpkit is")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and integers of thousands of digits are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        shown = text[:60] if isinstance(text, str) else text[:60].decode("utf-8", errors="replace")
        raise DocumentError(f"{where}: not JSON ({reason}): {shown.rstrip()!r}") from error


def number(value: Any) -> float:
    """A float from a JSON value: null is NaN, and infinities are strings.

    Example:
        >>> number(None), number("-inf"), number(2)
        (nan, -inf, 2.0)
    """
    return math.nan if value is None else float(value)


# -- numbers with errors ------------------------------------------------------------------------------------------------------
def format_with_error(value: float, error: float, kind: ErrorKind | None = None) -> str:
    """``1.234 +- 0.005``, with as many digits as the error supports; in parentheses the kind of error, and whether it exceeds the value.

    Example:
        >>> format_with_error(1.23456, 0.005), format_with_error(2.0, 0.1, "residual bound"), format_with_error(2e3, 2e4)
        ('1.235 +- 0.005', '2 +- 0.1 (residual bound)', '2e+03 +- 2e+04 (not resolved)')
    """
    if not math.isfinite(value):
        return f"{value:.4g}"
    if not math.isfinite(error):
        return f"{value:.4g} (error unknown)"
    if error <= 0:
        return f"{value:.6g}"  # exact: as many digits as a float32 can hold, by judgement
    digits = max(1, min(7, math.ceil(math.log10(max(abs(value), error) / error)) + 1)) if value else 2
    remarks = ([kind] if kind else []) + (["not resolved"] if value and error >= abs(value) else [])
    return f"{value:.{digits}g} +- {error:.2g}" + (f" ({', '.join(remarks)})" if remarks else "")


def percent(share: float) -> str:
    """A share in percent, with a decimal below 10 %; a small one is not shown as none.

    Example:
        >>> percent(0.00004), percent(0.05), percent(1.24), percent(0)
        ('0.004%', '5.0%', '124%', '0%')
    """
    if 0 < abs(share) < 0.001:
        return f"{100 * share:.1g}%"
    return f"{share:.1%}" if 0 < abs(share) < 0.0995 else f"{share:.0%}"


def decimals(value: float) -> str:
    """A number about 1 with two decimals; a small one is not shown as 0.00.

    Example:
        >>> decimals(0.9712), decimals(0.0012), decimals(0)
        ('0.97', '0.0012', '0')
    """
    return f"{value:.2f}" if abs(value) >= 0.0995 or not math.isfinite(value) else f"{value:.2g}"


@cache
def student_factor(count: int) -> float:
    """t(0.975; count - 1) / 1.96: widens a standard error from ``count`` samples so that twice it covers 95 % also with a handful."""
    from scipy.stats import t  # here: it loads ten times as long as NumPy, and what only reads files never needs it

    return float(t.ppf(0.975, count - 1) / 1.959964) if count > 1 else math.inf


def standard_error(samples: np.ndarray[Any, Any]) -> float:
    """Standard error of the mean of independent samples, widened for their small number."""
    if len(samples) < 2:
        return math.inf
    return float(samples.std(ddof=1) / math.sqrt(len(samples))) * student_factor(len(samples))


@dataclass(frozen=True)
class Progress:
    """Where a long call stands, handed to its ``callback`` after each step: the same for every call.

    Attributes:
        done: units of work done so far.
        expected: units the whole call is expected to need, as far as known now; 0 if that is not known yet.
        elapsed: seconds so far.
        remaining: seconds the rest may take, from the cost of a unit so far; NaN if it cannot be determined.
        text: what is being done, in a few words.
        unit: what is counted: ``"products"``, ``"gradients"``, ``"runs"``, ``"samples"``, ``"checks"``, ``"points"``.
        peak_bytes: memory that the call will take at most where its vectors live, besides model and data; 0 where it is not told.
        choices: how the work is done, in words by what was chosen: ``"graphs"``, ``"batches"``, ``"products"``, ``"basis"``.

    Example:
        >>> print(Progress(12, 40, 3.0, 7.0, "search for missed eigenvalues"))
        search for missed eigenvalues: 12 of about 40 products, 3 s, about 7 s left
    """

    done: int
    expected: int
    elapsed: float
    remaining: float
    text: str
    unit: str = "products"
    peak_bytes: float = 0.0
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_matvecs(self) -> int:
        """Products done; 0 where something else is counted."""
        return self.done if self.unit == "products" else 0

    @property
    def expected_matvecs(self) -> int:
        """Products expected in all; 0 where something else is counted."""
        return self.expected if self.unit == "products" else 0

    @property
    def stage(self) -> str:
        """The same as ``text``."""
        return self.text

    def __str__(self) -> str:
        count = f"{self.done} of about {self.expected} {self.unit}" if self.expected else f"{self.done} {self.unit}"
        rest = f", about {self.remaining:.3g} s left" if math.isfinite(self.remaining) else ""
        return f"{self.text}: {count}, {self.elapsed:.3g} s{rest}"


ProgressCallback = Callable[[Progress], None]


# -- what a class saves -------------------------------------------------------------------------------------------------------
class _Layout(NamedTuple):
    """What the documents of one class look like."""

    kind: str = ""
    version: int = 0
    saved: tuple[str, ...] = ()
    strict: bool = False


class _Saved:
    """Holds the class keywords of :class:`Result` and :class:`State`; a subclass that gives any begins anew, it inherits none of them.

    They are keywords and no class variables, so that a result may have a field called ``kind`` or ``version``.
    """

    _layout: ClassVar[_Layout] = _Layout()

    def __init_subclass__(cls, *, kind: str = "", version: int = 0, saved: tuple[str, ...] = (), strict: bool = False) -> None:
        super().__init_subclass__()
        if "_layout" not in cls.__dict__:  # it is there already in the copy of the class that @dataclass(slots=True) makes
            cls._layout = _Layout(kind, version or int(bool(kind)), tuple(saved), strict)


def _kept_by_class(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """Finding out anew what a class holds takes ten times as long as writing a record; typed, since mypy takes no class as hashable."""
    return cache(function)


_hints = _kept_by_class(get_type_hints)


@_kept_by_class
def _entries(cls: Any) -> tuple[tuple[str, str], ...]:
    """(key, attribute) of all that a class writes, in order: by default the fields of the dataclass."""
    names = cls._layout.saved or tuple(each.name for each in fields(cls))
    return tuple((key, path or key) for key, _, path in (name.partition("=") for name in names))


@_kept_by_class
def _arguments(cls: Any) -> tuple[tuple[str, str | None, bool, Any], ...]:
    """What the constructor of a result takes: (name, its key or None if it is not saved, whether it has a default, type hint)."""
    keys, hints = {path: key for key, path in _entries(cls)}, _hints(cls)
    if issubclass(cls, Bounded):
        names = ["value", *(name for name, hint in hints.items() if get_origin(hint) is not ClassVar)]
        return tuple((name, keys.get(name), False, hints.get(name, float)) for name in names)
    taken = [(f.name, not (f.default is MISSING and f.default_factory is MISSING)) for f in fields(cls) if f.init]
    return tuple((name, keys.get(name), optional, hints[name]) for name, optional in taken)


# -- results ------------------------------------------------------------------------------------------------------------------
class Result(_Saved):
    """Base of the frozen dataclasses that sharpkit returns: ``to_dict`` and ``from_dict``.

    Class keywords:
        kind: names the document; with it, ``kind`` and ``version`` are written first. Without it neither is written.
        version: of the layout, 1 by default; documents of a newer version are refused, fields missing in older ones take their defaults.
        saved: what is written, in order; by default all fields. An entry is a field, a property, a method without arguments, or
            ``"key=path"``, which writes the attribute at a dotted path under another key.
        strict: write NaN as null and infinities as strings at once, not when the document becomes JSON.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Circle(Result, kind="circle", saved=("r=radius", "area")):
        ...     radius: float
        ...     @property
        ...     def area(self) -> float:
        ...         return round(3.14159 * self.radius**2, 2)
        >>> Circle(2.0).to_dict()
        {'kind': 'circle', 'version': 1, 'r': 2.0, 'area': 12.57}
        >>> Circle.from_dict({"kind": "circle", "version": 1, "r": "inf", "area": "inf"})
        Circle(radius=inf)
    """

    if TYPE_CHECKING:
        name: str  # what this result is of, in the user's words

    def __getattr__(self, attribute: str) -> Any:
        """The name of one that has none: no class attribute, which a dataclass would take for the default of a field."""
        if attribute == "name":
            return ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}")

    def named(self, name: str) -> Self:
        """The same result with a name, which pages and :func:`sharpkit.compare` show.

        Example:
            >>> import sharpkit as sk
            >>> sk.Estimate(1.0, 0.1).named("after warm-up").to_dict()["name"]
            'after warm-up'
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be text, got {type(name).__name__}")
        other = copy.copy(self)
        object.__setattr__(other, "name", name)  # results are frozen
        return other

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary; JSON after :func:`json_ready`."""
        layout, hints = self._layout, _hints(type(self))
        document: dict[str, Any] = {"kind": layout.kind, "version": layout.version} if layout.kind else {}
        for key, path in _entries(type(self)):
            value = _attribute(self, path)
            if callable(value):
                value = value()
            document[key] = _plain(value, bounded=_keeps_bounds(hints.get(path), value))
        if layout.kind and self.name:
            document.setdefault("name", self.name)
        return json_ready(document) if layout.strict else document  # type: ignore[no-any-return]

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the section of the page, where this kind has one."""
        if not self._layout.kind:
            return None
        return importlib.import_module("sharpkit.reporting.notebook").fragment(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """The result back from its document, also after JSON.

        Raises:
            DocumentError: another kind, a newer version, or a field that is missing or of the wrong type; the message names it.
        """
        layout, name = cls._layout, cls.__name__
        if not isinstance(document, Mapping):
            raise DocumentError(f"{name} is read from a dictionary, as to_dict() makes one, got {type(document).__name__}")
        if layout.kind:
            if document.get("kind", layout.kind) != layout.kind:
                raise DocumentError(f"{name} reads documents whose field 'kind' is {layout.kind!r}, got {document['kind']!r}")
            came = document.get("version", 1)
            if not isinstance(came, int) or came > layout.version:
                raise DocumentError(f"{name} is read up to version {layout.version}, got {came!r} in field 'version': update sharpkit")
        arguments = {}
        for argument, key, optional, hint in _arguments(cls):
            if key is None:  # a default in place of what was not written would be wrong and look right
                raise DocumentError(f"{name} cannot be read back: field {argument!r} is not saved")
            if key in document:
                arguments[argument] = _read_field(hint, document[key], key, name)
            elif not optional:
                raise DocumentError(f"field {key!r} of {name} is missing from the document, which has {_named(document)}")
        if layout.kind and not arguments and "kind" not in document:
            raise DocumentError(
                f"{name} is read from a document with field 'kind', which is {layout.kind!r}; this one has {_named(document)}"
            )
        try:
            result = cls(**arguments)
            given = document.get("name")
            return result.named(given) if layout.kind and "name" not in arguments and isinstance(given, str) and given else result
        except (TypeError, ValueError, IndexError) as error:  # fields that are each of their type, and do not go together
            raise DocumentError(f"the fields of {name} do not go together: {error}") from error


class Bounded(float, Result, saved=("value", "lower", "upper")):
    """A number (usable as a plain float) with a 95 % interval.

    A subclass declares what else it holds as annotated attributes, which its constructor takes by name, and lists them in ``saved``.

    Attributes:
        lower, upper: the interval.
    """

    lower: float
    upper: float

    def __new__(cls, value: float, lower: float, upper: float) -> Self:
        self = super().__new__(cls, value)
        self.lower, self.upper = lower, upper
        return self

    @property
    def value(self) -> float:
        """The plain number."""
        return float(self)

    def __copy__(self) -> Self:
        other = float.__new__(type(self), float(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return (float, (float(self),))  # a checkpoint that holds it must load anywhere

    def __str__(self) -> str:
        if math.isinf(self):
            return "unbounded"
        return f"{float(self):.3g} ({self.lower:.3g}-{self.upper:.3g})"

    def __repr__(self) -> str:
        return f"Bounded({self})"


def _attribute(owner: Any, path: str) -> Any:
    """An attribute by its dotted path; the owner itself for an empty one."""
    for name in path.split(".") if path else ():
        owner = getattr(owner, name)
    return owner


def _keeps_bounds(hint: Any, value: Any) -> bool:
    """Whether a number with an interval, or those in a container, are written with it: not where the field says float."""
    if isinstance(value, Bounded):
        return float not in (hint, *get_args(hint))
    return any(isinstance(part, type) and issubclass(part, Bounded) for part in get_args(hint))


def _plain(value: Any, *, bounded: bool = False) -> Any:
    """Lists, dictionaries with string keys, numbers and strings; NaN and infinities stay."""
    if value is None or isinstance(value, (str, int)):  # first, since most are
        return value
    if isinstance(value, float) and not (bounded and isinstance(value, Bounded)):
        return float(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v, bounded=bounded) for k, v in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_plain(v, bounded=bounded) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _read_field(hint: Any, value: Any, key: str, owner: str) -> Any:
    try:
        return _read(hint, value)
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise DocumentError(f"field {key!r} of {owner} cannot be read: {error}") from error


def _named(document: Mapping[Any, Any]) -> str:
    return ", ".join(str(key)[:40] for key in list(document)[:20]) or "none"


def _read(hint: Any, value: Any) -> Any:
    """A plain value as what a type hint says; what needs no conversion, or what has no class, comes back as it is."""
    if hint is float:
        return number(value)
    if hint is int:  # 3.0 is a whole number in JSON
        return int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    if hint in (str, bool):
        if not isinstance(value, hint):
            raise TypeError(f"expected {hint.__name__}, got {_short(value)}")
        return value
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        others = [part for part in parts if part is not NoneType]
        return _read(others[0], value) if len(others) == 1 else value
    if kind is Literal and value not in parts:
        raise ValueError(f"expected one of {', '.join(map(repr, parts))}, got {_short(value)}")
    if not isinstance(kind, type):
        return value
    if issubclass(kind, Result):
        return kind.from_dict(value)
    if issubclass(kind, State):
        made = kind.__new__(kind)  # without __init__: its arguments are not saved, what it sets is
        made.load_state_dict(value)
        return made
    if kind.__module__.partition(".")[0] in ("torch", "numpy"):  # by name: a result without arrays is read without loading either
        return _array(kind, value)
    return _container(kind, parts, value)


def _short(value: Any) -> str:
    return shown if len(shown := repr(value)) <= 80 else f"{shown[:80]} ..."


def _container(kind: type, parts: tuple[Any, ...], value: Any) -> Any:
    if issubclass(kind, Mapping):
        # JSON has only strings as keys
        to_key: Any = {int: int, float: float}.get(parts[0], lambda key: key) if parts else lambda key: key
        return {to_key(k): _read(parts[1] if parts else Any, v) for k, v in value.items()}
    if issubclass(kind, (tuple, Sequence, deque)) and (not hasattr(value, "__len__") or isinstance(value, (str, bytes, Mapping))):
        raise TypeError(f"expected a list, got {_short(value)}")
    if issubclass(kind, tuple):
        if hasattr(kind, "_fields"):  # a NamedTuple, written as a list
            return kind(*map(_read, _hints(kind).values(), value))
        each = parts[:1] * len(value) if parts[1:] == (...,) else parts or (Any,) * len(value)
        return tuple(_read(part, v) for part, v in zip(each, value, strict=True))
    if issubclass(kind, (Sequence, deque)):
        items = [_read(parts[0] if parts else Any, v) for v in value]
        return deque(items) if issubclass(kind, deque) else items
    return value


def _array(kind: type, value: Any) -> Any:
    """A float64 (or bool) tensor or array from nested lists; in a state it is one already."""
    if hasattr(value, "shape"):
        return value

    def numbers(item: Any) -> Any:
        return [numbers(each) for each in item] if isinstance(item, list) else item if isinstance(item, bool) else number(item)

    import numpy as np

    array = np.array(numbers(value))  # an empty list is float64 too
    if kind.__module__.startswith("numpy"):
        return array
    import torch

    return torch.from_numpy(array)


# -- states -------------------------------------------------------------------------------------------------------------------
class State(_Saved):
    """Base of the parts of a run that are saved with it: ``state_dict`` and ``load_state_dict``.

    ``saved`` lists attributes as for :class:`Result` (by default the fields of a dataclass), ``"key=_attribute"`` for private ones, and
    parts that are states themselves. Values are read by the class's type hint of the attribute, or as the type of its present value.
    With ``version`` the state of any other version is refused. Tensors are kept as they are; what is derived, or is reset by loading, is
    set in an own ``load_state_dict`` after ``super().load_state_dict(state)``.

    Example:
        >>> class Counter(State, saved=("count=_count", "recent")):
        ...     def __init__(self) -> None:
        ...         self._count, self.recent = 0, deque([0.5], maxlen=2)
        >>> Counter().state_dict()
        {'count': 0, 'recent': [0.5]}
        >>> counter = Counter()
        >>> counter.load_state_dict({"count": 7, "recent": [1.0, 2.0]})
        >>> counter._count, counter.recent
        (7, deque([1.0, 2.0], maxlen=2))
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        if keywords:
            super().__init_subclass__(**keywords)
        else:  # a subclass without any, such as a user's own monitor, saves what its parent saves
            super(_Saved, cls).__init_subclass__()

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on: plain containers and tensors."""
        layout = self._layout
        state: dict[str, Any] = {"version": layout.version} if layout.version else {}
        state |= {key: _kept(_attribute(self, path)) for key, path in _entries(type(self))}
        return json_ready(state) if layout.strict else state  # type: ignore[no-any-return]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            DocumentError: a state of another version, or a field that is missing or of the wrong type; the message names it.
        """
        if not isinstance(state, Mapping):
            raise DocumentError(f"a {type(self).__name__} state is a dictionary, as state_dict() makes one, got {type(state).__name__}")
        name, came, version = type(self).__name__, state.get("version"), self._layout.version
        if version and came != version:
            raise DocumentError(f"a {name} state of version {came!r} cannot be loaded: expected version {version}, got version {came!r}")
        for key, path in _entries(type(self)):
            if key not in state:
                raise DocumentError(f"field {key!r} of {name} is missing from the state, which has {_named(state)}")
            where, _, attribute = path.rpartition(".")
            owner = _attribute(self, where)
            present: Any = getattr(owner, attribute, None)
            # a part that is there reads its own state in place: others may hold a reference to it
            if state[key] is not None and hasattr(present, "load_state_dict"):
                present.load_state_dict(state[key])
                continue
            value = _read_field(_hints(type(owner)).get(attribute, type(present)), state[key], key, name)
            setattr(owner, attribute, deque(value, present.maxlen) if isinstance(present, deque) else value)


class Parts(dict[str, P]):
    """States by name, themselves a state. With ``make`` a part is made when first asked for; without it, unknown saved parts are dropped.

    Args:
        make: the part of a name.
        parts: those there are from the beginning.
    """

    def __init__(self, make: Callable[[str], P] | None = None, parts: Mapping[str, P] | None = None) -> None:
        super().__init__(parts or {})
        self._make = make

    def __missing__(self, name: str) -> P:
        if self._make is None:
            raise KeyError(name)
        self[name] = self._make(name)
        return self[name]

    def state_dict(self) -> dict[str, Any]:
        """Of each part."""
        return {name: part.state_dict() for name, part in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved parts."""
        if self._make is not None:  # parts made after the state was saved are none of the run that goes on
            self.clear()
        for name, saved in state.items():
            if self._make is not None or name in self:
                self[name].load_state_dict(saved)


def _kept(value: Any) -> Any:
    """A copy of the containers; states and results as their dictionaries, everything else as it is."""
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, float):  # a Bounded too: only its number is needed to go on
        return float(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _kept(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_kept, value))
    return [_kept(each) for each in value] if isinstance(value, (list, deque)) else value
