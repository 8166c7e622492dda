"""The feature maps of linear attention that Based was compared with (arXiv 2402.18668, figure 3).

A map is built for H heads and turns queries and keys (..., H, K) of one token or many, at places (...) in their
documents, into features (..., H, E). Source: HazyResearch/zoology:zoology/mixers/feature_maps.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from based_jax.nn import layers

Heads = Float[Array, "*T H K"]
Places = Int[Array, "*T"]
Features = tuple[Float[Array, "*T H E"], Float[Array, "*T H E"]]

RELU_FLOOR = 1e-12
COSFORMER_HORIZON = 2048


class Elementwise(nnx.Module):
    """A function of each component: E = K."""

    def __init__(self, function: Callable, num_heads: int, feature_dim: int, *, rngs: nnx.Rngs):
        self.function = function
        self.expanded_dim = feature_dim

    def __call__(self, q: Heads, k: Heads, places: Places) -> Features:
        """Map queries and keys alike."""
        return self.function(q.astype(jnp.float32)), self.function(k.astype(jnp.float32))


class CosFormer(nnx.Module):
    """[relu(x) sin(a), relu(x) cos(a)], a = pi/2 (place + 1) / horizon, so that q.k fades with the distance: E = 2K.

    zoology's horizon is the length of the sequence at hand, here None, which a decode step cannot know; a number makes
    every pass compute the same, and beyond it weights turn negative (arXiv 2202.08791, equation 10).
    """

    def __init__(self, num_heads: int, feature_dim: int, *, horizon: int | None = COSFORMER_HORIZON, rngs: nnx.Rngs):
        self.horizon = horizon
        self.expanded_dim = 2 * feature_dim

    def __call__(self, q: Heads, k: Heads, places: Places) -> Features:
        """Map queries and keys alike."""
        horizon = q.shape[-3] if self.horizon is None else self.horizon
        angle = (math.pi / 2 / horizon) * (places + 1).astype(jnp.float32)[..., None, None]

        def features(x):
            x = jax.nn.relu(x.astype(jnp.float32))
            return jnp.concatenate([x * jnp.sin(angle), x * jnp.cos(angle)], axis=-1)

        return features(q), features(k)


class Performer(nnx.Module):
    """exp(w.x - |x|^2 / 2) / sqrt(E) at E = 256 orthogonal random directions w, x scaled by K^(-1/4).

    Source: arXiv 2009.14794, section 2.4; the directions are constants, drawn from seed 0. Those of another program
    are `stored_directions`, parameters that get no gradient.
    """

    def __init__(self, num_heads: int, feature_dim: int, *, stored_directions: bool = False, rngs: nnx.Rngs):
        self.expanded_dim = 256
        if stored_directions:
            directions = jnp.asarray(orthogonal_directions(self.expanded_dim, feature_dim))
            self.directions = nnx.Param(directions, **layers.logical_axes(None, None))
        self.stored_directions = stored_directions

    def __call__(self, q: Heads, k: Heads, places: Places) -> Features:
        """Map queries and keys alike."""
        directions = jnp.asarray(orthogonal_directions(self.expanded_dim, q.shape[-1]))
        if self.stored_directions:
            directions = jax.lax.stop_gradient(self.directions[...])

        def features(x):
            x = x.astype(jnp.float32) / x.shape[-1] ** 0.25
            along = jnp.einsum("...K,EK->...E", x, directions, precision=jax.lax.Precision.HIGHEST)
            return jnp.exp(along - 0.5 * jnp.sum(x * x, axis=-1, keepdims=True)) / math.sqrt(self.expanded_dim)

        return features(q), features(k)


class AllPoly(nnx.Module):
    """((P1 x)^2 + P2 x^2) / sqrt(2) with learned P1, P2 that all heads share: E = K."""

    def __init__(self, num_heads: int, feature_dim: int, *, rngs: nnx.Rngs):
        self.expanded_dim = feature_dim
        std = 1 / math.sqrt(3 * feature_dim)  # the deviation of torch's default for a linear layer
        init = layers.Init(std, std, jnp.float32, rngs)
        self.proj_1, self.proj_2 = (layers.linear(feature_dim, feature_dim, (None, None), init) for _ in range(2))

    def __call__(self, q: Heads, k: Heads, places: Places) -> Features:
        """Map queries and keys alike."""

        def features(x):
            x = x.astype(jnp.float32)
            return (self.proj_1(x) ** 2 + self.proj_2(x * x)) / math.sqrt(2)

        return features(q), features(k)


class Hedgehog(nnx.Module):
    """[softmax(W x), softmax(-W x)], W its own for each head, queries and keys, the identity at first: E = 2K.

    Source: arXiv 2402.04347, section 4.2 and appendix A.
    """

    def __init__(self, num_heads: int, feature_dim: int, *, rngs: nnx.Rngs):
        self.expanded_dim = 2 * feature_dim
        identity = jnp.broadcast_to(jnp.eye(feature_dim), (2, num_heads, feature_dim, feature_dim))
        self.maps = nnx.Param(jnp.array(identity), **layers.logical_axes(None, "heads", None, None))

    def __call__(self, q: Heads, k: Heads, places: Places) -> Features:
        """Map queries by the first maps, keys by the second."""

        def features(x, maps):
            y = jnp.einsum("...HK,HKE->...HE", x.astype(jnp.float32), maps, precision=jax.lax.Precision.HIGHEST)
            return jnp.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], axis=-1)

        map_q, map_k = self.maps[...]
        return features(q, map_q), features(k, map_k)


@functools.cache
def orthogonal_directions(count: int, dim: int) -> np.ndarray:
    """Return (count, dim) fp32 rows, orthogonal in blocks of `dim`, as zoology normalises them."""
    rng = np.random.default_rng(0)
    blocks = [np.linalg.qr(rng.standard_normal((dim, dim)))[0].T for _ in range(-(-count // dim))]
    return (np.concatenate(blocks)[:count] / math.sqrt(count / dim)).astype(np.float32)


MAP_OPTIONS = {"cosformer": ("horizon",), "performer": ("stored_directions",)}
"""The options of a mixer that a map takes."""
FEATURE_MAPS: dict[str, Callable] = {
    "relu": functools.partial(Elementwise, lambda x: jnp.maximum(x, RELU_FLOOR)),
    "squared": functools.partial(Elementwise, jnp.square),
    "elu": functools.partial(Elementwise, lambda x: jax.nn.elu(x) + 1),
    "identity": functools.partial(Elementwise, lambda x: x),
    "cosformer": CosFormer,
    "performer": Performer,
    "all_poly": AllPoly,
    "hedgehog": Hedgehog,
}
