"""Can this objective's curvature be trusted? Examines the user's own model, loss and data, and says what to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sharpkit.analysis._checks import ALL
from sharpkit.linalg.results import SCHEMA_VERSION
from sharpkit.objective import Objective
from sharpkit.operators.hessian import HessianOperator

_MARKS = {"ok": "ok      ", "note": "note    ", "warning": "WARNING ", "failed": "FAILED  "}


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: what.
        status: ``"ok"``, ``"note"`` (worth knowing), ``"warning"`` (numbers need care) or ``"failed"`` (numbers cannot be trusted).
        message: what was found, with numbers.
        remedy: what to change; empty where nothing need be.
    """

    name: str
    status: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{_MARKS[self.status]} {self.name}: {self.message}" + (f"\n          -> {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Diagnosis:
    """Everything :func:`examine` looked at.

    Attributes:
        objective: in words.
        checks: in the order they were made.
    """

    objective: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether measurements can be trusted: no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def findings(self) -> list[str]:
        """The verdict and everything that asks for care, in sentences."""
        verdict = (
            "Curvature of this objective can be trusted." if self.passed else "Curvature of this objective can NOT be trusted as it stands."
        )
        return [verdict, *(f"{c.name}: {c.message} {c.remedy}".strip() for c in self.checks if c.status in ("warning", "failed"))]

    def __str__(self) -> str:
        return "\n".join([self.objective, *(str(check) for check in self.checks), self.findings()[0]])

    def __repr__(self) -> str:
        counts = ", ".join(f"{sum(c.status == s for c in self.checks)} {s}" for s in _MARKS)
        return f"Diagnosis({'passed' if self.passed else 'FAILED'}: {counts})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kind": "diagnosis",
            "version": SCHEMA_VERSION,
            "passed": self.passed,
            "objective": self.objective,
            "checks": [{"name": c.name, "status": c.status, "message": c.message, "remedy": c.remedy} for c in self.checks],
        }


def examine(objective: Objective, *, seed: int = 0, callback: Callable[[str], None] | None = None) -> Diagnosis:
    """Examine an objective before trusting its curvature: about ten Hessian products and a few gradients.

    Looks at: whether two passes agree, products are symmetric, linear and equal to finite differences of gradients (in float64, on a copy,
    where the model allows it), how far float32 rounding goes, attention kernels, dropout and batch statistics, unused, frozen and tied
    parameters, integer buffers, kinked activations, how batches are weighed, memory and time.

    Args:
        objective: as made for measuring.
        seed: of the test vectors.
        callback: told the name of each check before it is made.

    Returns:
        the diagnosis; a check that raises counts as failed, with the error as its message.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(3, 2)
        >>> data = (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> sk.examine(sk.Objective(model, data, loss=torch.nn.functional.cross_entropy)).passed
        True
    """
    hessian = HessianOperator(objective)
    checks = []
    for name, function in ALL:
        if callback is not None:
            callback(name)
        try:
            checks.append(Check(name, *function(hessian, seed)))
        except Exception as error:
            checks.append(Check(name, "failed", f"{type(error).__name__}: {error}"))
    return Diagnosis(repr(objective), tuple(checks))
