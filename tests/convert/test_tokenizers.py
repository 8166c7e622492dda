"""The tokenizer of a folder: that of its tokenizer.json as its config.json says it is used, and one that is written."""

import json

import jax
import pytest
import tokenizers
from flax import nnx

from based_jax.convert import save_hf
from based_jax.convert.tokenizers import folder_tokenizer
from based_jax.data.tokenizer import Gpt2Tokenizer
from based_jax.data.tokenizer_file import FileTokenizer
from based_jax.errors import UserError
from based_jax.generate.text import encode_prompt
from based_jax.nn.lm import LM, LMConfig

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<end>": 3, "the": 4, "cat": 5}


@pytest.fixture
def file(tmp_path):
    """Return a tokenizer.json that begins each text with <s>, as Llama's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<end>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture(scope="module")
def model():
    config = LMConfig((("conv", {}),), d_model=8, vocab_size=6, mlp="none")
    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(("eos", "end"), [(3, 3), ([3, 2], 3), (None, 2)])
def test_a_published_folder_says_how_texts_begin_and_end(file, eos, end):
    (file.parent / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": eos}))
    tokenizer = folder_tokenizer(file.parent)
    assert (tokenizer.end_of_text, tuple(tokenizer.beginning)) == (end, (1,))
    assert tokenizer.encode("the cat") == [4, 5]
    assert encode_prompt(tokenizer, "the cat") == [1, 4, 5] and encode_prompt(tokenizer, "") == [1]


@pytest.mark.parametrize("eos", ["x", [], ["x"], True, 2.5])
def test_an_end_that_is_no_id(file, eos):
    (file.parent / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": eos}))
    with pytest.raises(UserError, match=r"config.json: eos_token_id is .*; it is an id, several of them, or null"):
        folder_tokenizer(file.parent)


def test_an_end_that_the_vocabulary_lacks(file):
    (file.parent / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 9}))
    with pytest.raises(UserError, match=r"tokenizer.json' has no id 9, with which its model ends a text"):
        folder_tokenizer(file.parent)


def test_a_file_is_copied_and_used_as_in_training(file, model, tmp_path):
    save_hf(model, tmp_path / "hf", tokenizer=str(file))
    tokenizer = folder_tokenizer(tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == file.read_bytes()
    assert tokenizer.fingerprint == FileTokenizer(file).fingerprint
    assert encode_prompt(tokenizer, "the") == [4] and encode_prompt(tokenizer, "") == [2]


def test_gpt2_s_is_written_for_other_programs(tmp_path):
    text, own = "Hello world, it's 2402.18668 <|endoftext|>\n", Gpt2Tokenizer()
    own.save(tmp_path / "tokenizer.json")
    read = FileTokenizer(tmp_path / "tokenizer.json")
    assert read.encode(text) == own.encode(text) and read.end_of_text == own.end_of_text


@pytest.mark.long
def test_a_folder_has_gpt2_s(model, tmp_path):
    save_hf(model, tmp_path / "hf", tokenizer="gpt2")
    assert isinstance(folder_tokenizer(tmp_path / "hf"), Gpt2Tokenizer)
    assert (tmp_path / "hf/tokenizer.json").exists()
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == Gpt2Tokenizer.end_of_text


def test_a_tokenizer_of_no_name_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(UserError, match="Unknown tokenizer 'byte'"):
        save_hf(model, tmp_path / "hf", tokenizer="byte")
    with pytest.raises(UserError, match=r"none.json' is no file of a tokenizer"):
        save_hf(model, tmp_path / "hf", tokenizer=str(tmp_path / "none.json"))
    assert not (tmp_path / "hf").exists()
