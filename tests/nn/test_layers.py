import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.reference_cases import FORWARD, GRADIENT, POINTWISE, assert_close, load

from based_jax.nn import layers, mlps, multihead


@pytest.mark.parametrize(("dim", "rotated"), [(8, 8), (4, 4), (5, 6), (0, 0)])
def test_rotary_turns_pairs_as_complex_numbers(dim, rotated, normal, close):
    """An odd dim of 5 has frequencies 0, 2/5 and 4/5, so 6 components turn; the rest pass."""
    x, positions = normal(2, 7, 3, 8), jnp.arange(3, 10)
    y = multihead.rotary(x, positions, dim, 100.0)
    half = rotated // 2
    pairs = np.asarray(x[..., :half]) + 1j * np.asarray(x[..., half:rotated])
    turns = np.exp(1j * np.asarray(positions)[:, None] * 100.0 ** (-np.arange(0, dim, 2) / max(dim, 1)))
    turned = pairs * turns[None, :, None, :]
    close(y, np.concatenate([turned.real, turned.imag, x[..., rotated:]], axis=-1))


def test_mlp(out_and_grads):
    case = load("gated_mlp_base_default")
    width, hidden = case.weights["fc2.weight"].shape
    mlp = mlps.SwiGLU(width, hidden, layers.Init(0.02, 0.02, jnp.float32, nnx.Rngs(0)))
    for name in ("fc1", "fc2"):
        getattr(mlp, name).kernel[...] = jnp.asarray(case.weights[f"{name}.weight"].T)
    y, (grads, grad_x) = out_and_grads(lambda mlp, x: mlp(x), (mlp, case.inputs["x"]), case.inputs["r"])
    assert_close(y, case.outputs["y"], FORWARD, "y")
    assert_close(grad_x, case.gradients["x"], GRADIENT, "gradient of x")
    for name in ("fc1", "fc2"):
        assert_close(getattr(grads, name).kernel[...].T, case.gradients[f"{name}.weight"], GRADIENT, name)


def test_the_gradient_of_a_product_s_parts_is_joined_once(normal):
    """Behind a barrier XLA cannot copy the joining, and all that it reads, into each product with the gradient."""
    mlp = mlps.SwiGLU(8, 12, layers.Init(0.02, 0.02, jnp.float32, nnx.Rngs(0)))
    text = jax.jit(jax.grad(lambda mlp, x: jnp.sum(mlp(x)))).lower(mlp, normal(2, 3, 8)).as_text()
    [joined] = re.findall(r"(%\w+) = stablehlo\.concatenate", text)
    [made] = re.findall(rf"(%\w+) = stablehlo\.optimization_barrier {joined} ", text)
    assert len(re.findall(rf"{joined}\b", text)) == 2 and f"dot_general {made}, " in text


def test_rms_norm(out_and_grads):
    case = load("rms_norm")
    norm = layers.rms_norm(case.weights["weight"].size, layers.NORM_EPS, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(case.weights["weight"])
    y, (grads, grad_x) = out_and_grads(lambda norm, x: norm(x), (norm, case.inputs["x"]), case.inputs["r"])
    assert_close(y, case.outputs["y"], POINTWISE, "y")
    assert_close(grad_x, case.gradients["x"], FORWARD, "gradient of x")
    assert_close(grads.scale[...], case.gradients["weight"], FORWARD, "gradient of the weight")
