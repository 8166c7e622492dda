"""What a config says of the optimizer, and the learning-rate schedules of the reference recipes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from based_jax.config import added_later, check_types
from based_jax.errors import UserError, unknown
from based_jax.optim.groups import NO_DECAY

Schedule = Callable[[Any], jax.Array]
Rate = float | jax.Array

NAMES = ("adamw", "muon")
MOMENT_DTYPES = ("float32", "bfloat16")
MAX_MUON_STEPS = 20


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """What Muon has of its own; learning rate, weight decay, clipping and schedule are those of `OptimConfig`.

    Attributes:
      momentum: decay of the sum of gradients, which Nesterov's rule looks ahead from.
      steps: iterations of Newton and Schulz that make it orthogonal.
      update_rms: root mean square of an update before the learning rate: about AdamW's, so that both take the same
        learning rate and weight decay (arXiv 2502.16982, section 2.2).
    """

    momentum: float = 0.95
    steps: int = 5
    update_rms: float = 0.2

    def __post_init__(self):
        check_types(self)
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum is {self.momentum}; it is at least 0 and below 1.")
        if not 1 <= self.steps <= MAX_MUON_STEPS:
            raise UserError(f"steps is {self.steps}; it is between 1 and {MAX_MUON_STEPS}.")
        if not 0 < self.update_rms < math.inf:
            raise UserError(f"update_rms is {self.update_rms}; it is above 0, and finite.")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; the defaults are the 10b run of HazyResearch/based.

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
      name: "adamw", or "muon", which updates the kernels inside the layers; all else is AdamW's (`optim.muon_groups`).
      muon: see its class.
      moment_dtype: what moments are kept in between steps, "float32" or "bfloat16"; they are computed in fp32.
      zero1: whether each device of the mesh axis "data" too keeps and updates only its part of the moments.
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
    name: str = added_later("adamw")
    muon: MuonConfig = added_later(MuonConfig())  # noqa: RUF009
    moment_dtype: str = added_later("float32")
    zero1: bool = added_later(False)

    def __post_init__(self):
        check_types(self)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.decay not in NO_DECAY:
            raise unknown("decay", self.decay, NO_DECAY)
        if self.name not in NAMES:
            raise unknown("name", self.name, NAMES)
        if self.moment_dtype not in MOMENT_DTYPES:
            raise unknown("moment_dtype", self.moment_dtype, MOMENT_DTYPES)
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
