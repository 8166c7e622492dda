"""The tokenizer of a folder of weights."""

import os
import shutil
from pathlib import Path

from based_jax.config.checks import shown
from based_jax.convert import based
from based_jax.convert.families import family_of
from based_jax.convert.fields import OWN_SECTION
from based_jax.convert.folders import CONFIG_FILE, Fields, read_json
from based_jax.data.tokenizer import Gpt2Tokenizer, Tokenizer, get_tokenizer
from based_jax.data.tokenizer_file import FileTokenizer, is_file_name, named_tokenizer
from based_jax.errors import UserError
from based_jax.folders import local_path

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_KEY = "tokenizer"
"""Of our own section of config.json."""
END_KEY = "eos_token_id"


def folder_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Return the tokenizer that config.json names, that of tokenizer.json, or GPT-2's for a released Based.

    What ends a text is the id that a published config.json names, the first of several, and what begins one is what
    tokenizer.json puts there.

    Raises:
      UserError: none of these is known, or what ends a text is no id.
    """
    path = local_path(folder, "folder")
    fields = read_json(path / CONFIG_FILE)
    own = fields.get(OWN_SECTION)
    if isinstance(own, dict) and TOKENIZER_KEY in own:
        return named_tokenizer(str(own[TOKENIZER_KEY]))
    if (path / TOKENIZER_FILE).exists():
        return FileTokenizer(path / TOKENIZER_FILE, end_of_text=_end_of_text(fields), begins=own is None)
    if family_of(fields) is based.FAMILY and fields.get("vocab_size") == Gpt2Tokenizer.vocab_size:
        return get_tokenizer("gpt2")
    raise UserError(f"'{folder}' names no tokenizer; give --tokenizer=bytes, gpt2 or the path of a tokenizer.json.")


def _end_of_text(fields: Fields) -> int | None:
    """Return the id, or the first of several, at which a published model ends a text; None where it is not told."""
    end = fields.get(END_KEY)
    first = end[0] if isinstance(end, list) and end else end
    if first is None or type(first) is int:
        return first
    raise UserError(f"{CONFIG_FILE}: {END_KEY} is {shown(end)}; it is an id, several of them, or null.")


def tokenizer_fields(tokenizer: str | None) -> Fields:
    """Return what config.json says of a tokenizer: the end of a text, and in our section its name; a file is copied.

    Raises:
      UserError: there is no such tokenizer.
    """
    if tokenizer is None:
        return {}
    end = {END_KEY: named_tokenizer(tokenizer).end_of_text}
    return end if is_file_name(tokenizer) else end | {OWN_SECTION: {TOKENIZER_KEY: tokenizer}}


def write_tokenizer(tokenizer: str | None, folder: Path) -> None:
    """Write the tokenizer.json of a file's tokenizer, or of GPT-2's, into a folder."""
    if tokenizer == "gpt2":
        Gpt2Tokenizer().save(folder / TOKENIZER_FILE)
    elif tokenizer is not None and is_file_name(tokenizer):
        shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
