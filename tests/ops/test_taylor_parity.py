"""Taylor attention equals the arrays that FLA's code and fp64 computed (`tests/parity`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference_cases import FORWARD, GRADIENT, POINTWISE, assert_close, assert_taylor_state, load

from based_jax.ops import taylor

FLA = {
    "norm": [
        ("fla_based_d8_norm_a",),
        ("fla_based_d16_norm_fwd_a", "fla_based_d16_norm_bwd_a"),
    ],
    "nonorm": [
        ("fla_based_d8_nonorm_a",),
        ("fla_based_d16_nonorm_fwd_a", "fla_based_d16_nonorm_bwd_a"),
    ],
}


@pytest.mark.parametrize("name", ["taylor_exp_d8", "taylor_exp_d16"])
def test_feature_map(name):
    case = load(name)
    assert_close(taylor.full_taylor_features(jnp.asarray(case.inputs["x"])), case.outputs["phi"], POINTWISE)


def sums_and_normaliser(q, k, v, impl):
    """Return sum_j p_ij v_j and z_i = sum_j p_ij, which the operation divides by.

    A further value channel, zero in v and 1 under the constant feature in the state before, comes out as 1 / z.
    """
    B, _, H, V = v.shape
    state = taylor.initial_state(B, H, q.shape[-1], V + 1).at[:, :, 0, V].set(1)
    o, _ = taylor.taylor_attention(q, k, jnp.pad(v, [(0, 0)] * 3 + [(0, 1)]), state=state, impl=impl)
    z = 1 / o[..., -1]
    return o[..., :-1] * z[..., None], z


def time_first(x):
    """Return (B, H, T, ...) as (B, T, H, ...), and the other way round."""
    return jnp.asarray(x, jnp.float32).swapaxes(1, 2)


@pytest.mark.parametrize("impl", ["oracle", "xla_steps", "xla"])
def test_core(impl):
    """The operation in fp32 against arrays in fp64; FLA's eps of 1e-6 shows nowhere."""
    case = load("based_core_fp64")
    q, k, v = (time_first(case.inputs[name]) for name in "qkv")
    o, state = jax.jit(functools.partial(taylor.taylor_attention, impl=impl))(q, k, v)
    for name in ("y", "y_fla_naive", "y_fla_chunk"):
        assert_close(time_first(o), case.outputs[name], FORWARD, name)
    assert_taylor_state(state, case.outputs["kv_state"][:, :, None], case.outputs["k_state"][:, :, None, None])
    sums = jax.jit(functools.partial(sums_and_normaliser, impl=impl))
    num, z = sums(q, k, v)
    for name in ("num", "y_fla_nonorm"):
        assert_close(time_first(num), case.outputs[name], FORWARD, name)
    assert_close(time_first(z), case.outputs["z"], FORWARD, "z")
    unscaled, _ = sums(q * np.sqrt(q.shape[-1]), k, v)
    assert_close(time_first(unscaled), case.outputs["y_fla_noscale_nonorm"], FORWARD, "without 1 / sqrt(K)")


@pytest.mark.parametrize("impl", ["oracle", "xla"])
@pytest.mark.parametrize(("norm", "files"), [(norm, files) for norm in FLA for files in FLA[norm]], ids=str)
def test_fla(norm, files, impl, out_and_grads):
    case = load(*files)
    call = {
        "norm": lambda q, k, v: taylor.taylor_attention(q, k, v, impl=impl)[0],
        "nonorm": lambda q, k, v: sums_and_normaliser(q, k, v, impl)[0],
    }[norm]
    q, k, v, r = (time_first(case.inputs[name]) for name in "qkvr")
    y, grads = out_and_grads(call, (q, k, v), r)
    assert_close(time_first(y), case.outputs["y"], FORWARD, "y")
    for name, grad in zip("qkv", grads, strict=True):
        assert_close(time_first(grad), case.gradients[name], GRADIENT, f"gradient of {name}")
