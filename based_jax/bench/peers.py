"""Models of other libraries that are timed beside ours, and which of them can be on this machine.

A library is imported where one of its models is timed, in a process of its own: each takes the GPU as it likes.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from based_jax.errors import unknown


class Peer(NamedTuple):
    """One model of a library: the modules and the packages that it needs, its name there, and how it is timed."""

    modules: tuple[str, ...]
    packages: tuple[str, ...]
    name: str
    measure: Callable[..., Any]


def check(peers: Mapping[str, Peer], name: str) -> None:
    """Raise UserError for a peer that is none."""
    if name not in peers:
        raise unknown("peer", name, peers)


def installed(peers: Mapping[str, Peer]) -> list[str]:
    """Return the peers whose libraries are there; which are not is printed."""
    missing = {x: [m for m in peer.modules if importlib.util.find_spec(m) is None] for x, peer in peers.items()}
    lacking = {name: modules for name, modules in missing.items() if modules}
    for name, modules in lacking.items():
        print(f"{name}: {', '.join(modules)} not installed.", flush=True)
    return [name for name in peers if name not in lacking]
