"""The optimizer of a config: clipping, the direction of AdamW or Muon, decay by path, and the schedule."""

from typing import Any

import optax

from based_jax.optim.config import OptimConfig, Rate, schedule
from based_jax.optim.groups import decay_mask, muon_labels
from based_jax.optim.moments import kept_in
from based_jax.optim.muon import scale_by_muon


def optimizer(
    config: OptimConfig, steps: int, *, lr: Rate | None = None, weight_decay: Rate | None = None
) -> optax.GradientTransformation:
    """Return clipping, the direction of `config.name`, decoupled weight decay by path and the schedule, in this order.

    It acts on an `nnx.State` of parameters, with stacked layers or without; AdamW on nested dicts too.

    Args:
      config: see `OptimConfig`.
      steps: updates in the whole run.
      lr, weight_decay: instead of the config's; may be traced, as lanes of a sweep are.

    Raises:
      UserError: as `schedule`.
    """
    decay: Any = config.weight_decay if weight_decay is None else weight_decay
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        kept_in(config.moment_dtype, DIRECTIONS[config.name](config)),
        optax.add_decayed_weights(decay, mask=lambda params: decay_mask(params, config.decay)),
        optax.scale_by_learning_rate(schedule(config, steps, lr)),
    )


def _adamw(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(*config.betas, config.eps)


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Return Muon for the kernels of layers, and Adam for all other parameters."""
    return optax.partition({"muon": scale_by_muon(config.muon), "adamw": _adamw(config)}, muon_labels)


DIRECTIONS = {"adamw": _adamw, "muon": _muon}
