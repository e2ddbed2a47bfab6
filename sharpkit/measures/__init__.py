"""Sharpness as the literature has it: near the weights, after one step, in the logits, layer by layer, in norms of the weights.

``sk.measures.m_sharpness(objective)`` and the others take an objective and return a number with its error and cost. Each says
which reparametrisations leave it alone; tests hold it to that.
"""

from __future__ import annotations

from sharpkit.measures.dimension import effective_dimension
from sharpkit.measures.fisher_rao import FisherRaoNorm, fisher_rao_norm
from sharpkit.measures.flatness import relative_flatness
from sharpkit.measures.logits import LogitSharpness, logit_sharpness
from sharpkit.measures.nearby import MSharpness, m_sharpness
from sharpkit.measures.one_step import OneStepSharpness, sam_sharpness
from sharpkit.measures.rounding import LayerSensitivity, layer_sensitivity, round_weights
from sharpkit.measuring.logit_growth import LogitGrowth, logit_growth

__all__ = [
    "FisherRaoNorm",
    "LayerSensitivity",
    "LogitGrowth",
    "LogitSharpness",
    "MSharpness",
    "OneStepSharpness",
    "effective_dimension",
    "fisher_rao_norm",
    "layer_sensitivity",
    "logit_growth",
    "logit_sharpness",
    "m_sharpness",
    "relative_flatness",
    "round_weights",
    "sam_sharpness",
]
