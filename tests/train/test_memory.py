"""A batch is as large as the rows that a process feeds, however many of its devices hold them."""

import pytest

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.train import memory

BYTES = 8 * 16 * 2 * memory.ID_BYTES


@pytest.mark.parametrize("sizes", [{"data": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_rows_that_several_devices_hold_count_once(monkeypatch, sizes):
    mesh = parallel.make_mesh(sizes)
    monkeypatch.setattr(memory, "_machine_bytes", lambda: BYTES)
    assert memory.check_batch_fits(8, mesh, 16) is None
    monkeypatch.setattr(memory, "_machine_bytes", lambda: BYTES - 1)
    with pytest.raises(
        UserError, match="batch_size is 8: a batch, of which this process feeds 8 rows of 16 tokens, takes"
    ):
        memory.check_batch_fits(8, mesh, 16)
