"""What ids of packed documents mean, to every operation and every form of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.dims import Unbroken
from based_jax.ops import (
    conv,
    delta_rule,
    diagonal_ssm,
    gated_conv,
    gated_linear_attention,
    gated_slot_attention,
    linear_attention,
    long_conv,
    segments,
    selective_scan,
    softmax,
    ssd,
    taylor,
    token_shift,
    wkv4,
)

LENGTH = 3  # of every document
IDS = np.asarray([[0, 7, 0, 7, 7, 2, 2, 2, 7, 0, 0, 7, 7, 0], [1, 1, 1, 2, 2, 0, 2, 1, 1, 1, 0, 0, 0, 0]])
NUMBERS = np.asarray([[0, 1, 0, 1, 1, 2, 2, 2, 3, 0, 0, 3, 3, 0], [1, 1, 1, 2, 2, 0, 2, 3, 3, 3, 0, 0, 0, 0]])
B, T, H, K, W = *IDS.shape, 2, 4, 3


def test_documents_are_numbered_in_order():
    number = jax.jit(segments.numbered)
    numbers = number(IDS)
    np.testing.assert_array_equal(numbers, NUMBERS)
    np.testing.assert_array_equal(number(numbers), NUMBERS)
    begins = np.asarray(jax.jit(segments.begins_later)(numbers))
    assert [np.flatnonzero(row).tolist() for row in begins] == [[5, 8], [3, 7]]


def test_padding_inside_a_document_is_found():
    ids = [[0, 1, 1, 0], [1, 0, 2, 2], [1, 0, 1, 2], [1, 2, 0, 2], [0, 0, 0, 0], [1, 1, 2, 3], [1, 0, 0, 2]]
    found = np.asarray(jax.jit(lambda ids: segments.padding_within(segments.numbered(ids)))(np.int32(ids)))
    assert found[:, 0].tolist() == [False, False, True, True, False, False, False]


def test_positions_count_within_documents_and_continue():
    ids = np.int32([[0, 0, 3, 3, 0, 1], [2, 2, 2, 7, 7, 0], [0] * 6, [5] * 6, [5, 0, 5, 2, 5, 5]])
    place, after = jax.jit(segments.positions, static_argnums=2)(ids, np.int32([4, 10, 9, 0, 3]), ids.shape[1])
    known = ids != 0
    expected = np.asarray([[0, 0, 4, 5, 0, 0], [10, 11, 12, 0, 1, 0], [0] * 6, range(6), [3, 0, 4, 0, 0, 1]])
    np.testing.assert_array_equal(np.where(known, place, 0), np.where(known, expected, 0))
    np.testing.assert_array_equal(after, [1, 2, 9, 6, 2])


def shift(x, impl, **options):
    return token_shift.token_shift(x, **options)


def attend(operation):
    """Return a call of an operation that keeps no state."""
    return lambda *arrays, state, **options: (operation(*arrays, **options), None)


TOKENS, HEADS, HEAD = (W,), (H, K), (H,)
SHIFT = {"the one form": None}
# An operation: its forms; a call of arrays over time, a state, ids and a form; what follows time in each array's shape,
# "-" for what is below 0; and the shape of a state of one row, None where there is none.
OPERATIONS = {
    "attention": (softmax.ATTENTION, attend(softmax.attention), (HEADS,) * 3, None),
    "window_attention": (
        softmax.WINDOW_ATTENTION,
        attend(lambda *qkv, **options: softmax.window_attention(*qkv, window=2, **options)),
        (HEADS,) * 3,
        None,
    ),
    "linear_attention": (
        linear_attention.IMPLEMENTATIONS,
        linear_attention.linear_attention,
        (HEADS,) * 3,
        (H, K, K + 1),
    ),
    "taylor_attention": (taylor.IMPLEMENTATIONS, taylor.taylor_attention, (HEADS,) * 3, (H, 15, K + 1)),
    "gated_linear_attention": (
        gated_linear_attention.IMPLEMENTATIONS,
        gated_linear_attention.gated_linear_attention,
        (HEADS, HEADS, HEADS, ("-", *HEADS)),
        (H, K, K),
    ),
    "delta_rule": (
        delta_rule.IMPLEMENTATIONS,
        delta_rule.delta_rule,
        (HEADS, HEADS, HEADS, ("-", H, 1), HEAD),
        (H, K, K),
    ),
    "dplr": (
        delta_rule.DPLR_IMPLEMENTATIONS,
        delta_rule.dplr,
        (HEADS, HEADS, HEADS, ("-", *HEADS), HEADS, HEADS),
        (H, K, K),
    ),
    "gated_slot_attention": (
        gated_slot_attention.IMPLEMENTATIONS,
        lambda *arrays, state, **options: gated_slot_attention.gated_slot_attention(
            *arrays, state=None if state is None else gated_slot_attention.SlotState(state, state), **options
        ),
        (HEADS, HEADS, HEADS, HEADS, ("-", *HEADS)),
        (H, K, K),
    ),
    "ssd": (
        ssd.IMPLEMENTATIONS,
        lambda x, dt, B, C, **options: ssd.ssd(x, -dt, -jnp.arange(1.0, 1 + H), B, C, **options),
        (HEADS, ("-", H), (1, K), (1, K)),
        (H, K, K),
    ),
    "selective_scan": (
        selective_scan.IMPLEMENTATIONS,
        lambda u, dt, B, C, **options: selective_scan.selective_scan(
            u, -dt, -jnp.arange(1.0, 1 + W * K).reshape(W, K) / W, B, C, **options
        ),
        (TOKENS, ("-", W), (K,), (K,)),
        (W, K),
    ),
    "wkv4": (
        wkv4.IMPLEMENTATIONS,
        lambda k, v, state, **options: wkv4.wkv4(
            k,
            v,
            -jnp.arange(1.0, 1 + W),
            jnp.ones(W),
            state=None if state is None else wkv4.WkvState(state[:, 0], 1 + state[:, 1] ** 2, state[:, 2]),
            **options,
        ),
        (TOKENS, TOKENS),
        (3, W),
    ),
    "diagonal_ssm": (
        diagonal_ssm.IMPLEMENTATIONS,
        lambda u, **options: diagonal_ssm.diagonal_ssm(
            u, *((-0.1 + 0.3j) * jnp.arange(1.0, 1 + H * 2).reshape(H, 2) for _ in range(3)), **options
        ),
        (HEADS,),
        (H, K, 2, 2),
    ),
    "short_conv": (
        conv.IMPLEMENTATIONS,
        lambda x, **options: conv.short_conv(x, 1 + jnp.arange(3.0 * W).reshape(3, W), bias=jnp.ones(W), **options),
        (TOKENS,),
        (3, W),
    ),
    "gated_short_conv": (
        gated_conv.IMPLEMENTATIONS,
        lambda x, **options: gated_conv.gated_short_conv(
            x, 1 + jnp.arange(3.0 * W).reshape(3, W), bias=jnp.ones(2 * W), **options
        ),
        ((2 * W,),),
        (3, W),
    ),
    "long_conv": (
        long_conv.IMPLEMENTATIONS,
        lambda u, state, **options: (
            long_conv.long_conv(u, jnp.arange(1.0, 1 + T * W).reshape(T, W)[: u.shape[1]], **options),
            None,
        ),
        (TOKENS,),
        None,
    ),
    "token_shift": (SHIFT, shift, (TOKENS,), TOKENS),
}
UNPACKED = {"xla_toeplitz"}


def alone(call, arrays, state):
    """Return outputs in a row of each row's documents, each alone and without padding, and the state after the last."""
    places = [np.asarray([np.flatnonzero(row == n) for row in NUMBERS]) for n in (1, 2, 3)]
    documents = [
        [jnp.take_along_axis(x, jnp.asarray(p).reshape(B, LENGTH, *(1,) * (x.ndim - 2)), 1) for x in arrays]
        for p in places
    ]
    first, _ = call(*documents[0], state=state)
    others, after = call(*map(jnp.concatenate, zip(*documents[1:], strict=True)), state=None)
    y = jnp.zeros((B, T, *first.shape[2:]))
    for p, part in zip(places, (first, *jnp.split(others, 2)), strict=True):
        y = y.at[jnp.arange(B)[:, None], p].set(part)
    return y, jax.tree.map(lambda x: x[B:], after)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_row_means_its_documents_one_by_one(name, normal, close):
    """An id that returns begins a document, padding within one does not, and a state belongs to the first."""
    table, call, shapes, of_state = OPERATIONS[name]
    forms = [form for form in table if table is SHIFT or (table[form].platform is None and form not in UNPACKED)]
    arrays = [
        -np.square(normal(B, T, *shape[1:])) if shape[0] == "-" else normal(B, T, *shape, scale=0.5) for shape in shapes
    ]
    if name == "linear_attention":
        arrays = [1 + np.square(x) for x in arrays]  # its normaliser must not vanish
    states = [None] if of_state is None else [None, 1 + np.square(normal(B, *of_state))]

    @jax.jit
    def both(arrays, states):
        oracle = functools.partial(call, segment_ids=None, impl=forms[-1])
        packed = functools.partial(call, *arrays, segment_ids=jnp.asarray(IDS))
        return [(alone(oracle, arrays, s), [packed(state=s, impl=form) for form in forms]) for s in states]

    for expected, found in both(arrays, states):
        for form, results in zip(forms, found, strict=True):
            close(results, expected, tolerance=2e-5, what=form)


BY_PLACE = "short_conv", "gated_short_conv", "window_attention", "diagonal_ssm", "long_conv", "token_shift"
UNBROKEN = np.asarray([[7, 7, 7, 2, 2, 0, 0, 3, 3, 7, 7, 0, 0], [1] * 11 + [2, 0]])


def form_of(name):
    """Return an operation with its first form for all platforms, of arrays and a state, and these."""
    table, call, shapes, of_state = OPERATIONS[name]
    form = next((form for form in table if table is not SHIFT and table[form].platform is None), None)
    return functools.partial(call, impl=form), shapes, of_state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BY_PLACE)
def test_ids_that_are_known_to_be_unbroken_mean_the_same(name, dtype, normal, close):
    call, shapes, of_state = form_of(name)
    arrays = [normal(*UNBROKEN.shape, *shape, dtype=dtype, scale=0.5) for shape in shapes]
    state = None if of_state is None else normal(B, *of_state)

    def with_gradients(segment_ids):
        (y, after), pull = jax.vjp(lambda *arrays: call(*arrays, state=state, segment_ids=segment_ids), *arrays)
        return y, after, pull((jnp.cos(y), jax.tree.map(jnp.cos, after)))

    plain, unbroken = jax.jit(with_gradients)(jnp.asarray(UNBROKEN)), jax.jit(with_gradients)(known(UNBROKEN))
    close(unbroken, plain, dtype)


@pytest.mark.parametrize("name", sorted({*BY_PLACE} - {"diagonal_ssm"}))  # its chunks move tokens of their own
def test_of_unbroken_documents_no_token_is_moved(name, normal):
    call, shapes, _ = form_of(name)
    arrays = [normal(*UNBROKEN.shape, *shape) for shape in shapes]

    def moves(segment_ids):
        """Return how many arrays over tokens the program of the output and its gradients gathers or scatters."""

        def loss(*arrays):
            return jnp.sum(jnp.cos(call(*arrays, state=None, segment_ids=segment_ids)[0]))

        text = jax.jit(jax.grad(loss, tuple(range(len(arrays))))).lower(*arrays).as_text()
        moved = re.findall(r"stablehlo\.(?:dynamic_)?(?:gather|scatter).*?-> tensor<([\dx]*)x\w+>", text, re.DOTALL)
        return sum(shape.startswith("x".join(map(str, UNBROKEN.shape))) for shape in moved)

    assert moves(known(UNBROKEN)) == 0
    assert moves(jnp.asarray(UNBROKEN)) > 0


def known(ids):
    return Unbroken(jnp.asarray(ids))
