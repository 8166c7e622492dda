"""Folders of models: what is saved is loaded, published configs are understood."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import torch_files
from helpers.cases import parametrize_some
from helpers.hf_folders import BASED, MODELS, REFUSED, D, change, model_of, random_lm
from helpers.reference_cases import LMS, load
from helpers.small_mixers import SMALL
from safetensors.numpy import load_file, save_file

from based_jax.convert import lm_from_reference, load_hf, reference_weights, save_hf
from based_jax.errors import UserError
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS, make_mixer

PARITY = Path(__file__).parents[1] / "parity"


@jax.jit
def logits_of(model, ids):
    return model(ids)


def norms(module):
    """Return the norms of a module, which are what has an epsilon."""
    return [part for _, part in nnx.iter_modules(module) if hasattr(part, "epsilon")]


def resolved(config):
    """Return every value of a config by name, defaults filled in, but for implementations."""
    values = vars(config) | {"mlp_dim": config.hidden_dim, "final_norm": config.last_norm}
    for i, (kind, options) in enumerate(values.pop("layers")):
        own = vars(MIXERS[kind].Config(**options)) | {"kind": kind, "impl": None}
        values |= {f"layers[{i}].{name}": value for name, value in own.items()}
    return values


def assert_same(model, weights, layout="based"):
    ours = reference_weights(model, layout)
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


PUBLISHED = {"hf_llama_a": "llama", "hf_mamba_a": "mamba", "hf_rwkv4_lm_a": "rwkv", "tiny_mamba_lm": None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_of_another_family(name, tmp_path):
    """What the reference was built with stands for config.json; the model is that of the parity tests."""
    case = load(name)
    save_file(case.weights, tmp_path / "model.safetensors")
    fields = case.meta.get("config", case.meta) | ({"model_type": PUBLISHED[name]} if PUBLISHED[name] else {})
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours, wanted = resolved(load_hf(tmp_path, dtype="float32", scan_layers=False).config), resolved(LMS[name])
    if wanted["mlp"] == "none":
        wanted["mlp_dim"] = ours["mlp_dim"]
    if "layers[0].dt_rank" in ours:
        assert ours["layers[0].dt_rank"] in (0, 2)  # D/16, rounded up
        wanted |= {key: ours[key] for key in ours if key.endswith("dt_rank")}
    assert ours == wanted


REFERENCES = {"tiny_based_lm": "based", "tiny_attn_lm_even": "based", "tiny_mamba_lm": "mamba"}
REFERENCES |= {"hf_mamba_a": "mamba_hf", "hf_llama_a": "llama"}


@parametrize_some("name", REFERENCES, ["tiny_mamba_lm"])
def test_what_is_written_is_the_reference_s_state_dict(name, tmp_path):
    """Key by key, shape by shape, bit for bit."""
    weights = load(name).weights
    model = lm_from_reference(weights, LMS[name])
    save_hf(model, tmp_path / "hf", layout=REFERENCES[name])
    written = load_file(tmp_path / "hf/model.safetensors")
    repeated = {"lm_head.weight"} if LMS[name].tie_embeddings and "lm_head.weight" not in written else set()
    assert written.keys() == weights.keys() - repeated
    for key, array in written.items():
        np.testing.assert_array_equal(array, weights[key], err_msg=key, strict=True)
    assert resolved(load_hf(tmp_path / "hf", dtype="float32", scan_layers=False).config) == resolved(model.config)


def test_eps_is_the_model_s(llama, caplog):
    """Llama's own default is 1e-6; it reaches every norm, and unknown keys are named."""
    assert {norm.epsilon for norm in norms(load_hf(llama))} == {1e-5}
    change(llama, rms_norm_eps=3e-6, window_of_opportunity=3)
    assert {norm.epsilon for norm in norms(load_hf(llama))} == {3e-6}
    assert "keys that are not known here and are left out: window_of_opportunity." in caplog.text
    fields = json.loads((llama / "config.json").read_text())
    del fields["rms_norm_eps"]
    (llama / "config.json").write_text(json.dumps(fields))
    assert load_hf(llama).config.norm_eps == 1e-6


@pytest.mark.parametrize("kind", MIXERS)
def test_eps_reaches_the_norms_of_a_mixer(kind):
    mixer = nnx.eval_shape(lambda: make_mixer(kind, 128, norm_eps=1e-3, rngs=nnx.Rngs(0)))
    widened = {"rwkv7": mixer.config.head_dim} if kind == "rwkv7" else {}
    assert {norm.epsilon for norm in norms(mixer)} <= {1e-3 * widened.get(kind, 1)}


def test_what_a_file_leaves_out_is_told(llama, caplog):
    change(llama)
    fields = json.loads((llama / "config.json").read_text())
    kept = {key: fields[key] for key in fields.keys() - {"rope_theta", "rms_norm_eps"}}
    (llama / "config.json").write_text(json.dumps(kept))
    assert load_hf(llama).config.layers[0][1]["rotary_base"] == 10000.0
    assert "leaves out rms_norm_eps 1e-06: taken as its publication's code does." in caplog.text
    assert "leaves out rope_theta 10000.0: taken" in caplog.text


def test_stored_frequencies_are_ignored(llama):
    """As transformers ignores them: rotary's base and scaling are those of config.json."""
    path = llama / "model.safetensors"
    weights, buffer = load_file(path), np.ones(4, np.float32)
    keys = ("model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    save_file(weights | dict.fromkeys(keys, buffer), path)
    assert_same(load_hf(llama), weights, "llama")


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


def as_torch_file(folder, names):
    """Put torch's files in the place of model.safetensors, one or shards with their index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {key: names[i % len(names)] for i, key in enumerate(weights)}
    for name in names:
        torch_files.write(folder / name, {key: weights[key] for key in weights if files[key] == name})
    if len(names) > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return weights


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["one-of-two.bin", "two-of-two.bin"]], ids=len)
def test_the_released_checkpoints_are_torch_s(names, folder):
    weights = as_torch_file(folder, names)
    assert_same(load_hf(folder), weights)


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


PARTLY_CONVOLUTIONS = (
    ("conv", {}),
    ("attention", {"num_heads": 2}),
    ("window", {"num_heads": 2, "rotary_fraction": 0.5}),
)
WRITTEN = {
    "based": [
        LMConfig(PARTLY_CONVOLUTIONS, d_model=D),
        LMConfig((BASED[1], ("attention", {"num_heads": 2})), d_model=D),
    ],
    "based_jax": [REFUSED["another mixer"], REFUSED["attention and others"]],
    "llama": [LMConfig((("attention", {"num_heads": 4, "num_kv_heads": 2, "rotary_fraction": 1.0}),), d_model=D)],
    "mamba": [LMConfig((("mamba", {"dt_rank": 3, "conv_bias": False}),) * 2, d_model=D, mlp="none")],
    "mamba_hf": [LMConfig((("mamba", {}),), d_model=D, mlp="none", norm_eps=1e-6)],
}


@parametrize_some("layout", WRITTEN, ["llama"])
def test_a_model_is_written_in_the_first_layout_that_holds_it(layout, rng, tmp_path):
    for number, config in enumerate(WRITTEN[layout]):
        model = random_lm(dataclasses.replace(config, vocab_size=11, scan_layers=True), rng)
        assert save_hf(model, tmp_path / str(number)) == layout
        assert_equal(model, load_hf(tmp_path / str(number)))


@parametrize_some("kind", MIXERS, ["rwkv7"])
def test_every_mixer_has_a_place_in_our_layout(kind, rng, tmp_path):
    layers = ((kind, SMALL.get(kind, {})),) * 2
    model = random_lm(LMConfig(layers, d_model=16, vocab_size=11, scan_layers=True), rng)
    save_hf(model, tmp_path / "hf", layout="based_jax")
    assert_equal(model, load_hf(tmp_path / "hf"))


def assert_equal(model, again):
    assert resolved(again.config) == resolved(model.config)
    ours, theirs = (nnx.to_flat_state(nnx.state(x)) for x in (model, again))
    for (path, leaf), (other_path, other) in zip(ours, theirs, strict=True):
        assert path == other_path
        np.testing.assert_array_equal(leaf[...], other[...], err_msg=str(path))


CHOICES = {
    "conv": {"kernel_size": (3, 2), "expand": (4, 2)},
    "taylor": {"num_heads": (2, 1), "feature_dim": (4, 2)},
    "window": {"num_heads": (2, 4), "window": (3, 5), "rotary_fraction": (1.0, 0.5), "bias": (False, True)},
    "attention": {"num_heads": (2, 1), "num_kv_heads": (None, 1), "rotary_base": (1e4, 10.0), "bias": (False, True)},
    "linear": {"num_heads": (2, 1), "feature_dim": (4, 2)},
}
MODEL_CHOICES = {
    "vocab_size": (11, 8),
    "pad_vocab_multiple": (8, 1, 3),
    "mlp_dim": (0, 20, 256),
    "mlp": ("swiglu", "swiglu", "swiglu", "identity"),
    "norm": ("rms", "rms", "rms", "layer"),
    "final_norm": (None, "rms", "rms", "layer"),
    "norm_eps": (1e-5, 1e-6),
    "init_std": (0.02, 0.1),
    "init_recipe": ("reference", "zoology"),
    "tie_embeddings": (True, False),
    "embed_dropout": (0.0, 0.1),
    "embed_norm": (False, False, False, True),
    "scan_layers": (False, True),
    "remat": ("none", "full"),
    "dtype": ("bfloat16", "float32"),
}


def drawn_config(rng):
    """Return a config that mostly has a place in the layout: one set of options for each kind, seldom two."""
    kinds = ["attention"] if rng.random() < 0.3 else ["conv", "taylor", "window"]
    kinds += ["linear"] if rng.random() < 0.05 else []

    def options(kind, odds):
        return {name: values[int(rng.random() < odds)] for name, values in CHOICES[kind].items()}

    same = {
        kind: options(kind, 0.3) | {"bias": False} if "bias" in CHOICES[kind] else options(kind, 0.3)
        for kind in CHOICES
    }
    layers = [(kind, same[kind] if rng.random() < 0.95 else options(kind, 0.5)) for kind in rng.choice(kinds, 3)]
    fields = {name: values[rng.integers(len(values))] for name, values in MODEL_CHOICES.items()}
    return LMConfig(tuple((str(kind), own) for kind, own in layers), d_model=8, **fields)


@pytest.mark.parametrize("draws", [6, pytest.param(150, marks=pytest.mark.long)])
def test_what_is_saved_is_loaded_or_refused_by_name(draws, rng, tmp_path):
    saved = 0
    for i in range(draws):
        model = random_lm(drawn_config(rng), rng)
        config = model.config
        try:
            save_hf(model, tmp_path / str(i), layout="based")
        except UserError as error:
            name = re.search(r"has no place for (\S+) .*, which would be read as .*\.$", str(error))[1]
            assert name in resolved(config) or re.fullmatch(r"layers\[\d\]", name)
            assert not (tmp_path / str(i)).exists()
            continue
        saved += 1
        again = load_hf(tmp_path / str(i), dtype=config.dtype, scan_layers=config.scan_layers)
        assert_equal(model, again)
    assert draws < 100 or 20 <= saved <= draws - 20
