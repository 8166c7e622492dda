"""Cases spread over processes on one GPU: compiling the kernels, not running them, is what takes the time."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

from based_jax import devices
from based_jax.bench.cases import same_oracle, same_program
from based_jax.bench.catalogue import OPERATIONS
from based_jax.bench.catalogue.operation import Case

ORACLE_SECONDS = 2.0
"""To compile a definition, as `Operation.compile_seconds`."""
SHOWN_CHARACTERS = 1500
"""Of what a process that failed said last."""


def parts(chosen: Sequence[Case], processes: int) -> list[list[Case]]:
    """Return the cases of each process, of about the same work; those with the same program stay together."""
    groups: dict[Case, list[Case]] = {}
    for case in chosen:
        groups.setdefault(same_program(case), []).append(case)
    found: list[list[Case]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for case in sorted(groups, key=_seconds, reverse=True):
        # Nearly the same load, and an oracle that is there already: better than the least load.
        least = min(loads)
        near = [i for i, load in enumerate(loads) if load <= least + ORACLE_SECONDS]
        mine = next((i for i in near if same_oracle(case) in map(same_oracle, found[i])), loads.index(least))
        loads[mine] += _seconds(case) + ORACLE_SECONDS * (same_oracle(case) not in map(same_oracle, found[mine]))
        found[mine].extend(groups[case])
    return found


def _seconds(case: Case) -> float:
    """Return about how long a call takes to compile."""
    packed = 1.5 if case.state or case.documents else 1.0
    # The GPU at hand is not asked what it is: its memory is the processes'.
    pieces = 1.5 if case.shape[0] * case.shape[1] < devices.H100_CORES and max(case.shape[2:], default=1) > 512 else 1.0
    return OPERATIONS[case.operation].compile_seconds * packed * pieces


def rows_of(chosen: Sequence[Case], processes: int, options: Sequence[str], limit: float) -> Iterator[dict]:
    """Yield the rows that processes print, as they come, and one for each case of which none came.

    Args:
      options: of `check`, the same for all processes.
      limit: seconds without any row after which all processes are ended: a kernel may wait for ever.
    """
    lines: queue.Queue = queue.Queue()
    work = [(i, part) for i, part in enumerate(parts(chosen, processes)) if part]
    command = [sys.executable, "-m", "based_jax", "bench", "check", *options, f"--processes={processes}"]
    with tempfile.TemporaryFile("w+") as errors:
        started = [
            subprocess.Popen(
                [*command, f"--part={i}"],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | devices.memory_share(processes),
            )
            for i, _ in work
        ]
        for process in started:
            threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        missing = {str(case) for _, part in work for case in part}
        for row in _rows(lines, len(started), limit):
            missing.discard(row["what"])
            yield row
        for process in started:
            process.kill()
            process.wait()
        said = _end(errors) if missing else ""
    codes = [process.returncode for process in started]
    for what in sorted(missing):
        yield {"what": what, "passed": False, "failure": f"no row came (exit codes {codes})", "seconds": 0.0}
    if said:
        print(said, file=sys.stderr, flush=True)


def _read(process: subprocess.Popen, lines: queue.Queue) -> None:
    for text in process.stdout or ():
        lines.put(text)
    lines.put(None)


def _rows(lines: queue.Queue, readers: int, limit: float) -> Iterator[dict]:
    """Yield rows until every reader has ended, or none has come for so many seconds."""
    while readers:
        try:
            text = lines.get(timeout=limit)
        except queue.Empty:
            return
        if text is None:
            readers -= 1
        elif text.startswith("{"):
            yield json.loads(text)


def _end(errors) -> str:
    errors.seek(0)
    return errors.read()[-SHOWN_CHARACTERS:]
