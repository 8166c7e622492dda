"""Tokenizers: round trips over any text, known GPT-2 ids, decoding of any ids, changed vocabulary files."""

import lzma
import random
import shutil

import pytest

from based_jax.data.tokenizer import GPT2_ASSETS, TOKENIZERS, Gpt2Tokenizer, get_tokenizer
from based_jax.errors import UserError

TEXTS = [
    "",
    "Hello world",
    "Call me Ishmael. It is a truth universally acknowledged,\n\tthat  ...   \r\n",
    "naïve café, 北京, 😀\u200d🚀, \x00\x7f\u2028",
    "a text that says <|endoftext|> in the middle",
]


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def tokenizer(request):
    return get_tokenizer(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encode_and_decode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.end_of_text for i in ids)


def test_batch_equals_single_texts(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_any_ids_decode(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(-3, tokenizer.vocab_size + 50) for _ in range(20)]
        known = [i for i in ids if 0 <= i < tokenizer.vocab_size]
        assert tokenizer.decode(ids) == tokenizer.decode(known)
    assert tokenizer.decode([*tokenizer.encode("end"), tokenizer.end_of_text]) == "end<|endoftext|>"
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("é")[:1] if tokenizer.vocab_size == 257 else [127])


def test_sizes_and_known_gpt2_ids():
    bytes_, gpt2 = get_tokenizer("bytes"), get_tokenizer("gpt2")
    assert (bytes_.vocab_size, bytes_.end_of_text) == (257, 256)
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("The quick brown fox jumps over the lazy dog.") == [
        464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13,
    ]  # fmt: skip
    assert bytes_.fingerprint != gpt2.fingerprint


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="Unknown tokenizer 'gpt-2': did you mean 'gpt2'"):
        get_tokenizer("gpt-2")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: lzma.compress(lzma.decompress(raw) + b"x y\n")])
def test_damaged_vocabulary_is_named(tmp_path, damage):
    shutil.copytree(GPT2_ASSETS, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "vocab.bpe.xz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"vocab\.bpe"):
        Gpt2Tokenizer(tmp_path)
