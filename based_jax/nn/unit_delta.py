"""What mixers by the delta rule share: queries and keys of length 1, and a token read where its product stands."""

import abc
from typing import ClassVar, override

from jaxtyping import Array

from based_jax.nn.gated import GatedLinearMixer
from based_jax.nn.mixer import Operation
from based_jax.ops.delta_rule import IMPLEMENTATIONS, delta_rule, delta_rule_step
from based_jax.ops.dispatch import beside
from based_jax.ops.matrix_state_step import IMPLEMENTATIONS as MATRIX_STATE_STEPS
from based_jax.ops.unit_delta_step import IMPLEMENTATIONS as UNIT_DELTA_STEPS
from based_jax.ops.unit_delta_step import unit, unit_delta_step


class UnitDeltaMixer(GatedLinearMixer):
    """A delta rule on unit queries and keys; a mixer gives what is kept and corrected by `_transition(x)`."""

    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    operation: ClassVar = Operation(delta_rule, delta_rule_step, MATRIX_STATE_STEPS)
    silu_without_conv: ClassVar = True

    @abc.abstractmethod
    def _transition(self, x) -> tuple[Array, Array]:
        """Return each token's log-decays and rates, by head; x may hold one token or many."""

    @override
    def _gated(self, x, q, k, v):
        return unit(q), unit(k), v, *self._transition(x)

    @override
    def _step_state(self, x, y, state):
        if set(self.projected) != {self.num_heads}:
            return super()._step_state(x, y, state)
        impl = beside(self.config.impl, UNIT_DELTA_STEPS)
        return unit_delta_step(y, *self._transition(x), state.memory, scale=self.scale, impl=impl)
