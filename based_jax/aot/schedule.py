"""How long a program takes by its own schedule: what it exchanges runs beside what stands until it is waited for.

Of GPUs, whose programs say where a collective begins and where it ends. One runs after the other, each at the rate of
the links, beside computations that take what their products or their bytes do.
"""

import dataclasses
from collections.abc import Callable

from based_jax.aot.hlo import Instruction, Program

Seconds = Callable[[Instruction], float]


@dataclasses.dataclass
class Scheduled:
    """Seconds of a program's run.

    Attributes:
      total: of all.
      exposed: of it in which nothing is computed, since what is exchanged is waited for.
      exchanged_until: when the last collective that has begun is over.
    """

    total: float = 0.0
    exposed: float = 0.0
    exchanged_until: float = 0.0

    def compute(self, seconds: float) -> None:
        """Compute for so long."""
        self.total += seconds

    def begin(self, seconds: float) -> float:
        """Begin to exchange, for so long, behind what is being exchanged; return when that is over."""
        self.exchanged_until = max(self.exchanged_until, self.total) + seconds
        return self.exchanged_until

    def wait(self, until: float) -> None:
        """Wait for what is exchanged."""
        self.exposed += max(0.0, until - self.total)
        self.total = max(self.total, until)


def scheduled(program: Program, computed: Seconds, exchanged: Seconds) -> Scheduled:
    """Return how long a program takes.

    Args:
      program: of one device.
      computed: seconds of an instruction that exchanges nothing, one run of it.
      exchanged: of one that is, or begins, a collective.
    """
    found = Scheduled()
    _run(program, program.entry, computed, exchanged, found)
    return found


def _run(program: Program, computation: str, computed: Seconds, exchanged: Seconds, found: Scheduled) -> None:
    ends: dict[str, float] = {}
    for x in program.computations[computation]:
        if x.collective:
            ends[x.name] = found.begin(exchanged(x))
            if not x.kind.endswith("-start"):
                found.wait(ends[x.name])
        elif x.kind.endswith("-done") and x.operands and x.operands[0] in ends:
            found.wait(ends[x.operands[0]])
        elif x.kind in ("while", "call", "conditional"):
            for _ in range(program.trips(x) if x.kind == "while" else 1):
                for name in x.called:
                    _run(program, name, computed, exchanged, found)
        else:
            found.compute(computed(x))
