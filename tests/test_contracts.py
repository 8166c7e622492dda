"""What each mixer promises. A new mixer needs no line here unless its defaults are too large for width 16."""

import dataclasses
import functools
import itertools
import math
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.small_mixers import SMALL

from based_jax import parallel
from based_jax.dims import Unbroken
from based_jax.errors import UserError
from based_jax.generate.state import State
from based_jax.generate.state_layout import StateLayout
from based_jax.nn.mixer import Mixer
from based_jax.nn.mixers import MIXERS, make_mixer

# All tests of a mixer after each other: they share what is compiled.
pytestmark = pytest.mark.parametrize("kind", MIXERS, scope="module")

B, D, T = 9, 16, 9
LONGEST = 40  # the sequence that every cache has room for, so that one step is compiled for all

# Ids of rows that are read in two halves: what any document and any padding may do at their ends and at the cut.
PATTERNS = """
    1 1 1 0 0 0   1 1 1 1 0 0
    0 0 0 1 1 1   0 0 1 1 1 1
    1 0 0 1 0 1   1 0 1 1 0 1
    0 0 0 0 0 0   0 1 1 0 1 2
    1 1 1 1 1 1   0 0 0 0 0 0
    3 3 3 3 3 1   2 2 2 2 2 2
    1 2 1 0 1 1   0 1 2 2 0 1
"""

HUGE = 10**18
IMPOSSIBLE = {int: (-1,), float: (-1.0, math.nan, math.inf), str: ("no such thing",)}
DOUBTFUL = {int: (0, HUGE), float: (0.0, -0.5, 1e-30, 1e30), str: ()}  # refused, or right


@functools.cache
def mixer_of(kind, seed=0, dtype=jnp.float32):
    """Return a mixer of test size with projections large enough that nothing hides in a tolerance."""
    return make_mixer(kind, D, std=0.2, out_std=0.2, dtype=dtype, rngs=nnx.Rngs(seed), **SMALL.get(kind, {}))


call = jax.jit(lambda mixer, x, ids=None: mixer(x, ids))
prefill = jax.jit(lambda mixer, x, cache, ids=None: mixer.prefill(x, cache, ids), donate_argnames="cache")
step = jax.jit(lambda mixer, x, cache: mixer.step(x, cache), donate_argnames="cache")


def empty(mixer):
    return mixer.init_cache(B, LONGEST)


def read(mixer, x, cache):
    """Return the outputs of x read token by token."""
    return decode(mixer, x, cache)[0]


def decode(mixer, x, cache):
    """Return the outputs of x read token by token, and the cache after them."""
    outputs = []
    for t in range(x.shape[1]):
        y, cache = step(mixer, x[:, t], cache)
        outputs.append(y)
    return np.stack(outputs, axis=1), cache


def documents(ids):
    """Return (row, times) of each document of rows of ids: the times of a longest run of equal ids, without padding."""
    for row, of_row in enumerate(ids):
        times = np.flatnonzero(of_row)
        begins = 1 + np.flatnonzero(np.diff(of_row[times]))
        yield from ((row, document) for document in np.split(times, begins))


def read_alone(mixer, x, ids):
    """Return the outputs of x where each document is read by itself, token by token; 0 at padding."""
    outputs = np.zeros_like(x)
    for some in itertools.batched(documents(ids), B):
        alone = np.zeros((B, max(times.size for _, times in some), D), np.float32)
        for i, (row, times) in enumerate(some):
            alone[i, : times.size] = x[row, times]
        y = read(mixer, alone, empty(mixer))
        for i, (row, times) in enumerate(some):
            outputs[row, times] = y[i, : times.size]
    return outputs


def test_causal(kind, normal):
    """Another token t changes output t and none before: row t of 9 has one, and the rows of the last batch none."""
    mixer, x, other = mixer_of(kind), np.asarray(normal(T, D)), np.asarray(normal(T, D))
    rows = np.where(np.eye(T + B, T)[..., None], other[None], x[None])
    y = np.concatenate([call(mixer, rows[i : i + B]) for i in range(0, T + B, B)])
    influence = np.abs(y[:T] - y[T:][:1]).max(axis=-1)  # of the row's token on each output
    assert influence.max() > 1e-2
    assert np.tril(influence, -1).max() <= 1e-6 * influence.max()
    assert np.diag(influence).min() > 1e-3 * influence.max()


def test_outputs_at_some_positions_are_those_of_all(kind, rng, normal, close):
    mixer, x = mixer_of(kind), np.asarray(normal(B, T, D))
    places = np.stack([rng.permutation(T)[:4] for _ in range(B)])
    some = jax.jit(lambda mixer, x, places: mixer(x, positions=places))(mixer, x, places)
    close(some, np.take_along_axis(np.asarray(call(mixer, x)), places[..., None], axis=1))


def test_prefill_and_steps_equal_one_pass(kind, normal, close):
    """Split after one token, after the window's 4, and after the last."""
    mixer, x = mixer_of(kind), np.asarray(normal(B, T, D))
    whole = call(mixer, x)
    close(read(mixer, x, empty(mixer)), whole, what="steps only")
    for split in (1, 4, T):
        y, cache = prefill(mixer, x[:, :split], empty(mixer))
        close(y, whole[:, :split], what=f"prefill of {split}")
        if split < T:
            close(read(mixer, x[:, split:], cache), whole[:, split:], what=f"steps after {split}")


@pytest.mark.parametrize("pieces", [(4, 1, 4), (1, 4, 4)], ids=str)
def test_chunked_prefill_equals_one_prefill(kind, pieces, normal, close):
    mixer, x = mixer_of(kind), np.asarray(normal(B, T + 2, D))
    cache, start = empty(mixer), 0
    for length in pieces:
        _, cache = prefill(mixer, x[:, start : start + length], cache)
        start += length
    _, once = prefill(mixer, x[:, :T], empty(mixer))
    close(cache, once)
    close(decode(mixer, x[:, :T], empty(mixer))[1], once, what="steps")
    close(read(mixer, x[:, T:], cache), read(mixer, x, empty(mixer))[:, T:])


class OneLayer(typing.NamedTuple):
    """What a layout of states asks of a decoder, of a mixer alone."""

    mixer: Mixer
    config: typing.Any
    fingerprint: str = "of a test"

    def init_cache(self, rows, max_len):
        return ((self.mixer.init_cache(rows, max_len),),)


def test_a_state_that_was_saved_and_forked_goes_on_bitwise(kind, normal, tmp_path):
    mixer, x, row, C = mixer_of(kind), np.asarray(normal(B, T, D)), 3, 4
    layout = StateLayout(OneLayer(mixer, types.SimpleNamespace(layers=((kind, {}),))))
    _, cache = prefill(mixer, x[:, :C], empty(mixer))
    state = layout.take(((cache,),), C, row=row)
    unbroken, last = decode(mixer, x[:, C:], cache)
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert loaded == state != layout.take(((last,),), C, row=row)
    for _ in range(2):
        [[fork]] = layout.fork(loaded, LONGEST, rows=B)
        np.testing.assert_array_equal(read(mixer, np.repeat(x[row : row + 1, C:], B, axis=0), fork)[row], unbroken[row])


@pytest.mark.parametrize("before", [0, 2], ids="{} tokens before".format)
def test_padding_is_inert_and_documents_do_not_see_each_other(kind, before, rng, normal, close):
    """Two prefills and steps, after tokens without an id, which the first document goes on with."""
    halves = np.asarray([row.split() for row in PATTERNS.strip().splitlines()], np.int32)
    halves = np.concatenate([halves, rng.integers(0, 3, (B - len(halves), halves.shape[1]))]).astype(np.int32)
    n, C, after = before, halves.shape[1] // 2, 4
    last = [row[row != 0][-1] for row in halves]
    ids = np.concatenate([np.zeros((B, n), np.int32), halves, np.stack([last] * after, axis=1)], axis=1)
    ids[:, :n] = [[row[row != 0][0]] * n for row in halves]
    mixer, x = mixer_of(kind), np.asarray(normal(B, ids.shape[1], D))
    expected, real = read_alone(mixer, x, ids), (ids != 0)[..., None]
    _, untouched = prefill(mixer, x[:, n : n + C], empty(mixer), np.zeros((B, C), np.int32))
    jax.tree.map(np.testing.assert_array_equal, untouched, empty(mixer))

    cache, parts = empty(mixer), [np.zeros((B, 0, D))]
    for t in range(n):
        y, cache = step(mixer, x[:, t], cache)
        parts.append(y[:, None])
    for start in (n, n + C):
        y, cache = prefill(mixer, x[:, start : start + C], cache, ids[:, start : start + C])
        parts.append(y)
    parts.append(read(mixer, x[:, n + 2 * C :], cache))
    continued = np.concatenate(parts, axis=1)
    close(np.where(real, continued, 0), expected, what="prefills and steps")
    if not before:
        whole = call(mixer, x[:, : 2 * C], ids[:, : 2 * C])
        close(np.where(real[:, : 2 * C], whole, 0), expected[:, : 2 * C], what="one pass")


def test_tokens_beyond_a_cache_are_refused_or_nan(kind, normal, close):
    """A cache that grows gives NaN to each token that it has no room for, and what is right to those before."""
    mixer, x, room = mixer_of(kind), np.asarray(normal(B, 7, D)), 4
    grows = mixer.state_size(room) < mixer.state_size(room + 1)
    expected = read(mixer, x, empty(mixer))
    if grows:
        expected[:, room:] = np.nan
        with pytest.raises(UserError, match=f"room for {room} tokens, and {room + 1} are to be read"):
            jax.eval_shape(mixer.prefill, x[:, : room + 1], mixer.init_cache(B, room))
    first, cache = prefill(mixer, x[:, :6], mixer.init_cache(B, room), np.asarray([[0, 1, 1, 1, 1, 1]] * B, np.int32))
    first_alone = read(mixer, x[:, 1:6], mixer.init_cache(B, room))
    close(np.isnan(first_alone), np.isnan(expected[:, :5]))
    close(np.nan_to_num(first[:, 1:]), np.nan_to_num(first_alone))
    later = np.asarray(read(mixer, x[:, 6:], cache))
    assert np.isnan(later).all() == grows and np.isnan(later).any() == grows
    close(np.nan_to_num(read(mixer, x, mixer.init_cache(B, room))), np.nan_to_num(expected))


def test_impossible_caches_are_refused(kind):
    for sizes, message in (((B, 0), "max_len of a cache is 0"), ((0, T), "batch of a cache is 0")):
        with pytest.raises(UserError, match=message):
            mixer_of(kind).init_cache(*sizes)


def test_decodes_with_64_bit_types_enabled(kind):
    """What a scan carries keeps its types, as the prefill's results do."""

    def decode(x, ids):
        mixer = make_mixer(kind, D, rngs=nnx.Rngs(0), **SMALL.get(kind, {}))
        _, cache = mixer.prefill(x, mixer.init_cache(B, LONGEST), ids)
        return jax.lax.scan(lambda cache, x: mixer.step(x, cache)[::-1], cache, jnp.moveaxis(x, 1, 0))

    with jax.enable_x64(True):
        cache, y = jax.eval_shape(decode, jnp.ones((B, 4, D), jnp.float32), jnp.ones((B, 4), jnp.int64))
    assert y.dtype == jnp.float32
    assert not any(leaf.dtype in (jnp.float64, jnp.int64) for leaf in jax.tree.leaves(cache))


def test_many_steps_equal_one_pass(kind, normal, close):
    """Long enough for a ring to wrap around several times."""
    mixer, x = mixer_of(kind), np.asarray(normal(B, LONGEST, D))
    close(read(mixer, x, empty(mixer)), call(mixer, x))


@pytest.mark.parametrize("seq_len", [7, 64])
def test_state_size_is_that_of_the_cache(kind, seq_len):
    mixer = mixer_of(kind)
    cache = jax.eval_shape(lambda: mixer.init_cache(3, seq_len))
    sizes = [leaf.size for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sum(sizes) == 3 * mixer.state_size(seq_len)


def test_flops_cover_each_weight_and_grow_with_the_state(kind):
    mixer = mixer_of(kind)
    weights = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)) if leaf.ndim > 1)
    short, long = mixer.flops_per_token(1024), mixer.flops_per_token(4096)
    assert 2 * weights <= short <= long
    assert (short < long) == (mixer.state_size(1024) < mixer.state_size(4096))


def test_bf16_stays_close_to_fp32(kind, normal, close):
    @jax.jit
    def in_one_pass_and_in_two(mixer, x):
        y, cache = mixer.prefill(x[:, :-1], empty(mixer))
        last, _ = mixer.step(x[:, -1], cache)
        return mixer(x), jnp.concatenate([y, last[:, None]], axis=1)

    x = normal(B, T, D, dtype="bfloat16")
    exact = call(mixer_of(kind), np.asarray(x, np.float32))
    for y in in_one_pass_and_in_two(mixer_of(kind, dtype=jnp.bfloat16), x):
        assert y.dtype == jnp.bfloat16
        error = np.asarray(y, np.float64) - exact
        assert np.linalg.norm(error) <= 2e-2 * np.linalg.norm(exact)


def test_ids_of_a_model_are_read(kind):
    x, ids = jnp.zeros((2, T, D)), jnp.ones((2, T), jnp.int32)
    assert jax.eval_shape(mixer_of(kind), x, Unbroken(ids)).shape == x.shape


def test_parameters_are_divided_among_devices(kind):
    """By their logical names; what comes of it, and of lanes, is compared in `nn/mixers/test_meshes.py`."""
    params, mesh = nnx.state(mixer_of(kind), nnx.Param), parallel.make_mesh({"data": 2, "tensor": 4})
    shardings = jax.tree.leaves(parallel.shardings(params, mesh))
    shapes = [x.shard_shape(leaf.shape) for x, leaf in zip(shardings, jax.tree.leaves(params), strict=True)]
    assert any(shape != leaf.shape for shape, leaf in zip(shapes, jax.tree.leaves(params), strict=True))


def test_impossible_options_are_refused(kind):
    """A value that is not refused gives outputs of the right shape."""

    def mixed(options):
        return make_mixer(kind, D, rngs=nnx.Rngs(0), **options)(jnp.ones((1, 4, D)))

    for field in dataclasses.fields(MIXERS[kind].Config):
        (type_,) = {int, float, str} & {field.type, *typing.get_args(field.type)} or {None}
        for value in (*IMPOSSIBLE.get(type_, ()), *DOUBTFUL.get(type_, ())):
            options = {**SMALL.get(kind, {}), field.name: value}
            possible = value in DOUBTFUL[type_] or field.default is None
            try:
                y = nnx.eval_shape(functools.partial(mixed, options))
                assert possible and y.shape == (1, 4, D), field.name
            except UserError as error:
                assert str(value) in str(error) and str(error).endswith(".")
    name = dataclasses.fields(MIXERS[kind].Config)[0].name
    with pytest.raises(UserError, match=f"Unknown option of mixer '{kind}' '{name}l': did you mean '{name}'"):
        make_mixer(kind, D, rngs=nnx.Rngs(0), **{f"{name}l": 1})


def test_declares_what_it_is(kind):
    mixer = MIXERS[kind]
    assert isinstance(mixer_of(kind), Mixer)
    assert "Source: " in mixer.__doc__
    assert mixer.Config.__dataclass_params__.frozen
    mixer.Config()
