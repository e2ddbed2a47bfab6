"""Everything that sharpkit knows about optimizers; all other modules ask here.

Which linear rule a parameter group follows, what an adaptive optimizer divides its gradients by, at which rates the groups train, which
parameters they hold, and what the next step would be.
"""

from __future__ import annotations

from sharpkit.optimizers.fixed_steps import Norm
from sharpkit.optimizers.geometry import has_geometry, step_geometry
from sharpkit.optimizers.groups import (
    averaging,
    begin_rates,
    check_one_way,
    check_trains,
    current_momentum,
    held_parameters,
    is_maximizing,
    learning_rate,
    learning_rates,
    plain_settings,
    rates_at_hand,
    regrouped,
    relative_rates,
    restore_initial_rates,
    set_learning_rates,
    set_momentum,
    weight_decay,
)
from sharpkit.optimizers.kinds import OptimizerKind, kind_of, refuse_unknown, register_optimizer
from sharpkit.optimizers.limits import (
    StepMatrix,
    check_settles,
    decoupled_decays,
    gradient_decays,
    groups_agree,
    has_heavy_ball,
    has_stepped,
    is_adaptive,
    known_rule,
    limit_rule,
    preconditioner_scale,
    settled_preconditioner,
    step_matrix,
    update_rule,
    update_rules,
)
from sharpkit.optimizers.rules import UpdateRule, operator_in
from sharpkit.optimizers.steps import (
    check_takes_rate,
    copy_optimizer,
    gradient_descent,
    has_linear_step,
    line_search_minimizer,
    linear_step,
    next_update,
)
from sharpkit.optimizers.width import GroupFactors, StepKind, check_fresh, eps_beside_gradients, split_groups, step_kind, subtracted_decays
from sharpkit.optimizers.wrappers import unwrap_optimizer

__all__ = [
    "GroupFactors",
    "Norm",
    "OptimizerKind",
    "StepKind",
    "StepMatrix",
    "UpdateRule",
    "averaging",
    "begin_rates",
    "check_fresh",
    "check_one_way",
    "check_settles",
    "check_takes_rate",
    "check_trains",
    "copy_optimizer",
    "current_momentum",
    "decoupled_decays",
    "eps_beside_gradients",
    "gradient_decays",
    "gradient_descent",
    "groups_agree",
    "has_geometry",
    "has_heavy_ball",
    "has_linear_step",
    "has_stepped",
    "held_parameters",
    "is_adaptive",
    "is_maximizing",
    "kind_of",
    "known_rule",
    "learning_rate",
    "learning_rates",
    "limit_rule",
    "line_search_minimizer",
    "linear_step",
    "next_update",
    "operator_in",
    "plain_settings",
    "preconditioner_scale",
    "rates_at_hand",
    "refuse_unknown",
    "register_optimizer",
    "regrouped",
    "relative_rates",
    "restore_initial_rates",
    "set_learning_rates",
    "set_momentum",
    "settled_preconditioner",
    "split_groups",
    "step_geometry",
    "step_kind",
    "step_matrix",
    "subtracted_decays",
    "unwrap_optimizer",
    "update_rule",
    "update_rules",
    "weight_decay",
]
