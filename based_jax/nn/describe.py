"""The facts of every mixer at a width, computed without running one."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.errors import UserError
from based_jax.nn.mixers import MIXERS, kind_of, make_mixer
from based_jax.nn.own_mixer import short

MAX_D_MODEL, MAX_SEQ_LEN = 2**20, 2**31 - 1
"""Widths beyond are of no model, and some mixers' constants would fill the memory; positions are int32."""


@dataclasses.dataclass(frozen=True)
class Description:
    """One row: bytes and FLOPs are per sequence or per token, as their names say.

    A mixer that does not fit has None in each column but the last, which says why.
    """

    mixer: str
    params: int | None = None
    state_kib: float | None = None
    train_mflops_per_token: float | None = None
    decode_mb_per_token: float | None = None
    implementations: str | None = None
    does_not_fit: str | None = None


def describe(d_model: int, seq_len: int, mixers: Iterable[str | type] = tuple(MIXERS)) -> list[Description]:
    """Return a row for each mixer, given by name or class, with its default options, computing in bf16.

    Raises:
      UserError: the width or the length is below 1, or beyond `MAX_D_MODEL` or `MAX_SEQ_LEN`; a class is no mixer.
    """
    for name, value, largest in (("d_model", d_model, MAX_D_MODEL), ("seq_len", seq_len, MAX_SEQ_LEN)):
        if not 1 <= value <= largest:
            raise UserError(f"{name} is {value}; it is between 1 and {largest}.")
    return [_describe(kind, d_model, seq_len) for kind in map(kind_of, mixers)]


def _describe(kind: str, d_model: int, seq_len: int) -> Description:
    try:
        mixer = nnx.eval_shape(lambda: make_mixer(kind, d_model, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        cache = jax.eval_shape(lambda: mixer.init_cache(1, seq_len))
    except UserError as error:
        return Description(short(kind), does_not_fit=f"does not fit: {error}")
    params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.state))
    return Description(
        mixer=short(kind),
        params=params,
        state_kib=round(state / 1024, 1),
        train_mflops_per_token=round(3 * mixer.flops_per_token(seq_len) / 1e6, 2),
        decode_mb_per_token=round((2 * params + 2 * state) / 1e6, 2),
        implementations=" ".join(mixer.IMPLEMENTATIONS) or "-",
    )
