"""Every exception and warning sharpkit raises, as one tree.

    SharpkitError
    ├── ObjectiveError            model, loss or data do not define one fixed function of the parameters
    │   └── NonDeterministicError two passes over the same data disagree
    ├── NonFiniteError            a loss, gradient or product came back NaN or infinite
    ├── NotSymmetricError         an operator that must be symmetric is not
    ├── UnsupportedError          PyTorch cannot compute this here (kernel, wrapper, checkpoint mode)
    ├── OutOfMemoryError          a product does not fit, even one sample at a time
    └── DocumentError             a saved result or state is of another kind or version, or lacks a field

Arguments of the wrong type or value raise ``TypeError`` and ``ValueError`` as usual. Every message says what came, what was
expected and how to mend it.
"""

from __future__ import annotations


class SharpkitError(Exception):
    """Base of every error that sharpkit raises on purpose."""


class ObjectiveError(SharpkitError):
    """Model, loss and data do not define one fixed, differentiable function of the parameters."""


class NonDeterministicError(ObjectiveError):
    """The same data evaluated twice gave two answers, so no Hessian is defined."""


class NonFiniteError(SharpkitError):
    """A loss, a gradient or a product contains NaN or infinity."""


class NotSymmetricError(SharpkitError):
    """An operator that must be symmetric failed the test u.(A v) = v.(A u)."""


class UnsupportedError(SharpkitError):
    """PyTorch cannot differentiate this model twice as it stands; the message says what to change."""


class OutOfMemoryError(SharpkitError):
    """A product does not fit in memory, even split into single samples."""


class DocumentError(SharpkitError, ValueError):
    """A saved result or state cannot be read: it is of another kind or version, or a field is missing or of the wrong type."""


class SharpkitWarning(UserWarning):
    """Base of every warning: the number is usable, with the caveat in the message."""


class ConvergenceWarning(SharpkitWarning):
    """An iterative result stopped before its tolerance; the partial result is flagged."""


class ObjectiveWarning(SharpkitWarning):
    """The objective is defined, but perhaps not the one that was meant."""
