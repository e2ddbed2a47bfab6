"""Every result and state is written and read by one base: exact there and back, and clear errors for what cannot be read."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch

from sharpkit._errors import DocumentError, SharpkitError
from sharpkit._results import Bounded, ErrorKind, Parts, Result, State, format_with_error, json_ready, number, standard_error, to_json


@dataclass(frozen=True)
class Mark(Result):
    """Has a field of its own called kind, and no kind as a document."""

    kind: str
    step: int


class Rate(Bounded, kind="rate", saved=("value", "lower", "upper", "rule")):
    rule: str

    def __new__(cls, value: float, *, lower: float, upper: float, rule: str) -> Rate:
        self = super().__new__(cls, value, lower, upper)
        self.rule = rule
        return self


class Inner(NamedTuple):
    step: int
    value: float


NAMES = ("marks", "size", "double", "spectrum", "by_size", "limit", "rate", "error_kind", "said")


@dataclass(frozen=True)
class Sample(
    Result, kind="sample", version=2, saved=("marks", "size", "double", "spectrum", "by_size", "limit", "rate", "error_kind", "said")
):
    vector: ClassVar[int] = 0
    size: int
    marks: tuple[Mark, ...]
    spectrum: torch.Tensor
    by_size: Mapping[int, np.ndarray[Any, Any]]
    limit: float | None = None
    rate: Rate | None = None
    error_kind: ErrorKind = field(default="standard error", kw_only=True)

    @property
    def double(self) -> int:
        return 2 * self.size

    def said(self) -> list[str]:
        return ["one"]


def a_sample(**changes: Any) -> Sample:
    settings: dict[str, Any] = {
        "size": 3,
        "marks": (Mark("spike", 1), Mark("edge", 2)),
        "spectrum": torch.tensor([[1.0, math.inf], [math.nan, 0.1]], dtype=torch.float64),
        "by_size": {8: np.array([1.0, math.nan]), 16: np.array([])},
        "rate": Rate(0.1, lower=0.05, upper=math.inf, rule="2 / lambda"),
    }
    return Sample(**settings | changes)


def test_a_document_has_its_kind_first_and_then_what_is_saved_in_that_order() -> None:
    document = a_sample().to_dict()
    assert tuple(document) == ("kind", "version", *NAMES)
    assert document["kind"] == "sample" and document["version"] == 2
    assert document["marks"] == [{"kind": "spike", "step": 1}, {"kind": "edge", "step": 2}]
    assert document["double"] == 6 and document["said"] == ["one"]
    assert document["by_size"].keys() == {"8", "16"}
    assert document["rate"] == {"kind": "rate", "version": 1, "value": 0.1, "lower": 0.05, "upper": math.inf, "rule": "2 / lambda"}


def test_a_result_comes_back_from_json_with_types_nan_and_infinities() -> None:
    first = a_sample()
    again = Sample.from_dict(json.loads(to_json(first.to_dict())))
    assert again.marks == first.marks and again.size == 3 and again.limit is None
    assert again.spectrum.dtype == torch.float64 and torch.equal(again.spectrum.nan_to_num(7.0), first.spectrum.nan_to_num(7.0))
    assert list(again.by_size) == [8, 16] and again.by_size[16].dtype == np.float64
    np.testing.assert_array_equal(again.by_size[8], first.by_size[8])
    assert isinstance(again.rate, Rate) and again.rate == 0.1 and again.rate.upper == math.inf and again.rate.rule == "2 / lambda"
    assert json_ready(again.to_dict()) == json_ready(first.to_dict())


def test_fields_that_an_older_document_lacks_take_their_defaults() -> None:
    document = a_sample().to_dict()
    del document["error_kind"], document["limit"], document["rate"]
    document["version"] = 1
    assert Sample.from_dict(document).error_kind == "standard error"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "estimate"}, "field 'kind' is 'sample', got 'estimate'"),
        ({"version": 3}, "read up to version 2, got 3 in field 'version'"),
        ({"version": "x"}, "got 'x' in field 'version'"),
        ({"size": 2.5}, "field 'size' of Sample cannot be read"),
        ({"size": None}, "field 'size' of Sample cannot be read"),
        ({"limit": "wide"}, "field 'limit' of Sample cannot be read.*'wide'"),
        ({"error_kind": "guess"}, "field 'error_kind' of Sample.*'residual bound'.*got 'guess'"),
        ({"marks": [{"kind": 3, "step": 1}]}, "field 'marks' of Sample cannot be read: field 'kind' of Mark.* expected str, got 3"),
        ({"marks": [{"kind": "spike"}]}, "field 'step' of Mark is missing from the document, which has kind"),
        ({"marks": 3}, "field 'marks'"),
        ({"by_size": [1]}, "field 'by_size'"),
        ({"spectrum": [[1.0], [1.0, 2.0]]}, "field 'spectrum'"),
        ({"rate": {"value": 1.0, "lower": 0.0, "upper": 2.0}}, "field 'rule' of Rate is missing"),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_name_of_the_field(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DocumentError, match=words) as caught:
        Sample.from_dict(a_sample().to_dict() | change)
    assert isinstance(caught.value, SharpkitError) and isinstance(caught.value, ValueError)


def test_a_class_that_leaves_a_field_out_is_written_but_not_read() -> None:
    @dataclass(frozen=True)
    class Pair(Result, kind="pair", saved=("value",)):
        value: float
        vectors: tuple[float, ...] = ()

    assert Pair(1.0, (2.0,)).to_dict() == {"kind": "pair", "version": 1, "value": 1.0}
    with pytest.raises(DocumentError, match="field 'vectors' is not saved"):
        Pair.from_dict({"kind": "pair", "version": 1, "value": 1.0})


def test_class_keywords_are_not_inherited_and_survive_slots() -> None:
    @dataclass(frozen=True, slots=True)
    class Point(Result, kind="point"):
        x: float

    @dataclass(frozen=True)
    class Labelled(Point):
        label: str = "a"

    assert Point(1.0).to_dict() == {"kind": "point", "version": 1, "x": 1.0}
    assert Labelled(1.0).to_dict() == {"x": 1.0, "label": "a"}


def test_strict_documents_hold_no_nan() -> None:
    @dataclass(frozen=True)
    class Strict(Result, strict=True):
        values: tuple[float, ...]

    assert Strict((math.nan, -math.inf, 1.0)).to_dict() == {"values": [None, "-inf", 1.0]}
    again = Strict.from_dict({"values": [None, "-inf", 1.0]})
    assert math.isnan(again.values[0]) and again.values[1:] == (-math.inf, 1.0)


def test_numpy_numbers_are_written_as_plain_ones() -> None:
    written = Mark("a", np.int64(3)).to_dict() | a_sample(limit=np.float64(2.0)).to_dict()  # type: ignore[arg-type]
    assert type(written["step"]) is int and type(written["limit"]) is float


def test_a_number_with_an_interval_is_plain_where_a_field_says_float() -> None:
    rate = Rate(0.5, lower=0.4, upper=0.6, rule="r")
    assert a_sample(limit=rate).to_dict()["limit"] == 0.5
    assert type(a_sample(limit=rate).to_dict()["limit"]) is float
    assert type(pickle.loads(pickle.dumps(rate))) is float
    assert Bounded.from_dict(Bounded(1.0, 0.5, 2.0).to_dict()).upper == 2.0
    assert str(Bounded(math.inf, 1.0, math.inf)) == "unbounded" and repr(Bounded(1.0, 0.5, 2.0)) == "Bounded(1 (0.5-2))"


def test_infinite_intervals_are_json_that_can_be_read_back() -> None:
    assert number(json_ready(Bounded(math.inf, 1.0, math.inf))) == math.inf


# -- states ---------------------------------------------------------------------------------------------------------------
@dataclass
class Tracker(State, saved=("vector", "points", "last=_last")):
    tol: float
    vector: torch.Tensor | None = None
    points: list[tuple[int, float]] = field(default_factory=list)
    _last: float = math.nan


class Run(State, version=3, saved=("step=_step", "window=_window", "inner=_shelf.inner", "trackers", "fixed", "mark", "spare", "free")):
    mark: Mark | None
    spare: Tracker | None

    def __init__(self) -> None:
        self._step, self._window = 0, deque([0.5], maxlen=2)
        self._shelf = Shelf()
        self.trackers = Parts(lambda name: Tracker(tol=float(len(name))))
        self.fixed = Parts(parts={"a": Tracker(1.0)})
        self.mark = self.spare = None
        self.free: dict[Any, Any] = {}


class Shelf:
    inner: deque[Inner]

    def __init__(self) -> None:
        self.inner = deque(maxlen=3)


def a_run() -> Run:
    run = Run()
    run._step, run.mark, run.spare = 4, Mark("spike", 2), Tracker(9.0, points=[(1, 0.5)])
    run._window.extend([1.0, 2.0])
    run._shelf.inner.append(Inner(1, math.nan))
    run.trackers["top"].vector = torch.tensor([1.0, 2.0], dtype=torch.float16)
    run.trackers["top"].points = [(1, 0.1 + 0.2)]
    run.fixed["a"]._last = math.inf
    run.free = {0: {"moment": torch.ones(2)}}
    return run


def test_a_state_goes_on_bit_for_bit(tmp_path: Any) -> None:
    run, again = a_run(), Run()
    again.trackers["unsaved"].points = [(1, 1.0)]
    torch.save(run.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))  # plain containers and tensors only
    assert again._step == 4 and again.mark == Mark("spike", 2)
    assert again._window == deque([1.0, 2.0]) and again._window.maxlen == 2
    assert again._shelf.inner.maxlen == 3 and isinstance(again._shelf.inner[0], Inner) and math.isnan(again._shelf.inner[0].value)
    assert list(again.trackers) == ["top"] and again.trackers["top"].tol == 3.0
    vector = again.trackers["top"].vector
    assert vector is not None and vector.dtype == torch.float16 and vector.tolist() == [1.0, 2.0]
    assert again.trackers["top"].points == [(1, 0.1 + 0.2)]
    assert again.fixed["a"]._last == math.inf
    assert again.spare is not None and again.spare.points == [(1, 0.5)]
    assert list(again.free) == [0] and torch.equal(again.free[0]["moment"], torch.ones(2))
    assert str(again.state_dict()) == str(run.state_dict())


def test_a_state_is_a_copy_of_the_containers() -> None:
    run = a_run()
    state = run.state_dict()
    again = Run()
    again.load_state_dict(state)
    again.trackers["top"].points.append((2, 2.0))
    run._window.append(9.0)
    assert state["trackers"]["top"]["points"] == [(1, 0.1 + 0.2)] and state["window"] == [1.0, 2.0]


def test_parts_that_cannot_be_made_are_dropped_and_the_others_stay() -> None:
    state = a_run().state_dict()
    state["fixed"]["gone"] = state["fixed"].pop("a")
    run = Run()
    run.load_state_dict(state)
    assert list(run.fixed) == ["a"] and math.isnan(run.fixed["a"]._last)
    with pytest.raises(KeyError, match="gone"):
        run.fixed["gone"]


@pytest.mark.parametrize("version", [2, 4, None])
def test_a_state_of_another_version_is_refused(version: int | None) -> None:
    with pytest.raises(DocumentError, match=f"version {version} cannot be loaded: expected version 3, got version {version}"):
        Run().load_state_dict(a_run().state_dict() | {"version": version})


def test_a_field_that_is_missing_or_of_the_wrong_type_is_named() -> None:
    state = a_run().state_dict()
    with pytest.raises(DocumentError, match="field 'step' of Run cannot be read"):
        Run().load_state_dict(state | {"step": "soon"})
    del state["window"]
    with pytest.raises(DocumentError, match="field 'window' of Run is missing from the state, which has version, step"):
        Run().load_state_dict(state)


def test_a_number_with_an_interval_is_saved_as_its_number() -> None:
    run = a_run()
    run._window.append(Rate(0.5, lower=0.4, upper=0.6, rule="r"))
    assert type(run.state_dict()["window"][-1]) is float


# -- numbers --------------------------------------------------------------------------------------------------------------
def test_an_error_is_shown_with_its_kind_where_it_is_given() -> None:
    assert format_with_error(2.0, 0.1) == "2 +- 0.1"
    assert format_with_error(2.0, 0.1, "standard error") == "2 +- 0.1 (standard error)"
    assert format_with_error(2.0, 0.0, "residual bound") == "2"
    assert format_with_error(2.0, math.inf, "residual bound") == "2 (error unknown)"


def test_two_widened_standard_errors_cover_as_student_says() -> None:
    from scipy.stats import t

    samples = np.array([1.0, 2.0, 4.0])
    exact = samples.std(ddof=1) / math.sqrt(3) * t.ppf(0.975, 2)
    assert standard_error(samples) * 1.959964 == pytest.approx(exact, rel=1e-6)
    assert standard_error(samples[:1]) == math.inf


def test_the_module_needs_neither_torch_nor_numpy() -> None:
    code = "import sys; import sharpkit._results; print([m for m in ('torch', 'numpy', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
