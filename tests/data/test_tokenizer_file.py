import dataclasses

import numpy as np
import pytest
import tokenizers

from based_jax.data.tokenizer_file import FileTokenizer
from based_jax.errors import UserError
from based_jax.train.tasks import TextTask

WORDS = {"<unk>": 0, "the": 1, "cat": 2, "<": 3, "/": 4, "s": 5, ">": 6, "</s>": 7}


def written(path, vocab):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([token for token in ("</s>",) if token in vocab])
    tokenizer.save(str(path))
    return path


def test_a_file_of_the_library(tmp_path):
    tokenizer = FileTokenizer(written(tmp_path / "tokenizer.json", WORDS))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (8, 7)
    assert tokenizer.encode("the cat") == [1, 2] == tokenizer.encode_batch(["the cat"])[0]
    assert 7 not in tokenizer.encode("cat </s>")  # what a text spells out does not end it
    assert tokenizer.decode([1, 2, 99]) == "the cat"
    assert tokenizer.fingerprint == FileTokenizer(tmp_path / "tokenizer.json").fingerprint


def test_files_that_are_none(tmp_path):
    for path, message in (
        (tmp_path / "none.json", r"is no file of a tokenizer: .*\.$"),
        (written(tmp_path / "endless.json", {"<unk>": 0, "a": 1}), "has none of .* for the end of a text"),
    ):
        with pytest.raises(UserError, match=message):
            FileTokenizer(path)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_text_and_tokens_of_it_are_trained_on(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "tokenizer.json", WORDS)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat " * 30)
    (tmp_path / "text" / "val.txt").write_text("cat the cat the")
    (tmp_path / "tokens").mkdir()
    np.array([1, 2] * 30 + [7], np.uint32).tofile(tmp_path / "tokens" / "a.uint32.bin")
    np.save(tmp_path / "tokens" / "val.npy", np.array([2, 1, 2, 1], np.uint16))
    task = TextTask("text", "text", tokenizer="tokenizer.json", seq_len=4, cache_dir="cache", processes=processes)
    assert task.num_tokens == 8 and task.located.tokenizer == str(tmp_path / "tokenizer.json")
    text, tokens = (dataclasses.replace(task.located, path=str(tmp_path / name)).open(3) for name in ("text", "tokens"))
    assert text.record["fingerprint"] == tokens.record["fingerprint"]
    np.testing.assert_array_equal(text.batch(2)["inputs"], tokens.batch(2)["inputs"])
