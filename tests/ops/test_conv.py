import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.documents import numbered

from based_jax.errors import UserError
from based_jax.ops.conv import MAX_UNROLLED_TAPS, short_conv, short_conv_step

FAST = ["xla_steps", "xla_taps"]

# (T, W, D): kernels of one tap, and longer than the sequence.
CASES = [(1, 3, 64), (2, 4, 7), (63, 1, 5), (65, 3, 1), (64, 7, 24)]


def exact(x, kernel, state=None, ids=None):
    """Return outputs and state in fp64, tap by tap."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    ids = np.ones(x.shape[:2], int) if ids is None else numbered(np.asarray(ids))
    B, W = x.shape[0], kernel.shape[0]
    y, after = np.zeros_like(x), np.zeros((B, W, x.shape[2]))
    for b in range(B):
        real = np.flatnonzero(ids[b])
        owners = np.concatenate([np.ones(W, int), ids[b, real]])
        inputs = np.concatenate([after[b] if state is None else np.asarray(state[b], np.float64), x[b, real]])
        for i, t in enumerate(real):
            own = owners[i + 1 : i + 1 + W] == ids[b, t]
            y[b, t] = np.sum(kernel * inputs[i + 1 : i + 1 + W] * own[:, None], axis=0)
        after[b] = inputs[-W:] * (owners[-W:] == owners[-1])[:, None]
    return y, after


def caller(impl, *, ids=None):
    def call(x, kernel, state=None):
        return short_conv(x, kernel, state=state, segment_ids=ids, impl=impl)

    return call


@pytest.fixture
def draw(normal, packed_ids):
    """Return a source of (x, kernel, state), cotangents and ids."""

    def inputs(T, W, D, dtype="float32", batch=6):
        args = (normal(batch, T, D, dtype=dtype), normal(W, D), normal(batch, W, D, dtype=dtype))
        return args, (normal(batch, T, D, dtype=dtype), normal(batch, W, D, dtype=dtype)), packed_ids(T)

    return inputs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle_equals_fp64(case, draw, close):
    args, _, ids = draw(*case)

    @jax.jit
    def both(args, ids):
        return caller("oracle")(*args[:2]), caller("oracle", ids=ids)(*args)

    plain, packed = both(args, ids)
    close(plain, exact(*args[:2]), what="plain")
    close(packed, exact(*args, ids), what="packed, with a state")


def test_oracle_gradients_equal_fp64_differences(draw, normal, out_and_grads):
    """The convolution is linear in each argument, so that a difference is exact."""
    args, cotangents, ids = draw(20, 3, 5)
    _, grads = out_and_grads(caller("oracle", ids=ids), args, cotangents)
    for i, (x, grad) in enumerate(zip(args, grads, strict=True)):
        direction = np.asarray(normal(*x.shape), np.float64)

        def moved(by, i=i, x=x):
            out = exact(*args[:i], np.asarray(x, np.float64) + by, *args[i + 1 :], ids)
            return sum(np.sum(o * np.asarray(w, np.float64)) for o, w in zip(out, cotangents, strict=True))

        slope = moved(direction) - moved(0)
        assert abs(np.sum(grad * direction) - slope) < 1e-5 * np.linalg.norm(grad), f"argument {i}"


@pytest.mark.parametrize("impl", [*FAST, "oracle"])
def test_bias_and_silu_follow_the_convolution(impl, draw, normal, close):
    (x, kernel, state), _, ids = draw(20, 3, 5)

    @jax.jit
    def both(x, kernel, state, bias, ids):
        bare, after = short_conv(x, kernel, state=state, segment_ids=ids, impl="oracle")
        wanted = jnp.where((ids == 0)[..., None], 0, jax.nn.silu(bare + bias[None, None]))
        options = {"bias": bias, "silu": True, "state": state}
        found = short_conv(x, kernel, **options, segment_ids=ids, impl=impl)
        stepped, of_one = (
            short_conv_step(x[:, 0], kernel, **options),
            short_conv(x[:, :1], kernel, **options, impl=impl),
        )
        return (found, stepped[0]), ((wanted, after), of_one[0][:, 0])

    close(*both(x, kernel, state, normal(5), ids))


@parametrize_some("case", CASES, [CASES[i] for i in (0, 2, 4)], ids=str)
def test_every_form_equals_the_oracle(case, draw, out_and_grads, close):
    args, cotangents, ids = draw(*case)
    expected = out_and_grads(caller("oracle", ids=ids), args, cotangents)
    for impl in FAST:
        close(out_and_grads(caller(impl, ids=ids), args, cotangents), expected, what=impl)


@pytest.mark.parametrize("case", [(1, 3, 64), (65, 3, 5)], ids=str)
def test_every_form_equals_the_oracle_without_state_and_ids(case, draw, out_and_grads, close):
    args, cotangents, _ = draw(*case)
    expected = out_and_grads(caller("oracle"), args[:2], cotangents)
    for impl in FAST:
        close(out_and_grads(caller(impl), args[:2], cotangents), expected, what=impl)


def test_every_form_equals_the_oracle_in_bf16(draw, out_and_grads, close):
    args, cotangents, ids = draw(129, 3, 24, dtype="bfloat16")
    expected = out_and_grads(caller("oracle", ids=ids), args, cotangents)
    for impl in FAST:
        out, grads = out_and_grads(caller(impl, ids=ids), args, cotangents)
        assert {x.dtype for x in out} == {jnp.dtype("bfloat16")}
        close((out, grads), expected, "bfloat16", what=impl)


@pytest.mark.parametrize("impl", FAST)
def test_pieces_equal_one_call(impl, draw, out_and_grads, close):
    """A row of one document and a left-padded one, whose first pieces are padding only; gradients cross the state."""
    (x, kernel, _), cotangents, _ = draw(20, 3, 5, batch=2)
    ids = np.asarray([np.ones(20), np.arange(20) >= 6], np.int32)

    def in_pieces(x, kernel):
        outputs, state = [], None
        for start, stop in ((0, 1), (1, 6), (6, 8), (8, 20)):
            y, state = caller(impl, ids=ids[:, start:stop])(x[:, start:stop], kernel, state)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), state

    expected = out_and_grads(caller("oracle", ids=ids), (x, kernel), cotangents)
    close(out_and_grads(in_pieces, (x, kernel), cotangents), expected)


def test_steps_equal_one_call(draw, close):
    (x, kernel, state), _, _ = draw(10, 3, 5)
    step, outputs, after = jax.jit(short_conv_step), [], state
    for t in range(10):
        y, after = step(x[:, t], kernel, after)
        outputs.append(y)
    close((np.stack(outputs, axis=1), after), exact(x, kernel, state))


@pytest.mark.parametrize("W, dilation", [(3, 1), (9, 1), (11, 2), (70, 1)])
def test_toeplitz_equals_the_oracle(W, dilation, normal, out_and_grads, close):
    args = normal(2, 37, 5), normal(W, 5), normal(2, (W - 1) * dilation + 1, 5)
    cotangent = normal(2, 37, 5)

    def call(impl):
        return lambda x, kernel, state: short_conv(x, kernel, state=state, dilation=dilation, impl=impl)[0]

    close(*(out_and_grads(call(impl), args, cotangent) for impl in ("xla_toeplitz", "oracle")))


def test_toeplitz_says_what_it_does_not_take(normal):
    x = normal(1, 4, 2)
    with pytest.raises(UserError, match="packed documents"):
        short_conv(x, normal(9, 2), segment_ids=jnp.ones((1, 4), int), impl="xla_toeplitz")


@pytest.mark.parametrize("impl", [*FAST, "oracle"])
def test_vmap_equals_a_loop(impl, draw, close):
    (x, kernel, state), _, ids = draw(20, 3, 5)
    call = jax.jit(lambda x, kernel, state, ids: caller(impl, ids=ids)(x, kernel, state))
    x, kernel, state, ids = jax.device_get((x, kernel, state, ids))
    x, state, ids = (y.reshape(3, 2, *y.shape[1:]) for y in (x, state, ids))
    lanes = x, np.stack([kernel, -kernel, 2 * kernel]), state, ids
    mapped = jax.device_get(jax.jit(jax.vmap(call))(*lanes))
    for i in range(3):
        close(jax.tree.map(lambda y, i=i: y[i], mapped), call(*(y[i] for y in lanes)))


@pytest.mark.parametrize("impl", [*FAST, "oracle"])
def test_dilated_taps_are_a_long_kernel_with_zeros_between(impl, normal, packed_ids, close):
    x, kernel, ids = normal(6, 20, 4), normal(3, 4), packed_ids(20)
    spread = np.zeros((9, 4), np.float32)
    spread[::4] = kernel

    @jax.jit
    def both(x, kernel, spread, ids):
        y, state = short_conv(x, kernel, dilation=4, segment_ids=ids, impl=impl)
        long = short_conv(x, spread, segment_ids=ids, impl="oracle")
        stepped = short_conv_step(x[:, 0], kernel, state, dilation=4), short_conv_step(x[:, 0], spread, state)
        return ((y, state), stepped[0]), (long, stepped[1])

    close(*both(x, kernel, spread, ids))


def test_a_wide_kernel_equals_the_oracle(normal, packed_ids, out_and_grads, close):
    """More taps than are unrolled."""
    args, ids, cotangent = (normal(6, 30, 4), normal(MAX_UNROLLED_TAPS + 5, 4)), packed_ids(30), normal(6, 30, 4)
    calls = [lambda x, k, impl=impl: short_conv(x, k, segment_ids=ids, impl=impl)[0] for impl in ("xla_taps", "oracle")]
    close(*(out_and_grads(call, args, cotangent) for call in calls))
