"""JAX's coordination service, in a process that outlives process 0 by a moment: who loses it is aborted by JAX."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from jax._src.lib import _jax as jaxlib_api

from based_jax.errors import UserError

SERVICE_SECONDS = 5.0
SERVICE = """if True:
    import json, sys, time
    from jax._src.lib import _jax

    address, count, options = json.loads(sys.argv[1])
    service = _jax.get_distributed_runtime_service(address, count, **options)
    print(end=".", flush=True)
    sys.stdin.read()
    time.sleep(float(sys.argv[2]))
"""


class _Service:
    """JAX's coordination service in a process that outlives the one that began it by `SERVICE_SECONDS`.

    JAX aborts every process that loses the service, and process 0 holds it. So long it answers, they hear by `hosts`
    that process 0 is gone.
    """

    def __init__(self, address: str, count: int, **options: Any):
        words = [sys.executable, "-c", SERVICE, json.dumps([address, count, options]), str(SERVICE_SECONDS)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._process.stdout is not None
        if not self._process.stdout.read(1):
            raise UserError(f"JAX's coordination service cannot listen at {address}.")

    def shutdown(self) -> None:
        """Let the service end soon: others may still hear from it that all have come to their end."""
        assert self._process.stdin is not None
        self._process.stdin.close()


@contextlib.contextmanager
def in_a_process_of_its_own() -> Iterator[None]:
    """Begin JAX's coordination service as `_Service`; JAX has no public way to begin it elsewhere."""
    own, jaxlib_api.get_distributed_runtime_service = jaxlib_api.get_distributed_runtime_service, _Service
    try:
        yield
    finally:
        jaxlib_api.get_distributed_runtime_service = own
