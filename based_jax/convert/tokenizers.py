"""The tokenizer of a folder of weights."""

import os

from based_jax.convert import based
from based_jax.convert.fields import OWN_SECTION
from based_jax.convert.folders import CONFIG_FILE, read_json
from based_jax.convert.hf import TOKENIZER_KEY, family_of
from based_jax.data.tokenizer import Gpt2Tokenizer, Tokenizer, get_tokenizer
from based_jax.data.tokenizer_file import FileTokenizer, named_tokenizer
from based_jax.errors import UserError
from based_jax.folders import local_path

TOKENIZER_FILE = "tokenizer.json"


def folder_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Return the tokenizer that config.json names, that of tokenizer.json, or GPT-2's for a released Based.

    Raises:
      UserError: none of these is known.
    """
    path = local_path(folder, "folder")
    fields = read_json(path / CONFIG_FILE)
    own = fields.get(OWN_SECTION)
    if isinstance(own, dict) and TOKENIZER_KEY in own:
        return named_tokenizer(str(own[TOKENIZER_KEY]))
    if (path / TOKENIZER_FILE).exists():
        return FileTokenizer(path / TOKENIZER_FILE)
    if family_of(fields) is based.FAMILY and fields.get("vocab_size") == Gpt2Tokenizer.vocab_size:
        return get_tokenizer("gpt2")
    raise UserError(f"'{folder}' names no tokenizer; give --tokenizer=bytes, gpt2 or the path of a tokenizer.json.")
