import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.devices import gpus
from helpers.reference_cases import FORWARD, GRADIENT, assert_close, load

from based_jax.nn.gated import bounded_decay, head_slopes, softplus_decay
from based_jax.nn.mixers import make_mixer
from based_jax.ops.dispatch import recorded_choices


def test_decays_equal_the_reference(out_and_grads):
    case = load("fla_kda_gate_a")
    args = tuple(jnp.asarray(case.inputs[name]) for name in ("g", "A_log", "dt_bias"))

    def flat(function, *more):
        def call(g, A_log, dt_bias):
            logits = g.reshape(*g.shape[:2], -1)
            return function(logits, jnp.repeat(A_log, g.shape[3]), dt_bias, *more).reshape(g.shape)

        return call

    o, grads = out_and_grads(flat(softplus_decay), args, jnp.asarray(case.inputs["r"]))
    assert_close(o, case.outputs["o"], FORWARD)
    for name, grad in zip(("g", "A_log", "dt_bias"), grads, strict=True):
        assert_close(grad, case.gradients[name], GRADIENT, name)
    bounded = jax.jit(flat(bounded_decay, case.meta["lower_bound"]))(*args)
    assert_close(bounded, case.outputs["lower_bound_gate"], FORWARD)


def test_slopes_are_those_of_lightning_attention():
    slopes = load("lightning_attn2_op_a").inputs["slopes"].ravel()
    np.testing.assert_allclose(head_slopes(slopes.size), slopes, rtol=1e-6)
    assert len(set(head_slopes(6))) == 6


def test_a_bounded_gate_keeps_at_least_its_share(normal):
    mixer = make_mixer("kda", 8, num_heads=1, head_dim=4, lower_bound=-0.5, std=5.0, rngs=nnx.Rngs(0))
    q = k = v = normal(2, 3, 1, 4)
    *_, log_decay, _ = jax.jit(lambda mixer, *xs: mixer._gated(*xs))(mixer, normal(2, 3, 8), q, k, v)
    assert float(log_decay.min()) >= -0.5 and float(log_decay.max()) <= 0


@pytest.mark.parametrize("rank", [0, 3])
def test_flops_count_every_weight_of_a_gate(rank):
    kind, options = ("kda", {"head_dim": 3, "num_heads": 2}) if rank else ("retnet", {"num_heads": 2})
    mixer = nnx.eval_shape(lambda: make_mixer(kind, 8, rngs=nnx.Rngs(0), **options))
    weights = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)) if leaf.ndim > 1)
    state = mixer.key_dim * mixer.value_dim // mixer.num_heads
    assert mixer.flops_per_token(64) == 2 * weights + 4 * state


def test_few_tokens_are_multiplied_with_the_gate_and_what_is_projected_beside_it_at_once(normal):
    def step(x):
        mixer = make_mixer("gated_deltanet", 128, num_heads=2, dtype="bfloat16", rngs=nnx.Rngs(0))
        return mixer.step(x, mixer.init_cache(64, 8))

    with gpus(), recorded_choices() as choices:
        jax.eval_shape(step, normal(64, 128))
    assert list(choices["few_tokens_products"]) == ["hopper_strips"]
