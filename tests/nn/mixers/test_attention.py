"""Heads that projections fill up with zeros for a GPU's attention."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers.decoding import in_one_pass, prefill_then_step
from helpers.devices import gpus

from based_jax.nn import layers
from based_jax.nn.mixers import attention
from based_jax.ops import softmax

HEADS, HEAD_DIM, FILLED = 4, 5, 8


@pytest.fixture
def mixer(normal):
    """Return grouped queries with biases and heads of five components."""
    config = attention.AttentionConfig(num_heads=HEADS, num_kv_heads=2, bias=True)
    init = layers.Init(0.2, 0.2, jnp.float32, nnx.Rngs(0))
    made = attention.Attention(HEADS * HEAD_DIM, config, init)
    for layer in (made.qkv, made.out_proj):
        layer.bias[...] = normal(*layer.bias.shape)
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_zeros_in_heads_change_nothing(packed, mixer, normal, packed_ids, out_and_grads, close, monkeypatch):
    x, cotangent, ids = normal(6, 17, 20), normal(6, 17, 20), packed_ids(17) if packed else None
    plain = out_and_grads(lambda mixer, x: mixer(x, ids), (mixer, x), cotangent)
    monkeypatch.setattr(attention, "whole_pass_head_dim", lambda head_dim: FILLED)
    close(out_and_grads(lambda mixer, x: mixer(x, ids), (mixer, x), cotangent), plain)


def test_a_cache_of_filled_heads_decodes_what_is_read_at_once(mixer, normal, close, monkeypatch):
    monkeypatch.setattr(attention, "filled_head_dim", lambda head_dim: FILLED)
    x = normal(2, 9, 20)
    y, _, cache = prefill_then_step(mixer, x, 6)
    assert {leaf.shape[3] for leaf in cache.state.tokens} == {FILLED}
    close(y, in_one_pass(mixer, x))


def test_a_step_writes_a_token_in_place(mixer):
    """Of a cache that is given away nothing is copied, and no part of it repeated or moved."""
    cache = jax.eval_shape(lambda: mixer.init_cache(2, 1000))
    compiled = jax.jit(lambda mixer, x, cache: mixer.step(x, cache), donate_argnums=2).lower(
        mixer, jax.ShapeDtypeStruct((2, HEADS * HEAD_DIM), jnp.float32), cache
    )
    memory = compiled.compile().memory_analysis()
    bytes_of_cache = sum(4 * leaf.size for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == bytes_of_cache
    assert memory.temp_size_in_bytes < bytes_of_cache / 2  # four scores a token beside twenty numbers


def test_a_gpu_s_attention_gets_heads_from_products_as_it_takes_them(mixer, monkeypatch):
    """What is filled up and cut are parameters alone."""
    calls, entry = [], softmax.ATTENTION["cudnn_flash"]

    def compute(call):
        calls.append(call)
        return call.v

    spy = dataclasses.replace(entry, compute=compute, supports=lambda call: None)
    monkeypatch.setitem(softmax.ATTENTION, "cudnn_flash", spy)
    x = jax.ShapeDtypeStruct((3, 16, HEADS * HEAD_DIM), jnp.float32)
    with gpus():
        text = str(jax.make_jaxpr(lambda mixer, x: jax.vjp(lambda *z: z[0](z[1]), mixer, x)[1](x))(mixer, x))
    filled = re.findall(r"f32\[([\d,]+)\] = pad\[", text)
    [call] = calls
    assert {y.shape[-1] for y in (call.q, call.k, call.v)} == {FILLED} and call.head_dim == HEAD_DIM
    assert filled and not any(shape.startswith("3,") for shape in filled)
