"""Text to ids and back: raw bytes, or the byte-level BPE of GPT-2 from its original vocabulary files."""

import hashlib
import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from based_jax.data.checks import check_choice
from based_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
BYTE_PIECES = (*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode())
GPT2_ASSETS = Path(__file__).parent / "assets" / "gpt2"
GPT2_WORD_ENDS = frozenset(" \n\t。，、！？：；")
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class Tokenizer(Protocol):
    """What generation asks of a tokenizer."""

    vocab_size: int
    end_of_text: int
    beginning: tuple[int, ...]  # ids before each text, of published models that were trained so
    fingerprint: str  # equal only for tokenizers that give every text the same ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without an end-of-text id, also where the text spells one out.

        Raises:
          UserError: the text holds half of a surrogate pair, which no UTF-8 can say.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; raises as `encode`."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids: broken UTF-8 becomes U+FFFD, ids outside the vocabulary are left out."""


class TextTokenizer(Tokenizer, Protocol):
    """A tokenizer of texts of any size, a part at a time."""

    def last_cut(self, text: str, start: int, stop: int) -> int:
        """Return the last place of (start, stop] where a cut changes no id of `text`, or `start` if there is none."""


class ByteTokenizer:
    """The UTF-8 bytes of a text, and id 256 for its end."""

    vocab_size = 257
    end_of_text = 256
    beginning: tuple[int, ...] = ()
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        """Return the bytes of `text`."""
        return list(_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the bytes of each text."""
        return [self.encode(text) for text in texts]

    def last_cut(self, text: str, start: int, stop: int) -> int:
        """Return `stop`: every character has bytes of its own."""
        return stop

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids: broken UTF-8 becomes U+FFFD, ids outside the vocabulary are left out."""
        return b"".join(BYTE_PIECES[i] for i in ids if 0 <= i < self.vocab_size).decode(errors="replace")


class Gpt2Tokenizer:
    """GPT-2's byte-level BPE; loading raises UserError if a vocabulary file is missing or changed."""

    vocab_size = 50257
    end_of_text = 50256
    beginning: tuple[int, ...] = ()
    fingerprint = "gpt2"

    def __init__(self, assets: Path = GPT2_ASSETS):
        vocab = json.loads(_verified(assets, "encoder.json"))
        merges = _verified(assets, "vocab.bpe").decode().split("\n")[1:]
        pairs = [(left, right) for left, right in (line.split() for line in merges if line)]
        self._bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
        self._bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._bpe.decoder = tokenizers.decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, encoded in parallel by the library's own threads."""
        for text in texts:
            _utf8(text)
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(list(texts))]

    def last_cut(self, text: str, start: int, stop: int) -> int:
        """Return the last place between a letter or a digit and what ends a word: no pre-token of GPT-2 spans it."""
        places = (at for at in range(min(stop, len(text) - 1), start, -1) if text[at] in GPT2_WORD_ENDS)
        return next((at for at in places if text[at - 1].isalnum()), start)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids: broken UTF-8 becomes U+FFFD, ids outside the vocabulary are left out."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._bpe.decode(known, skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write the file of the `tokenizers` library."""
        copy = tokenizers.Tokenizer.from_str(self._bpe.to_str())
        copy.add_special_tokens([END_OF_TEXT])
        copy.save(str(path))


TOKENIZERS: dict[str, type[TextTokenizer]] = {"bytes": ByteTokenizer, "gpt2": Gpt2Tokenizer}


def get_tokenizer(name: str) -> TextTokenizer:
    """Return the tokenizer of that name, loaded; UserError for an unknown name."""
    return tokenizer_class(name)()


def tokenizer_class(name: str) -> type[TextTokenizer]:
    """Return the class of the tokenizer of that name, which knows its sizes; UserError for an unknown name."""
    check_choice("tokenizer", name, TOKENIZERS)
    return TOKENIZERS[name]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise UserError(f"Text has a lone surrogate, {bad!r}, at character {error.start}: it is no UTF-8.") from None


def _verified(assets: Path, name: str) -> bytes:
    """Return the content of a vocabulary file after comparing its sha256."""
    path = assets / f"{name}.xz"
    try:
        content = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise UserError(
            f"Cannot read the GPT-2 vocabulary file {path} ({error}): install the package again."
        ) from error
    if hashlib.sha256(content).hexdigest() != GPT2_SHA256[name]:
        raise UserError(f"The GPT-2 vocabulary file {path} is not the original {name}: install the package again.")
    return content
