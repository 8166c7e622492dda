"""Batches that cannot fit are refused before one is made: by the rows of a process, and by the tokens of a device."""

import tracemalloc

import pytest

from based_jax import parallel
from based_jax.data.text import TextSource
from based_jax.errors import UserError
from based_jax.train import memory
from based_jax.train.loop import train
from tests.helpers.tiny_runs import make_config

MACHINE = 8 * 16 * memory.BYTES_A_TOKEN_IS_MADE_IN[False]


@pytest.mark.parametrize("sizes", [{"data": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_rows_that_several_devices_hold_count_once(monkeypatch, sizes):
    config, mesh = make_config(), parallel.make_mesh(sizes)
    monkeypatch.setattr(memory, "_memory_bytes", lambda device: None)
    monkeypatch.setattr(memory, "_machine_bytes", lambda: MACHINE)
    memory.check_batch_fits(config, mesh)
    monkeypatch.setattr(memory, "_machine_bytes", lambda: MACHINE - 1)
    message = "^batch_size is 8: a batch, of which this process feeds 8 rows of 16 tokens, takes 0.0 GiB to be made"
    with pytest.raises(UserError, match=message):
        memory.check_batch_fits(config, mesh)


@pytest.mark.parametrize(
    ("sizes", "microbatches", "tokens"),
    [({"data": 8}, 1, 16), ({"fsdp": 4, "sequence": 2}, 2, 16), ({"tensor": 8}, 4, 128)],
)
def test_a_device_has_ids_of_all_its_tokens_and_activations_of_a_microbatch(monkeypatch, sizes, microbatches, tokens):
    config, mesh = make_config(microbatches=microbatches), parallel.make_mesh(sizes)
    needed = tokens * 2 * memory.ID_BYTES + tokens // microbatches * 16 * 4
    monkeypatch.setattr(memory, "_memory_bytes", lambda device: needed)
    memory.check_batch_fits(config, mesh)
    monkeypatch.setattr(memory, "_memory_bytes", lambda device: needed - 1)
    with pytest.raises(UserError, match=f"^batch_size is 8: the {tokens} tokens of a device take .* raise micro"):
        memory.check_batch_fits(config, mesh)


@pytest.mark.parametrize("rows", [{"rows_per_device": 10**9}, {"batch_size": 8 * 10**9}])
def test_what_cannot_fit_is_refused_before_a_batch_is_made(tmp_path, monkeypatch, rows):
    config = make_config(**rows)
    monkeypatch.setattr(type(config.data), "open", lambda *_: pytest.fail("a batch is made"))
    with pytest.raises(UserError, match=r"^batch_size is 8000000000: a batch, of which"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_of_text_is_made_in_as_many_bytes_a_token(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The cat sat on the mat. " * 4000)
    source = TextSource(tmp_path / "texts", "bytes", 256, 512, cache_dir=tmp_path / "cache")
    assert made_in(source.batch) == pytest.approx(memory.BYTES_A_TOKEN_IS_MADE_IN[True], rel=0.1)


def test_a_batch_of_a_synthetic_task_is_made_in_as_many_bytes_a_token():
    source = make_config(data={"train": [{"num_examples": 900, "seq_len": 32, "num_kv_pairs": 2}]}).data.open(900)
    assert made_in(source.batch) == pytest.approx(memory.BYTES_A_TOKEN_IS_MADE_IN[False], rel=0.1)


def made_in(batch):
    """Return the bytes a token at the peak of making a batch, when another one was made before."""
    batch(0)
    tracemalloc.start()
    tokens = batch(1)["inputs"].size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / tokens
