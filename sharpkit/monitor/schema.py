"""The lines of a monitored run: names of the metrics, and the curvature of a record that is compared with the stability limit.

A run is a header, ``{"kind": "monitor_run", ...}``, and records, ``{"kind": "monitor_record", "step": ..., "values": {...}, ...}``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sharpkit._results import number

Document = Mapping[str, Any]

RUN, RECORD, HISTORY = "monitor_run", "monitor_record", "monitor_history"
VERSION = 1  # of the layout, counted from 1 by convention; files of a newer one are refused by sharpkit.monitor.runs

# The curvature that is held against the limit, the most telling first: steps of a fixed length have theirs in their own norm, for an
# adaptive optimizer the limit is one on D^-1 H, and the batch that a step is made on says more about that step than a fixed probe set.
CURVATURES = ("generalized_sharpness", "preconditioned_lambda_max", "lambda_max", "probe_lambda_max")

WORDS = {
    "generalized_sharpness": "sharpness in the steps' norm",
    "preconditioned_lambda_max": "preconditioned lambda_max",
    "probe_lambda_max": "lambda_max, probe set",
    "batch_sharpness": "batch sharpness",
    "gradient_noise_interaction": "gradient-noise interaction",
    "critical_sharpness": "critical sharpness",
    "directional_sharpness": "directional sharpness",
    "noise_scale": "gradient noise scale",
    "attention_logits": "largest attention logit",
    "output_log_z": "log Z of the output (root mean square)",
}


def in_words(metric: str, header: Document | None = None) -> str:
    """A metric's name as a reader sees it; with the header of its run, the curvature that the limit is about is named by its matrix.

    Example:
        >>> in_words("lambda_max"), in_words("lambda_max/head"), in_words("batch_sharpness")
        ('lambda_max', 'lambda_max of layer head', 'batch sharpness')
        >>> in_words("preconditioned_lambda_max", {"condition": "SGD: lambda_max(R H) <= 2 / lr"})
        'lambda_max of R H'
    """
    name, _, group = metric.partition("/")
    if name == "preconditioned_lambda_max" and (matrix := limit_matrix(header)):
        return f"lambda_max of {matrix}"
    whose = group if group.startswith("group") else f"layer {group}"
    return WORDS.get(name, name) + (f" of {whose}" if group else "")


def limit_matrix(header: Document | None) -> str:
    """Name of the matrix that a run's limit is about, such as D^-1 H; empty where its header does not say."""
    from sharpkit.optimizers import operator_in  # here, since the sinks load without torch

    return operator_in(str((header or {}).get("condition")))


class Reading(NamedTuple):
    """One metric at one step; NaN where the record does not say."""

    step: int  # optimizer steps done
    value: float  # what was measured
    stderr: float  # error of the value; infinite if unknown
    limit: float  # value from which training is unstable; NaN if there is none
    loss: float  # loss at the same step
    lr: float = math.nan  # learning rate that the limit belongs to

    @property
    def ratio(self) -> float:
        """The value over its limit; NaN without a limit."""
        return self.value / self.limit if self.limit > 0 else math.nan

    @property
    def ratio_error(self) -> float:
        """One standard error of the ratio."""
        return self.stderr / self.limit if self.limit > 0 else math.nan

    @property
    def touches(self) -> bool:
        """Whether the value lies within its error of the limit, or above it; an error above a twentieth of the limit counts as that."""
        # bounded, by judgement, as at the edge of stability: an error of half the limit would let a value far below it pass for touching
        return self.value + min(self.stderr, 0.05 * self.limit) >= self.limit > 0

    def is_above(self, factor: float = 1.0, *, num_errors: float = 2.0) -> bool:
        """Whether the value exceeds ``factor`` times its limit by more than ``num_errors`` errors; never without a limit."""
        return self.value - num_errors * self.stderr > factor * self.limit

    def is_below(self, factor: float = 1.0, *, num_errors: float = 2.0) -> bool:
        """Whether the value lies below ``factor`` times its limit by more than ``num_errors`` errors; never without a limit."""
        return self.value + num_errors * self.stderr < factor * self.limit


def reading(record: Document, metric: str) -> Reading | None:
    """One metric of a record; None where the record lacks it or it is not finite.

    Example:
        >>> reading({"step": 3, "values": {"lambda_max": {"value": 19.0, "stderr": 0.1, "limit": 20.0}}}, "lambda_max").ratio
        0.95
    """
    entry = record["values"].get(metric)
    if entry is None:
        return None
    value, error = number(entry["value"]), number(entry.get("stderr"))
    if not math.isfinite(value):
        return None
    error = math.inf if math.isnan(error) else error  # so that no comparison finds it significant
    return Reading(int(record["step"]), value, error, number(entry.get("limit")), number(record.get("loss")), number(record.get("lr")))


def main_curvature(records: Iterable[Document]) -> str:
    """The metric that a run is judged by: the most telling curvature that has a limit in any record, else the most telling there is.

    Returns:
        Its name; empty where no record holds one.

    Example:
        >>> main_curvature([{"values": {"lambda_max": {"limit": None}, "probe_lambda_max": {"limit": 20.0}}}])
        'probe_lambda_max'
    """
    present: set[str] = set()
    limited: set[str] = set()
    for record in records:
        for name in record["values"].keys() & CURVATURES:
            present.add(name)
            if record["values"][name].get("limit") is not None:
                limited.add(name)
    # one without a limit is taken only where no record has one: there is nothing to hold it against
    return next((name for name in CURVATURES if name in (limited or present)), "")
