"""Options of mixers, and caches."""

import jax.numpy as jnp
from flax import nnx

from based_jax.nn.mixers import make_mixer
from tests.bad_inputs.cases import Call, Command

NAN = float("nan")


def option(kind: str, sentence: str, **options) -> Call:
    """Return the case of a mixer that cannot be built at width 16."""
    name = f"{kind} with {options}"
    return Call(name, lambda _: nnx.eval_shape(lambda: make_mixer(kind, 16, rngs=nnx.Rngs(0), **options)), sentence)


def prefill(kind: str, max_len: int, tokens: int, sentence: str, **options) -> Call:
    """Return the case of tokens that a cache has no room for."""

    def call(_):
        mixer = make_mixer(kind, 4, rngs=nnx.Rngs(0), **options)
        return mixer.prefill(jnp.ones((1, tokens, 4)), mixer.init_cache(1, max_len))

    return Call(f"{tokens} tokens into a cache of {max_len} of {kind}", call, sentence)


CASES: tuple[Command | Call, ...] = (
    option("attention", "A head has 1 components; rotary turns pairs of them", num_heads=16, rotary_fraction=1.0),
    option("window", "A head has 1 components; rotary turns pairs of them", num_heads=16),
    option("window", "sinks is -1; it is at least 0", num_heads=2, sinks=-1),
    option("taylor_window", "feature_dim is 33; Taylor attention takes 1 to 32", num_heads=2, feature_dim=33),
    option("retnet", "A head has 1 components; rotary turns pairs of them", num_heads=16),
    option("attention", "rotary_base is nan; it is above 0", num_heads=2, rotary_base=NAN),
    option("attention", "num_kv_heads is 0; it divides num_heads, which is 2", num_heads=2, num_kv_heads=0),
    option("gla", "gate_logit_normalizer is nan; it is above 0", num_heads=2, gate_logit_normalizer=NAN),
    option("deltanet", "expand_k is nan; it is above 0", num_heads=2, expand_k=NAN),
    option("deltanet", "conv_size is -1; it is at least 0", num_heads=2, conv_size=-1),
    option("kda", "expand_v is 0.001; times 8 it is a width between 1", head_dim=8, expand_v=0.001),
    option("rwkv4_channel_mix", "expand is 0.01; times 16 it is a width between 1", expand=0.01),
    option("hyena", "l_max is 1000000000; it is at most 16777216", l_max=10**9),
    option("mamba", "d_state is 1000000000000; it is at most 2147483647", d_state=10**12),
    prefill("attention", 3, 4, "The cache has room for 3 tokens, and 4 are to be read", num_heads=1),
    prefill("long_conv", 3, 4, "The cache has room for 3 tokens, and 4 are to be read", l_max=8),
    prefill("attention", 0, 1, "max_len of a cache is 0; it is at least 1", num_heads=1),
    prefill("long_conv", 9, 1, "The sequence has 9 tokens; the filter is l_max = 8 long", l_max=8),
)
