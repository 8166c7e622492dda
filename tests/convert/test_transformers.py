"""Models of transformers: folders are read as its own code computes, and those that are written are read by it.

The arrays are of `helpers/transformers_arrays.py`.
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.cases import parametrize_some
from helpers.reference_cases import FORWARD, LOGITS, assert_close, assert_gradients, load
from safetensors.numpy import load_file, save_file

from based_jax.convert import lm_from_reference, load_hf, save_hf
from based_jax.labels import NO_LABEL
from based_jax.nn.loss import loss_sums

LAYOUTS = {
    "hf_llama_b": "llama",
    "hf_mistral_b": "mistral",
    "hf_qwen2_b": "qwen2",
    "hf_qwen3_b": "qwen3",
    "hf_mamba_b": "mamba_hf",
}


def write(case, folder, **fields):
    folder.mkdir()
    save_file(case.weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.meta["config"] | fields))
    return folder


READ = [*LAYOUTS, "hf_rwkv_b"]


@parametrize_some("name", READ, ["hf_qwen3_b"])
def test_logits(name, tmp_path):
    case = load(name)
    model = load_hf(write(case, tmp_path / "hf"), dtype="float32")
    logits = jax.jit(lambda model, ids: model(ids))(model, case.inputs["ids"])
    assert_close(logits, case.outputs["logits"], LOGITS, "logits")


@pytest.mark.long
@pytest.mark.parametrize("name", READ)
def test_loss_and_gradients(name, tmp_path):
    case = load(name)
    model = load_hf(write(case, tmp_path / "hf"), dtype="float32")
    graphdef, params = nnx.split(model)
    ids = case.inputs["ids"]
    batch = {"inputs": ids, "labels": np.pad(ids[:, 1:], [(0, 0), (0, 1)], constant_values=NO_LABEL)}

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        sums = loss_sums(model, batch)
        return sums["loss"] / sums["count"]

    value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert_close(value, case.outputs["loss"], FORWARD, "loss")
    assert_gradients(grads, lm_from_reference(case.gradients, model.config))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_that_is_written_holds_the_same_arrays(name, tmp_path):
    """Under the same keys, in the same shapes, bit for bit; what both config.json say is equal."""
    case = load(name)
    model = load_hf(write(case, tmp_path / "hf"))
    assert save_hf(model, tmp_path / "again", layout=LAYOUTS[name]) == LAYOUTS[name]
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == case.weights.keys()
    for key, array in again.items():
        np.testing.assert_array_equal(array, case.weights[key], err_msg=key)
    fields, config = json.loads((tmp_path / "again/config.json").read_text()), case.meta["config"]
    both = (fields.keys() & config.keys()) - {"max_window_layers"}  # which layer_types says as well
    assert {"model_type", "vocab_size", "hidden_size"} < both
    assert {key: fields[key] for key in both} == {key: config[key] for key in both}
    assert load_hf(tmp_path / "again").config == model.config


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_transformers_reads_what_is_written(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    case = load(name)
    save_hf(load_hf(write(case, tmp_path / "hf")), tmp_path / "again", layout=LAYOUTS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor(case.inputs["ids"]), use_cache=False).logits.numpy()
    np.testing.assert_array_equal(logits, case.outputs["logits"])
