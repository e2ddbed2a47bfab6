"""Laws fitted to others' runs, as calculators that know the range they were fitted on."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from sharpkit._arguments import real
from sharpkit._errors import SharpkitWarning

__all__ = ["StepLaw", "critical_batch_size", "step_law"]


class StepLaw(NamedTuple):
    """Peak rate of AdamW under a cosine or WSD, and batch size in tokens."""

    lr: float
    batch_tokens: float


def step_law(parameters: float, tokens: float) -> StepLaw:
    """Rate and batch size for pre-training a language model: 1.79 N^-0.713 D^0.307 and 0.58 D^0.571 tokens.

    Args:
        parameters: N, without embeddings. Fitted on 60 M to 1 B.
        tokens: D, to train on. Fitted on 2 B to 100 B.

    Warns where it is asked outside of these.

    Example:
        >>> law = step_law(1e9, 1e11)
        >>> round(law.lr, 5), round(law.batch_tokens, -4)
        (0.00163, 1110000.0)

    References:
        Li et al. (2025), arXiv 2503.04715.
    """
    N, D = real("parameters", parameters, above=0), real("tokens", tokens, above=0)
    outside = [f"{name} = {value:.3g}" for name, value, low, high in (("N", N, 6e7, 1e9), ("D", D, 2e9, 1e11)) if not low <= value <= high]
    if outside:
        warnings.warn(f"{' and '.join(outside)} lie outside the runs that Step Law was fitted to", SharpkitWarning, stacklevel=2)
    return StepLaw(1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571)


def critical_batch_size(loss: float) -> float:
    """Tokens in a batch beyond which more parallelism buys little, at a language model's test loss in nats a token: 2e8 L^(-1 / 0.21).

    Fitted on GPTs of 2020 at losses of about 2.4 to 6; the measured one of your own run is :func:`sharpkit.gradient_noise_scale`.

    Example:
        >>> round(critical_batch_size(3.0), -4)
        1070000.0

    References:
        Kaplan et al. (2020), arXiv 2001.08361; McCandlish et al. (2018), arXiv 1812.06162.
    """
    return float(2e8 * real("loss", loss, above=0) ** (-1 / 0.21))
