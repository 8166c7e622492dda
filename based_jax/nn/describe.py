"""The facts of every mixer at a width, computed without running one."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.errors import UserError
from based_jax.nn.mixers import MIXERS, make_mixer


@dataclasses.dataclass(frozen=True)
class Description:
    """One row: bytes and FLOPs are per sequence or per token, as their names say."""

    mixer: str
    params: int
    state_kib: float
    train_mflops_per_token: float
    decode_mb_per_token: float
    implementations: str


def describe(d_model: int, seq_len: int) -> list[Description]:
    """Return a row for each mixer with its default options, computing in bf16.

    Raises:
      UserError: the width or the length is impossible for some mixer's defaults; its name is in the message.
    """
    return [_describe(kind, d_model, seq_len) for kind in MIXERS]


def _describe(kind: str, d_model: int, seq_len: int) -> Description:
    try:
        mixer = nnx.eval_shape(lambda: make_mixer(kind, d_model, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        cache = jax.eval_shape(lambda: mixer.init_cache(1, seq_len))
    except UserError as error:
        raise UserError(f"Mixer '{kind}': {error}") from None
    params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.state))
    return Description(
        mixer=kind,
        params=params,
        state_kib=round(state / 1024, 1),
        train_mflops_per_token=round(3 * mixer.flops_per_token(seq_len) / 1e6, 2),
        decode_mb_per_token=round((2 * params + 2 * state) / 1e6, 2),
        implementations=" ".join(mixer.IMPLEMENTATIONS) or "-",
    )
