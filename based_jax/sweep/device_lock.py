"""One user of a device at a time, among all threads and processes of a user."""

import contextlib
import fcntl
import os
import tempfile
import threading
from pathlib import Path

import jax

from based_jax.folders import check_file, writing


class DeviceLock(contextlib.AbstractContextManager):
    """Held by who uses a device, among all threads and processes of a user that see the same devices.

    What a row calls its seconds is then its own, whoever else trains on the device.
    """

    def __init__(self, device: jax.Device):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        name = f"based_jax-{os.getuid()}-{device.platform}-{visible}-{device.id}.lock".replace("/", "_")
        path = Path(tempfile.gettempdir()) / name
        with writing(path):
            if path.exists():
                check_file(path)
            self._file = path.open("a")
        self._threads = threading.Lock()

    def __enter__(self) -> "DeviceLock":
        self._threads.acquire()
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._threads.release()
