"""What a GPU exchanges with others while a step runs: how long its collectives take, and what of it nothing hides.

A kernel of NCCL's runs from when its GPU comes to it until all have what they wait for: what a GPU waits for another
one counts.
"""

import collections
import re
from collections.abc import Sequence
from typing import Any

from based_jax.bench.timing import Kernel, busy_time, in_order

COLLECTIVE = re.compile(r"nccl\w*?_(AllGather|ReduceScatter|AllReduce|SendRecv|Broadcast|Reduce)")
"""What NCCL calls a kernel; one that sends and receives is XLA's collective-permute and all-to-all."""
WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")


def kind(kernel: Kernel) -> str | None:
    """Return the kind of collective that a kernel is of, as all-gather; None for any other kernel."""
    found = COLLECTIVE.search(kernel.name)
    return WORD.sub("-", found[1]).lower() if found else None


def exchanged(kernels: Sequence[Kernel], steps: int) -> dict[str, Any]:
    """Return the milliseconds of a step in which a GPU exchanges, and "exposed" of it in which it does nothing else.

    Args:
      kernels: of one GPU, in so many steps.
      steps: that were recorded.

    Returns:
      "milliseconds" and "exposed" of all collectives, and by "kinds" the same with "launches".
    """
    ordered = in_order(kernels)
    by_kind: dict[str, list[Kernel]] = collections.defaultdict(list)
    for kernel in ordered:
        if (name := kind(kernel)) is not None:
            by_kind[name].append(kernel)
    others = [kernel for kernel in ordered if kind(kernel) is None]

    def times(some: Sequence[Kernel]) -> dict[str, float]:
        hidden_by = in_order([*others, *some])
        exposed = busy_time(hidden_by) - busy_time(others)
        return {"milliseconds": _per_step(busy_time(some), steps), "exposed": _per_step(exposed, steps)}

    kinds = {
        name: {"launches": round(len(some) / steps, 1), **times(some)}
        for name, some in sorted(by_kind.items(), key=lambda item: -busy_time(item[1]))
    }
    return {**times([kernel for kernel in ordered if kind(kernel) is not None]), "kinds": kinds}


def _per_step(nanoseconds: float, steps: int) -> float:
    return round(nanoseconds / 1e6 / steps, 3)


def line(found: dict[str, Any]) -> str:
    """Return what is exchanged in one line of print."""
    kinds = ", ".join(f"{name} {x['milliseconds']:.2f} ({x['exposed']:.2f})" for name, x in found["kinds"].items())
    return f"exchanges {found['milliseconds']:.2f} ms, {found['exposed']:.2f} of it alone: {kinds}"
