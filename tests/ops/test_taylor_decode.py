"""Decoding with Taylor attention: recent tokens beside the state, drafted ones taken back, and rounded states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some

from based_jax.errors import UserError
from based_jax.ops.taylor import taylor_attention
from based_jax.ops.taylor_decode import (
    EXACT_FORMAT,
    FORMATS,
    holding,
    initial_state,
    rewound,
    state_elements,
    taylor_attention_decode,
    total,
)

decode = jax.jit(taylor_attention_decode)
oracle = jax.jit(lambda *qkv: taylor_attention(*qkv, impl="oracle"))


@pytest.fixture
def draw(normal):
    """Return a source of q, k and v."""

    def inputs(B, T, H, K, V, dtype="float32"):
        return tuple(normal(B, T, H, dim, dtype=dtype) for dim in (K, K, V))

    return inputs


def empty(qkv, **form):
    B, _, H, K = qkv[0].shape
    return initial_state(B, H, K, qkv[2].shape[-1], dtype=qkv[2].dtype, **form)


def in_steps(qkv, state, tokens=1):
    """Return outputs and the state after reading so many tokens at once."""

    def step(state, some):
        return decode(*some, state)[::-1]

    B, T = qkv[0].shape[:2]
    blocks = (jnp.moveaxis(x.reshape(B, T // tokens, tokens, *x.shape[2:]), 1, 0) for x in qkv)
    state, o = jax.lax.scan(step, state, tuple(blocks))
    return jnp.moveaxis(o, 0, 1).reshape(qkv[2].shape), state


def at(qkv, start, stop):
    return tuple(x[:, start:stop] for x in qkv)


@parametrize_some(
    "dtype, flush, tokens, sizes",
    [
        (dtype, flush, tokens, sizes)
        for dtype in ("float32", "bfloat16")
        for flush, tokens in ((1, 1), (2, 1), (16, 1), (6, 6), (16, 3))
        for sizes in ((2, 42, 3, 16, 10), (1, 42, 1, 7, 5))
    ],
    [
        ("float32", 1, 1, (2, 42, 3, 16, 10)),
        ("float32", 16, 3, (2, 42, 3, 16, 10)),
        ("bfloat16", 16, 1, (1, 42, 1, 7, 5)),
    ],
)
def test_steps_equal_the_oracle(dtype, flush, tokens, sizes, draw, close):
    qkv = draw(*sizes, dtype=dtype)
    o, state = jax.jit(in_steps, static_argnums=2)(qkv, empty(qkv, flush=flush), tokens)
    wanted, sums = oracle(*qkv)
    assert o.dtype == wanted.dtype
    close(o, wanted, dtype)
    close(total(state), sums)


def test_drafted_tokens_equal_steps_and_are_taken_back(draw, close):
    """Each row accepts a number of its own, so that from then on each has recent tokens of its own number."""
    read, tokens, flush, accepted = 14, 4, 16, np.asarray([0, 1, 3, 4])
    qkv, drafted = draw(4, 40, 2, 8, 5), draw(4, tokens, 2, 8, 5)

    @jax.jit
    def verify_then_go_on(qkv, drafted):
        _, state = in_steps(at(qkv, 0, read), empty(qkv, flush=flush))
        o, state = decode(*drafted, state)
        state = rewound(state, jnp.asarray(tokens - accepted))
        return o, *in_steps(at(qkv, read, 40), state)

    o, after, state = verify_then_go_on(qkv, drafted)
    text = [jnp.concatenate([x[:, :read], new, x[:, read:]], axis=1) for x, new in zip(qkv, drafted, strict=True)]
    close(o, oracle(*text)[0][:, read : read + tokens])
    ids = np.ones((4, 40 + tokens), np.int32)
    ids[:, read : read + tokens] = np.arange(tokens) < accepted[:, None]  # what is not accepted leaves no trace
    wanted, sums = jax.jit(lambda text: taylor_attention(*text, segment_ids=jnp.asarray(ids), impl="oracle"))(text)
    close(after, wanted[:, read + tokens :])
    close(total(state), sums)


@parametrize_some("state_dtype", FORMATS, ["int8"])
def test_a_row_is_rounded_as_beside_others_that_are_as_full_as_it_is(state_dtype, draw):
    """Rows have no room one after the other; what a row holds beforehand, and when it is written, is its own."""
    qkv, counts = draw(3, 40, 2, 8, 5), np.asarray([0, 5, 16], np.int32)

    @jax.jit
    def read(qkv, counts):
        state = empty(qkv, flush=16, state_dtype=state_dtype)
        o, after = in_steps(qkv, state._replace(recent=state.recent._replace(length=counts)))
        return o, after.sums, after.recent.length

    together = read(qkv, counts)
    for row, count in enumerate(counts):
        for found, wanted in zip(*map(jax.tree.leaves, (together, read(qkv, np.full(3, count)))), strict=True):
            assert np.array_equal(found[row], wanted[row])


@parametrize_some("flush", (16, 64), [16])
def test_each_format_keeps_its_error_at_4096_tokens(flush, draw):
    qkv = draw(1, 4096, 1, 16, 32)

    @jax.jit
    def outputs(qkv):
        states = {name: empty(qkv, flush=flush, state_dtype=name) for name in FORMATS}
        return {name: in_steps(qkv, state, flush)[0][:, -256:] for name, state in states.items()}

    wanted = np.asarray(jax.jit(lambda *x: taylor_attention(*x, impl="xla_chunks"))(*qkv)[0][:, -256:], np.float64)
    for name, o in outputs(qkv).items():
        error = np.linalg.norm(o - wanted) / np.linalg.norm(wanted)
        stated = FORMATS[name].errors[flush]
        assert error < stated, name
        assert name == EXACT_FORMAT or error > stated / 2, name  # the states are rounded


def test_a_state_holds_what_it_is_given_in_the_elements_that_are_said(draw, close):
    _, sums = oracle(*draw(2, 9, 3, 8, 5))

    @jax.jit
    def held(sums):
        states = {name: initial_state(2, 3, 8, 5, flush=16, state_dtype=name, dtype=sums.dtype) for name in FORMATS}
        return states, {name: (holding(sums, state), total(holding(sums, state))) for name, state in states.items()}

    states, found = held(sums)
    for name, (state, again) in found.items():
        shapes = (jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (state, states[name]))
        assert next(shapes) == next(shapes)
        close(again[..., -1], sums[..., -1])
        close(again, sums, tolerance=0.04 if name == "float8_e4m3fn" else 1e-2)
        elements = sum(x.size for x in jax.tree.leaves(state)) - state.recent.length.size
        assert elements == 2 * 3 * state_elements(8, 5, 16, name)


def test_states_that_do_not_exist_are_refused(draw):
    qkv = draw(1, 3, 1, 4, 4)
    for form, words in (
        ({"flush": 0}, "flush is 0; a state is written every 1 to 256 tokens"),
        ({"flush": 15, "state_dtype": "bfloat16"}, "flush is 15 and state_dtype 'bfloat16'; .* every 16 or more"),
        ({"flush": 16, "state_dtype": "int9"}, "Unknown state_dtype 'int9': did you mean 'int8'"),
    ):
        with pytest.raises(UserError, match=words):
            empty(qkv, **form)
    with pytest.raises(UserError, match="there are 3 tokens; this state takes 2 at once"):
        taylor_attention_decode(*qkv, empty(qkv, flush=2))
    with pytest.raises(UserError, match=r"E and V of the state are \(45, 4\); of these q and v, \(15, 4\)"):
        taylor_attention_decode(*qkv, empty(draw(1, 1, 1, 8, 4), flush=4))
    with pytest.raises(UserError, match="flush is 1; a state takes tokens back"):
        rewound(empty(qkv), jnp.ones(1, jnp.int32))
