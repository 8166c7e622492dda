import os
import tempfile

import jax
import pytest

from based_jax.errors import UserError
from based_jax.sweep.device_lock import DeviceLock


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_in_the_way_of_a_lock_is_one_sentence(tmp_path, monkeypatch, make):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    DeviceLock(jax.devices()[0])
    [path] = tmp_path.iterdir()
    path.unlink()
    make(path)
    with pytest.raises(UserError, match=rf"^'{path}' cannot be written: I"):
        DeviceLock(jax.devices()[0])
