"""The residual stream of a model, and what a layer leaves to be added to it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from based_jax import parallel
from based_jax.ops.calls import Pieces
from based_jax.ops.norm import residual_layer_norm, residual_rms_norm


class Stream(NamedTuple):
    """The residual stream r, and the output y of a layer that is still to be added: the norm after it does both.

    The output of a step may come in pieces.
    """

    r: Float[Array, "*B D"]
    y: Float[Array, "*B D"] | Pieces | None = None

    def filled(self, dtype) -> "Stream":
        """Return the stream with an output to add, of zeros if there is none, as a loop over layers carries it."""
        return self if self.y is not None else Stream(self.r, jnp.zeros_like(self.r, dtype))

    def total(self) -> Float[Array, "*B D"]:
        """Return the stream with nothing left to add."""
        y = self._whole()
        return self.r if y is None else self.r + y

    def constrained(self) -> "Stream":
        """Return the stream with rows and tokens over the mesh, lest XLA gathers activations instead of weights."""
        return self if isinstance(self.y, Pieces) else jax.tree.map(parallel.constrain_tokens, self)

    def normed(self, norm: Any, dtype) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """Return the stream with nothing left to add, and its norm by an `nnx.RMSNorm` or `nnx.LayerNorm`."""
        scale, options = norm.scale[...], {"eps": norm.epsilon, "dtype": dtype}
        if isinstance(norm, nnx.RMSNorm):
            return residual_rms_norm(self.r, self._whole(), scale, **options)
        return residual_layer_norm(self.r, self._whole(), scale, norm.bias[...], **options)

    def is_of_one_token(self, norm: Any) -> bool:
        """Return whether it is that of a step of one sequence, and its norm one over the root of the mean square."""
        return self.r.shape[:-1] == (1,) and isinstance(norm, nnx.RMSNorm)

    def pieces(self) -> Pieces | None:
        """Return the output of a step that is still to be added, in pieces."""
        return self.y if self.y is None or isinstance(self.y, Pieces) else Pieces(self.y[None])

    def _whole(self) -> Float[Array, "*B D"] | None:
        return jnp.sum(self.y.sums, axis=0) if isinstance(self.y, Pieces) else self.y
