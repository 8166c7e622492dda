"""How an operation picks its implementation: one literal table each, and `auto` that fails closed.

An operation's table maps a name, of a backend and a form as in "hopper_chunks", to an `Implementation`. A backend's
bare name stands for its first entry that is not specialised. `auto` takes the first entry that is made for the platform
being compiled for, or preferred there, supports the call and is not slower; otherwise it runs the first XLA form that
is not slower, and logs once what it left and why. A named implementation that cannot run raises with the reason.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax

from based_jax.dims import Unbroken
from based_jax.errors import UserError, unknown
from based_jax.ops import dimensions, segments, sequence, sharded

log = logging.getLogger(__name__)

FALLBACK_BACKEND = "xla"
"""The backend that runs everywhere."""

FORMER_NAMES = {"recurrent": "xla_steps", "quadratic": "xla_quadratic", "toeplitz": "xla_toeplitz"}
"""What forms were called before their names began with a backend: configs of that time still run."""


_CHOICES: ContextVar[dict[str, dict[str, None]]] = ContextVar("choices", default={})  # noqa: B039
"""Of `recorded_choices`, to be filled."""
_KERNELS: ContextVar[bool] = ContextVar("kernels", default=True)
"""Whether `auto` may take what is made for a platform."""


def no_objection(_call: Any) -> None:
    """Nothing speaks against any call."""


def not_run(_call: Any) -> str:
    """Return why `auto` leaves any call to others that no device has run yet."""
    return "it compiles, and has not been run on a device"


def not_timed(_call: Any) -> str:
    """Return why `auto` leaves any call to others that a device has checked and nobody has timed."""
    return "it is right on a device, and has not been timed on one"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    `compute` takes a call, as in `ops/calls.py`, and returns its results. `supports` returns why a call cannot run, or
    None, `slower` likewise why `auto` leaves a call that can run to another one. `platform` is the only one it runs on
    ("cuda", "tpu"), or None for any; `preferred` is one on which `auto` takes it though it runs on any. `by_place`
    names a call's arrays over time where `compute` takes documents for unbroken: where their ids do not say so
    (`dims.Unbroken`) these are moved first. One that is `specialised` is for a part of the calls that its backend runs,
    and the backend's bare name does not stand for it.
    """

    compute: Callable[[Any], Any]
    supports: Callable[[Any], str | None] = no_objection
    platform: str | None = None
    preferred: str | None = None
    slower: Callable[[Any], str | None] = no_objection
    by_place: tuple[str, ...] = ()
    specialised: bool = False

    def for_documents(self, unbroken: bool) -> Callable[[Any], Any]:
        """Return `compute` for documents that are known to be unbroken or are not."""
        return self.compute if unbroken or not self.by_place else segments.without_padding(self.compute, *self.by_place)


def target_platform() -> str:
    """Return the platform that is being compiled for: the mesh's device where one is set, else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return "cuda" if platform == "gpu" else platform


def target_device_kind() -> str:
    """Return the name of the device that is being compiled for, "NVIDIA H100 80GB HBM3" say; as `target_platform`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device if device is not None else jax.devices()[0]).device_kind


def named(table: Mapping[str, Implementation], impl: str) -> str | None:
    """Return the key of a table that `impl` names: itself or by `FORMER_NAMES`, or the first of a backend, or None."""
    impl = FORMER_NAMES.get(impl, impl)
    if impl in table:
        return impl
    return next((name for name, x in table.items() if backend_of(name) == impl and not x.specialised), None)


def backend_of(name: str) -> str:
    """Return the backend of an implementation's name."""
    return name.partition("_")[0]


def beside(impl: str, table: Mapping[str, Implementation]) -> str:
    """Return the `impl` of an operation with this table that a mixer calls beside its main one, which runs by `impl`.

    A form that the table has is taken over, but for one that `auto` prefers by size, which differs; of others the
    backend.
    """
    if (name := named(table, impl)) is not None:
        return "auto" if table[name].preferred else impl
    backend = backend_of(impl)
    return impl if named(table, backend) is None else backend


def dispatch(
    operation: str, table: Mapping[str, Implementation], impl: str, call: Any, cut: sequence.Cut | None = None
) -> Any:
    """Compute a call of `operation`, in a scope of that name, with the implementation that `choose` returns.

    It gets the numbers of its documents (`ops/segments.py`) for their ids. Where tokens lie over several devices, each
    computes its piece as the operation's `cut` says (`ops/sequence.py`).

    Raises:
      UserError: as `choose`, or the tokens lie over several devices and the operation has no cut.
    """
    segment_ids = getattr(call, "segment_ids", None)
    if unbroken := isinstance(segment_ids, Unbroken):
        call = call._replace(segment_ids=segment_ids.ids)
    run = functools.partial(_run, operation, table, impl, unbroken=unbroken)
    if sequence.pieces(call) == 1:
        return run(call)
    _check_name(operation, table, impl)
    if cut is None:
        held = f"Mesh axis 'sequence' has {sequence.pieces(call)} devices"
        raise UserError(f"{held}; for {operation}, which needs all tokens of a row, it has 1.")
    return cut(run, call)


def _run(operation: str, table: Mapping[str, Implementation], impl: str, call: Any, *, unbroken: bool) -> Any:
    name = choose(operation, table, impl, call)
    _CHOICES.get().setdefault(operation, {})[name] = None
    chosen = table[name]
    with jax.named_scope(operation):
        if getattr(call, "segment_ids", None) is not None:
            ids = Unbroken(call.segment_ids) if unbroken else call.segment_ids
            call = call._replace(segment_ids=segments.numbered(ids))
        compute = chosen.for_documents(unbroken)
        return sharded.per_device(compute, call) if _left_to_xla(chosen, call) else compute(call)


def _left_to_xla(chosen: Implementation, call: Any) -> bool:
    """Return whether an implementation would leave the division of a call to XLA, and channels can be divided."""
    return chosen.platform is None and dimensions.have_heads(call)


@contextlib.contextmanager
def recorded_choices() -> Iterator[dict[str, dict[str, None]]]:
    """Collect what is chosen while this context is open: by operation the implementations, in their order."""
    choices: dict[str, dict[str, None]] = {}
    token = _CHOICES.set(choices)
    try:
        yield choices
    finally:
        _CHOICES.reset(token)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Leave what `auto` would take a platform's kernel for to XLA's forms while this context is open: to compare."""
    token = _KERNELS.set(False)
    try:
        yield
    finally:
        _KERNELS.reset(token)


def choose(operation: str, table: Mapping[str, Implementation], impl: str, call: Any) -> str:
    """Return the key of the table that `impl` names, or that `auto` picks for a call.

    Raises:
      UserError: `impl` is not in the table, or cannot run this call here.
    """
    _check_name(operation, table, impl)
    name = named(table, impl)
    if name is None:
        return _automatic(operation, table, call)
    if reason := _refusal(table[name], call):
        raise UserError(f"{operation}: impl='{impl}' cannot run this call: {reason}.")
    return name


def _check_name(operation: str, table: Mapping[str, Implementation], impl: str) -> None:
    if impl != "auto" and named(table, impl) is None:
        raise unknown(f"{operation} implementation", impl, {*table, *map(backend_of, table), "auto"})


def _refusal(implementation: Implementation, call: Any) -> str | None:
    platform = target_platform()
    if implementation.platform not in (None, platform):
        return f"it needs {implementation.platform}, and this is {platform}"
    return implementation.supports(call)


def _automatic(operation: str, table: Mapping[str, Implementation], call: Any) -> str:
    reasons, chosen = {}, _fallback(table, call)
    for name, candidate in table.items():
        if (candidate.platform or candidate.preferred) != target_platform():
            continue
        if candidate.platform is not None and not _KERNELS.get():
            continue
        reason = candidate.supports(call) or candidate.slower(call)
        if reason is None:
            chosen = name
            break
        if candidate.platform is not None:
            reasons[name] = reason
    for name, reason in reasons.items():
        _log_once(f"{operation}: '{chosen}' instead of '{name}': {reason}.")
    return chosen


def _fallback(table: Mapping[str, Implementation], call: Any) -> str:
    """Return the first XLA form for any platform that is not slower; a table has one that never is."""
    forms = [name for name, x in table.items() if backend_of(name) == FALLBACK_BACKEND and x.preferred is None]
    return next(name for name in forms if table[name].slower(call) is None)


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)
