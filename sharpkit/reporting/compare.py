"""Results of one kind side by side: which of their numbers differ by more than their errors. Works on documents, as the page does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sharpkit._arguments import shown, texts
from sharpkit._errors import DocumentError
from sharpkit._results import Result, format_with_error, number
from sharpkit.monitor.schema import HISTORY, in_words
from sharpkit.reporting.documents import Document, to_document

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ERRORS = 2.0  # standard errors of a difference, by convention
_ROUNDING = 1e-5  # relative, of numbers without an error: by judgement, sums in float32
_MOST_FINDINGS = 6  # by judgement; the table has them all
# fields that say how a number was found, not what was found
_ABOUT = {
    "version",
    "seed",
    "seconds",
    "num_matvecs",
    "tol",
    "overhead",
    "budget",
    "gradients",
    "size",
    "rounding",
    "misfit",
    "pilot_steps",
}
_WORDS = {"stable_lr": "largest stable rate", "lr": "learning rate", "grad_norm": "gradient norm", "frobenius_norm": "Frobenius norm"}


class _Reading(NamedTuple):
    value: float
    error: float  # 0 where none is told
    certain: bool  # a bound: the truth lies no further away


@dataclass(frozen=True)
class Comparison(Result, kind="comparison", saved=("of", "names", "quantities", "values", "errors", "differs", "findings")):
    """Numbers of several results, and which differ from the first one's.

    Attributes:
        of: the kind of the results.
        names: of the results, in order.
        quantities: names of the numbers.
        values: for each quantity, one value for each result; NaN where it has none.
        errors: in the same order; 0 where none is told.
        differs: whether a value differs from the first result's by more than both errors: the bounds' sum, or two standard errors of the
            difference; what has no error, by more than rounding.
    """

    of: str
    names: tuple[str, ...]
    quantities: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float, ...], ...]
    differs: tuple[tuple[bool, ...], ...]

    def findings(self) -> list[str]:
        """The largest differences, and what does not differ, in sentences."""
        first, sentences, alike = self.names[0], list[tuple[float, str]](), []
        for quantity, values, errors, differs in zip(self.quantities, self.values, self.errors, self.differs, strict=True):
            for name, value, error, differ in list(zip(self.names, values, errors, differs, strict=True))[1:]:
                if differ:
                    ours, theirs = _said(value, error), _said(values[0], errors[0])
                    ratio = value / values[0] if values[0] * value > 0 and math.isfinite(value / values[0]) else math.nan
                    how = f"is {ratio:.3g} times that of {first}" if math.isfinite(ratio) else "differs"
                    size = abs(math.log(ratio)) if math.isfinite(ratio) else math.inf
                    sentences.append((size, f"{name}: {quantity} {how} ({ours}, {first} has {theirs})."))
            if not any(differs):
                alike.append(quantity)
        sentences.sort(key=lambda each: -each[0])
        out = [sentence for _, sentence in sentences[:_MOST_FINDINGS]]
        if len(sentences) > _MOST_FINDINGS:
            out.append(f"{len(sentences) - _MOST_FINDINGS} more differences are in the table.")
        if alike:
            others = " and others" if len(alike) > _MOST_FINDINGS else ""
            out.append(f"No difference beyond the errors: {', '.join(alike[:_MOST_FINDINGS])}{others}.")
        return out

    def cells(self) -> list[list[str]]:
        """A row for each quantity, its name first; a star marks what differs from the first result."""
        rows = []
        for quantity, *numbers in zip(self.quantities, self.values, self.errors, self.differs, strict=True):
            rows.append([quantity, *(f"{_said(v, e)}{' *' if d else ''}" for v, e, d in zip(*numbers, strict=True))])
        return rows

    def table(self) -> str:
        """The cells as text, one line for each quantity."""
        cells = [["", *self.names], *self.cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)

    def __str__(self) -> str:
        return "\n".join([self.table(), *self.findings()])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Every quantity over the first result's, with errors."""
        from sharpkit.plots.compare import plot_comparison

        return plot_comparison(self, ax=ax)


def compare(results: Sequence[Any] | Mapping[str, Any], *, names: Sequence[str] | None = None) -> Comparison:
    """Set results of one kind side by side: checkpoints, runs, optimizers or layers.

    Args:
        results: at least two of one kind, their ``to_dict()``, or a mapping from names to them. Of a monitored run the last record counts.
        names: of the results; by default those that they carry (:meth:`named`), else A, B, ...

    Raises:
        TypeError: something that is no result.
        ValueError: fewer than two, of different kinds, without numbers in common, or names that do not tell them apart.

    Example:
        >>> import sharpkit as sk
        >>> print(sk.compare({"before": sk.Estimate(3.0, 0.1), "after": sk.Estimate(4.5, 0.1)}))
               before      after
        value  3 +- 0.1    4.5 +- 0.1 *
        after: value is 1.5 times that of before (4.5 +- 0.1, before has 3 +- 0.1).
    """
    if isinstance(results, Mapping) and "kind" not in results:
        if names is not None:
            raise ValueError("the results are given by name: leave names out")
        names, results = [str(name) for name in results], list(results.values())
    if isinstance(results, (str, bytes, Mapping)) or not isinstance(results, Sequence):
        raise TypeError(f"results must be a list of results, or a dict of them by name, got {shown(results)}")
    documents = [to_document(result) for result in results]
    if len(documents) < 2:
        raise ValueError(f"a comparison needs at least two results, got {len(documents)}")
    kinds = {str(document["kind"]) for document in documents}
    if len(kinds) > 1:
        raise ValueError(f"only results of one kind have the same numbers, got {', '.join(sorted(kinds))}")
    letters = [chr(65 + i % 26) for i in range(len(documents))]
    carried = [str(document.get("name") or letter) for document, letter in zip(documents, letters, strict=True)]
    chosen = texts("names", names) if names is not None else carried if len(set(carried)) == len(carried) else letters
    if len(chosen) != len(documents) or len(set(chosen)) != len(chosen):
        raise ValueError(f"names must be {len(documents)} different ones, one for each result, got {', '.join(chosen)}")
    readings = [dict(_readings(document)) for document in documents]
    quantities = [quantity for quantity in readings[0] if any(quantity in other for other in readings[1:])]
    if not quantities:
        raise ValueError(f"results of kind {kinds.pop()!r} have no numbers in common to compare")
    missing = _Reading(math.nan, 0.0, False)
    rows = [[each.get(quantity, missing) for each in readings] for quantity in quantities]
    return Comparison(
        of=kinds.pop(),
        names=tuple(chosen),
        quantities=tuple(quantities),
        values=tuple(tuple(each.value for each in row) for row in rows),
        errors=tuple(tuple(each.error for each in row) for row in rows),
        differs=tuple(tuple(i > 0 and _differ(row[0], each) for i, each in enumerate(row)) for row in rows),
    )


def _differ(one: _Reading, other: _Reading) -> bool:
    if math.isnan(one.value) or math.isnan(other.value):
        return False
    if not (math.isfinite(one.value) and math.isfinite(other.value)):
        return one.value != other.value
    bounds, variance = sum(r.error for r in (one, other) if r.certain), sum(r.error**2 for r in (one, other) if not r.certain)
    rounding = _ROUNDING * max(abs(one.value), abs(other.value))
    return abs(one.value - other.value) > bounds + _ERRORS * math.sqrt(variance) + rounding


def _said(value: float, error: float) -> str:
    return "-" if math.isnan(value) else format_with_error(value, error) if error else f"{value:.4g}"


# -- the numbers of a document -----------------------------------------------------------------------------------------------------
def _readings(document: Document) -> Iterator[tuple[str, _Reading]]:
    """The numbers of a result that mean the same in another of its kind."""
    kind = document["kind"]
    try:
        if kind == HISTORY:
            yield from _last_record(document)
        elif kind == "eigenpairs":
            for i, (value, residual) in enumerate(zip(document["values"], document["residuals"], strict=True), start=1):
                yield f"eigenvalue {i}", _Reading(number(value), number(residual), True)
        elif kind == "learning_rate_curve":
            for row in document["rows"]:
                half = (number(row["upper"]) - number(row["lower"])) / 4
                yield f"largest rate at batch size {row['batch_size']}", _Reading(number(row["max_lr"]), half, False)
        elif kind == "layer_sharpness":
            for what in ("lambda_max", "trace"):
                for name, item in zip(document["names"], document[what], strict=True):
                    yield f"{what} of {name}", _reading(item)
        elif "value" in document:
            yield "value", _reading(document)
        else:
            yield from _fields(document)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DocumentError(f"the {kind!r} document is not as this version of sharpkit writes it: {error!r}") from error


def _fields(document: Document) -> Iterator[tuple[str, _Reading]]:
    for field, item in document.items():
        if field in _ABOUT or isinstance(item, (bool, int)) or item is None:
            continue
        words = _WORDS.get(field, field.replace("_", " ") if "lambda" not in field else field)
        if isinstance(item, float):
            yield words, _Reading(item, 0.0, False)
        elif isinstance(item, Mapping) and "value" in item:
            yield words, _reading(item)


def _reading(item: Mapping[str, Any]) -> _Reading:
    value = number(item["value"])
    if "stderr" in item:
        return _Reading(value, number(item["stderr"]), item.get("error_kind", "standard error") != "standard error")
    if "lower" in item and "upper" in item:
        half = (number(item["upper"]) - number(item["lower"])) / 4  # 95 % of a normal one
        return _Reading(value, half if math.isfinite(half) else 0.0, False)
    return _Reading(value, 0.0, False)


def _last_record(document: Document) -> Iterator[tuple[str, _Reading]]:
    last = document["records"][-1]
    if last.get("loss") is not None:
        yield "loss", _Reading(number(last["loss"]), 0.0, False)
    for metric, item in last["values"].items():
        yield in_words(metric, document.get("header")), _reading(item)
