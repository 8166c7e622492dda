"""Based's global mixer where its state is written every few tokens; `tests/test_contracts.py` has each token added."""

import jax
import jax.numpy as jnp
from flax import nnx
from helpers.cases import parametrize_some
from helpers.small_mixers import SMALL

from based_jax.nn.mixers import make_mixer

B, T, D = 2, 19, 16


@parametrize_some("kind", ["taylor", "prefix"], ["taylor"])
def test_prefills_and_steps_equal_one_pass(kind, normal, close):
    """Prefills add the recent tokens that steps have left; a document that begins leaves those of the last behind."""
    mixer = make_mixer(kind, D, std=0.2, rngs=nnx.Rngs(0), **SMALL[kind], flush=4)
    ids = jnp.asarray([[1] * T, [1] * 8 + [2] * (T - 8)], jnp.int32)

    @jax.jit
    def in_turns(mixer, x):
        cache, outputs = mixer.init_cache(B, T), []
        for start, stop in ((0, 2), (8, 11)):
            y, cache = mixer.prefill(x[:, start:stop], cache, ids[:, start:stop])
            last, cache = jax.lax.scan(
                lambda cache, x: mixer.step(x, cache)[::-1], cache, x[:, stop : 8 if stop < 8 else T].swapaxes(0, 1)
            )[::-1]
            outputs += [y, last.swapaxes(0, 1)]
        return jnp.concatenate(outputs, axis=1), cache

    x = normal(B, T, D)
    y, cache = in_turns(mixer, x)
    close(y, jax.jit(lambda mixer, x: mixer(x, ids))(mixer, x))
    sizes = [leaf.size for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sum(sizes) == B * mixer.state_size(T)
    assert mixer.state_size(T) == mixer.published_state_size(T) + 2 * 4 * (4 + 8)
