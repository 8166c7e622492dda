import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hlo
from helpers.cases import parametrize_some
from helpers.documents import numbered

from based_jax import parallel
from based_jax.ops import segments, softmax_chunks
from based_jax.ops.softmax import (
    ATTENTION,
    WINDOW_ATTENTION,
    attention,
    window_attention,
)


def fast(table, length=1):
    """Return a table's forms, of which the recurrent one does nothing new in a sequence longer than a band."""
    names = [name for name, entry in table.items() if entry.platform is None and name != "oracle"]
    return [name for name in names if name != "xla_steps" or length <= 65]


# (T, K, V, H, window): windows of one key, below, at and above a band, and longer than the sequence.
CASES = [
    (1, 16, 64, 2, 1),
    (2, 24, 112, 1, 64),
    (63, 7, 5, 3, 1),
    (64, 16, 1, 2, 64),
    (65, 24, 5, 1, 7),
    (127, 1, 64, 3, 65),
    (128, 8, 5, 2, 66),
    (129, 16, 64, 1, 129),
    (300, 8, 5, 2, 100),
]


def exact(q, k, v, window=None, ids=None):
    """Return outputs in fp64, query by query over the keys that it sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    ids = np.ones(q.shape[:2], int) if ids is None else numbered(np.asarray(ids))
    o = np.zeros_like(v)
    for b, t in zip(*np.nonzero(ids), strict=True):
        seen = np.flatnonzero(ids[b, : t + 1] == ids[b, t])
        seen = seen[seen > t - (window or t + 1)]
        s = np.einsum("hk,shk->hs", q[b, t], k[b, seen]) / math.sqrt(q.shape[-1])
        p = np.exp(s - s.max(axis=1, keepdims=True))
        o[b, t] = np.einsum("hs,shv->hv", p / p.sum(axis=1, keepdims=True), v[b, seen])
    return o


def caller(impl, window=None, ids=None):
    if window is None:
        return lambda q, k, v: attention(q, k, v, segment_ids=ids, impl=impl)
    return lambda q, k, v: window_attention(q, k, v, window=window, segment_ids=ids, impl=impl)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Cut time into chunks that are much shorter than the sequences."""
    monkeypatch.setattr(softmax_chunks, "CHUNK_TOKENS", 64)


@pytest.fixture
def draw(normal, packed_ids):
    """Return a source of (q, k, v), a cotangent and ids."""

    def inputs(T, K, V, H, dtype="float32", batch=6):
        q, k, v, cotangent = (normal(batch, T, H, size, dtype=dtype) for size in (K, K, V, V))
        return (q, k, v), cotangent, packed_ids(T)

    return inputs


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_oracle_equals_fp64(case, draw, close):
    *sizes, window = case
    qkv, _, ids = draw(*sizes)

    @jax.jit
    def all_three(qkv, ids):
        return [caller("oracle", *options)(*qkv) for options in ((window, ids), (None, ids), (window,))]

    close(all_three(qkv, ids), [exact(*qkv, window, ids), exact(*qkv, None, ids), exact(*qkv, window)])


def test_oracle_gradients_equal_fp64_differences(draw, normal, out_and_grads):
    qkv, cotangent, ids = draw(20, 7, 5, 2)
    _, grads = out_and_grads(caller("oracle", 6, ids), qkv, cotangent)
    for i, (x, grad) in enumerate(zip(qkv, grads, strict=True)):
        direction, step = np.asarray(normal(*x.shape), np.float64), 1e-5

        def moved(sign, i=i, x=x, by=step * direction):
            o = exact(*qkv[:i], np.asarray(x, np.float64) + sign * by, *qkv[i + 1 :], 6, ids)
            return np.sum(o * np.asarray(cotangent, np.float64))

        slope = (moved(1) - moved(-1)) / (2 * step)
        assert abs(np.sum(grad * direction) - slope) < 1e-5 * np.linalg.norm(grad), f"argument {i}"


@parametrize_some("case", CASES, [CASES[i] for i in (0, 2, 4, 7, 8)], ids=str)
def test_every_window_form_equals_the_oracle(case, draw, out_and_grads, close):
    *sizes, window = case
    qkv, cotangent, ids = draw(*sizes)
    expected = out_and_grads(caller("oracle", window, ids), qkv, cotangent)
    for impl in fast(WINDOW_ATTENTION, sizes[0]):
        close(out_and_grads(caller(impl, window, ids), qkv, cotangent), expected, what=impl)


@pytest.mark.parametrize("impl", [*fast(ATTENTION), "oracle", "pieces of time"])
def test_zeros_behind_heads_change_nothing(impl, draw, out_and_grads, close):
    qkv, cotangent, ids = draw(66, 7, 5, 2)
    options = {"segment_ids": ids, "head_dim": 7, "impl": impl if impl in ATTENTION else "auto"}

    def filled(*qkv):
        wide = (jnp.pad(x, [(0, 0)] * 3 + [(0, 8 - x.shape[3])]) for x in qkv)
        return attention(*wide, **options)[..., :5]

    expected = out_and_grads(caller("oracle", ids=ids), qkv, cotangent)
    pieces = 1 if impl in ATTENTION else 2
    with jax.set_mesh(parallel.make_mesh({"sequence": pieces}, jax.devices()[:pieces])):
        close(out_and_grads(filled, qkv, cotangent), expected)


@pytest.mark.parametrize("case", [(1, 16, 64, 2, 3), (65, 24, 5, 1, 1000)], ids=str)
def test_every_window_form_equals_the_oracle_without_ids(case, draw, out_and_grads, close):
    *sizes, window = case
    qkv, cotangent, _ = draw(*sizes, batch=2)
    expected = out_and_grads(caller("oracle", window), qkv, cotangent)
    for impl in fast(WINDOW_ATTENTION):
        close(out_and_grads(caller(impl, window), qkv, cotangent), expected, what=impl)


@pytest.mark.parametrize("sizes", [(1, 16, 16, 2), (65, 7, 5, 3), (300, 24, 24, 1)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_every_attention_form_equals_the_oracle(packed, sizes, draw, out_and_grads, close):
    qkv, cotangent, ids = draw(*sizes)
    ids = ids if packed else None
    expected = out_and_grads(caller("oracle", ids=ids), qkv, cotangent)
    for impl in fast(ATTENTION):
        close(out_and_grads(caller(impl, ids=ids), qkv, cotangent), expected, what=impl)


@pytest.mark.parametrize(
    ("T", "window", "packed"), [(300, None, False), (300, None, True), (65, 5, True), (300, 100, True)]
)
def test_every_form_equals_the_oracle_in_bf16(T, window, packed, draw, out_and_grads, close):
    qkv, cotangent, ids = draw(T, 16, 16, 2, dtype="bfloat16")
    ids = ids if packed else None
    expected = out_and_grads(caller("oracle", window, ids), qkv, cotangent)
    for impl in fast(ATTENTION if window is None else WINDOW_ATTENTION, T):
        o, grads = out_and_grads(caller(impl, window, ids), qkv, cotangent)
        assert o.dtype == jnp.bfloat16
        close((o, grads), expected, "bfloat16", what=impl)


@pytest.mark.parametrize("window", [None, 7])
def test_vmap_equals_a_loop(window, draw, close):
    (q, k, v), _, ids = draw(70, 8, 8, 2)
    lanes = [x.reshape(3, 2, *x.shape[1:]) for x in jax.device_get((q, k, v, ids))]
    table = ATTENTION if window is None else WINDOW_ATTENTION
    for impl in [*fast(table), "oracle"]:
        call = jax.jit(lambda q, k, v, ids, impl=impl: caller(impl, window, ids)(q, k, v))
        mapped = np.asarray(jax.jit(jax.vmap(call))(*lanes))
        for i in range(3):
            close(mapped[i], call(*(x[i] for x in lanes)), what=impl)


def test_very_large_scores_stay_finite(draw, close):
    (q, k, v), _, ids = jax.device_get(draw(130, 16, 16, 2))
    q, k = np.round(q * 8) * 64, np.round(k * 8) * 64
    for window, impl in ((None, "xla_quadratic"), (66, "xla_bands")):
        o = jax.jit(caller(impl, window, ids))(q, k, v)
        close(o, exact(q, k, v, window, ids))


def test_chunks_of_the_last_queries(draw, close):
    """However many keys stand before the queries, and with chunks of both that are not filled."""
    (q, k, v), _, ids = jax.device_get(draw(200, 8, 5, 2))
    numbers, expected = np.asarray(jax.jit(segments.numbered)(ids)), exact(q, k, v, ids=ids)
    for T in (200, 130, 1):
        last = (q[:, -T:], k, v, numbers[:, -T:], numbers)
        close(jax.jit(softmax_chunks.attention)(*last), expected[:, -T:])


def test_pairs_of_chunks_that_do_not_meet_are_left_out():
    full = softmax_chunks.Cut(past=0, window=1024, queries=64, keys=64).pairs(1024, 1024)
    assert len(full[0]) == 16 * 17 // 2
    window = softmax_chunks.Cut(past=128, window=65, queries=64, keys=64).pairs(128, 256)
    assert [pair.tolist() for pair in window] == [[0, 0, 1, 1], [1, 2, 2, 3]]


MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_each_device_attends_for_its_rows_and_heads(close, draw):
    """Both passes: an eighth of the products, and nothing exchanged."""
    qkv, _, ids = jax.device_get(draw(200, 8, 8, 4, batch=6))
    qkv, ids = [x[:4] for x in qkv], ids[:4]

    def both(q, k, v, ids):
        return jax.value_and_grad(lambda *x: jnp.sum(caller("xla_chunks", ids=ids)(*x) ** 2), (0, 1, 2))(q, k, v)

    alone = jax.jit(both).lower(*qkv, ids).compile()
    mesh = parallel.make_mesh(MESH)
    heads = jax.NamedSharding(mesh, jax.P(parallel.BATCH_AXES, None, parallel.HEAD_AXES))
    rows = jax.NamedSharding(mesh, jax.P(parallel.BATCH_AXES))
    with jax.set_mesh(mesh):
        shared = jax.jit(both, in_shardings=(heads,) * 3 + (rows,)).lower(*qkv, ids).compile()
    program = hlo.Program(shared.as_text())
    assert program.flops() == hlo.Program(alone.as_text()).flops() / 8
    exchanged = [x for axis in range(3) for x in program.exchanged((2, 2, 2), axis)]
    assert {x.shape for x in exchanged} <= {()}  # the sum
    placed = [jax.device_put(x, where) for x, where in zip((*qkv, ids), (heads, heads, heads, rows), strict=True)]
    close(shared(*placed), alone(*qkv, ids))


def test_chunks_run_in_shard_map(draw, close):
    qkv, cotangent, ids = draw(130, 8, 5, 2)
    rows = jax.P(parallel.BATCH_AXES)
    call = jax.shard_map(
        lambda q, k, v, ids: caller("xla_chunks", ids=ids)(q, k, v),
        mesh=parallel.make_mesh({"data": 2}, jax.devices()[:2]),
        in_specs=rows,
        out_specs=rows,
    )
    found = jax.jit(lambda *qkv: jax.vjp(lambda *x: call(*x, ids), *qkv)[1](cotangent))(*qkv)
    expected = jax.jit(lambda *qkv: jax.vjp(caller("oracle", ids=ids), *qkv)[1](cotangent))(*qkv)
    close(found, expected)


def temporary_bytes(f, T):
    shape = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    return jax.jit(f).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_window_memory_is_linear_and_below_one_score_matrix():
    forward = caller("xla_bands", 64)
    backward = jax.grad(lambda *qkv: jnp.sum(forward(*qkv) ** 2), argnums=(0, 1, 2))
    for f in (forward, backward):
        once, four_times = temporary_bytes(f, 2048), temporary_bytes(f, 8192)
        assert four_times < 4.5 * once
        assert four_times < 8192 * 8192


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_to_32768_tokens_takes_less_than_2_GiB(monkeypatch, dtype):
    """Both passes of one sequence with 16 heads, of which all scores together would take 64 GiB."""
    monkeypatch.undo()
    shape = jax.ShapeDtypeStruct((1, 32768, 16, 64), dtype)
    both = jax.value_and_grad(lambda *qkv: jnp.sum(caller("auto")(*qkv).astype(jnp.float32) ** 2), argnums=(0, 1, 2))
    assert jax.jit(both).lower(*[shape] * 3).compile().memory_analysis().temp_size_in_bytes < 2 << 30


def test_scanned_layers_do_not_share_who_sees_whom():
    """That is the same in all of them, but T^2 bytes a row: JAX would take it out of their scan."""
    T, ids = 1024, jnp.ones((1, 1024), jnp.int32)

    def layers(x, weights):
        def layer(x, weight):
            qkv = x[..., None] * weight[None, None, None]
            return attention(qkv, qkv, qkv, segment_ids=ids, impl="xla_chunks").sum(axis=-1), None

        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

    compiled = jax.jit(jax.grad(layers, argnums=(0, 1))).lower(jnp.ones((1, T, 2)), jnp.ones((3, 8))).compile()
    assert max(math.prod(shape) for x in hlo.Program(compiled.as_text()).instructions for shape in x.shapes) < T * T / 8
