"""Operations whose tokens lie over devices: outputs, states and gradients of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.documents import rows_over_pieces
from helpers.hlo import Program
from helpers.scans import SCANS

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.ops import attention, sequence, sharded, softmax_chunks, window_attention
from based_jax.ops.conv import short_conv
from based_jax.ops.long_conv import long_conv
from based_jax.ops.token_shift import token_shift

B, T = 4, 16
MESH = {"data": 1, "tensor": 2, "sequence": 4}


def over(sizes):
    """Return a context of a mesh of as many devices as the sizes say."""
    return jax.set_mesh(parallel.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]))


@functools.cache
def both(call):
    """Return a call of (x, rest) with the gradient of x under its own outputs, as weights of no symmetry."""

    def run(x, *rest):
        y, pull = jax.vjp(lambda x: call(x, *rest), x)
        return y, pull(jax.tree.map(jnp.cos, y))

    return run


def close_over(sizes, call, close, *arguments):
    """Check that a call on a mesh is that of one device."""
    expected = jax.jit(both(call))(*arguments)
    with over(sizes):
        close(jax.jit(both(call))(*arguments), expected)


ALL = [
    (name, impl, packed, continued)
    for name in SCANS
    for impl in ("xla_steps", "xla_chunks")
    for packed in (True, False)
    for continued in (True, False)
]


FEW = "gated_linear_attention", "dplr", "diagonal_ssm", "wkv4"
"""One for each way to compose pieces but by sums, of which Taylor attention's mixer is tested."""


@parametrize_some("name", SCANS, ["gated_linear_attention"])
def test_scans_in_bf16_go_on_from_the_states_of_the_pieces_before(name, rng, normal, close):
    ids, x = rows_over_pieces(rng, T), normal(B, T, 2, 4, dtype="bfloat16", scale=0.5)
    call = jax.jit(functools.partial(scan, name, "xla_chunks"))
    expected = call(np.asarray(x, np.float32), ids, None)
    with over(MESH):
        close(call(x, ids, None), expected, "bfloat16")


@parametrize_some("name, impl, packed, continued", ALL, [(name, "xla_steps", True, True) for name in FEW])
def test_scans_go_on_from_the_states_of_the_pieces_before(name, impl, packed, continued, rng, normal, close):
    ids = rows_over_pieces(rng, T) if packed else None
    x, before = normal(B, T, 2, 4, scale=0.5), normal(B, 3, 2, 4, scale=0.5)
    state = jax.jit(lambda x: SCANS[name](x)[1])(before) if continued else None
    call = functools.partial(scan, name, impl)
    close_over(MESH, call, close, x, ids, state)


def scan(name, impl, x, ids, state):
    return SCANS[name](x, segment_ids=ids, state=state, impl=impl)


@pytest.mark.parametrize("devices", [2, 3, 5, 8])
def test_each_device_gets_what_stands_before_it_in_order(devices, normal, close):
    """By products of matrices, which do not commute; the first device gets zeros."""
    factors = np.asarray(normal(devices, 2, 2))

    def product(factors):
        return sharded.per_shard(on_device, (factors[None],), (("batch", "time"),), (("batch", "time"),))[0]

    def on_device(own):
        return sharded.before(lambda earlier, later: later @ earlier, own[0])[None]

    with over({"sequence": devices}):
        found = jax.jit(product)(factors)
    expected = [np.zeros((2, 2)), factors[0]]
    for factor in factors[1:-1]:
        expected.append(factor @ expected[-1])
    close(found, np.stack(expected))


def windows(window, impl, x, ids):
    return window_attention(x, x + 1, x * x, window=window, segment_ids=ids, impl=impl)


@parametrize_some(
    "window, impl, packed",
    [(w, impl, packed) for w in (1, 3, 6, 100) for impl in ("xla_bands", "xla_steps") for packed in (True, False)],
    [(6, "xla_bands", True), (3, "xla_bands", False)],
)
def test_windows_see_the_keys_before_a_piece(window, impl, packed, rng, normal, close):
    """Those of several pieces before, and of none."""
    ids = rows_over_pieces(rng, T) if packed else None
    close_over(MESH, functools.partial(windows, window, impl), close, normal(B, T, 2, 4), ids)


@parametrize_some(
    "devices, packed",
    [(devices, packed) for devices in (2, 4, 8) for packed in (True, False)],
    [(4, True)],
)
def test_attention_meets_the_keys_of_all_pieces_before(devices, packed, rng, normal, close, monkeypatch):
    """Of heads that the devices cannot share, in chunks that are no multiple of a piece; none gathers keys."""
    monkeypatch.setattr(softmax_chunks, "CHUNK_TOKENS", 3)
    ids = rows_over_pieces(rng, T) if packed else None
    sizes = {"data": 1, "tensor": 8 // devices, "sequence": devices}
    x = normal(B, T, 8 // devices * (devices - 1), 4)
    close_over(sizes, attended, close, x, ids)
    with over(sizes):
        text = jax.jit(both(attended)).lower(x, ids).compile().as_text()
    exchanged = Program(text).exchanged((1, 1, 8 // devices, devices), parallel.AXES.index("sequence"))
    assert {found.kind for found in exchanged} == {"collective-permute"}


@parametrize_some("devices, packed", [(2, True), (2, False), (4, True)], [(2, True)])
def test_attention_exchanges_heads_for_time_where_the_devices_can_share_them(devices, packed, rng, normal, close):
    """Padding within a document may stand at the end of a piece. Of ids alone a device gets all."""
    ids = rows_over_pieces(rng, T) if packed else None
    sizes, x = {"data": 1, "tensor": 2, "sequence": devices}, normal(B, T, 2 * devices, 4)
    close_over(sizes, attended, close, x, ids)
    if packed:
        with over(sizes):
            moved, unbroken = jax.jit(sequence.compacted)(x, ids)
            found = jax.jit(sequence.restored)(jax.jit(attended)(moved, unbroken), ids)
        close(found, jax.jit(attended)(x, ids))
    with over(sizes):
        text = jax.jit(both(attended)).lower(x, ids).compile().as_text()
    exchanged = Program(text).exchanged((1, 1, 2, devices), parallel.AXES.index("sequence"))
    assert {(found.kind, found.dtype) for found in exchanged} <= {("all-to-all", "f32"), ("all-gather", "s32")}


def test_a_form_that_does_not_exist_is_refused_of_pieces_too():
    x = jnp.ones((B, T, 2, 4))
    with over(MESH), pytest.raises(UserError, match="Unknown attention implementation 'xla_chunk'"):
        jax.eval_shape(functools.partial(attention, impl="xla_chunk"), x, x, x)


def attended(x, ids):
    return attention(x, x + 1, x * x, segment_ids=ids)


def convolution(taps, dilation, x, ids):
    return short_conv(
        x,
        jnp.cos(jnp.arange(taps * x.shape[-1], dtype=jnp.float32)).reshape(taps, -1),
        dilation=dilation,
        segment_ids=ids,
    )[0]


@parametrize_some(
    "taps, dilation, packed",
    [(taps, dilation, packed) for taps, dilation in ((1, 1), (3, 1), (3, 4), (16, 1)) for packed in (True, False)],
    [(3, 4, True)],
)
def test_convolutions_see_the_inputs_before_a_piece(taps, dilation, packed, rng, normal, close):
    ids = rows_over_pieces(rng, T) if packed else None
    close_over(MESH, functools.partial(convolution, taps, dilation), close, normal(B, T, 8), ids)


@pytest.mark.parametrize("continued", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_token_before_the_first_of_a_piece_is_another_ones(continued, rng, normal, close):
    ids = rows_over_pieces(rng, T)
    state = normal(B, 8) if continued else None
    close_over(MESH, shifted, close, normal(B, T, 8), ids, state)


def shifted(x, ids, state):
    return token_shift(x, segment_ids=ids, state=state)


def test_tokens_are_compacted_within_the_piece_of_a_device(rng, normal, close):
    """What then goes by places is what it is of tokens that stay where they are."""
    ids, x = rows_over_pieces(rng, T), normal(B, T, 8)

    def compacted(x, ids):
        x, unbroken = sequence.compacted(x, ids)
        y = convolution(3, 1, x, unbroken) + shifted(x, unbroken, None)[0]
        y = y + windows(6, "xla_bands", x.reshape(B, T, 2, 4), unbroken).reshape(x.shape)
        return sequence.restored(y, ids)

    def in_place(x, ids):
        y = convolution(3, 1, x, ids) + shifted(x, ids, None)[0]
        return y + windows(6, "xla_bands", x.reshape(B, T, 2, 4), ids).reshape(x.shape)

    expected = jax.jit(both(in_place))(x, ids)
    with over(MESH):
        close(jax.jit(both(compacted))(x, ids), expected)
        assert "all-gather" not in jax.jit(sequence.compacted).lower(x, ids).compile().as_text()


def test_what_needs_all_tokens_is_refused():
    message = "^Mesh axis 'sequence' has 4 devices; for long_conv, which needs all tokens of a row, it has 1\\."
    with over(MESH), pytest.raises(UserError, match=message):
        jax.eval_shape(long_conv, jnp.ones((B, T, 8)), jnp.ones((T, 8)))


def test_tokens_that_cannot_be_divided_are_not_cut(normal, close):
    """As in a prefill of any length, of an operation that has no cut too."""
    close_over(MESH, shifted, close, normal(B, T + 1, 8), None, None)
    close_over(MESH, long_conv, close, normal(B, T + 1, 8), normal(T + 1, 8))
