"""Folders in the released layout: what is saved is loaded, released configs are understood, others are refused."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from based_jax.convert import load_hf, reference_weights, save_hf
from based_jax.errors import UserError
from based_jax.nn.lm import LM, LMConfig

PARITY = Path(__file__).parents[1] / "parity"
D = 16
BASED = (
    ("conv", {"kernel_size": 4}),
    ("taylor", {"num_heads": 2, "feature_dim": 4}),
    ("window", {"num_heads": 4, "window": 3}),
)
MODELS = {
    "based": LMConfig(BASED * 2 + BASED[:1], d_model=D, vocab_size=11),
    "convolutions": LMConfig((("conv", {"expand": 2}),), d_model=D, vocab_size=11),
    "attention": LMConfig(
        (("attention", {"num_heads": 2, "rotary_fraction": 0.25, "rotary_base": 5e3}),) * 2,
        d_model=D,
        vocab_size=11,
        pad_vocab_multiple=16,
        mlp_dim=20,
    ),
}
REFUSED = {
    "zoology's norm": LMConfig(BASED, d_model=D, norm="layer"),
    "zoology's last norm": LMConfig(BASED, d_model=D, final_norm="layer"),
    "no MLP": LMConfig(BASED, d_model=D, mlp="identity"),
    "another mixer": LMConfig((("base_conv", {}),), d_model=D),
    "attention and others": LMConfig((*BASED, ("attention", {"num_heads": 2})), d_model=D),
    "two windows": LMConfig((*BASED, ("window", {"num_heads": 4, "window": 5})), d_model=D),
    "biases": LMConfig((("attention", {"num_heads": 2, "bias": True}),), d_model=D),
}


@functools.cache
def model_of(name):
    return nnx.jit(lambda: LM(MODELS[name], rngs=nnx.Rngs(0)))()


@jax.jit
def logits_of(model, ids):
    return model(ids)


@pytest.fixture
def folder(tmp_path):
    """Return a saved folder, its fields and its weights."""
    save_hf(model_of("based"), tmp_path / "hf")
    return tmp_path / "hf"


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_same(model, weights):
    ours = reference_weights(model)
    assert ours.keys() == weights.keys()
    for key, array in ours.items():
        np.testing.assert_array_equal(array, weights[key], err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_save_then_load_is_the_identity(name, tmp_path):
    model = model_of(name)
    save_hf(model, tmp_path / "hf")
    again = load_hf(tmp_path / "hf", scan_layers=False)
    for ours, theirs in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ids = jnp.arange(8)[None]
    np.testing.assert_array_equal(logits_of(model, ids), logits_of(again, ids))
    save_hf(again, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "hf/config.json").read_text()


@pytest.mark.parametrize("name", ["tiny_based_lm", "tiny_attn_lm_even"])
def test_a_reference_model_under_its_own_config(name, tmp_path):
    """The constructor arguments that the reference was given stand for config.json; the attention model has no F."""
    with np.load(PARITY / f"{name}.npz") as file:
        save_file({key[2:]: file[key] for key in file.files if key.startswith("w.")}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(str(file["meta"]))
        ids, logits = jnp.asarray(file["in.ids"]), file["out.logits"]
    ours = logits_of(load_hf(tmp_path, dtype="float32"), ids)
    np.testing.assert_allclose(ours, logits, rtol=0, atol=5e-5 * np.abs(logits).max())


def test_config_json_tells_the_reference_what_it_does_not_default_to(folder):
    """Its own defaults are biases, no rotary and another norm; a window takes its heads from n_head."""
    fields = json.loads((folder / "config.json").read_text())
    with np.load(PARITY / "tiny_based_lm.npz") as file:
        reference = json.loads(str(file["meta"]))
    told = ("rms_norm", "mlp_fc1_bias", "mlp_fc2_bias", "qkv_proj_bias", "out_proj_bias", "rotary_emb_fraction")
    assert {key: fields[key] for key in told} == {key: reference[key] for key in told}
    for mixer in ("mixer", "alt_mixer", "alt_mixer_2"):
        assert fields[mixer]["_target_"] == reference[mixer]["_target_"]
    assert fields["n_head"] == fields["alt_mixer_2"]["num_heads"] == 4
    assert fields["alt_mixer_2"]["window_size"] // 2 + 1 == 3
    assert (fields["alt_mixer_layers"], fields["alt_mixer_2_layers"]) == ([1, 4], [2, 5])


def test_shards_in_bf16_under_a_training_wrapper(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stored = {f"model.{key}": array.astype(ml_dtypes.bfloat16) for key, array in weights.items()}
    files = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(stored)}
    for name in set(files.values()):
        save_file({key: stored[key] for key in stored if files[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    rounded = {key: array.astype(ml_dtypes.bfloat16).astype(np.float32) for key, array in weights.items()}
    assert_same(load_hf(folder), rounded)


@pytest.mark.parametrize("hidden", [256, 128])
def test_a_width_that_config_json_leaves_open_is_read_off_the_weights(hidden, tmp_path):
    """8D/3 is 106 for a width of 40: 256, or 128 as in some of attn-1b's weights."""
    layers = (("attention", {"num_heads": 2}),)
    config = LMConfig(layers, d_model=40, vocab_size=11, mlp_dim=hidden)
    model = nnx.jit(lambda: LM(config, rngs=nnx.Rngs(0)))()
    save_hf(model, tmp_path / "hf")
    change(tmp_path / "hf", n_inner=None)
    assert load_hf(tmp_path / "hf").config.mlp_dim == hidden


def test_only_the_fields_that_other_ports_read_are_needed(folder):
    fields = json.loads((folder / "config.json").read_text())
    needed = ("vocab_size", "n_embd", "n_inner", "n_layer", "n_head", "alt_mixer_layers", "alt_mixer_2_layers")
    kept = {key: fields[key] for key in (*needed, "alt_mixer", "alt_mixer_2")}
    (folder / "config.json").write_text(json.dumps(kept | {"mixer": {"kernel_size": 4, "kernel_sizes": 3}}))
    assert_same(load_hf(folder), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_place_in_the_layout_is_not_written(name, tmp_path):
    model = nnx.eval_shape(lambda: LM(REFUSED[name], rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="The released layout holds models of"):
        save_hf(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_save_overwrites_nothing(folder, tmp_path):
    with pytest.raises(UserError, match="is not empty"):
        save_hf(model_of("based"), folder)
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file/hf"):
        with pytest.raises(UserError, match=str(path)):
            save_hf(model_of("based"), path)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu' in config.json; only 'swiglu' is supported."),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon is '1e-6', which is no float"),
        ({"alt_mixer": {"feature_map": {"_target_": "x.ReLU"}}}, "The feature map is 'x.ReLU'"),
        ({"alt_mixer": {"feature_dim": 4, "feature_map": {"input_dim": 8}}}, "input_dim is 8"),
        ({"alt_mixer": {"num_heads": 2, "feature_dim": 2}}, r"proj_k.weight' has shape \(8, 16\); the model's is \(4,"),
        ({"n_inner": 1000}, r"fc1.weight' has shape \(64, 16\); the model's is \(2048, 16\)"),
        ({"n_layer": "7"}, "a value of the wrong type"),
        ({"n_layer": 8}, r"lack 'transformer.layers.7"),
        ({"alt_mixer": None, "rotary_emb_fraction": 0.5}, "Wqkv"),
    ],
    ids=str,
)
def test_a_config_that_describes_another_model_is_refused(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(UserError, match=message):
        load_hf(folder)


def test_folders_that_cannot_be_read_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"none/config.json' cannot be read"):
        load_hf(tmp_path / "none")
    config = (folder / "config.json").read_text()
    for text, message in (("{", "cannot be read"), ("[]", "holds a list"), ("{}", "lacks 'n_embd'")):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_hf(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"model.safetensors' cannot be read"):
        load_hf(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    with pytest.raises(UserError, match=r"other.safetensors' cannot be read"):
        load_hf(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        load_hf(folder)
