"""MLPs: what a block has between its mixers."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from based_jax.dims import BD
from based_jax.nn.layers import Init, linear
from based_jax.nn.projections import Projected, gated, into_stream
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.token_layer import token_mlp


class SwiGLU(nnx.Module):
    """Gated MLP: fc2(value * silu(gate)) with (value, gate) = fc1(x), value first.

    Source: HazyResearch/based:based/models/mlp.py, `GatedMlp`.
    """

    def __init__(self, d_model: int, d_hidden: int, init: Init):
        self.fc1 = linear(d_model, 2 * d_hidden, ("embed", "mlp"), init, parts=(d_hidden, d_hidden))
        self.fc2 = linear(d_hidden, d_model, ("mlp", "embed"), init.out)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"] | Projected:
        """Apply to each token."""
        return into_stream(self.fc2, gated(self.fc1, x))

    def step_whole(self, r: BD, y: Pieces | None, norm: Any) -> tuple[BD, Pieces]:
        """Return r + y of one sequence's token, and the MLP of its norm, to be added next."""
        kernels = (layer.kernel[...].astype(layer.dtype) for layer in (self.fc1, self.fc2))
        return token_mlp(r, y, norm.scale[...], *kernels, eps=norm.epsilon)


class GELU(nnx.Module):
    """MLP with biases: fc2(gelu(fc1(x))), the exact GELU (arXiv 1606.08415).

    Source: HazyResearch/zoology:zoology/mixers/mlp.py, `MLP`.
    """

    def __init__(self, d_model: int, d_hidden: int, init: Init):
        self.fc1 = linear(d_model, d_hidden, ("embed", "mlp"), init, bias=True)
        self.fc2 = linear(d_hidden, d_model, ("mlp", "embed"), init.out, bias=True)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Apply to each token."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Identity(nnx.Module):
    """No MLP, as in zoology's MQAR models: the block then adds its second norm's output to the residual."""

    def __init__(self, d_model: int, d_hidden: int, init: Init):
        pass

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Return x."""
        return x


MLPS = {"swiglu": SwiGLU, "gelu": GELU, "identity": Identity, "none": None}
