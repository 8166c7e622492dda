"""TPU kernels inside a caller's own `jax.shard_map`, which checks over which devices their results vary."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers.devices import tpus

from based_jax.ops.delta_rule import delta_rule, delta_rule_step, dplr
from based_jax.ops.gated_conv import gated_short_conv
from based_jax.ops.gated_linear_attention import gated_linear_attention
from based_jax.ops.norm import residual_layer_norm, residual_rms_norm
from based_jax.ops.softmax import window_attention
from based_jax.ops.taylor import taylor_attention
from based_jax.ops.taylor_decode import initial_state, taylor_attention_decode

B, T, H, D = 4, 256, 2, 64
TOKENS, RATES, STREAM = (B, T, H, D), (B, T, H), (B, T, D)


def ones(*shapes, dtype=jnp.bfloat16):
    return [jnp.ones(shape, dtype) for shape in shapes]


def decays(channels=1):
    return -jnp.ones((*RATES, channels))


KEYS = ones((B, T, H, 16), (B, T, H, 16), TOKENS)
QKV = ones(TOKENS, TOKENS, TOKENS)
WEIGHTS = jnp.ones(D)
CASES = {
    "taylor": (taylor_attention, KEYS, []),
    "window": (functools.partial(window_attention, window=65), QKV, []),
    "gated linear attention": (gated_linear_attention, [*QKV, decays()], []),
    "delta rule": (delta_rule, [*QKV, decays(), jnp.ones(RATES)], []),
    "delta rule by channel": (delta_rule, [*QKV, decays(D), jnp.ones(RATES)], []),
    "low rank": (dplr, [*QKV, decays(D), *QKV[:2]], []),
    "gated convolution": (gated_short_conv, ones((B, T, 256)), [jnp.ones((3, 128))]),
    "RMS norm": (residual_rms_norm, [jnp.ones(STREAM), *ones(STREAM)], [WEIGHTS]),
    "layer norm": (residual_layer_norm, [jnp.ones(STREAM), *ones(STREAM)], [WEIGHTS, WEIGHTS]),
}
"""An operation, its arrays by rows, and its parameters, which all devices share."""


def lowered(function, arguments, specs, results) -> str:
    with tpus(kind="TPU v5", shape=(2,)):
        run = jax.jit(jax.shard_map(function, in_specs=specs, out_specs=results))
        return run.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_rows_are_their_devices_and_those_of_parameters_are_summed(name):
    operation, rows, parameters = CASES[name]

    def loss(*arguments):
        results = jax.tree.leaves(operation(*arguments, impl="tpu"))
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in results)

    arguments = [*rows, *parameters]
    specs = (*[jax.P("data")] * len(rows), *[jax.P()] * len(parameters))
    text = lowered(jax.grad(loss, range(len(arguments))), arguments, specs, specs)
    assert text.count("@tpu_custom_call(") >= 2
    assert text.count("all_reduce") >= bool(parameters)


def test_tokens_that_are_decoded_are_their_devices():
    states = initial_state(256, 1, 16, 64, flush=16, state_dtype="float32", dtype=jnp.dtype(jnp.bfloat16))
    given = [*ones((256, 1, 1, 16), (256, 1, 1, 16), (256, 1, 1, 64)), states]
    text = lowered(functools.partial(taylor_attention_decode, impl="tpu"), given, jax.P("data"), jax.P("data"))
    assert "@tpu_custom_call(" in text
    delta = [*ones((B, H, D), (B, H, D), (B, H, D)), jnp.zeros((B, H, 1)), jnp.zeros((B, H)), jnp.zeros((B, H, D, D))]
    text = lowered(functools.partial(delta_rule_step, impl="tpu"), delta, jax.P("data"), jax.P("data"))
    assert "@tpu_custom_call(" in text
