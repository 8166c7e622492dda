"""Which model a state belongs to, in a few letters."""

import hashlib
import json

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Shaped, UInt32

from based_jax import config as configs
from based_jax.nn.lm_config import LMConfig

TRAINING_FIELDS = ("scan_layers", "remat", "init_std", "init_recipe", "embed_dropout")
"""Fields of a model's config that change nothing of what it reads."""
UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
ODD = (2654435761, 2246822519)
"""Multipliers of places, one for each sum of a parameter's bits."""


def fingerprint(config: LMConfig, params: nnx.State) -> str:
    """Return 32 hexadecimal digits of all that decides what a model reads: its config, and each bit of its parameters.

    It tells models apart that differ by accident; it is no signature.
    """
    fields = {name: value for name, value in configs.to_dict(config).items() if name not in TRAINING_FIELDS}
    layers = [(kind, {k: v for k, v in options.items() if k != "impl"}) for kind, options in fields["layers"]]
    sums = {"/".join(map(str, path)): x.tolist() for path, x in nnx.to_flat_state(jax.device_get(_bit_sums(params)))}
    text = json.dumps([fields | {"layers": layers}, sums], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@jax.jit
def _bit_sums(params: nnx.State) -> nnx.State:
    """Return two sums modulo 2^32 of each parameter's bits, weighted by odd numbers that go by the place."""
    return jax.tree.map(_sums_of, params)


def _sums_of(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    bits = jax.lax.bitcast_convert_type(x, UINTS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(ODD[0]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    weights = [((place ^ (place >> 15)) * jnp.uint32(odd)) | jnp.uint32(1) for odd in ODD]
    return jnp.stack([jnp.sum(bits * weight, dtype=jnp.uint32) for weight in weights])
