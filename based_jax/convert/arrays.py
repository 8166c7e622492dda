"""Parameters alone, of any model, under their flat names ("stacks/0/blocks/0/mixer/qkv/kernel"), for other programs."""

import json
import os

import numpy as np
from safetensors.numpy import save_file

from based_jax import config as configs
from based_jax.convert.reference import parameters
from based_jax.folders import check_free, check_utf8, local_path, written_whole
from based_jax.nn.lm import LM


def flat_parameters(model: LM) -> dict[str, np.ndarray]:
    """Return every parameter by its path; those of a stacked pattern of layers have a leading axis of its copies."""
    return {path: np.asarray(leaf[...]) for path, leaf in parameters(model).items()}


def save_orbax(model: LM, folder: str | os.PathLike, *, tokenizer: str | None = None) -> None:
    """Write the parameters as an Orbax checkpoint, whole or not at all; its metadata has the config.

    Plain Orbax reads it: `orbax.checkpoint.v1.load(folder)` returns numpy arrays by path.

    Args:
      model: the model.
      folder: new, or empty.
      tokenizer: the name of its tokenizer, for the metadata.

    Raises:
      UserError: the folder is not empty, or cannot be written.
    """
    from orbax.checkpoint import v1 as ocp

    target = local_path(folder, "folder")
    check_utf8(target)
    check_free(target)
    with written_whole(target) as part:
        ocp.save(part, flat_parameters(model), custom_metadata=_metadata(model, tokenizer))


def save_safetensors(model: LM, file: str | os.PathLike, *, tokenizer: str | None = None) -> None:
    """Write the parameters as a file of safetensors, whole or not at all; its metadata has the config as JSON.

    Args:
      model: the model.
      file: new.
      tokenizer: the name of its tokenizer, for the metadata.

    Raises:
      UserError: the file exists, or cannot be written.
    """
    target = local_path(file, "file")
    check_free(target)
    metadata = {name: json.dumps(value) for name, value in _metadata(model, tokenizer).items()}
    with written_whole(target) as part:
        save_file({path: np.ascontiguousarray(x) for path, x in flat_parameters(model).items()}, part, metadata)


def _metadata(model: LM, tokenizer: str | None) -> dict:
    return {"model": configs.to_dict(model.config), "tokenizer": tokenizer}
