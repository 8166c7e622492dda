"""Which keys a config has, with what `--help` says of each, and which of them somebody means who types another word."""

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Collection, Iterator
from typing import Annotated, Any

SYNONYMS: dict[str, str] = {
    # model
    "hidden_size": "d_model",
    "n_embd": "d_model",
    "embed_dim": "d_model",
    "dim": "d_model",
    "width": "d_model",
    "n_layers": "layers",
    "num_layers": "layers",
    "n_layer": "layers",
    "num_hidden_layers": "layers",
    "depth": "layers",
    "mixers": "layers",
    "n_heads": "num_heads",
    "n_head": "num_heads",
    "heads": "num_heads",
    "num_attention_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "num_key_value_heads": "num_kv_heads",
    "window_size": "window",
    "sliding_window": "window",
    "intermediate_size": "mlp_dim",
    "ffn_dim": "mlp_dim",
    "d_ff": "mlp_dim",
    "n_inner": "mlp_dim",
    "dropout": "embed_dropout",
    "vocab": "vocab_size",
    "n_vocab": "vocab_size",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
    "precision": "dtype",
    "gradient_checkpointing": "remat",
    # data
    "context_length": "seq_len",
    "context_len": "seq_len",
    "ctx_len": "seq_len",
    "n_ctx": "seq_len",
    "block_size": "seq_len",
    "sequence_length": "seq_len",
    "seq_length": "seq_len",
    "max_seq_len": "seq_len",
    "max_length": "seq_len",
    "max_position_embeddings": "seq_len",
    "data_path": "path",
    "data_dir": "path",
    "dataset": "path",
    # optim
    "learning_rate": "lr",
    "max_lr": "lr",
    "peak_lr": "lr",
    "min_lr": "final_lr",
    "end_lr": "final_lr",
    "b1": "betas",
    "b2": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "epsilon": "eps",
    "adam_epsilon": "eps",
    "wd": "weight_decay",
    "grad_clip": "clip_norm",
    "gradient_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "lr_schedule": "schedule",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "warmup": "warmup_steps",
    "num_warmup_steps": "warmup_steps",
    "optimizer": "optim",
    # the run
    "num_steps": "steps",
    "n_steps": "steps",
    "max_steps": "steps",
    "train_steps": "steps",
    "num_train_steps": "steps",
    "max_iters": "steps",
    "iterations": "steps",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "bs": "batch_size",
    "batch": "batch_size",
    "train_batch_size": "batch_size",
    "global_batch_size": "batch_size",
    "gradient_accumulation_steps": "microbatches",
    "grad_accum": "microbatches",
    "accumulate_steps": "microbatches",
    "random_seed": "seed",
    "log_interval": "log_every",
    "logging_steps": "log_every",
    "eval_interval": "eval_every",
    "eval_steps": "eval_every",
    "checkpoint_every": "every",
    "save_every": "every",
    "save_steps": "every",
    "save_interval": "every",
    "max_to_keep": "keep",
}
"""What others call a key, and the last part of its name here."""
OPTIONS_OF_LAYERS = ("num_heads", "num_kv_heads", "head_dim", "feature_dim", "feature_map", "window", "d_state", "impl")
"""What is no key of a config but an option of a mixer, in a list of layers."""
LEAST_LIKENESS = 0.75
OWN_SECTION = 0.1
"""What a name in the section that was typed is ahead of one in another section, in likeness."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config.

    Attributes:
      name: dotted, as `--config.` takes it; NAME stands for any name.
      kind: its annotation.
      default: what it is if it is left out; `dataclasses.MISSING` where it cannot be.
      meaning: a sentence or two.
      condition: where only one class of a table has it, which: "data.kind=text"; otherwise empty.
    """

    name: str
    kind: Any
    default: Any
    meaning: str
    condition: str = ""


def keys_of(cls: type, where: str = "", condition: str = "") -> Iterator[Key]:
    """Yield every key of a dataclass, those of its sections where they stand; meanings are those of its docstrings."""
    annotations, meanings = typing.get_type_hints(cls, include_extras=True), _meanings(cls)
    for field in dataclasses.fields(cls):
        name = f"{where}.{field.name}" if where else field.name
        kind = annotations[field.name]
        if typing.get_origin(kind) is Annotated:
            for choice, member in typing.get_args(kind)[1].items():
                yield from keys_of(member, name, f"{name}.kind={choice}")
        elif _is_dataclass(kind):
            yield from keys_of(kind, name, condition)
        else:
            for section, place in _sections_in(kind):
                yield from keys_of(section, name + place, condition)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield Key(name, kind, default, meanings.get(field.name, ""), condition)


def key_names(cls: type, where: str = "") -> list[str]:
    """Return the names of all keys of a dataclass and of its sections, each once."""
    names = dict.fromkeys(key.name for key in keys_of(cls, where))
    sections = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [name for name in sections | names if name]


def meant_key(key: str, names: Collection[str]) -> str | None:
    """Return which of dotted `names` somebody means by `key`, for a sentence; None if it is at most misspelt.

    It is what a synonym stands for, the same name in another section, or the most similar one, rather of its own.
    """
    section, _, name = key.rpartition(".")
    names = [found for found in names if found != key]  # where another class of a table has it
    wanted = SYNONYMS.get(name.lower(), name)
    same = [found for found in names if found.rpartition(".")[2] == wanted]
    if same:
        return f"'{min(same, key=lambda found: (found.rpartition('.')[0] != section, len(found)))}'"
    layers = [found for found in names if found.rpartition(".")[2] == "layers"]
    if wanted in OPTIONS_OF_LAYERS and layers:
        return f"'{wanted}' in the options of a mixer in '{layers[0]}'"
    likeness = {found: _likeness(name, found.rpartition(".")[2]) for found in names}
    best = max(names, key=lambda found: likeness[found] + OWN_SECTION * (found.rpartition(".")[0] == section))
    return f"'{best}'" if likeness[best] >= LEAST_LIKENESS else None


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _sections_in(kind: Any) -> Iterator[tuple[type, str]]:
    """Yield the dataclasses in a union, a tuple or a dict, each with what stands between its key and its own keys."""
    for member in typing.get_args(kind):
        if _is_dataclass(member):
            yield member, ".NAME" if typing.get_origin(kind) is dict else ""
        elif typing.get_origin(member) is dict:
            yield from _sections_in(member)


def _is_dataclass(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _meanings(cls: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and its bases say under "Attributes:", by field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, attributes = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        entries = re.split(r"^  (?=\w)", attributes.split("\n\n")[0], flags=re.MULTILINE)
        for names, colon, text in (entry.partition(": ") for entry in entries):
            if colon:
                found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
