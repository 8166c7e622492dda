"""Weights that are not exactly a model's are refused by name; those that are go in and out unchanged."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from based_jax.convert import lm_from_reference, mixer_from_reference, reference_weights
from based_jax.convert.skeletons import SKELETONS
from based_jax.errors import UserError
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import make_mixer

D = 8
LAYERS = (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 2}), ("window", {"num_heads": 2, "window": 3})) * 2
CONFIG = LMConfig(LAYERS, d_model=D, vocab_size=13, dtype="float32", scan_layers=True)
EMBEDDING, HEAD = SKELETONS["based"].embedding, SKELETONS["based"].head
FC1 = "transformer.layers.4.mlp.fc1.weight"


@pytest.fixture(scope="module")
def weights():
    return reference_weights(nnx.jit(lambda: LM(CONFIG, rngs=nnx.Rngs(0)))())


def test_reference_weights_and_lm_from_reference_are_inverse(weights):
    for scan_layers in (False, True):
        config = LMConfig(**vars(CONFIG) | {"scan_layers": scan_layers})
        again = reference_weights(lm_from_reference(weights, config))
        assert again.keys() == weights.keys()
        for key, array in again.items():
            np.testing.assert_array_equal(array, weights[key], err_msg=key)


def test_a_training_checkpoint_is_unwrapped(weights):
    wrapped = {f"model.{key}": value for key, value in weights.items() if key != HEAD}
    wrapped |= {"val_metrics.num-tokens.count": np.zeros(()), "model.transformer.decay.decay": np.zeros(2)}
    model = lm_from_reference(wrapped, CONFIG)
    np.testing.assert_array_equal(model.embed.embedding[...], weights[EMBEDDING])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_parameters_are_fp32_whatever_the_weights_are(weights, dtype):
    model = lm_from_reference({key: value.astype(dtype) for key, value in weights.items()}, CONFIG)
    again = reference_weights(model)
    assert {array.dtype for array in again.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(again[FC1], weights[FC1].astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(FC1), rf"lack '{FC1}' \(32, 8\); 1 keys are missing"),
        (lambda w: w.update({f"{FC1}.scale": w[FC1]}), rf"have '{FC1}.scale' \(32, 8\), which the model does not"),
        (lambda w: w.update({FC1: w[FC1].T}), rf"'{FC1}' has shape \(8, 32\); the model's is \(32, 8\)"),
        (lambda w: w.update({FC1: np.zeros(3)}), rf"'{FC1}' has shape \(3,\)"),
        (lambda w: w.update({HEAD: w[HEAD] + 1}), "'lm_head.weight' differs from the embedding"),
    ],
    ids=["missing", "surplus", "transposed", "flat", "untied"],
)
def test_other_weights_are_refused_by_key(weights, change, message):
    changed = dict(weights)
    change(changed)
    with pytest.raises(UserError, match=message):
        lm_from_reference(changed, CONFIG)


def test_a_mixer_takes_its_width_from_the_weights():
    mixer = make_mixer("conv", D, rngs=nnx.Rngs(0))
    weights = {
        "in_proj.weight": np.asarray(mixer.in_proj.kernel[...]).T,
        "in_proj.bias": np.zeros(4 * D),
        "conv.conv.weight": np.asarray(mixer.conv_kernel[...]).T[:, None],
        "out_proj.weight": np.asarray(mixer.out_proj.kernel[...]).T,
        "out_proj.bias": np.zeros(D),
    }
    x = jnp.ones((1, 5, D))
    np.testing.assert_array_equal(mixer_from_reference("conv", weights)(x), mixer(x))
    with pytest.raises(UserError, match=r"'conv.conv.weight' has shape \(16, 1, 3\); the model's is \(16, 1, 5\)"):
        mixer_from_reference("conv", weights, kernel_size=5)
    with pytest.raises(UserError, match="did you mean 'kernel_size'"):
        mixer_from_reference("conv", weights, kernel_sizes=3)
    with pytest.raises(UserError, match="did you mean 'conv'"):
        mixer_from_reference("covn", weights)
    with pytest.raises(UserError, match="lack the output projection 'out_proj"):
        mixer_from_reference("conv", {"in_proj.bias": weights["in_proj.bias"]})
