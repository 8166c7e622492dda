"""Optimizers by parameter path: AdamW as the reference recipes have it, and Muon; their moments and schedules."""

from based_jax.optim.chain import optimizer
from based_jax.optim.config import MuonConfig, OptimConfig, schedule
from based_jax.optim.groups import (
    PARAMETER_GROUPS,
    axes_of,
    decay_groups,
    is_variable,
    muon_groups,
    parameter_groups,
    path_of,
    updates_taken,
)

__all__ = [
    "PARAMETER_GROUPS",
    "MuonConfig",
    "OptimConfig",
    "axes_of",
    "decay_groups",
    "is_variable",
    "muon_groups",
    "optimizer",
    "parameter_groups",
    "path_of",
    "schedule",
    "updates_taken",
]
