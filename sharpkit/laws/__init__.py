"""Learning-rate schedules and laws as their papers have them: to use, to draw, to fit to a run; calculators with their range."""

from __future__ import annotations

from sharpkit.laws.annealing import AnnealingLaw, fit_annealing_law
from sharpkit.laws.calculators import StepLaw, critical_batch_size, step_law
from sharpkit.laws.rewarming import Rewarming, rewarming
from sharpkit.laws.schedules import cosine_power, infinite, plot_schedules, power, rex, scheduler, unified, wsd, wsd_s
from sharpkit.learner.schedules import GradientNorms, cosine, linear

__all__ = [
    "AnnealingLaw",
    "GradientNorms",
    "Rewarming",
    "StepLaw",
    "cosine",
    "cosine_power",
    "critical_batch_size",
    "fit_annealing_law",
    "infinite",
    "linear",
    "plot_schedules",
    "power",
    "rewarming",
    "rex",
    "scheduler",
    "step_law",
    "unified",
    "wsd",
    "wsd_s",
]
