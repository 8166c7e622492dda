"""Parameters that a run begins with, of another run, of a checkpoint, or of a folder of released weights."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from based_jax.config import check_types
from based_jax.errors import UserError
from based_jax.folders import local_path
from based_jax.nn.lm import LMConfig
from based_jax.optim import path_of
from based_jax.train.checkpoint import Leaves, SavedCheckpoints, described
from based_jax.train.workdir import CHECKPOINTS_FOLDER

MAX_NAMES_SHOWN = 8
PARAMS = "params/"
"""Of a parameter's path in a checkpoint."""


@dataclasses.dataclass(frozen=True)
class InitFrom:
    """Whose parameters a run begins with.

    Of those that the patterns choose, the source and the model have the same names and shapes; the others are drawn
    from the seed. A pattern is of a parameter's whole path, such as 'embed/*' or 'stacks/0/*'.

    Attributes:
      path: the workdir of a run, the folder of its checkpoints or of one of them, or a folder with config.json and
        weights that `convert.load_hf` reads.
      step: of a run's checkpoints, which one; None for the last good one.
      include: patterns of the parameters to take.
      exclude: patterns of those to leave out of these.
    """

    path: str
    step: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        check_types(self)

    def takes(self, name: str) -> bool:
        """Return whether the patterns choose the parameter of this path."""
        return _matches(name, self.include) and not _matches(name, self.exclude)


def read_parameters(init_from: InitFrom, config: LMConfig, params: nnx.State) -> tuple[dict[str, jax.Array], str]:
    """Return the parameters to begin with, by their paths, and a line that says what they are.

    Args:
      init_from: see its class.
      config: of the model that takes them.
      params: its parameters' shapes, with their shardings.

    Raises:
      UserError: the folder is none of those, a pattern matches nothing, or names or shapes differ.
    """
    wanted = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    folder = local_path(init_from.path, "init_from.path")
    checkpoints, step = _checkpoints(folder, init_from.step)
    if checkpoints is not None:
        where, taken = _from_checkpoint(init_from, checkpoints, step, wanted)
    else:
        where, taken = str(folder), _from_released(init_from, folder, config, wanted)
    return taken, _line(where, taken, wanted)


def _checkpoints(folder: Path, step: int | None) -> tuple[SavedCheckpoints | None, int | None]:
    """Return the checkpoints that a folder has or is of, and which one is meant; none for released weights."""
    if (folder / CHECKPOINTS_FOLDER).is_dir():
        return SavedCheckpoints(folder / CHECKPOINTS_FOLDER), step
    if SavedCheckpoints(folder).latest() is not None:
        return SavedCheckpoints(folder), step
    if folder.name.isdecimal() and (folder / "_CHECKPOINT_METADATA").exists():
        return SavedCheckpoints(folder.parent), int(folder.name)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"init_from.path '{folder}' is neither a run, nor checkpoints, nor released weights with their config.json."
        )
    return None, None


def _from_checkpoint(
    init_from: InitFrom, checkpoints: SavedCheckpoints, step: int | None, wanted: Leaves
) -> tuple[str, dict[str, jax.Array]]:
    def choose(folder: Any, found: Leaves) -> Leaves:
        params = {path.removeprefix(PARAMS): leaf for path, leaf in found.items() if path.startswith(PARAMS)}
        return {PARAMS + name: wanted[name] for name in _chosen(init_from, str(folder), params, wanted)}

    step, leaves = checkpoints.restore_leaves(choose, step)
    taken = {path.removeprefix(PARAMS): leaf for path, leaf in leaves.items()}
    return str(checkpoints.directory / str(step)), taken


def _from_released(init_from: InitFrom, folder: Path, config: LMConfig, wanted: Leaves) -> dict[str, jax.Array]:
    from based_jax.convert import load_hf

    params = nnx.state(load_hf(folder, dtype=config.dtype, scan_layers=config.scan_layers), nnx.Param)
    found = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return {
        name: jax.device_put(found[name], wanted[name].sharding)
        for name in _chosen(init_from, str(folder), found, wanted)
    }


def _chosen(init_from: InitFrom, where: str, found: Mapping[str, Any], wanted: Leaves) -> list[str]:
    """Return the names that the patterns choose, after a check that both sides have them in the same shapes."""
    for pattern in (*init_from.include, *init_from.exclude):
        if not any(_matches(name, (pattern,)) for name in (*found, *wanted)):
            raise UserError(f"init_from: '{pattern}' matches no parameter of '{where}'; they are {_names(found)}.")
    names = sorted(filter(init_from.takes, found.keys() | wanted.keys()))
    absent, surplus = ([name for name in names if name not in side] for side in (found, wanted))
    if absent or surplus:
        parts = [f"lacks {_names(absent)}" if absent else "", f"has {_names(surplus)} beside it" if surplus else ""]
        raise UserError(
            f"init_from: '{where}' has not the model's parameters: it {' and '.join(filter(None, parts))};"
            " init_from.include and init_from.exclude choose some by patterns."
        )
    for name in names:
        if (there := described(found[name])) != (here := described(wanted[name])):
            raise UserError(f"init_from: '{name}' is {there} in '{where}' and {here} here.")
    return names


def _line(where: str, taken: Mapping[str, jax.Array], wanted: Leaves) -> str:
    left = [name for name in wanted if name not in taken]
    count = sum(leaf.size for leaf in taken.values())
    rest = f"; drawn from the seed: {_names(left)}" if left else ""
    return f"init_from: {count:,} parameters, {len(taken)} of {len(wanted)} arrays, are those of '{where}'{rest}"


def _names(names: Any) -> str:
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:MAX_NAMES_SHOWN])
    return shown + (f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else "")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
