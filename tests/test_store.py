"""A row is on the disk or is not a row, whoever writes and whenever they are killed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from based_jax.errors import UserError
from based_jax.store import Store, StoreError

WRITER = """
import sys
from based_jax.store import Store, StoreError
store = Store(sys.argv[1])
for i in range(int(sys.argv[3])):
    store.append({"id": f"{sys.argv[2]}-{i}", "text": "x" * 5000})
    print(i, flush=True)
"""


def writer(folder, name, rows):
    return subprocess.Popen([sys.executable, "-c", WRITER, folder, name, str(rows)], stdout=subprocess.PIPE, text=True)


def test_rows_come_back_with_the_first_of_each_id(tmp_path):
    store = Store(tmp_path / "a" / "b")
    assert store.rows() == [] and store.ids() == set()
    for row in ({"id": "p", "x": 1}, {"id": "q", "x": [0.5, None]}, {"id": "p", "x": 2}):
        store.append(row)
    assert store.rows() == [{"id": "p", "x": 1}, {"id": "q", "x": [0.5, None]}]
    [file] = (tmp_path / "a" / "b").iterdir()
    assert Store(file).ids() == {"p", "q"}


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    writers = [writer(tmp_path, name, 50) for name in "abc"]
    assert [process.wait() for process in writers if process.communicate()] == [0, 0, 0]
    assert Store(tmp_path).ids() == {f"{name}-{i}" for name in "abc" for i in range(50)}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_killed_writer_leaves_every_row_that_it_had_written(tmp_path):
    process = writer(tmp_path, "k", 100_000)
    said = [process.stdout.readline() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    ids = Store(tmp_path).ids()
    assert len(said) == 20 and {f"k-{i}" for i in range(20)} <= ids
    other = Store(tmp_path)
    other.append({"id": "later"})
    assert Store(tmp_path).ids() == ids | {"later"}


@pytest.mark.parametrize("end", ['{"id": "z", "x": [1, 2', '{"id"', "\x00\x00"])
def test_what_a_killed_writer_had_not_finished_is_no_row(tmp_path, end):
    (tmp_path / "w.jsonl").write_text(json.dumps({"id": "y"}) + "\n" + end)
    assert Store(tmp_path).ids() == {"y"}


@pytest.mark.parametrize("line", ["{", "[1]", '{"x": 1}', "7"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "w.jsonl").write_text(f'{{"id": "y"}}\n{line}\n{{"id": "z"}}\n')
    with pytest.raises(UserError, match=r"Line 2 of .*w\.jsonl"):
        Store(tmp_path).rows()


def test_a_row_that_json_cannot_hold_leaves_no_trace(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(TypeError):
        store.append({"id": "a", "x": object()})
    assert store.rows() == [] and not os.listdir(tmp_path)


def test_after_a_full_disk_the_next_row_is_whole(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.append({"id": "a"})
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:5]))
    with pytest.raises(OSError, match="part of a row"):
        store.append({"id": "b"})
    monkeypatch.undo()
    store.append({"id": "c"})
    assert Store(tmp_path).ids() == {"a", "c"}


def test_looking_whether_a_store_can_be_written_leaves_no_trace(tmp_path):
    Store(tmp_path / "a" / "b").check_writable()
    Store(tmp_path).check_writable()
    assert not list(tmp_path.iterdir())


def test_what_the_disk_says_is_one_sentence_and_the_rows_stay(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.append({"id": "a"})

    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=rf"^Store '{tmp_path}' cannot be written: No space left on device\.$"):
        store.append({"id": "b"})
    monkeypatch.undo()
    assert Store(tmp_path).ids() == {"a"}


def test_a_store_that_is_removed_under_its_writer_is_told_and_a_file_of_it_is_begun_anew(tmp_path):
    store = Store(tmp_path / "store")
    store.append({"id": "a"})
    next((tmp_path / "store").iterdir()).unlink()  # as who merges files does
    store.append({"id": "b"})
    assert store.ids() == {"b"}
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StoreError, match="has been removed, and its rows with it"):
        store.append({"id": "c"})
    assert not list(tmp_path.iterdir())


def test_a_name_cut_within_a_letter_is_no_row(tmp_path):
    (tmp_path / "w.jsonl").write_bytes(b'{"id": "y"}\n{"id": "\xc3')
    assert Store(tmp_path).ids() == {"y"}
