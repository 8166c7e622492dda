"""Adapters: by path, nothing at first, stacked with the layers that are."""

import jax
import numpy as np
import pytest
from flax import nnx

from based_jax import LM, LMConfig
from based_jax.errors import UserError
from based_jax.nn import lora


@pytest.fixture(scope="module")
def params():
    layers = (("conv", {}), *(("window", {"num_heads": 2, "window": 3}),) * 2)
    return nnx.state(LM(LMConfig(layers, d_model=8, vocab_size=8, scan_layers=True), rngs=nnx.Rngs(0)))


PATTERN = "*/mixer/qkv/kernel"


def test_adapters_add_nothing_at_first_and_their_product_later(params, close):
    found = lora.adapters(params, [PATTERN, PATTERN], 3, jax.random.key(0))
    [(path, adapter)] = found.items()
    assert path == "stacks/1/blocks/0/mixer/qkv/kernel"
    assert (adapter.a.shape, adapter.b.shape) == ((2, 8, 3), (2, 3, 24))
    before = lora.by_path(params)
    assert all(np.array_equal(x, before[name]) for name, x in lora.by_path(lora.merged(params, found)).items())
    adapter = adapter._replace(b=jax.random.normal(jax.random.key(1), adapter.b.shape))
    after = lora.by_path(lora.merged(params, {path: adapter}, alpha=6.0))
    product = np.einsum("lir,lro->lio", adapter.a, adapter.b)
    close(after[path], before[path] + 2 * product)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {path}


def test_bad_adapters_are_told(params):
    key = jax.random.key(0)
    with pytest.raises(UserError, match="rank is 0; it is at least 1"):
        lora.adapters(params, [PATTERN], 0, key)
    with pytest.raises(UserError, match=r"'\*/qvk/kernel' matches no kernel; there are stacks/0/blocks/0/"):
        lora.adapters(params, ["*/qvk/kernel"], 1, key)
    found = lora.adapters(params, [PATTERN], 1, key)
    with pytest.raises(UserError, match="There is an adapter for 'stacks/1/x', which is no parameter's path"):
        lora.merged(params, {"stacks/1/x": next(iter(found.values()))})
