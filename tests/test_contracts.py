"""What each mixer promises. A new mixer needs no line here unless its defaults are too large for width 16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.nn.mixer import Mixer
from based_jax.nn.mixers import MIXERS, make_mixer

# All tests of a mixer after each other: they share what is compiled.
pytestmark = pytest.mark.parametrize("kind", MIXERS, scope="module")

B, D, T = 3, 16, 9
LONGEST = 40  # the sequence that every cache has room for, so that one step is compiled for all

SMALL = {
    "attention": {"num_heads": 4, "num_kv_heads": 2, "bias": True},
    "deltanet": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2},
    "gla": {"num_heads": 2, "gate_low_rank_dim": 4, "expand_k": 1.0},
    "gsa": {"num_heads": 2, "num_slots": 4},
    "h3": {"d_state": 4, "head_dim": 2},
    "hgrn2": {"expand_ratio": 8, "lower_bound": 0.1},
    "hyena": {"l_max": 64, "filter_order": 8},
    "implicit_conv": {"l_max": 64, "hidden_dim": 4},
    "kda": {"num_heads": 2, "head_dim": 4},
    "lightning": {"num_heads": 2},
    "linear": {"num_heads": 2, "feature_dim": 4, "feature_map": "hedgehog"},
    "long_conv": {"l_max": 64},
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 4, "headdim": 8, "ngroups": 2},
    "prefix": {"num_heads": 2, "feature_dim": 4},
    "retnet": {"num_heads": 2},
    "rwkv4_channel_mix": {"expand": 2.0},
    "rwkv5": {"head_size": 8},
    "rwkv6": {"num_heads": 2, "proj_low_rank_dim": 2, "gate_low_rank_dim": 4},
    "rwkv7": {"head_dim": 8, **dict.fromkeys(("decay_low_rank_dim", "gate_low_rank_dim", "a_low_rank_dim"), 4)},
    "rwkv7_channel_mix": {"expand": 2.0},
    "simple_gla": {"num_heads": 2},
    "taylor": {"num_heads": 2, "feature_dim": 4},
    "window": {"num_heads": 2, "window": 4},
}

IMPOSSIBLE = {int: -1, float: -1.0, str: "no such thing"}


@functools.cache
def mixer_of(kind, seed=0, dtype=jnp.float32):
    """Return a mixer of test size with projections large enough that nothing hides in a tolerance."""
    return make_mixer(kind, D, std=0.2, out_std=0.2, dtype=dtype, rngs=nnx.Rngs(seed), **SMALL.get(kind, {}))


call = jax.jit(lambda mixer, x, ids=None: mixer(x, ids))
prefill = jax.jit(lambda mixer, x, cache, ids=None: mixer.prefill(x, cache, ids))
step = jax.jit(lambda mixer, x, cache: mixer.step(x, cache))


def empty(mixer):
    return mixer.init_cache(B, LONGEST)


def read(mixer, x, cache):
    """Return the outputs of x read token by token."""
    outputs = []
    for t in range(x.shape[1]):
        y, cache = step(mixer, x[:, t], cache)
        outputs.append(y)
    return np.stack(outputs, axis=1)


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
    """Split after one token, before the window's 4 and after them, and after the last."""
    mixer, x = mixer_of(kind), np.asarray(normal(B, T, D))
    whole = call(mixer, x)
    close(read(mixer, x, empty(mixer)), whole, what="steps only")
    for split in (1, 3, 4, T):
        y, cache = prefill(mixer, x[:, :split], empty(mixer))
        close(y, whole[:, :split], what=f"prefill of {split}")
        if split < T:
            close(read(mixer, x[:, split:], cache), whole[:, split:], what=f"steps after {split}")


@pytest.mark.parametrize("pieces", [(4, 1, 4), (3, 3, 3)], ids=str)
def test_chunked_prefill_equals_one_prefill(kind, pieces, normal, close):
    mixer, x = mixer_of(kind), np.asarray(normal(B, T + 2, D))
    cache, start = empty(mixer), 0
    for length in pieces:
        _, cache = prefill(mixer, x[:, start : start + length], cache)
        start += length
    _, once = prefill(mixer, x[:, :T], empty(mixer))
    close(cache, once)
    close(read(mixer, x[:, T:], cache), read(mixer, x, empty(mixer))[:, T:])


def test_packed_documents_equal_separate_ones(kind, normal, close):
    """Three documents, one of one token, in three orders; the last goes on after the row, and a prefill cuts one."""
    mixer, x, lengths = mixer_of(kind), np.asarray(normal(B, T, D)), (5, 1, 3)
    alone = read(mixer, x, empty(mixer))
    orders = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    packed, expected = (
        np.stack([np.concatenate([of[i, : lengths[i]] for i in order]) for order in orders]) for of in (x, alone)
    )
    ids = np.stack([np.concatenate([[(3, 1, 2)[i]] * lengths[i] for i in order]) for order in orders])
    close(call(mixer, packed, ids), expected)
    first, cache = prefill(mixer, packed[:, :7], empty(mixer), ids[:, :7])
    second, cache = prefill(mixer, packed[:, 7:], cache, ids[:, 7:])
    close(np.concatenate([first, second], axis=1), expected)
    further, expected = (np.stack([of[order[-1]][lengths[order[-1]] :][:3] for order in orders]) for of in (x, alone))
    close(read(mixer, further, cache), expected)


def test_left_padding_changes_nothing(kind, normal, close):
    """Rows without padding, with some, and with a first chunk that is padding only."""
    mixer, x, pads, chunk = mixer_of(kind), np.asarray(normal(B, T + 4, D)), (0, 2, 7), 7
    ids = (np.arange(T) >= np.asarray(pads)[:, None]).astype(np.int32)
    alone = read(mixer, np.stack([np.roll(row, -pad, axis=0) for row, pad in zip(x, pads, strict=True)]), empty(mixer))
    whole = call(mixer, x[:, :T], ids)
    first, cache = prefill(mixer, x[:, :chunk], empty(mixer), ids[:, :chunk])
    second, cache = prefill(mixer, x[:, chunk:T], cache, ids[:, chunk:])
    continued = np.concatenate([first, second, read(mixer, x[:, T:], cache)], axis=1)
    for row, pad in enumerate(pads):
        close(whole[row, pad:], alone[row, : T - pad], what=f"one pass, padded by {pad}")
        close(continued[row, pad:], alone[row, : T + 4 - pad], what=f"prefill and steps, padded by {pad}")


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


def test_vmap_over_parameters_equals_a_loop(kind, normal, close):
    mixers, x = [mixer_of(kind, seed) for seed in range(3)], normal(3, B, T, D)
    graphdef = nnx.graphdef(mixers[0])
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, mixers))
    lanes = jax.jit(jax.vmap(lambda params, x: nnx.merge(graphdef, params)(x)))(params, x)
    close(lanes, np.stack([call(mixer, x[i]) for i, mixer in enumerate(mixers)]))


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


def test_sharded_equals_unsharded(kind, normal, out_and_grads, close):
    """Rows over 2 devices and parameters by their logical names over 4, gradients included."""
    graphdef, params = nnx.split(mixer_of(kind))
    x, cotangent = normal(4, T, D), normal(4, T, D)
    mesh = parallel.make_mesh({"data": 2, "tensor": 4})
    placed = jax.device_put(params, parallel.shardings(params, mesh))
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))

    def forward(params, x):
        return nnx.merge(graphdef, params)(x)

    sharded = out_and_grads(forward, (placed, jax.device_put(x, parallel.batch_sharding(mesh))), cotangent)
    close(sharded, out_and_grads(forward, (params, x), cotangent))


def test_impossible_options_are_refused(kind):
    for field in dataclasses.fields(MIXERS[kind].Config):
        if type(field.default) in IMPOSSIBLE:
            options = {**SMALL.get(kind, {}), field.name: IMPOSSIBLE[type(field.default)]}
            with pytest.raises(UserError, match=str(options[field.name])):
                make_mixer(kind, D, rngs=nnx.Rngs(0), **options)(jnp.ones((1, 4, D)))
    name = dataclasses.fields(MIXERS[kind].Config)[0].name
    with pytest.raises(UserError, match=f"Unknown option of mixer '{kind}' '{name}l': did you mean '{name}'"):
        make_mixer(kind, D, rngs=nnx.Rngs(0), **{f"{name}l": 1})


def test_declares_what_it_is(kind):
    mixer = MIXERS[kind]
    assert isinstance(mixer_of(kind), Mixer)
    assert "Source: " in mixer.__doc__
    assert mixer.Config.__dataclass_params__.frozen
    mixer.Config()
