"""GGUF files: read as transformers reads the same arrays, and with the tokenizer that they describe."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from based_jax.convert import load_hf
from based_jax.convert.gguf import read_gguf
from based_jax.errors import UserError

pytest.importorskip("gguf", reason="the extra linearize is not installed")
from helpers.gguf_files import write_gguf

FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 258,
}


@pytest.fixture(scope="module")
def weights():
    return llama_weights(FIELDS, np.random.default_rng(0))


def write(weights, path, fields=FIELDS, **options):
    write_gguf(path, weights, fields, **options)
    return path


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_those_of_the_folder_of_the_same_weights(bias, weights, tmp_path, rng):
    """Which `test_transformers.py` holds to transformers' own logits."""
    if bias:
        names = [name for name in weights if "self_attn" in name]
        own = {name.replace("weight", "bias"): rng.normal(size=len(weights[name])).astype(np.float32) for name in names}
        weights = weights | own
    fields = FIELDS | {"attention_bias": bias, "rope_theta": 500.0, "tie_word_embeddings": True, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file(weights, tmp_path / "model.safetensors")
    models = (
        read_gguf(write(weights, tmp_path / "model.gguf", rope_theta=500.0)).model(),
        load_hf(tmp_path, dtype="float32"),
    )
    found, expected = (jax.jit(lambda model, ids: model(ids))(model, np.arange(12)[None]) for model in models)
    np.testing.assert_array_equal(found, expected)


def test_heads_have_the_width_that_the_file_tells(weights, tmp_path):
    """That of four heads of two: keys and values of one width, which the arrays have."""
    fields = FIELDS | {"num_attention_heads": 2, "num_key_value_heads": 1}
    own = {"llama__attention__key_length": 32, "llama__attention__value_length": 32}
    assert "head_dim" not in read_gguf(write(weights, tmp_path / "a.gguf", fields, **own)).config.layers[0][1]
    own = {"llama__attention__key_length": 16, "llama__attention__value_length": 16}
    found = read_gguf(write(weights, tmp_path / "b.gguf", fields, **own))
    assert found.config.layers[0][1]["head_dim"] == 16
    with pytest.raises(UserError, match=r"has shape"):
        found.model()


def test_eight_bits_are_near_what_was_quantised(weights, tmp_path):
    found = read_gguf(write(weights, tmp_path / "q.gguf", quantised=("_proj", "embed")))
    assert set(found.weights) == set(weights) and found.config.tie_embeddings
    for name, array in weights.items():
        assert np.abs(found.weights[name] - array).max() <= np.abs(array).max() / 127, name


def llama_weights(fields, rng):
    D, F, V = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    kv = D * fields["num_key_value_heads"] // fields["num_attention_heads"]
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    for i in range(fields["num_hidden_layers"]):
        own = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D)}
        own |= {"self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        own |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in own.items()}
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_its_tokenizer_and_a_folder_of_it(weights, tmp_path):
    found = read_gguf(write(weights, tmp_path / "model.gguf"))
    text = "three then 42 <|endoftext|>"
    ids = found.text_tokenizer().encode(text)
    assert found.text_tokenizer().decode(ids) == text and 0 not in ids and found.end_of_text == 0
    assert len(ids) == len(text) - text.count("th")
    assert found.save(tmp_path / "hf") == "llama"
    assert Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    again = load_hf(tmp_path / "hf", dtype="float32")
    np.testing.assert_array_equal(again.embed.embedding[...], found.model().embed.embedding[...])


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"pre": "no-such"}, "pre-tokenizer of a GGUF file 'no-such'"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type is yarn; only none is read"),
        ({"llama__attention__sliding_window": 8}, "attention.sliding_window is 8; only 0 is read"),
        ({"tokenizer__ggml__add_bos_token": True}, "tokenizer.ggml.add_bos_token is True; only False is read"),
        ({"llama__attention__value_length": 8}, "keys and values of 8 and 16; one is read"),
    ],
)
def test_what_is_not_known_is_told(told, words, weights, tmp_path):
    with pytest.raises(UserError, match=words):
        read_gguf(write(weights, tmp_path / "model.gguf", **told))


def test_files_that_are_none_are_told(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF no")
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        read_gguf(tmp_path / "bad.gguf")
