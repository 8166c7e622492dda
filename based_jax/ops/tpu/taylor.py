"""Taylor linear attention through the Mosaic TPU kernels: which calls they take, gradients, and the packed state.

The kernels want tokens on lanes, (B, H, K, T) and (B, H, V, T), as XLA lays out the projections that they come from by
itself: what turns them over below is compiled to nothing. The backward pass saves q, k, v, o and the normaliser.
Kernels: `pallas_kernels/tpu/taylor*.py`.
"""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from based_jax.dims import BHEV, BT, BTHV
from based_jax.ops import sharded, taylor_state
from based_jax.ops.calls import LinearAttentionCall

DTYPES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
LANES = 128
MAX_CHUNK_TOKENS = 2 * LANES
"""As wide as matrix units are from v6e on; before, where they are 128 wide, it takes fewer bundles as well."""
MAX_KEY_DIM, MAX_VALUE_DIM, VALUE_MULTIPLE = 32, 128, 16


def supports(call: LinearAttentionCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return taylor_state.refusal(call, DTYPES, {"K": MAX_KEY_DIM, "V": MAX_VALUE_DIM})


def slower(call: LinearAttentionCall) -> str | None:
    """Return why `auto` leaves a call to XLA, or None."""
    time = call.q.shape[1]
    return None if time >= LANES else f"tokens come {LANES} at a time, and are {time}"


def compute(call: LinearAttentionCall) -> tuple[BTHV, BHEV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return sharded.per_device(_on_device, call, check_vma=False)  # kernels may not say over which devices results vary


def chunk_tokens(time: int) -> int:
    """Return how many tokens a chunk of a row with so many has."""
    return min(MAX_CHUNK_TOKENS, time + -time % LANES)


def _on_device(call: LinearAttentionCall) -> tuple[BTHV, BHEV]:
    # Pallas' TPU modules take half a second to import and are needed only here and below.
    from pallas_kernels.tpu.taylor_features import KEY_MULTIPLE

    (time, _, keys), values = call.q.shape[1:], call.v.shape[3]
    chunk = chunk_tokens(time)
    multiples = (KEY_MULTIPLE, KEY_MULTIPLE, VALUE_MULTIPLE)
    qkv = [
        sharded.fill(einops.rearrange(x, "B T H K -> B H K T"), {2: multiple, 3: chunk})
        for x, multiple in zip((call.q, call.k, call.v), multiples, strict=True)
    ]
    sizes = keys, qkv[0].shape[2], values, qkv[2].shape[2]
    state = None if call.state is None else _pack(call.state, *sizes)
    documents = None if call.segment_ids is None else _documents(call.segment_ids, chunk)
    arguments = sharded.vary_alike(*qkv, state, *(documents or (None, None)))
    o, after = _attention(keys**-0.5, time, chunk, *arguments)
    return einops.rearrange(o[:, :, :values, :time], "B H V T -> B T H V"), _unpack(after, *sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(scale, time, chunk, q, k, v, state, numbers, held):
    return _attention_fwd(scale, time, chunk, q, k, v, state, numbers, held)[0]


def _attention_fwd(scale, time, chunk, q, k, v, state, numbers, held):
    from pallas_kernels.tpu import taylor as kernels

    options = {"scale": scale, "tokens": time, "chunk": chunk}
    o, z, after = sharded.launch(kernels.forward, q, k, v, state, _kernels_documents(numbers, held), **options)
    return (o, after), (q, k, v, o, z, state, numbers, held)


def _attention_bwd(scale, time, chunk, saved, cotangents):
    from pallas_kernels.tpu import taylor_backward as backward

    q, k, v, o, z, state, numbers, held = saved
    do, dafter = cotangents
    inverse = jnp.where(z == 0, 0.0, 1.0 / z)
    both = jnp.einsum("BHVT,BHVT->BHT", do, o, preferred_element_type=jnp.float32)[:, :, None]
    given = q, k, v, do, jnp.concatenate([inverse, -both * inverse], axis=2)
    options, documents = {"scale": scale, "tokens": time, "chunk": chunk}, _kernels_documents(numbers, held)
    values = v.shape[2]
    before = None if state is None else _with_normaliser_twice(jnp.swapaxes(state, 2, 3), values)
    [dq] = sharded.launch(backward.query_gradients, *given, before, documents, **options)
    dk, dv, dstate = sharded.launch(backward.key_gradients, *given, jnp.swapaxes(dafter, 2, 3), documents, **options)
    return dq, dk, dv, None if state is None else _of_one_normaliser(dstate, values), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _kernels_documents(numbers, held):
    from pallas_kernels.tpu.taylor_chunks import Documents

    return None if numbers is None else Documents(numbers, held)


def _documents(numbers: BT, chunk: int) -> tuple[Int[Array, "B 1 _"], Int[Array, "B _"]]:
    """Return the numbers, and the document of the state before each chunk and after the last: 1 in a row of padding."""
    numbers = sharded.fill(numbers.astype(jnp.int32), {1: chunk})
    return numbers[:, None], taylor_state.held(numbers, chunk)


def _with_normaliser_twice(state: Float[Array, "B H E _"], values: int) -> Float[Array, "B H E _"]:
    return state.at[..., values + 1].set(state[..., values])


def _of_one_normaliser(dstate: Float[Array, "B H E _"], values: int) -> Float[Array, "B H _ E"]:
    """Return the gradient of a state in the forward kernel's layout: that of the normaliser comes in two columns."""
    dstate = jnp.swapaxes(dstate, 2, 3)
    return dstate.at[:, :, values].add(dstate[:, :, values + 1]).at[:, :, values + 1 :].set(0.0)


def _pack(state: BHEV, keys: int, key_rows: int, values: int, value_rows: int) -> Float[Array, "B H _ F"]:
    """Return the kernels' sums of [v, 1] F(k)^T (B, H, value_rows + SUM_ROWS, F) of a state."""
    from pallas_kernels.tpu.taylor_chunks import SUM_ROWS
    from pallas_kernels.tpu.taylor_features import number_of_features, packed_places

    sums = jnp.swapaxes(state / taylor_state.factors(keys), 2, 3)
    shape = *state.shape[:2], value_rows + SUM_ROWS, number_of_features(key_rows)
    rows = np.append(np.arange(values), value_rows)
    places = packed_places(keys, key_rows)
    return jnp.zeros(shape, jnp.float32).at[:, :, rows[:, None], places[None]].set(sums)


def _unpack(sums: Float[Array, "B H _ F"], keys: int, key_rows: int, values: int, value_rows: int) -> BHEV:
    """Undo `_pack`."""
    from pallas_kernels.tpu.taylor_features import packed_places

    rows = np.append(np.arange(values), value_rows)
    places = packed_places(keys, key_rows)
    return jnp.swapaxes(sums[:, :, rows][..., places], 2, 3) * taylor_state.factors(keys)
