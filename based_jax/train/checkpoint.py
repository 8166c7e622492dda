"""Checkpoints of a training state: written in the background, verified when read, never half taken for whole.

Each is a folder named by its step, which Orbax renames into place once all of it is on disk; what a killed process
leaves has a temporary name that nothing reads. Leaves are stored under their paths ('params/embed/embedding'), so a
checkpoint depends on no class, and with a checksum each, since the array format would pass on a flipped bit.
"""

import contextlib
import dataclasses
import logging
import os
import re
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from based_jax.config import check_types
from based_jax.errors import UserError
from based_jax.optim import path_of

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what stays.

    Attributes:
      every: steps between checkpoints; None saves only where a run stops.
      keep: how many of the latest stay; with 2 or more there is one to fall back to.
      keep_every: those at multiples of this many steps stay as well; None for no others.
    """

    every: int | None = 1000
    keep: int = 2
    keep_every: int | None = None

    def __post_init__(self):
        check_types(self)
        for name in ("every", "keep", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it is at least 1.")


class Checkpoints:
    """The checkpoints of one run: `due`, `save`, `latest`, `restore`; a context manager that ends with `close`.

    `save` copies the state to host memory and returns, so the arrays may be donated at once; writing and the removal
    of old checkpoints go on in the background. An error there surfaces in the next `save`, `wait`, `latest` or
    `close`. One save runs at a time: the next one waits for it. In a run of many processes all call every method.
    """

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig | None = None):
        logging.getLogger("absl").addFilter(_QUIET)
        self.directory = epath.Path(directory).resolve()
        self.config = config or CheckpointConfig()
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=_preservation(self.config),
            lightweight_initialize=True,  # garbled metadata of one step must not keep the others from being opened
        )
        self._step: int | None = None
        self._corrupt: set[int] = set()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def due(self, step: int) -> bool:
        """Return whether the config wants a checkpoint after this step."""
        return self.config.every is not None and step % self.config.every == 0

    def latest(self) -> int | None:
        """Return the step of the last complete checkpoint that is not known to be corrupt; None where there is none."""
        self.wait()
        return max(self._steps(), default=None)

    def save(self, step: int, state: Any, wait: bool = False) -> None:
        """Start to save a state, unless this step was the last one saved or restored; `wait` until it is on disk.

        Corrupt checkpoints that `restore` met are removed first, lest they count among those to keep.

        Args:
          step: names the checkpoint; one of the same name is replaced.
          state: a tree of arrays, `nnx.State` and PRNG keys included.
          wait: return only when the checkpoint is complete.

        Raises:
          UserError: this save or the one before it met a full disk or another error of the file system.
        """
        if step != self._step:
            self.wait()
            self._step = step
            with self._disk_errors():
                self._start(step, _flatten(state))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the save in progress is complete.

        Raises:
          UserError: as `save`.
        """
        with self._disk_errors():
            self._orbax.wait()

    def close(self) -> None:
        """Wait for the save in progress and release the directory.

        Raises:
          UserError: as `save`.
        """
        with self._disk_errors():
            self._orbax.close()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any]:
        """Return the latest good checkpoint as (step, state), warning of each corrupt one on the way.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct`, with the shardings to restore to (the first device where
            there is none). It may lack whole top-level fields of the saved state: they are not read.
          step: a certain checkpoint, and no other.

        Raises:
          UserError: no checkpoint is good, or one has other parameters, shapes or dtypes.
        """
        steps = self._steps()
        if step is not None and step not in steps:
            raise UserError(f"'{self.directory}' has no checkpoint of step {step}; it has {steps or 'none'}.")
        for candidate in reversed(steps) if step is None else [step]:
            try:
                state = _load(self.directory / str(candidate), abstract_state)
            except UserError:
                raise
            except Exception as error:
                log.warning("Checkpoint '%s' is corrupt: %s", self.directory / str(candidate), _reason(error))
                self._corrupt.add(candidate)
            else:
                self._step = candidate
                return candidate, state
        raise UserError(f"'{self.directory}' has no good checkpoint (corrupt: {sorted(self._corrupt) or 'none'}).")

    def _steps(self) -> list[int]:
        steps = [int(folder.name) for folder in self.directory.iterdir() if folder.name.isdigit()]
        return sorted(step for step in steps if step not in self._corrupt)

    def _start(self, step: int, leaves: dict[str, jax.Array]) -> None:
        while self._corrupt:
            self._orbax.delete(self._corrupt.pop())
        metadata = {"checksums": _checksums(leaves)}
        self._orbax.save_async(step, leaves, force=True, overwrite=True, custom_metadata=metadata)

    @contextlib.contextmanager
    def _disk_errors(self):
        """Turn an error of the file system into a UserError that names the directory and the last good step."""
        try:
            yield
        except (OSError, ValueError) as error:
            code = _os_error_code(error)
            if code is None:
                raise
            step, self._step = self._step, None
            good = [known for known in self._steps() if known != step]
            last = f"the last good checkpoint is step {max(good)}" if good else "there is no good checkpoint yet"
            raise UserError(f"Cannot save step {step} in '{self.directory}': {os.strerror(code)}; {last}.") from error


class _Quiet(logging.Filter):
    """Drops the log of Orbax, whose failures reach the user as one sentence of this module."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record comes from elsewhere."""
        return "orbax" not in record.pathname


_QUIET = _Quiet()


def _preservation(config: CheckpointConfig):
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_every is not None:
        kept.append(policies.EveryNSteps(config.keep_every))
    return policies.AnyPreservationPolicy(kept)


def _flatten(tree: Any) -> dict[str, Any]:
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _load(folder: epath.Path, abstract_state: Any) -> Any:
    wanted = {path: _placed(leaf) for path, leaf in _flatten(abstract_state).items()}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        found = ocp.metadata(folder)
        if not found.metadata or not found.custom_metadata:
            raise ValueError("its metadata cannot be read")
        _check_leaves(found.metadata, wanted, folder)
        leaves = ocp.load(folder, wanted)
    for path, checksum in _checksums(leaves).items():
        if checksum != found.custom_metadata["checksums"][path] or leaves[path].dtype != wanted[path].dtype:
            raise ValueError(f"'{path}' is not what was saved")
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[path] for path in wanted])


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_leaves(found: dict[str, Any], wanted: dict[str, Any], folder: epath.Path) -> None:
    """Check that the fields in `wanted` have the saved paths, shapes and dtypes; name the first that differs."""
    fields = {path.split("/")[0] for path in wanted}
    for path in sorted(wanted.keys() | {path for path in found if path.split("/")[0] in fields}):
        there, here = _described(found.get(path)), _described(wanted.get(path))
        if there != here:
            raise UserError(f"Checkpoint '{folder}' is of another model: '{path}' is {there} there and {here} here.")


def _described(leaf: Any) -> str:
    if leaf is None:
        return "absent"
    leaf = jax.eval_shape(_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return f"{leaf.dtype}{list(leaf.shape)}"


def _data(x: jax.Array) -> jax.Array:
    """Return the numbers of an array, of a PRNG key those that it wraps."""
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _checksums(leaves: dict[str, jax.Array]) -> dict[str, int]:
    sums = jax.device_get({path: _checksum(leaf) for path, leaf in leaves.items()})
    return {path: int(checksum) for path, checksum in sums.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Return a uint32 that any flipped bit changes and no sharding does: the sum of the scrambled words."""
    x = _data(x)
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
    scrambled = words.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    return jnp.sum(scrambled ^ (scrambled >> 15), dtype=jnp.uint32)


def _os_error_code(error: Exception) -> int | None:
    """Return the errno of an error of Python or of TensorStore, which writes it into the message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def _reason(error: BaseException) -> str:
    """Return the first words of what an error goes back to, in one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = textwrap.shorten(str(error), 150, placeholder=" ...")
    return text if " " in text else repr(error)
