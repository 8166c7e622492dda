"""Folders and models that are refused: what a file says of another model, what a layout has no place for."""

import json

import pytest
from flax import nnx
from helpers.hf_folders import MODELS, REFUSED, change, model_of, random_lm

from based_jax.convert import load_hf, save_hf
from based_jax.errors import UserError
from based_jax.nn.lm import LM


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, r"lack 'model.layers.0.self_attn.k_proj.bias' \(64,\)"),
        ({"mlp_bias": True}, "mlp_bias is True in config.json; only False is supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "Unknown rope_type of config.json 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor' of transformers' Llama"),
        ({"rope_scaling": {"factor": 2.0}}, "Rotary has a factor in config.json, 2.0, and no rope_type"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "Unknown rope_type of config.json 'dynamic'"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters has a section 'full_attention'",
        ),
        ({"rope_interleaved": True}, "rope_interleaved is True in config.json; only False is supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4} in config.json; only None is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sliding_window": 8}, "sliding_window is 8"),
        ({"head_dim": 4}, r"o_proj.weight' has shape \(32, 32\); the model's is \(32, 16\)"),
        ({"num_key_value_heads": 4}, r"k_proj.weight \+ .* has shape \(64, 32\)"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs from the embedding"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
    ],
    ids=str,
)
def test_a_llama_of_another_kind_is_refused(fields, message, llama):
    change(llama, **fields)
    with pytest.raises(UserError, match=message):
        load_hf(llama)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral"}, "lacks 'sliding_window' of transformers' Mistral"),
        ({"use_sliding_window": True, "max_window_layers": 0}, "lacks 'sliding_window' of transformers' Qwen2"),
        ({"use_sliding_window": True, "sliding_window": 8}, "lacks 'max_window_layers' of transformers' Qwen2"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 8}, "but use_sliding_window is not true"),
        ({"layer_types": ["sliding_attention"], "use_sliding_window": True}, "sliding_window is None in config.json"),
        ({"layer_types": ["chunked_attention"]}, "layer_types has 'chunked_attention' in config.json; only"),
        ({"layer_types": ["full_attention"] * 9}, "layer_types has 9 in config.json; there are"),
    ],
    ids=str,
)
def test_windows_of_layers_are_stated_whole(fields, message, llama):
    layers = json.loads((llama / "config.json").read_text())["num_hidden_layers"]
    types = {"layer_types": fields["layer_types"] * layers} if len(fields.get("layer_types", [])) == 1 else {}
    change(llama, **{"model_type": "qwen2"} | fields | types)
    with pytest.raises(UserError, match=message):
        load_hf(llama)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_place_in_the_layout_is_not_written(name, tmp_path):
    model = nnx.eval_shape(lambda: LM(REFUSED[name], rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="The layout of HazyResearch/based has no place for") as found:
        save_hf(model, tmp_path / "hf", layout="based")
    assert len(str(found.value)) < 250
    assert not (tmp_path / "hf").exists()


def test_a_layout_of_no_name(tmp_path):
    with pytest.raises(UserError, match="Unknown layout 'lama': did you mean 'llama'"):
        save_hf(model_of("based"), tmp_path / "hf", layout="lama")


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
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon is '1e-6', which is no float of a model"),
        ({"alt_mixer": {"feature_map": {"_target_": "x.ReLU"}}}, "The feature map is 'x.ReLU'"),
        ({"alt_mixer": {"feature_dim": 4, "feature_map": {"input_dim": 8}}}, "input_dim is 8"),
        ({"alt_mixer": {"num_heads": 2, "feature_dim": 2}}, r"proj_k.weight' has shape \(8, 16\); the model's is \(4,"),
        ({"n_inner": 1000}, r"fc1.weight' has shape \(64, 16\); the model's is \(2048, 16\)"),
        ({"n_layer": "7"}, "a value of the wrong type"),
        ({"mixer": None, "rotary_emb_fraction": None}, "rotary_emb_fraction is None, which is no float"),
        ({"n_layer": 8}, r"lack 'transformer.layers.7"),
        ({"alt_mixer": None, "rotary_emb_fraction": 0.5}, "Wqkv"),
    ],
    ids=str,
)
def test_a_config_that_describes_another_model_is_refused(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(UserError, match=message):
        load_hf(folder)


def test_an_attention_model_has_to_say_which_share_rotary_turns(rng, tmp_path):
    save_hf(random_lm(MODELS["attention"], rng), tmp_path / "hf")
    fields = json.loads((tmp_path / "hf/config.json").read_text())
    del fields["rotary_emb_fraction"]
    (tmp_path / "hf/config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="lacks 'rotary_emb_fraction' of HazyResearch/based"):
        load_hf(tmp_path / "hf")


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
    with pytest.raises(UserError, match=r"has weights twice: model.safetensors and the shards that"):
        load_hf(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"other.safetensors' cannot be read"):
        load_hf(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        load_hf(folder)
