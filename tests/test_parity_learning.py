"""Whole models of zoology learn here as there: twenty steps from its weights under its own keys; see `test_parity.py`.

The models are those of the figure, at D = 64 and with 256 tokens.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers.reference_cases import FORWARD, assert_close, assert_parameters, load

from based_jax import convert
from based_jax.errors import UserError
from based_jax.nn.lm import LMConfig
from based_jax.optim import OptimConfig, optimizer
from based_jax.train.step import initial_state, make_train_step

TRAINED, POLES = 2e-5, 5e-5
STEPS = 20
OPTIM = OptimConfig(
    lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, decay="all", clip_norm=None, schedule="constant", eps=1e-8
)
CONV = ("base_conv", {"kernel_size": 3})
BLOCKS = {"mlp": "identity", "norm": "layer"}
MAMBA_BLOCKS = {"mlp": "none", "norm": "rms", "final_norm": "layer"}
MODELS = {
    "zoology_learning_attention": (
        (CONV, ("attention", {"num_heads": 1, "rotary_fraction": 0.0, "bias": True})),
        BLOCKS,
    ),
    "zoology_learning_based": ((CONV, ("taylor", {"num_heads": 1, "feature_dim": 8})), BLOCKS),
    "zoology_learning_gated_deltanet": ((CONV, ("gated_deltanet", {"num_heads": 2})), BLOCKS),
    "zoology_learning_h3": ((("h3", {"d_state": 16, "head_dim": 2}),) * 2, BLOCKS),
    "zoology_learning_hyena": ((("hyena", {"l_max": 64}),) * 2, BLOCKS),
    "zoology_learning_mamba": ((("mamba", {}),) * 2, MAMBA_BLOCKS),
}
HYENA = "backbone.layers.1.sequence_mixer.filter_fn"
QUICK_TO_RUN = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}
"""Twenty steps of Mamba take longer than to compile them, unlike most that is compiled for a test."""
GATED_DELTANET = "backbone.layers.1.sequence_mixer.mixer"


def config(name, **changes):
    layers, blocks = MODELS[name]
    return LMConfig(layers, d_model=64, vocab_size=256, dtype="float32", **blocks, **changes)


@pytest.mark.parametrize(
    "name",
    [name if name == "zoology_learning_based" else pytest.param(name, marks=pytest.mark.long) for name in MODELS],
)
def test_twenty_steps(name):
    case = load(name)
    graphdef, _ = nnx.split(model := convert.lm_from_reference(case.weights, config(name)))
    tx = optimizer(OPTIM, STEPS)
    step = make_train_step(graphdef, tx)
    batches = {
        "inputs": case.inputs["ids"].astype(np.int32).reshape(STEPS, -1, 64),
        "labels": case.inputs["labels"].astype(np.int32).reshape(STEPS, -1, 64),
    }
    train = jax.jit(lambda state: jax.lax.scan(step, state, batches), compiler_options=QUICK_TO_RUN)
    state, metrics = train(initial_state(model, tx))
    assert_close(metrics["loss"], case.outputs["losses"], FORWARD, "losses")
    trained = convert.lm_from_reference(case.trained, config(name))
    assert_parameters(state.params, trained, lambda path: POLES if path[-1] == "a_imag" else TRAINED)


@pytest.mark.parametrize("name", ["zoology_learning_hyena", "zoology_learning_mamba"])
def test_stacked_layers_take_the_same_weights(name, close):
    case = load(name)
    flat, scanned = (convert.lm_from_reference(case.weights, config(name, scan_layers=scan)) for scan in (False, True))
    ids = jnp.asarray(case.inputs["ids"][:2], jnp.int32)
    assert [stack.repeats for stack in scanned.stacks] == [2]
    close(*(jax.jit(lambda model: model(ids))(model) for model in (scanned, flat)))


@pytest.mark.parametrize(
    ("name", "key", "array", "message"),
    [
        ("hyena", f"{HYENA}.modulation.deltas", np.full((1, 1, 64), -4.0, np.float32), "its values are not those"),
        ("hyena", f"{HYENA}.modulation.deltas", np.zeros((1, 1, 32), np.float32), "has shape .1, 1, 32."),
        ("hyena", f"{HYENA}.pos_emb.t", np.zeros((1, 64, 1), np.float32), "its values are not those"),
        ("hyena", f"{HYENA}.implicit_filter.5.freq", np.full((1, 64), 2.0, np.float32), "its values are not those"),
        ("gated_deltanet", f"{GATED_DELTANET}.D", np.ones(3, np.float32), r"has shape \(3,\); the model's is \(2,\)"),
    ],
    ids=["window", "width", "time", "frequency", "unused"],
)
def test_buffers_are_compared_before_they_are_dropped(name, key, array, message):
    name = f"zoology_learning_{name}"
    weights = load(name).weights
    assert key in weights
    with pytest.raises(UserError, match=f"'{key}' .*{message}"):
        convert.lm_from_reference(weights | {key: array}, config(name))
    rest = {other: value for other, value in weights.items() if other != key}
    assert convert.lm_from_reference(rest, config(name)).num_params() > 0


def test_a_checkpoint_of_bf16_has_rounded_buffers():
    name = "zoology_learning_hyena"
    weights = {key: value.astype(ml_dtypes.bfloat16) for key, value in load(name).weights.items()}
    model = convert.lm_from_reference(weights, config(name))
    assert model.mixers()[0].filter.frequency[...].dtype == np.float32
