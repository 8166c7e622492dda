"""Calls past 32-bit offsets and past the narrow axes of a grid; the oracle takes a sample of what they return."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from based_jax.bench import comparison
from based_jax.bench.catalogue.definitions import with_ones
from based_jax.bench.catalogue.operation import Case, Function, Shape
from based_jax.bench.catalogue.taylor import DIMS, TAYLOR_ATTENTION, definition, features

K, V = DIMS
WIDTHS = {"q": K, "k": K, "v": V}
TOKENS_AT_ONCE = 1 << 13
"""Tokens whose features are in memory together, and that are drawn together."""
SAMPLE_TOKENS = 64
"""Tokens of a sample."""


def many_blocks(seed: int, impl: str, *, batch: int = 4375, heads: int = 16, time: int = 100) -> dict:
    """Return the errors of 70,000 short sequences: of the first, the last, and those about block 65,535."""
    arrays, do = jax.jit(lambda key: _random(key, batch, time, heads))(jax.random.key(seed))
    run = jax.jit(comparison.both_passes(_function(impl)))
    found, bits, finite = _twice(lambda: run({"o": do}, arrays, None))
    middle = min(batch - 1, 65535 // heads)
    rows = np.unique(np.clip([0, 1, middle - 1, middle, middle + 1, middle + 2, batch - 2, batch - 1], 0, batch - 1))
    got, some, some_do = jax.device_get(jax.jit(lambda *x: jax.tree.map(lambda y: y[rows], x))(found, arrays, do))
    with jax.enable_x64(True):
        oracle = jax.jit(comparison.both_passes(definition))
        gradients = {"o": some_do, "state": np.zeros_like(got["state"])}
        wanted = oracle(*_wide((gradients, some | {"state": gradients["state"]})), np.ones((len(rows), time), np.int32))
        wanted = jax.device_get(wanted)
    return _found(seed, impl, (batch, heads, time), got, wanted, bits, finite)


def far_offsets(
    seed: int, impl: str, *, heads: int = 16, time: int = (1 << 21) + (1 << 14) + 1, tail: int = 2049
) -> dict:
    """Return the errors of one sequence whose values are more than 2^31 elements.

    Only the tail's outputs have a gradient. So the oracle needs the state before the tail, a sum over all tokens before
    it, and the tail itself; the gradients of earlier keys and values come from the gradient of that state.
    """
    first = time - tail
    arrays, do = jax.jit(lambda key: _random(key, 1, time, heads, first))(jax.random.key(seed))
    run = jax.jit(comparison.both_passes(_function(impl)))
    found, bits, finite = _twice(lambda: run({"o": do}, arrays, None))
    far = min(first - SAMPLE_TOKENS, (1 << 31) // (heads * V) - SAMPLE_TOKENS // 2)
    spans = [0, first // 2, far, first - SAMPLE_TOKENS]

    def cut(*trees):
        def span(begin, size):
            return jax.tree.map(lambda x: x[:, begin : begin + size], trees)

        return [*(span(begin, SAMPLE_TOKENS) for begin in spans), span(first, tail)]

    by_token = {name: found[name] for name in ("o", "dq", "dk", "dv")}
    *samples, (got, end, do) = jax.device_get(jax.jit(cut)(by_token, arrays, do))
    got |= {"state": jax.device_get(found["state"])}
    with jax.enable_x64(True):
        before = jax.device_get(jax.jit(lambda k, v: state_of(k, v, first))(arrays["k"], arrays["v"]))
        gradients, end = _wide(({"o": do, "state": np.zeros_like(before)}, end | {"state": before}))
        oracle = jax.jit(comparison.both_passes(definition))
        wanted = jax.device_get(oracle(gradients, end, np.ones((1, tail), np.int32)))
        pull = jax.jit(lambda k, v, ds: jax.vjp(_state, k, v)[1](ds))
        for i, (sample, x, _) in enumerate(samples):
            dk, dv = jax.device_get(pull(*_wide((x["k"], x["v"])), wanted["dstate"]))
            got |= {f"dk{i}": sample["dk"], f"dv{i}": sample["dv"], f"dq{i}": sample["dq"]}
            wanted |= {f"dk{i}": dk, f"dv{i}": dv, f"dq{i}": np.zeros_like(dk)}
    return _found(seed, impl, (1, heads, time), got, wanted, bits, finite)


CASES: dict[str, Callable[[int, str], dict]] = {
    "taylor_attention (4375,16,100) 70,000 blocks": many_blocks,
    "taylor_attention (1,16,2113537) past 2^31 elements": far_offsets,
}
"""Functions of a seed and an implementation of Taylor attention."""


def _function(impl: str) -> Function:
    return TAYLOR_ATTENTION.function(Case("taylor_attention", (1, 1, 1), DIMS, impl))


def _random(key: jax.Array, batch: int, time: int, heads: int, first: int = 0) -> tuple[dict, jax.Array]:
    """Return arrays (B, T, H, .) and the output's gradient, which is zero before token `first`."""

    def normal(key, width):
        def block(key):
            # Rounded afterwards: drawn in bf16 they would have a mean of -0.012.
            return jax.random.normal(key, (batch, min(TOKENS_AT_ONCE, time), heads, width)).astype(jnp.bfloat16)

        # In pieces: the generator's own numbers are 32 bits wide.
        blocks = jax.lax.map(block, jax.random.split(key, math.ceil(time / TOKENS_AT_ONCE)))
        return jnp.moveaxis(blocks, 0, 1).reshape(batch, -1, heads, width)[:, :time]

    keys = jax.random.split(key, 4)
    arrays = {name: normal(key, width) for key, (name, width) in zip(keys, WIDTHS.items(), strict=False)}
    do = normal(keys[3], V)
    if first:
        do = jnp.where(jnp.arange(time)[None, :, None, None] >= first, do, 0)
    return arrays, do


def _twice(run: Callable) -> tuple[dict, bool, bool]:
    """Return what a call returns, whether it does so twice, and whether all of it is finite."""
    digest = jax.jit(_digest)
    first, fine = jax.device_get(digest(run()))
    shapes = jax.eval_shape(run)
    held = [jnp.full(x.size * x.dtype.itemsize // 2, jnp.nan, jnp.bfloat16) for x in jax.tree.leaves(shapes)]
    for x in jax.block_until_ready(held):
        x.delete()
    found = run()
    second, fine_again = jax.device_get(digest(found))
    return found, first == second, bool(fine and fine_again)


def _digest(tree) -> tuple:
    """Return a number of the bits of each array and their places, and whether all are finite."""

    def number(x):
        words = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype == jnp.bfloat16 else jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            place = place * 1000003 + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum((words.astype(jnp.uint32) + 1) * ((place ^ (place >> 15)) | 1), dtype=jnp.uint32)

    fine = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])
    return jax.tree.map(number, tree), fine.all()


def state_of(k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    """Return the state (1, H, E, V+1) after so many tokens, in fp64."""

    def add(state, block):
        places = block * TOKENS_AT_ONCE + jnp.arange(TOKENS_AT_ONCE)
        taken = jnp.minimum(places, tokens - 1)
        some = [x[:, taken].astype(jnp.float64) for x in (k, v)]
        mask = (places < tokens)[None, :, None, None]
        return state + jnp.einsum("bthe,bthv->bhev", features(some[0]) * mask, with_ones(some[1])), None

    empty = jnp.zeros((1, k.shape[2], 1 + K + K * (K + 1) // 2, V + 1), jnp.float64)
    return jax.lax.scan(add, empty, jnp.arange(math.ceil(tokens / TOKENS_AT_ONCE)))[0]


def _state(k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("bthe,bthv->bhev", features(k), with_ones(v))


def _wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _found(seed: int, impl: str, shape: Shape, got: dict, wanted: dict, bits: bool, finite: bool) -> dict:
    rows = {name: comparison.error_of_rows(x, wanted[name]) for name, x in got.items() if name != "state"}
    errors = {name: comparison.error(x, wanted[name]) for name, x in got.items()}
    found = {"errors": errors, "rows": rows, "finite": finite, "same_bits": bool(bits)}
    place = {"seed": seed, "operation": "taylor_attention", "impl": impl, "shape": shape}
    return place | comparison.judged(found)
