"""Every language model equals its published definition; see `test_parity.py`."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.cases import parametrize_some
from helpers.decoding import prefill_then_step
from helpers.reference_cases import FOLDER, FORWARD, LMS, LOGITS, assert_close, assert_gradients, load

from based_jax import config as configs
from based_jax import convert
from based_jax.convert.reference import reference_keys, reference_shapes
from based_jax.convert.skeletons import SKELETONS
from based_jax.generate import generate
from based_jax.labels import NO_LABEL
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.loss import loss_sums
from based_jax.optim import decay_groups

CONFIGS = Path(__file__).parents[1] / "configs"

STACKED = [("tiny_based_lm", False), ("tiny_based_lm", True), ("tiny_attn_lm_even", True), ("zoology_lm_based", False)]
STACKED += [("zoology_lm_based_mlp", False)]
STACKED += [("hf_llama_a", True), *(("tiny_mamba_lm", scan) for scan in (False, True))]
STACKED += [("hf_mamba_a", True), ("hf_rwkv4_lm_a", True)]
LONG_STACKED = ("tiny_based_lm", True), ("tiny_mamba_lm", False)
CHECKPOINTS = {
    "based-360m": ("based.py:360m", {}),
    "based-1b-50b": ("based.py:1b_50b", {}),
    "based-1b": ("based.py:1b", {}),
    "attn-360m": ("attention.py:360m", {}),
    "attn-1b(multiple_of=256)": ("attention.py:1b", {}),
    "attn-1b(multiple_of=128)": ("attention.py:1b", {"mlp_dim": 4480}),
    "mamba-360m": ("mamba.py:360m", {}),
    "mamba-1b": ("mamba.py:1b", {}),
}


def language_model(name, weights, scan_layers):
    fields = vars(LMS[name]) | {"scan_layers": scan_layers}
    return convert.lm_from_reference(weights, LMConfig(**fields))


def batch_of(case):
    """Return a batch with the file's labels, or with each token's successor as its label."""
    ids = case.inputs["ids"]
    after = np.pad(ids[:, 1:], [(0, 0), (0, 1)], constant_values=NO_LABEL)
    return {"inputs": np.asarray(ids), "labels": np.asarray(case.inputs.get("labels", after))}


@parametrize_some("name, scan_layers", STACKED, [case for case in STACKED if case not in LONG_STACKED])
def test_language_model(name, scan_layers):
    case = load(name)
    model, batch = language_model(name, case.weights, scan_layers), batch_of(case)
    graphdef, params = nnx.split(model)

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        hidden, sums = model.hidden(batch["inputs"]), loss_sums(model, batch)
        return sums["loss"] / sums["count"], (hidden, model.logits(hidden))

    (value, (hidden, logits)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    assert_close(value, case.outputs["loss"], FORWARD, "loss")
    assert_close(logits, case.outputs["logits"], LOGITS, "logits")
    assert_close(hidden, case.outputs.get("hidden", hidden), FORWARD, "hidden")
    assert_gradients(grads, language_model(name, case.gradients, scan_layers))


@pytest.mark.parametrize(
    ("name", "scan_layers", "greedy"),
    [
        pytest.param("tiny_based_lm", False, 8, marks=pytest.mark.long),
        ("tiny_based_lm", True, 8),
        ("hf_llama_a", True, 6),
        ("hf_mamba_a", False, 0),
        ("hf_rwkv4_lm_a", False, 0),
    ],
)
def test_language_model_decodes(name, scan_layers, greedy):
    case = load(name)
    model = language_model(name, case.weights, scan_layers)
    hidden, _, _ = prefill_then_step(model, case.inputs["ids"], case.meta.get("n_prefill", 24))
    logits = jax.jit(lambda model, hidden: model.logits(hidden))(model, hidden)
    assert_close(logits, case.outputs["logits_prefill_then_decode"], LOGITS)
    if greedy:
        prompt, expected = np.split(case.outputs[f"greedy{greedy}"], [-greedy], axis=1)
        np.testing.assert_array_equal(generate(model, list(prompt), greedy), expected)


def test_states_of_whole_models():
    """Each layer's cache after the last token, the convolution's inputs channel first."""
    case = load("hf_mamba_a")
    model = language_model("hf_mamba_a", case.weights, False)
    _, _, end = prefill_then_step(model, case.inputs["ids"], case.meta["n_prefill"])
    for i, (cache,) in enumerate(end):
        assert_close(jnp.moveaxis(cache.state.conv, 1, 2), case.outputs["conv_state"][i], FORWARD, f"conv {i}")
        assert_close(cache.state.memory, case.outputs["ssm_state"][i], FORWARD, f"state {i}")

    case = load("hf_rwkv4_lm_a")
    model = language_model("hf_rwkv4_lm_a", case.weights, False)
    _, _, end = prefill_then_step(model, case.inputs["ids"], case.meta["n_prefill"])
    for i, ((time,), (channel,)) in enumerate(zip(end[::2], end[1::2], strict=True)):
        ours = {"ffn_x": channel.state, "att_x": time.state.shift, **time.state.memory._asdict()}
        for name, value in ours.items():
            assert_close(value, case.outputs[f"state_{name}"][..., i], FORWARD, f"{name} {i}")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_weight_decay_groups(scan_layers):
    model = language_model("tiny_based_lm", load("tiny_based_lm").weights, scan_layers)
    groups = json.loads((FOLDER / "tiny_based_lm_weight_decay_groups.json").read_text())
    keys = reference_keys(model)
    ours = decay_groups(nnx.state(model, nnx.Param), "reference")
    for paths, group in zip(ours, ("decay", "no_decay"), strict=True):
        assert sorted(key for path in paths for (key,) in keys[path]) == sorted(groups[group])


@pytest.mark.parametrize("name", ["zoology_lm_based", pytest.param("zoology_lm_based_mlp", marks=pytest.mark.long)])
def test_initial_deviations(name):
    """Three sigma of both samples."""
    model = LM(dataclasses.replace(LMS[name], init_recipe="zoology"), rngs=nnx.Rngs(0))
    ours = nnx.to_flat_state(nnx.state(model, nnx.Param))
    wanted = load(name).meta["init_std"]
    keys = reference_keys(model, "zoology")
    for parts, leaf in ours:
        ((key,),) = keys["/".join(map(str, parts))]
        assert abs(float(jnp.std(leaf[...])) - wanted[key]) <= 6 * wanted[key] / np.sqrt(2 * leaf.size), key


@pytest.mark.parametrize("name", ["zoology_lm_based", "zoology_lm_based_mlp"])
def test_state_bytes(name):
    model = nnx.eval_shape(lambda: LM(LMS[name], rngs=nnx.Rngs(0)))
    assert 4 * model.state_size(1024) == load(name).meta["state_size_bytes_seq1024"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_released_shapes(name):
    """The reference configs under the released keys, as `save_hf` writes and `load_hf` expects them."""
    spec, changes = CHECKPOINTS[name]
    fields = configs.load(str(CONFIGS / spec)).model.to_dict()
    model = nnx.eval_shape(lambda: LM(configs.build(LMConfig, fields | changes), rngs=nnx.Rngs(0)))
    released = json.loads((FOLDER / "checkpoint_shapes.json").read_text())[name]
    skeleton = "mamba" if name.startswith("mamba") else "based"
    shapes = {key: shape for (key,), shape in reference_shapes(model, reference_keys(model, skeleton)).items()}
    shapes[SKELETONS[skeleton].head] = shapes[SKELETONS[skeleton].embedding]
    assert shapes == {key: tuple(shape) for key, shape in convert.reference.unwrapped(released["state_dict"]).items()}
    assert model.num_params() == released["params_tied"]
