"""AdamW with weight decay by parameter path, and the learning-rate schedules of the reference recipes."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import PurePosixPath as PurePath
from typing import Any

import jax
import jax.numpy as jnp
import optax

from based_jax.config import check_types
from based_jax.errors import UserError, unknown

Schedule = Callable[[Any], jax.Array]
Rate = float | jax.Array

PARAMETER_GROUPS: dict[str, tuple[str, ...]] = {
    "kernel": ("kernel",),
    "short filter": ("conv_kernel",),
    "long filter": ("taps", "pos_emb", "frequency"),
    "embedding": ("embedding",),
    "bias": ("bias", "conv_bias"),
    "norm scale": ("scale",),
    "decay": ("A_log", "dt_bias", "log_dt", "log_a_real", "a_imag", "time_decay"),
    "bonus": ("time_first", "bonus"),
    "skip": ("D",),
    "long skip": ("skip", "shift_skip"),
    "state matrix": ("b", "c", "shift_b", "shift_c"),
    "token shift": ("mix", "shift_mix"),
    "key gain": ("k_k", "k_a", "r_k"),
    "feature map": ("maps",),
}
"""What a parameter is, by the end of its path: each pattern of `PurePath.match` in one group alone.

A scale with a bias beside it is of a LayerNorm or GroupNorm, "centred norm scale"; RMSNorm has none.
"""
CENTRED_NORM_SCALE = "centred norm scale"
NO_DECAY: dict[str, frozenset[str]] = {
    # HazyResearch/based, with Mamba's and the delta rules' `_no_weight_decay`, then what H3 and RWKV exempt
    "reference": frozenset({"embedding", "bias", CENTRED_NORM_SCALE, "decay", "bonus", "skip"}),
    "kernels": frozenset({*PARAMETER_GROUPS, CENTRED_NORM_SCALE} - {"kernel", "short filter"}),
    "all": frozenset(),
}
"""Which groups of parameters do not decay."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are the 10b run of HazyResearch/based.

    Attributes:
      lr: peak learning rate.
      betas: decay of the first and the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay; a step shrinks a decayed parameter by lr * weight_decay of itself.
      decay: which parameters decay: those of "reference", HazyResearch/based, "kernels" alone, or "all".
      clip_norm: global norm that gradients are clipped to; None leaves them as they are.
      schedule: "warmup_cosine", "cosine_per_epoch" or "constant".
      warmup_steps: steps of "warmup_cosine" before the peak.
      warmup_lr: where "warmup_cosine" starts.
      final_lr: where "warmup_cosine" ends.
      t_initial: steps that "warmup_cosine" takes from the peak to the end; None for all steps after the warmup.
      steps_per_epoch: steps for which "cosine_per_epoch" keeps the learning rate; only that schedule needs it.
    """

    lr: float = 8e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: str = "reference"
    clip_norm: float | None = 1.0
    schedule: str = "warmup_cosine"
    warmup_steps: int = 200
    warmup_lr: float = 1e-6
    final_lr: float = 8e-5
    t_initial: int | None = None
    steps_per_epoch: int | None = None

    def __post_init__(self):
        check_types(self)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.decay not in NO_DECAY:
            raise unknown("decay", self.decay, NO_DECAY)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas is {self.betas}; both are at least 0 and below 1.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"clip_norm is {self.clip_norm}; it is above 0, or None for no clipping.")
        for name in ("lr", "eps", "weight_decay", "warmup_lr", "final_lr", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it is at least 0, and finite.")
        for name in ("t_initial", "steps_per_epoch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is at least 1, or None.")


def constant(config: OptimConfig, steps: int, peak: Rate) -> Schedule:
    """Return the peak for every step."""
    return lambda step: jnp.asarray(peak)


def warmup_cosine(config: OptimConfig, steps: int, peak: Rate) -> Schedule:
    """Return a line up to the peak, then half a cosine down to `final_lr`, whose time starts after the warmup.

    Source: timm's CosineLRScheduler with `warmup_prefix`, as HazyResearch/based configures it.
    """
    warmup = config.warmup_steps
    decay_steps = steps - warmup if config.t_initial is None else config.t_initial
    if decay_steps < 1:
        raise UserError(
            f"optim.warmup_steps is {warmup}, but the run has {steps} steps; the warmup is shorter than the run."
        )
    rising = optax.linear_schedule(config.warmup_lr, peak, warmup)
    above_final = optax.cosine_decay_schedule(peak - config.final_lr, decay_steps)  # its alpha would divide by the peak
    return optax.join_schedules([rising, lambda step: config.final_lr + above_final(step)], [warmup])


def cosine_per_epoch(config: OptimConfig, steps: int, peak: Rate) -> Schedule:
    """Return half a cosine from the peak to 0 that moves once per epoch, as zoology trains MQAR; 0 after the run.

    Source: torch's CosineAnnealingLR with eta_min 0, stepped after each epoch (HazyResearch/zoology:zoology/train.py).
    """
    if config.steps_per_epoch is None:
        raise UserError("optim.schedule 'cosine_per_epoch' needs steps_per_epoch, which is None; it is at least 1.")
    per_epoch = config.steps_per_epoch
    by_epoch = optax.cosine_decay_schedule(peak, math.ceil(steps / per_epoch))
    return lambda step: by_epoch(jnp.asarray(step) // per_epoch)


SCHEDULES = {"warmup_cosine": warmup_cosine, "cosine_per_epoch": cosine_per_epoch, "constant": constant}


def schedule(config: OptimConfig, steps: int, peak: Rate | None = None) -> Schedule:
    """Return the learning rate (a scalar, fp32 unless x64 is on) as a function of the step, 0 at the first update.

    Args:
      config: names the schedule and its values.
      steps: updates in the whole run.
      peak: instead of `config.lr`; may be traced.

    Raises:
      UserError: the schedule does not fit into that many steps, or misses a value.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; it is at least 1.")
    return SCHEDULES[config.schedule](config, steps, config.lr if peak is None else peak)


def adamw(
    config: OptimConfig, steps: int, *, lr: Rate | None = None, weight_decay: Rate | None = None
) -> optax.GradientTransformation:
    """Return clipping, Adam, decoupled weight decay by path and the schedule, in this order.

    It acts on an `nnx.State` of parameters or on nested dicts, with stacked layers or without.

    Args:
      config: see `OptimConfig`.
      steps: updates in the whole run.
      lr, weight_decay: instead of the config's; may be traced, as lanes of a sweep are.

    Raises:
      UserError: as `schedule`.
    """
    b1, b2 = config.betas
    decay: Any = config.weight_decay if weight_decay is None else weight_decay
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1, b2, config.eps),
        optax.add_decayed_weights(decay, mask=lambda params: decay_mask(params, config.decay)),
        optax.scale_by_learning_rate(schedule(config, steps, lr)),
    )


def updates_taken(opt_state: Any) -> jax.Array:
    """Return the updates that the state of `adamw` has seen: each of its counts has them."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def decay_mask(params, decay: str):
    """Return a tree like `params` with True where weight decay applies.

    Ranks play no part, since stacking layers changes them. Source: HazyResearch/based:train/optim/param_grouping.py.

    Raises:
      UserError: a parameter is of no group.
    """
    groups = parameter_groups(params)
    return jax.tree_util.tree_map_with_path(lambda keys, _: groups[path_of(keys)] not in NO_DECAY[decay], params)


def decay_groups(params, decay: str) -> tuple[list[str], list[str]]:
    """Return the sorted paths of the parameters that decay, and of those that do not; errors as `decay_mask`."""
    groups = sorted(parameter_groups(params).items())
    exempt = NO_DECAY[decay]
    return [path for path, group in groups if group not in exempt], [p for p, group in groups if group in exempt]


def parameter_groups(params) -> dict[str, str]:
    """Return the group of each parameter by its path: a key of `PARAMETER_GROUPS`, or `CENTRED_NORM_SCALE`.

    Raises:
      UserError: a parameter is of no group.
    """
    paths = {path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)}
    groups = {path: _group(path) for path in paths}
    centred = {
        path for path in paths if groups[path] == "norm scale" and str(PurePath(path).with_name("bias")) in paths
    }
    return groups | dict.fromkeys(centred, CENTRED_NORM_SCALE)


def _group(path: str) -> str:
    for group, patterns in PARAMETER_GROUPS.items():
        if any(PurePath(path).match(pattern) for pattern in patterns):
            return group
    known = ", ".join(pattern for patterns in PARAMETER_GROUPS.values() for pattern in patterns)
    raise UserError(f"Parameter '{path}' is in none of optim.PARAMETER_GROUPS, which ends of paths are in: {known}.")


def path_of(keys: tuple) -> str:
    """Return a key path of `jax.tree_util` as 'stacks/0/norm1/scale': the array inside an nnx variable adds no part."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")
