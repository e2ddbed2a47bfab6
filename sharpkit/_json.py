"""Strict JSON: what is written and how it is read back. NaN becomes null, infinities the strings "inf" and "-inf"."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_ready(value: Any) -> Any:
    """Strict JSON: NaN becomes null, infinities the strings "inf" and "-inf", tuples lists.

    Example:
        >>> json_ready({"a": (1.0, float("nan"), float("-inf"))})
        {'a': [1.0, None, '-inf']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
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
    return json.dumps(json_ready(document), allow_nan=False)


def number(value: Any) -> float:
    """A float from a JSON value: null is NaN, and infinities are strings.

    Example:
        >>> number(None), number("-inf"), number(2)
        (nan, -inf, 2.0)
    """
    return math.nan if value is None else float(value)
