"""Claims of groups in a store: of all commands that fill it, here and on other hosts, one trains a group at a time.

A claim is a file that its owner refreshes. That of a process of this host that has ended counts no more, and that of
another host once it was seen to be left alone for `CLAIM_SECONDS`; both are taken over by whoever asks next.
"""

import contextlib
import errno
import os
import stat
import threading
import time
import uuid
from pathlib import Path

import filelock

from based_jax.folders import reason
from based_jax.store import Store, StoreError

CLAIMS_FOLDER = "claims"
CLAIM_SECONDS = 300.0
"""For which a claim may be left alone; a third of it is between two refreshes. All who share a store have the same."""
UNWRITTEN_SECONDS = 2.0
"""For which a claim may be empty."""
TRIES = 100
"""To write a claim into a folder that others make and remove."""


class Claims(contextlib.AbstractContextManager):
    """What this process has claimed in a store; nothing when the context ends, and nothing more after that.

    Threads may share it. A process that is forked after makes its own.
    """

    def __init__(self, store: Store):
        self._folder = store.path / CLAIMS_FOLDER
        self._leases: dict[str, filelock.SoftFileLease] = {}
        self._unwritten: dict[str, _UnwrittenClaim] = {}
        self._lock, self._ended = threading.Lock(), False

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            for name in list(self._leases):
                self._release(name)
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
                if self._acquire(lease):
                    return True
                self._discard_unwritten(name, Path(lease.lock_file))
            except OSError as error:
                raise StoreError(f"Claim '{lease.lock_file}' cannot be written: {reason(error)}.") from error
            return False

    def give_back(self, name: str) -> None:
        """End a claim, if this process has it."""
        with self._lock:
            self._release(name)

    def clear(self) -> None:
        """Remove the claims of processes of this host that have ended."""
        with self:
            for path in self._folder.glob("*.lock"):
                if self.take(path.stem):
                    self.give_back(path.stem)

    def _acquire(self, lease: filelock.SoftFileLease) -> bool:
        for _ in range(TRIES):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                lease.acquire(blocking=False)
            except filelock.Timeout:
                return False
            except FileNotFoundError:  # a command that has ended took the folder with it
                continue
            return True
        return False

    def _discard_unwritten(self, name: str, path: Path) -> None:
        """Remove a claim whose owner was killed before it wrote who it is: a lease waits for such an owner for ever.

        So it does for what no command leaves: that raises OSError.
        """
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise OSError(errno.EINVAL, "It is a pipe, a link or a device, not a file")
            before = self._unwritten.get(name)
            if before is None or not before.is_at(path):
                self._unwritten.pop(name, None)
                if path.stat().st_size == 0:
                    self._unwritten[name] = _UnwrittenClaim(path)
            elif time.monotonic() - before.since > UNWRITTEN_SECONDS:
                before.remove(path)
                del self._unwritten[name]

    def _release(self, name: str) -> None:
        if lease := self._leases.pop(name, None):
            with contextlib.suppress(OSError):  # of a store that is gone, or cannot be written any more
                lease.release()


class _UnwrittenClaim:
    """An empty claim, and since when it was seen; open, so that no other file gets its number."""

    def __init__(self, path: Path):
        self.since = time.monotonic()
        self._file = path.open("rb")

    def is_at(self, path: Path) -> bool:
        """Return whether a path still is this claim, and still is empty."""
        found = path.stat()
        return found.st_size == 0 and os.path.samestat(found, os.fstat(self._file.fileno()))

    def remove(self, path: Path) -> None:
        """Remove the file at a path if it still is this claim: two who see it may be at it, and one claims it anew."""
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        path.rename(aside)
        if not self.is_at(aside):
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _lease(path: Path) -> filelock.SoftFileLease:
    return filelock.SoftFileLease(path, lease_duration=CLAIM_SECONDS, thread_local=False)
