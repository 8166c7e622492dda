"""Attention maps, materialised: how much each query takes of each key, in layers that are a weighted mean of values.

They take T^2 numbers a head, and are for short inputs; what trains and decodes never makes them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from based_jax.dims import BT, BTD, BTHK
from based_jax.errors import UserError
from based_jax.inside.layers import blocks_of, mixer_inputs
from based_jax.nn.lm import LM
from based_jax.nn.mixer import Mixer
from based_jax.nn.mixers.attention import Attention
from based_jax.nn.mixers.taylor import TaylorAttention
from based_jax.nn.mixers.window import WindowAttention
from based_jax.ops.taylor import polynomial

LARGEST_LENGTH = 4096
"""Of an input whose maps are made: one of a head takes 64 MiB in fp32."""
Weights = Float[Array, "B H T S"]


class LayerMap(NamedTuple):
    """The map of a layer.

    Attributes:
      layer: its place in the model.
      kind: of its mixer.
      weights: fp32, of each head and query over the keys, which sum to 1; (B, H, T, S).
    """

    layer: int
    kind: str
    weights: Weights


def attention_maps(model: LM, ids: BT) -> list[LayerMap]:
    """Return the maps of those layers that have one: attention, windows and Taylor attention.

    Raises:
      UserError: the input is longer than `LARGEST_LENGTH`, or no layer has a map.
    """
    mapped = [(index, block) for index, block in enumerate(blocks_of(model)) if type(block.mixer) in SCORES]
    if not mapped:
        known = ", ".join(mixer.__name__ for mixer in SCORES)
        raise UserError(f"No layer of the model has an attention map; those of {known} have.")
    inputs = mixer_inputs(model, ids)
    weights = jax.jit(lambda pairs: [attention_weights(*pair) for pair in pairs])(
        [(block.mixer, inputs[index]) for index, block in mapped]
    )
    return [LayerMap(index, block.kind, found) for (index, block), found in zip(mapped, weights, strict=True)]


def attention_weights(mixer: Mixer, x: BTD) -> Weights:
    """Return the map of a mixer of what it reads.

    Raises:
      UserError: the mixer has no map, or the input is longer than `LARGEST_LENGTH`.
    """
    scores, visible = _scored(mixer, x)
    kernel: Callable[[Any], Any] = polynomial if type(mixer) is TaylorAttention else _exponential
    weights = jnp.where(visible, kernel(scores), 0.0)
    return weights / weights.sum(axis=-1, keepdims=True)


def softmax_weights(mixer: Mixer, x: BTD) -> Weights:
    """Return the softmax of the same scores, which a Taylor layer's map approximates; errors as `attention_weights`."""
    scores, visible = _scored(mixer, x)
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def _exponential(scores: Weights) -> Weights:
    return jnp.exp(scores - scores.max(axis=-1, keepdims=True))


def _scored(mixer: Mixer, x: BTD) -> tuple[Weights, Any]:
    """Return the scores of a mixer, q.k over the root of a head's width, and which keys a query sees."""
    if type(mixer) not in SCORES:
        raise UserError(f"{type(mixer).__name__} has no attention map: it is no weighted mean of values.")
    T = x.shape[1]
    if T > LARGEST_LENGTH:
        raise UserError(f"The input has {T} tokens; maps are made of {LARGEST_LENGTH} at most.")
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    visible = (distance >= 0) & (distance < (mixer.config.window if type(mixer) is WindowAttention else T))
    return SCORES[type(mixer)](mixer, x), visible[None, None]


def _score(q: BTHK, k: BTHK) -> Weights:
    q, k = (y.astype(jnp.float32) for y in (q, k))
    return jnp.einsum("BTHK,BSHK->BHTS", q, k, precision="highest") / math.sqrt(q.shape[-1])


def _of_attention(mixer: Any, x: BTD) -> Weights:
    q, k, _ = mixer.rotated_qkv(x, jnp.zeros(1, jnp.int32), None)
    return _score(q, mixer.for_each_query(k))


def _of_taylor(mixer: Any, x: BTD) -> Weights:
    q, k, _ = mixer.qkv(x)
    return _score(q, k)


SCORES: dict[type, Callable[[Any, BTD], Weights]] = {
    Attention: _of_attention,
    WindowAttention: _of_attention,
    TaylorAttention: _of_taylor,
}
