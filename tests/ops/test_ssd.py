import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus

from based_jax.errors import UserError
from based_jax.ops import selective_scan
from based_jax.ops.calls import SSDCall
from based_jax.ops.hopper import selective_scan as hopper_selective_scan
from based_jax.ops.hopper import ssd as hopper_ssd
from based_jax.ops.ssd import ssd, ssd_step

H, P, N = 4, 3, 5
jitted = functools.partial(jax.jit, static_argnames="impl")


def inputs(normal, T, groups=2, dtype="float32", batch=6):
    """Return x, dt, A, B, C."""
    x = normal(batch, T, H, P, dtype=dtype)
    B, C = (normal(batch, T, groups, N, dtype=dtype) for _ in "BC")
    return x, jnp.abs(normal(batch, T, H)), -jnp.abs(normal(H)), B, C


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_oracle_equals_fp64(groups, normal):
    x, dt, A, B, C = inputs(normal, 6, groups)
    y, _ = jitted(ssd)(x, dt, A, B, C, impl="oracle")
    x, dt, A, B, C = (np.asarray(z, np.float64) for z in (x, dt, A, B, C))
    B, C = (np.repeat(z, H // groups, axis=2) for z in (B, C))
    s = np.zeros((6, H, N, P))
    for t in range(6):
        s = np.exp(dt[:, t] * A)[..., None, None] * s
        s += np.einsum("bhn,bhp->bhnp", B[:, t], dt[:, t, :, None] * x[:, t])
        np.testing.assert_allclose(y[:, t], np.einsum("bhn,bhnp->bhp", C[:, t], s), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, pytest.param(37, marks=pytest.mark.long), 131])
def test_chunked_equals_the_oracle(T, normal, packed_ids, out_and_grads, close):
    args, ids = (*inputs(normal, T), normal(6, H, N, P)), packed_ids(T)

    def call(impl):
        return lambda x, dt, A, B, C, state: ssd(x, dt, A, B, C, state=state, segment_ids=ids, impl=impl)

    cotangents = normal(6, T, H, P), normal(6, H, N, P)
    close(*(out_and_grads(call(impl), args, cotangents) for impl in ("xla_chunks", "oracle")), tolerance=2e-5)


def test_it_is_mamba_s_scan_with_one_rate_a_head(normal, packed_ids, close, monkeypatch):
    """The kernels' way, with the scan's oracle in their place."""
    monkeypatch.setattr(hopper_selective_scan, "compute", selective_scan.IMPLEMENTATIONS["oracle"].compute)
    args, state, ids = inputs(normal, 20, groups=1), normal(6, H, N, P), packed_ids(20)
    wanted = jitted(ssd)(*args, state=state, segment_ids=ids, impl="oracle")
    close(jax.jit(hopper_ssd.compute)(SSDCall(*args, state, ids)), wanted, tolerance=2e-5)
    bare = jax.jit(hopper_ssd.compute)(SSDCall(*args))
    close(bare, jitted(ssd)(*args, impl="oracle"), tolerance=2e-5)


def test_bf16_and_steps(normal, close):
    args = inputs(normal, 9, dtype="bfloat16")
    y, after = jitted(ssd)(*args)
    assert y.dtype == jnp.bfloat16
    state, step = jnp.zeros((6, H, N, P)), jax.jit(ssd_step)
    for t in range(9):
        x, dt, A, B, C = args
        o, state = step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        close(o, y[:, t], "bfloat16")
    close(after, state, "bfloat16")


def test_what_the_kernels_take(normal):
    def zeros(groups=1, states=16, heads=4, width=64, T=64):
        x, dt = jnp.zeros((2, T, heads, width), jnp.bfloat16), jnp.zeros((2, T, heads))
        B, C = (jnp.zeros((2, T, groups, states), jnp.bfloat16) for _ in "BC")
        return x, dt, -jnp.ones(heads), B, C

    with gpus():
        for options, words in (
            ({"groups": 2}, "of one group, and are of 2"),
            ({"states": 128}, "8, 16, 24, 32 states, and has 128"),
            ({"heads": 3, "width": 32}, "multiple of 64, and are 96"),
        ):
            with pytest.raises(UserError, match=words):
                ssd(*zeros(**options), impl="hopper_steps")
        chunks = {}, {"groups": 2, "states": 128}
        for options, kernel in (({"T": 63}, "selective_scan"), *((options, "one_decay_forward") for options in chunks)):
            lowered = jax.jit(ssd).trace(*zeros(**options)).lower(lowering_platforms=("cuda",))
            assert kernel in lowered.as_text(debug_info=True)
