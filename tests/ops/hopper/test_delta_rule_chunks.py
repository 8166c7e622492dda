"""The delta rule's Hopper kernels by chunks as far as a CPU can tell: refusals, lowering, and the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from helpers.interpreted import replace_products
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.ops import delta_rule, segments
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.hopper import delta_rule as hopper_delta_rule
from based_jax.ops.hopper import limits
from pallas_kernels.hopper import mosaic


@pytest.fixture
def interpreted(monkeypatch):
    """Run kernels in Pallas' interpreter, which looks for races.

    It takes products' reads for those of registers, and these for such as copies may overtake.
    """
    replace_products(monkeypatch)

    def reads_are_over(read):
        def run(*operands):
            found = read(*operands)
            plgpu.commit_smem()
            return found

        return run

    for name in ("multiply", "load"):
        monkeypatch.setattr(mosaic, name, reads_are_over(getattr(mosaic, name)))
    monkeypatch.setattr(mosaic, "load_global", lambda ref, layout: ref[...])
    monkeypatch.setattr(plgpu, "set_max_registers", lambda *args, **options: None)
    monkeypatch.setattr(limits, "multiprocessors", lambda: 2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    "T, H, K, V",
    [(130, 1, 128, 128), (70, 2, 256, 256)],
)
def test_they_equal_the_oracle(T, H, K, V, normal, out_and_grads, interpreted):
    k = normal(1, T, H, K)
    k = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype(jnp.bfloat16)
    q, v, do = (normal(1, T, H, size, dtype="bfloat16") for size in (K, V, V))
    g, beta = -jnp.exp(normal(1, T, H, 1)), 2 * jax.nn.sigmoid(normal(1, T, H))
    state, dstate = normal(1, H, K, V), normal(1, H, K, V)

    def kernels(q, k, v, g, beta, state):
        return hopper_delta_rule.compute(MatrixStateCall(q, k, v, g, beta=beta, scale=K**-0.5, state=state))

    def oracle(q, k, v, g, beta, state):
        return delta_rule.delta_rule(q, k, v, g, beta, state=state, impl="xla_steps")

    given = q, k, v, g, beta, state
    got = out_and_grads(kernels, given, (do, dstate))
    right = out_and_grads(oracle, jax.tree.map(lambda x: x.astype(jnp.float32), given), (do.astype(jnp.float32), dstate))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        print(np.linalg.norm(x - y) / np.linalg.norm(y))
    assert not get_races().races_found
