import jax
import jax.numpy as jnp
import pytest
from helpers.devices import gpus

from based_jax.ops import segments
from based_jax.ops.bonus import read_apart
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.gated_linear_attention import IMPLEMENTATIONS, gated_linear_attention

H, K, V = 2, 5, 3


@pytest.mark.parametrize("T, packed, dtype", [(37, True, "float32"), (1, False, "float32"), (20, False, "bfloat16")])
def test_a_form_that_knows_no_bonus_equals_the_oracle(T, packed, dtype, normal, packed_ids, out_and_grads, close):
    """Padding at the beginning, at the end, within documents and alone is among the rows."""
    q, k, v = (normal(6, T, H, n, dtype=dtype) for n in (K, K, V))
    args = q, k, v, -(normal(6, T, H, K) ** 2), normal(H, K), normal(6, H, K, V)
    ids = segments.numbered(packed_ids(T)) if packed else None

    def call(impl):
        def knows_none(call):
            assert call.bonus is None
            return IMPLEMENTATIONS["xla_steps"].compute(call)

        compute = read_apart(knows_none) if impl == "apart" else IMPLEMENTATIONS[impl].compute

        def run(q, k, v, g, bonus, state):
            return compute(MatrixStateCall(q, k, v, g, bonus, scale=0.7, state=state, segment_ids=ids))

        return run

    cotangents = normal(6, T, H, V, dtype=dtype), normal(6, H, K, V)
    expected = out_and_grads(call("oracle"), args, cotangents)
    close(out_and_grads(call("apart"), args, cotangents), expected, dtype)


@pytest.mark.parametrize("impl", ["hopper_steps", "triton_chunks"])
def test_kernels_take_a_bonus(impl):
    q, bonus = jnp.zeros((2, 64, 4, 64), "bfloat16"), jnp.zeros((4, 64))
    with gpus():
        traced = jax.jit(lambda q: gated_linear_attention(q, q, q, -q, bonus=bonus, impl=impl)[0]).trace(q)
        assert "custom_call" in traced.lower(lowering_platforms=("cuda",)).as_text()
