"""Claims of groups in a store: of all commands that fill it, here and on other hosts, one trains a group at a time.

A claim is a file that its owner refreshes. That of a process of this host that has ended counts no more, and that of
another host once it was seen to be left alone for `CLAIM_SECONDS`; both are taken over by whoever asks next.
"""

import contextlib
import threading
from pathlib import Path

import filelock

from based_jax.store import Store, StoreError

CLAIMS_FOLDER = "claims"
CLAIM_SECONDS = 300.0
"""For which a claim may be left alone; a third of it is between two refreshes. All who share a store have the same."""


class Claims(contextlib.AbstractContextManager):
    """What this process has claimed in a store; nothing when the context ends, and nothing more after that.

    Threads may share it. A process that is forked after makes its own.
    """

    def __init__(self, store: Store):
        self._folder = store.path / CLAIMS_FOLDER
        self._leases: dict[str, filelock.SoftFileLease] = {}
        self._lock, self._ended = threading.Lock(), False

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            for lease in self._leases.values():
                self._release(lease)
            with contextlib.suppress(OSError):
                self._folder.rmdir()  # where others have no claim

    def take(self, name: str) -> bool:
        """Claim a name; return False if somebody has it.

        Raises:
          StoreError: the claim cannot be written.
        """
        with self._lock:
            # A lease is kept: it remembers since when it has seen the claim of another host left alone.
            lease = self._leases.setdefault(name, _lease(self._folder / f"{name}.lock"))
            if self._ended or lease.is_locked:
                return False
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                lease.acquire(blocking=False)
            except filelock.Timeout:
                return False
            except OSError as error:
                raise StoreError(f"Claim '{lease.lock_file}' cannot be written: {error.strerror or error}.") from error
            return True

    def give_back(self, name: str) -> None:
        """End a claim, if this process has it."""
        with self._lock:
            if name in self._leases:
                self._release(self._leases.pop(name))

    def clear(self) -> None:
        """Remove the claims of processes of this host that have ended."""
        for path in self._folder.glob("*.lock"):
            if self.take(path.stem):
                self.give_back(path.stem)

    def _release(self, lease: filelock.SoftFileLease) -> None:
        with contextlib.suppress(OSError):  # of a store that is gone, or cannot be written any more
            lease.release()


def _lease(path: Path) -> filelock.SoftFileLease:
    return filelock.SoftFileLease(path, lease_duration=CLAIM_SECONDS, thread_local=False)
