"""Results as plain dictionaries: all that pages and comparisons know of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Document = dict[str, Any]


def to_document(result: Any) -> Document:
    """A result as a plain dictionary with its kind and findings: ``to_dict()`` of what has one, or a copy of such a dictionary.

    Raises:
        TypeError: neither.

    Example:
        >>> import sharpkit as sk
        >>> to_document(sk.Estimate(1.0, 0.1))["kind"]
        'estimate'
    """
    if isinstance(result, Mapping) and "kind" in result:
        return dict(result)
    if not hasattr(result, "to_dict"):
        raise TypeError(
            f"a report is made of sharpkit results (or of their to_dict()), got {type(result).__name__}; wrap a bare number as sk.Estimate"
        )
    document = dict(result.to_dict())
    document.setdefault("kind", type(result).__name__.lower())
    if "findings" not in document and callable(getattr(result, "findings", None)):
        document["findings"] = list(result.findings())
    return document
