"""Options of published layers that no array of theirs has, by what they have to equal."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers.cases import parametrize_some
from helpers.random_models import filled

from based_jax.nn.gated import GatedLinearMixer
from based_jax.nn.mixers import make_mixer

D = 16
SHARED = {
    "simple_gla": ({"num_heads": 4, "num_kv_heads": 2}, {"num_heads": 4}),
    "retnet": ({"num_heads": 4, "num_kv_heads": 1, "conv_size": 3}, {"num_heads": 4, "conv_size": 3}),
    "gsa": ({"num_heads": 4, "num_kv_heads": 2, "num_slots": 3}, {"num_heads": 4, "num_slots": 3}),
    "gated_deltanet": ({"num_heads": 2, "num_v_heads": 4}, {"num_heads": 4, "expand_k": 2.0}),
    "kda": ({"num_heads": 1, "num_v_heads": 2, "head_dim": 4}, {"num_heads": 2, "head_dim": 4}),
}
"""Options of a mixer whose heads share, and of one in which each has its own."""


def made(kind, rng, **options):
    return filled(lambda: make_mixer(kind, D, rngs=nnx.Rngs(0), **options), rng, 0.3)


def repeated(mixer: GatedLinearMixer, columns, heads):
    """Return columns of queries, keys and values (..., widths) with those of shared heads once for each that shares."""
    parts = np.split(np.asarray(columns), np.cumsum(mixer.widths)[:-1], axis=-1)
    return np.concatenate(
        [each_head(part, count, heads) for part, count in zip(parts, mixer.projected, strict=True)], -1
    )


def each_head(part, count, heads):
    by_head = part.reshape(*part.shape[:-1], count, -1)
    return np.repeat(by_head, heads // count, axis=-2).reshape(*part.shape[:-1], -1)


call = jax.jit(lambda mixer, x: mixer(x))


@parametrize_some("kind", SHARED, ["simple_gla"])
def test_shared_heads_are_those_of_repeated_projections(kind, rng, normal, close):
    shared, own = (made(kind, rng, **options) for options in SHARED[kind])
    heads = shared.num_heads
    params = dict(nnx.to_flat_state(nnx.state(shared, nnx.Param)))
    for path, leaf in nnx.to_flat_state(nnx.state(own, nnx.Param)):
        value = params[path][...]
        if path[0] in ("qkv", "conv_kernel"):
            value = repeated(shared, value, heads)
        if kind == "gsa" and path[0] == "decay":
            value = each_head(np.asarray(value), shared.projected.keys, heads)
        leaf.set_value(jnp.asarray(value))
        nnx.update(own, nnx.from_flat_state([(path, leaf)]))
    x = np.asarray(normal(2, 9, D))
    close(call(shared, x), call(own, x))
    assert shared.published_state_size(9) == own.published_state_size(9)


def test_hgrn2_s_taps_have_no_activation(rng, normal, close):
    """A tap of 1 two tokens back delays the layer by two tokens."""
    delayed, plain = made("hgrn2", rng, expand_ratio=8, conv_size=3), made("hgrn2", rng, expand_ratio=8)
    nnx.update(delayed, nnx.state(plain))
    delayed.conv_kernel[...] = jnp.zeros_like(delayed.conv_kernel[...]).at[0].set(1.0)
    x = np.asarray(normal(2, 9, D))
    close(call(delayed, x)[:, 2:], call(plain, x)[:, :-2])


@parametrize_some("kind", ["deltanet", "gated_deltanet"], ["deltanet"])
def test_rates_go_up_to_two(kind, rng, normal):
    q, k, v, x = (jnp.asarray(normal(*shape)) for shape in ((1, 4, 1, 4), (1, 4, 1, 4), (1, 4, 1, 3), (1, 4, D)))
    plain, doubled = (made(kind, rng, num_heads=1, allow_neg_eigval=allow) for allow in (False, True))
    nnx.update(doubled, nnx.state(plain))
    rates = [mixer._gated(x, q, k, v)[4] for mixer in (plain, doubled)]
    np.testing.assert_allclose(rates[1], 2 * rates[0], rtol=1e-6)


def test_both_factors_of_base_conv_have_an_activation(rng, normal, close):
    mixer, x = made("base_conv", rng, use_act=True), np.asarray(normal(2, 9, D))
    padded = np.pad(x, [(0, 0), (2, 0), (0, 0)])
    taps = sum(np.asarray(mixer.conv_kernel[...])[tap] * padded[:, tap : tap + 9] for tap in range(3))
    kernel, *biases = (
        np.asarray(leaf[...]) for leaf in (mixer.projection.kernel, mixer.projection.bias, mixer.conv_bias)
    )
    factors = taps + biases[1], x @ kernel + biases[0]
    close(call(mixer, x), np.prod([y / (1 + np.exp(-y)) for y in factors], axis=0) + x)
