"""The tokenizer of a file of the `tokenizers` library, tokenizer.json."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from based_jax.data.tokenizer import END_OF_TEXT, TextTokenizer, get_tokenizer, tokenizer_class
from based_jax.errors import UserError
from based_jax.folders import read_file, reason

ENDS_OF_TEXT = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
"""What ends a text in published vocabularies, the first that a file has."""


class FileTokenizer:
    """A tokenizer.json; UserError if it cannot be read or has no id for the end of a text.

    `end_of_text` is that id where a model names one, else the first of `ENDS_OF_TEXT`; with `begins` texts that a model
    continues have what the file puts before each one.
    """

    def __init__(self, path: Path, *, end_of_text: int | None = None, begins: bool = False):
        try:
            content = read_file(path)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no class of its own
            raise UserError(f"'{path}' is no file of a tokenizer: {reason(error)}.") from None
        self._tokenizer.encode_special_tokens = True  # a text that spells one out is not one
        if end_of_text is not None and self._tokenizer.id_to_token(end_of_text) is None:
            raise UserError(f"'{path}' has no id {end_of_text}, with which its model ends a text.")
        ends = [end_of_text, *(self._tokenizer.token_to_id(token) for token in ENDS_OF_TEXT)]
        if all(end is None for end in ends):
            raise UserError(f"'{path}' has none of {', '.join(ENDS_OF_TEXT)} for the end of a text.")
        self.end_of_text = next(end for end in ends if end is not None)
        self.beginning: tuple[int, ...] = self._before_texts() if begins else ()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def _before_texts(self) -> tuple[int, ...]:
        """Return what the file puts before each text, of which none is an end of its own."""
        bare, whole = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return tuple(whole[: next(starts, 0)])

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without those that a model puts before or behind it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, encoded in parallel."""
        return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def last_cut(self, text: str, start: int, stop: int) -> int:
        """Return `start`: where a file's tokenizer may be cut is not known."""
        return start

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids; those outside the vocabulary are left out."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=False)


def is_file_name(name: str) -> bool:
    """Return whether the name of a tokenizer is the path of its file."""
    return name.endswith(".json")


def named_tokenizer(name: str) -> TextTokenizer:
    """Return the tokenizer of a name, or of a path that ends in .json.

    Raises:
      UserError: there is no such tokenizer.
    """
    return FileTokenizer(Path(name)) if is_file_name(name) else get_tokenizer(name)


def vocabulary_size(name: str) -> int:
    """Return how many ids `named_tokenizer` has, which only a file has to be read for; raises likewise."""
    return (named_tokenizer if is_file_name(name) else tokenizer_class)(name).vocab_size
