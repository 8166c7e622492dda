"""Mixers from outside the package, one of which keeps all contracts."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.nn.mixer import Mixer
from based_jax.ops import scan


@dataclasses.dataclass(frozen=True)
class SumConfig:
    decay: float = 0.9

    def __post_init__(self):
        if not 0 <= self.decay <= 1:
            raise UserError(f"decay is {self.decay}; it is between 0 and 1.")


class Sum(Mixer):
    """A decaying sum of what stood before: it keeps all contracts."""

    Config: ClassVar = SumConfig

    def __init__(self, d_model, config, init):
        self.config, self.d_model = config, d_model
        self.out_proj = layers.linear(d_model, d_model, ("heads", "embed"), init.out)

    def __call__(self, x, segment_ids=None, positions=None):
        h, _ = self._mix(x, None, segment_ids)
        return self.out_proj(*layers.at(positions, h))

    def _initial_state(self, batch, max_len):
        return jnp.zeros((batch, self.d_model), jnp.float32)

    def _prefill(self, x, state, segment_ids):
        h, state = self._mix(x, state, segment_ids)
        return self.out_proj(h), state

    def _step(self, x, state):
        h, state = self._average(x, state)
        return self.out_proj(h), state

    def _mix(self, x, state, segment_ids):
        return scan.over_tokens(self._average, x, self._initial_state(len(x), 1), state, segment_ids)

    def _average(self, x, state):
        state = self.config.decay * state + x
        return state, state

    def state_size(self, seq_len):
        return self.d_model

    def flops_per_token(self, seq_len):
        return 2 * self.d_model**2 + 2 * self.d_model
