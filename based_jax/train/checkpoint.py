"""Checkpoints of a training state: written in the background, verified when read, never half taken for whole.

Each is a folder named by its step, which Orbax renames into place once all of it is on disk; what a killed process
leaves has a temporary name that nothing reads. Leaves are stored under their paths ('params/embed/embedding'), so a
checkpoint depends on no class, and with a checksum each, since the array format would pass on a flipped bit.
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import logging
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from based_jax.config import added_later, check_types
from based_jax.errors import UserError
from based_jax.folders import check_utf8, reason, writing
from based_jax.optim import path_of
from based_jax.parallel import first_process_says

log = logging.getLogger(__name__)

Leaves = Mapping[str, jax.ShapeDtypeStruct]
"""Of a tree, by their paths: 'params/embed/embedding'."""
Choose = Callable[[epath.Path, Leaves], Leaves]

TOO_LATE = ("Event loop is closed", "ignored due to race condition")
"""Ends of what Python says of these."""
CLOCK_STEPS = 10
"""Steps between looks at the clock where many processes must agree on what it says."""
LEAST_SLICE_BYTES = 1 << 20
"""Of a part that one of several devices with the same array writes."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what stays.

    A checkpoint is due by `every` or by `every_minutes`, whichever comes first; where both are None, only where a run
    stops.

    Attributes:
      every: steps between checkpoints, at multiples of this many; None for none by steps.
      keep: how many of the latest stay; with 2 or more there is one to fall back to.
      keep_every: those at multiples of this many steps stay as well; None for no others.
      every_minutes: minutes since the last one was begun; None for none by the clock. In a run of many processes the
        clock is that of process 0, and is read every `CLOCK_STEPS` steps.
    """

    every: int | None = 1000
    keep: int = 2
    keep_every: int | None = None
    every_minutes: float | None = added_later(10.0)

    def __post_init__(self):
        check_types(self)
        for name in ("every", "keep", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it is at least 1.")
        if self.every_minutes is not None and not 0 < self.every_minutes < math.inf:
            raise UserError(f"every_minutes is {self.every_minutes}; it is above 0, or None.")


class SavedCheckpoints:
    """The checkpoints that a folder holds, to read: nothing is written, and a run may go on saving into it."""

    def __init__(self, directory: str | os.PathLike):
        _hush_libraries()
        check_utf8(directory)
        self.directory = epath.Path(directory).resolve()
        self._corrupt: set[int] = set()

    def latest(self) -> int | None:
        """Return the step of the last complete checkpoint that is not known to be corrupt; None where there is none."""
        return max(self._steps(), default=None)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any]:
        """Return the latest good checkpoint as (step, state), warning of each corrupt one on the way.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct`, with the shardings to restore to (the first device where
            there is none). It may lack whole top-level fields of the saved state: they are not read.
          step: a certain checkpoint, and no other.

        Raises:
          UserError: no checkpoint is good, or one has other parameters, shapes or dtypes.
        """
        wanted = _flatten(abstract_state)

        def all_wanted(folder: epath.Path, found: Leaves) -> Leaves:
            _check_leaves(found, wanted, folder)
            return wanted

        step, leaves = self.restore_leaves(all_wanted, step)
        return step, jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[path] for path in wanted])

    def restore_leaves(self, choose: Choose, step: int | None = None) -> tuple[int, dict[str, jax.Array]]:
        """Return as `restore`, but leaves by their paths.

        Args:
          choose: takes the folder of a checkpoint and the shapes that it holds, and returns what to read of it; a
            UserError of it ends the search.
          step: a certain checkpoint, and no other.
        """
        steps = self._steps()
        if step is not None and step not in steps:
            raise UserError(f"'{self.directory}' has no checkpoint of step {step}; it has {steps or 'none'}.")
        for candidate in self._candidates() if step is None else [step]:
            try:
                return candidate, _load_leaves(self.directory / str(candidate), choose)
            except UserError:
                raise
            except Exception as error:
                log.warning("Checkpoint '%s' is corrupt: %s", self.directory / str(candidate), _reason(error))
                self._corrupt.add(candidate)
        raise UserError(f"'{self.directory}' has no good checkpoint (corrupt: {sorted(self._corrupt) or 'none'}).")

    def _candidates(self) -> Iterator[int]:
        """Yield the last step that is not known to be corrupt until there is none; a run may save meanwhile."""
        while steps := self._steps():
            yield steps[-1]

    def _steps(self) -> list[int]:
        try:
            steps = [int(folder.name) for folder in self.directory.iterdir() if folder.name.isdecimal()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"'{self.directory}' cannot be read: {reason(error)}.") from error
        return sorted(step for step in steps if step not in self._corrupt)


class Checkpoints(SavedCheckpoints):
    """The checkpoints of one run: `due`, `save`, `latest`, `restore`; a context manager that ends with `close`.

    `save` copies the state to host memory and returns, so the arrays may be donated at once; writing and the removal
    of old checkpoints go on in the background. An error there surfaces in the next `save`, `wait`, `latest` or
    `close`. One save runs at a time: the next one waits for it. In a run of many processes all call every method.
    """

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig | None = None):
        super().__init__(directory)
        self.config = config or CheckpointConfig()
        with writing(self.directory):
            self._orbax = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=_preservation(self.config),
                lightweight_initialize=True,  # garbled metadata of one step must not keep the others from being opened
            )
        # Orbax knows no time of what was there before, and fails to subtract it where many processes are preempted.
        for info in self._orbax._manager._checkpoints:
            info.time = info.time.replace(tzinfo=datetime.UTC)
        self._step: int | None = None
        self._begun = time.monotonic()
        self._folder = self._identity()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        try:
            self.close()
        except UserError:
            if error is None:  # else it is told already what is wrong
                raise

    def due(self, step: int) -> bool:
        """Return whether the config wants a checkpoint after this step; every process calls it with every step."""
        by_steps = self.config.every is not None and step % self.config.every == 0
        return by_steps or (self.config.every_minutes is not None and self._minutes_are_over(step))

    def latest(self) -> int | None:
        """Wait for the save in progress, and return as `SavedCheckpoints.latest`."""
        self.wait()
        return super().latest()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any]:
        """Return as `SavedCheckpoints.restore`; the step that was restored is not saved again."""
        self._step, state = super().restore(abstract_state, step)
        return self._step, state

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
            self._step, self._begun = step, time.monotonic()
            with self._disk_errors():
                if self._identity() != self._folder:  # Orbax would make it anew, in a workdir without all else
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
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

    def _minutes_are_over(self, step: int) -> bool:
        """Return whether this is a step after which process 0, whose word all take, sees that it is time."""
        over = time.monotonic() - self._begun >= 60 * (self.config.every_minutes or 0)
        return over if jax.process_count() == 1 else step % CLOCK_STEPS == 0 and first_process_says(over)

    def _identity(self) -> tuple[int, int] | None:
        """Return which folder the checkpoints lie in; None where there is none."""
        try:
            found = os.stat(self.directory)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _start(self, step: int, leaves: dict[str, jax.Array]) -> None:
        while self._corrupt:
            self._orbax.delete(self._corrupt.pop())
        metadata = {"checksums": _checksums(leaves)}
        with _saving():
            self._orbax.save_async(step, leaves, force=True, overwrite=True, custom_metadata=metadata)

    @contextlib.contextmanager
    def _disk_errors(self):
        """Turn an error of the file system into a UserError that names the directory and the last good step."""
        try:
            yield
        except Exception as error:  # Orbax says in many ways that its files are gone
            code = errno.ENOENT if self._identity() != self._folder else _os_error_code(error)
            if code is None and str(self.directory) not in str(error):
                raise
            why = _reason(error).rstrip(".") if code is None else os.strerror(code)
            step, self._step = self._step, None
            good = [known for known in self._steps() if known != step]
            last = f"the last good checkpoint is step {max(good)}" if good else "there is no good checkpoint yet"
            what = "the last step" if step is None else f"step {step}"
            raise UserError(f"Cannot save {what} in '{self.directory}': {why}; {last}.") from error


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _not_of_tensorstore(record: logging.LogRecord) -> bool:
    return "tensorstore" not in record.getMessage()


@functools.cache
def _hush_libraries() -> None:
    """Drop what Orbax says, and each array for itself from its own thread; failures are one sentence of this module.

    Of what nobody has caught, drop what comes too late: for the event loop of a failed save, or a signal for the
    handler that the one before has taken away.
    """
    logging.getLogger("absl").addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_of_tensorstore)  # "Task exception was never retrieved"
    hook = sys.unraisablehook

    def tell(unraisable: Any) -> None:
        if not str(unraisable.exc_value).endswith(TOO_LATE):
            hook(unraisable)

    sys.unraisablehook = tell


def _preservation(config: CheckpointConfig):
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_every is not None:
        kept.append(policies.EveryNSteps(config.keep_every))
    return policies.AnyPreservationPolicy(kept)


def _saving() -> ocp.Context:
    """Return Orbax's options: devices with the same array share in writing it from some size on.

    Each part is one that JAX compiles a slice for, by shape and place, which takes longer than writing a small array.
    """
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = LEAST_SLICE_BYTES
    return context


def _flatten(tree: Any) -> dict[str, Any]:
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _load_leaves(folder: epath.Path, choose: Choose) -> dict[str, jax.Array]:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        found = ocp.metadata(folder)
        if not found.metadata or not found.custom_metadata:
            raise ValueError("its metadata cannot be read")
        wanted = {path: _placed(leaf) for path, leaf in choose(folder, found.metadata).items()}
        leaves = ocp.load(folder, wanted)
    for path, checksum in _checksums(leaves).items():
        if checksum != found.custom_metadata["checksums"][path] or leaves[path].dtype != wanted[path].dtype:
            raise ValueError(f"'{path}' is not what was saved")
    return leaves


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_leaves(found: Leaves, wanted: Leaves, folder: epath.Path) -> None:
    """Check that the fields in `wanted` have the saved paths, shapes and dtypes; name the first that differs."""
    fields = {path.split("/")[0] for path in wanted}
    for path in sorted(wanted.keys() | {path for path in found if path.split("/")[0] in fields}):
        there, here = described(found.get(path)), described(wanted.get(path))
        if there != here:
            raise UserError(f"Checkpoint '{folder}' is of another model: '{path}' is {there} there and {here} here.")


def described(leaf: Any) -> str:
    """Return dtype and shape of an array, or of what stands for one: 'float32[16, 8]'; None is 'absent'."""
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
