"""What a monitored run showed, in plain sentences, from its header and records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from sharpkit._results import decimals, format_with_error, number, percent
from sharpkit.monitor.events import NOT_FINITE, spread_of_differences
from sharpkit.monitor.schema import Reading, in_words, main_curvature, reading

Document = Mapping[str, Any]
_GIVEN_BACK = 0.5  # of the improvement, and of the level: a run that ends so far above its lowest loss was lost; by judgement
# A logit, or log Z in nats, below which growth means nothing, by judgement: at 50 a softmax has become a choice; log Z begins at the
# logarithm of the number of classes, at most about 12.
_GROWTHS = (
    ("attention_logits", 50.0, "a layer norm on queries and keys (QK norm, arXiv 2302.05442) holds it down"),
    ("output_log_z", 25.0, "a z-loss, 1e-4 (log Z)^2 added to the loss (arXiv 2204.02311), holds it near 0"),
)
_NUM_SPREADS = 8.0  # of the losses' scatter, by judgement, as for a spike


def run_findings(header: Document, records: Sequence[Document]) -> list[str]:
    """What the run showed, in sentences: the course of the curvature against its limit, failures, cost; steps increasing.

    Example:
        >>> def record(step, value):
        ...     return {"step": step, "overhead": 0.03, "values": {"lambda_max": {"value": value, "stderr": 0.1, "limit": 20.0}}}
        >>> print(run_findings({"budget": 0.05}, [record(0, 5.0), record(100, 15.0)])[0])
        lambda_max went from 5 +- 0.1 (step 0) to 15 +- 0.1 (step 100), 0.75 times the limit 20; no measurement reached the limit.
    """
    if not records:
        return ["Nothing was measured yet."]
    main = main_curvature(records)
    readings = [r for r in (reading(record, main) for record in records) if r is not None] if main else []
    name, nothing = in_words(main, header), "No curvature was measured, so nothing can be compared with the stability limit."
    said = _course(name, readings) if readings else [nothing]
    # batch sharpness has a limit of its own, at which SGD settles while lambda_max stays below its limit
    # means that did not converge have no typical value
    along = [record for record in records if record["values"].get("batch_sharpness", {}).get("converged", True)]
    said += _settled(name, readings)
    said += _settled(in_words("batch_sharpness"), [r for r in (reading(record, "batch_sharpness") for record in along) if r is not None])
    said += _logits(records)
    return [*said, *_loss(records), *_failures(header, records), *_unconverged(header, main, records), *_cost(header, records)]


def _course(name: str, readings: list[Reading]) -> list[str]:
    first, last, peak = readings[0], readings[-1], max(readings, key=lambda r: r.value)
    shown = format_with_error(last.value, last.stderr)
    if len(readings) == 1:
        sentence = f"{name} was {shown} at step {last.step}"
    else:
        start = format_with_error(first.value, first.stderr)
        sentence = f"{name} went from {start} (step {first.step}) to {shown} (step {last.step})"
    # a value within one error of the limit counts as having reached it, as for the event of that name
    reached = next((r for r in readings if r.touches), None)
    if last.limit > 0:
        sentence += f", {decimals(last.ratio)} times the limit {last.limit:.4g}"
        sentence += f"; {name} first reached the limit at step {reached.step}" if reached else "; no measurement reached the limit"
    elif not any(r.limit > 0 for r in readings):
        sentence += "; no stability limit is known for this optimizer"
    sentences = [sentence + "."]
    if len(readings) > 2 and peak.value > 1.2 * max(first.value, last.value):  # by judgement: a peak that the two ends do not tell of
        sentences.append(f"Its highest value was {format_with_error(peak.value, peak.stderr)} at step {peak.step}.")
    return sentences


def _settled(name: str, readings: list[Reading]) -> list[str]:
    """Mean ratio to the limit over the last third of the readings."""
    # nine readings at least, so that a third of them has a standard deviation
    tail = [r for r in readings[-(len(readings) // 3) :] if math.isfinite(r.ratio)] if len(readings) >= 9 else []
    if len(tail) < 3:
        return []
    ratios = [r.ratio for r in tail]
    return [
        f"Over the last third of the run, steps {tail[0].step} to {tail[-1].step}, {name} lay at {decimals(fmean(ratios))} +- "
        f"{stdev(ratios):.2g} of its limit (mean and standard deviation)."
    ]


def _loss(records: Sequence[Document]) -> list[str]:
    """Where it was lost: a value that is not finite, or an end far above the lowest level."""
    lost = [e["text"] for record in records for e in record.get("events", ()) if e["text"].startswith(NOT_FINITE)]
    said = [lost[0].partition(". ")[0] + "."] if lost else []
    losses = [(record["step"], loss) for record in records if math.isfinite(loss := number(record.get("loss")))]
    if len(losses) < 3:
        return said
    values = [loss for _, loss in losses]
    # levels are medians of three, so that one easy batch is not the lowest; the end is what it is
    levels = [(median(values[i - 1 : i + 2]), losses[i][0]) for i in range(1, len(losses) - 1)]
    (low, at), (step, last) = min(levels), losses[-1]
    if last - low > max(_GIVEN_BACK * abs(values[0] - low), _GIVEN_BACK * abs(low), _NUM_SPREADS * spread_of_differences(values)):
        said.append(
            f"The loss rose from {low:.3g} (step {at}) to {last:.3g} (step {step}), the last one known; it began at {values[0]:.3g}."
        )
    return said


def _logits(records: Sequence[Document]) -> list[str]:
    """Logits of a transformer that grew, each with what is known to hold them down."""
    said = []
    for name, level, remedy in _GROWTHS:
        values = [(record["step"], number(record["values"][name]["value"])) for record in records if name in record["values"]]
        if len(values) < 2:
            continue
        (first, before), (last, after) = values[0], values[-1]
        sentence = f"The {in_words(name)} went from {before:.3g} (step {first}) to {after:.3g} (step {last})"
        grown = after > level and after > 2 * before  # twice, by judgement
        said.append(f"{sentence}: it grows, as it does before training breaks; {remedy}." if grown else f"{sentence}.")
    return said


def _failures(header: Document, records: Sequence[Document]) -> list[str]:
    counts: dict[str, int] = {}
    last: dict[str, tuple[int, str]] = {}
    for record in records:
        for name, reason in record.get("failed", {}).items():
            counts[name] = counts.get(name, 0) + 1
            last[name] = (record["step"], reason)
    times = {1: "once", 2: "twice"}
    return [
        f"{in_words(name, header)} could not be measured {times.get(count, f'{count} times')}, "
        f"last at step {last[name][0]}: {last[name][1]}"
        for name, count in counts.items()
    ]


def _unconverged(header: Document, main: str, records: Sequence[Document]) -> list[str]:
    entries = [record["values"][main] for record in records if main in record["values"]]
    loose = sum(not entry.get("converged", True) for entry in entries)
    if not loose:
        return []
    return [f"{loose} of {len(entries)} values of {in_words(main, header)} were not computed to the tolerance; their error bars are wider."]


def _cost(header: Document, records: Sequence[Document]) -> list[str]:
    overhead, budget = number(records[-1].get("overhead")), header.get("budget")
    if not math.isfinite(overhead):
        return []
    sentence = f"Measuring took {percent(overhead)} of the training time"
    if budget is None:
        return [sentence + "."]
    # a tenth of tolerance, by judgement: the last measurement is paid for by the steps that follow it
    verdict = "within" if overhead <= 1.1 * float(budget) else "ABOVE"
    return [f"{sentence}, {verdict} the budget of {percent(float(budget))}."]
