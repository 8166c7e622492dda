"""Packing: ids do not depend on how text is cut, memory not on its size; whole or absent, and read without a write."""

import io
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import filelock
import numpy as np
import pytest

from based_jax.data import encoding, files_of_text, packing, pieces
from based_jax.data.corpus import FolderCorpus
from based_jax.data.documents import Chunk
from based_jax.data.packing import PackedText
from based_jax.data.pieces import cut_into_pieces
from based_jax.data.progress import Progress
from based_jax.data.tokenizer import TOKENIZERS, ByteTokenizer, get_tokenizer
from based_jax.errors import UserError

WORDS = [
    "the",
    " state",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "'s",
    "'",
    "don't",
    "1234",
    " 5",
    "é",
    "北京。",
    "，",
    "...",
    "?!",
    "\u2028",
    "\xa0",
    "😀",
    "x1",
    "_",
]


PACK = """if True:
    import resource, sys
    from pathlib import Path
    from based_jax.data.corpus import FolderCorpus
    from based_jax.data.packing import PackedText
    from based_jax.data.tokenizer import get_tokenizer

    folder, cache, name = sys.argv[1:]
    tokenizer = get_tokenizer(name)
    tokenizer.encode("warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    PackedText.open(FolderCorpus(folder), tokenizer, Path(cache))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "corpus"
    path.mkdir()
    for number in range(3):
        (path / f"{number}.txt").write_text(f"Some text {number}. " * 200)
    (path / "val.txt").write_text("Other text. " * 20)
    return path


def packed(folder, cache, tokenizer=ByteTokenizer, processes=1):
    return PackedText.open(FolderCorpus(folder), tokenizer(), cache, processes)


def left(cache):
    """Return what is in a cache but its locks."""
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_pieces_have_the_ids_of_the_whole(name, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 8)
    tokenizer, rng = get_tokenizer(name), random.Random(0)
    for _ in range(150):
        text = "".join(rng.choices(WORDS, k=rng.randrange(1, 60)))
        at = rng.randrange(len(text) + 1)
        chunks = [("train", Chunk(text[:at], last=False)), ("train", Chunk(text[at:], last=True))]
        found = list(cut_into_pieces(chunks, tokenizer))
        assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
        ids = tokenizer.encode_batch([piece.text for piece in found])
        assert list(itertools.chain(*ids)) == tokenizer.encode(text), text


def test_long_words_stay_whole(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 8)
    chunks = [("train", Chunk("a" * 50 + " b" * 20 + "c" * 30, last=True))]
    found = [piece.text for piece in cut_into_pieces(chunks, get_tokenizer("gpt2"))]
    assert found[0].startswith("a" * 50) and found[-1].endswith("c" * 30) and len(found) > 3


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_tokens_are_those_of_each_document(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 100)
    tokenizer = get_tokenizer(name)
    found = packed(folder, tmp_path / "cache", TOKENIZERS[name])
    documents = [f"Some text {number}. " * 200 for number in range(3)]
    expected = [id for ids in tokenizer.encode_batch(documents) for id in [*ids, tokenizer.end_of_text]]
    stream = found.stream("train")
    np.testing.assert_array_equal(stream.read(0, len(stream)), expected)
    assert (found.count("train", "documents"), found.count("validation", "documents")) == (3, 1)


UNGUARDED = """if True:
    import sys
    from pathlib import Path
    from based_jax.data.corpus import FolderCorpus
    from based_jax.data.packing import PackedText
    from based_jax.data.tokenizer import get_tokenizer

    folder, cache = map(Path, sys.argv[1:])
    print(PackedText.open(FolderCorpus(folder), get_tokenizer("gpt2"), cache, processes=2).fingerprint)
"""


def test_processes_write_what_one_writes_also_from_a_script(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    command = [sys.executable, str(script), str(folder), str(tmp_path / "cache")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [packed(folder, tmp_path / "other cache", TOKENIZERS["gpt2"]).fingerprint]
    assert found.stderr == ""


def test_processes_share_batches_where_there_are_fewer_files(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("Some text. " * 999)
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(packing, "encoded_files", lambda *_: pytest.fail("one file is shared by files"))
    found = [packed(tmp_path / "one", tmp_path / f"cache {count}", processes=count) for count in (1, 2)]
    assert found[0].fingerprint == found[1].fingerprint


def text_folder(folder, kind):
    """Make a folder of five files: short documents of which some are held out whole, one that is cut, or validation."""
    folder.mkdir()
    rows = [{"text": f"Document {number}. " * (number % 7)} for number in range(300)]  # every seventh is blank
    lines = "".join(map("{}\n".format, map(json.dumps, [*rows, {"text": "half \ud800"}])))
    texts = {f"{number}.jsonl": lines.replace("Document", f"Text {number}") for number in range(3)}
    texts |= {"3.txt": "one " * 9, "4.txt": "four " * 8}
    if kind == "cut":
        texts = {f"{number}.txt": f"Book {number}.\n" * (30 + number) ** 2 for number in range(5)}
    if kind == "validation files":
        texts["val.txt"] = "Held out. " * 50
    for name, text in texts.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("kind", ["documents", "cut", "validation files"])
def test_by_files_as_by_batches(tmp_path, monkeypatch, kind):
    text_folder(tmp_path / "texts", kind)
    monkeypatch.setattr(files_of_text, "calling_processes", lambda tokenizer, count: encoding._thread(tokenizer))
    monkeypatch.setattr(files_of_text, "TOKENS_AT_ONCE", 1000)
    one, several = (packed(tmp_path / "texts", tmp_path / f"cache {count}", processes=count) for count in (1, 4))
    assert several.index == one.index and one.count("validation", "documents") > 0
    for split in packing.SPLITS:
        assert (several.folder / f"{split}.tokens").read_bytes() == (one.folder / f"{split}.tokens").read_bytes()
    assert sorted(path.name for path in several.folder.iterdir()) == sorted(path.name for path in one.folder.iterdir())


def test_processes_are_told_by_their_files_what_is_wrong(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files_of_text, "calling_processes", lambda tokenizer, count: encoding._thread(tokenizer))
    for name in ("8.jsonl", "9.jsonl"):
        (folder / name).write_text('{"text": "a"}\n{"no": 1}\n')
    with pytest.raises(UserError, match=r"8\.jsonl', line 2"):
        packed(folder, tmp_path / "cache", processes=2)
    assert left(tmp_path / "cache") == []


def test_blank_files_of_processes_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(files_of_text, "calling_processes", lambda tokenizer, count: encoding._thread(tokenizer))
    (tmp_path / "blank").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "blank" / name).write_text(" ")
    with pytest.raises(UserError, match="has no text to train on: all its documents are blank"):
        packed(tmp_path / "blank", tmp_path / "cache", processes=2)


def test_a_process_that_dies_is_told_and_leaves_nothing(folder, tmp_path):
    class Dying(ByteTokenizer):
        def __reduce__(self):
            return os._exit, (1,)

    with pytest.raises(UserError, match="A process that encodes text was killed"):
        packed(folder, tmp_path / "cache", Dying, processes=2)
    assert left(tmp_path / "cache") == []


def test_the_fingerprint_is_of_the_tokens_alone(folder, tmp_path):
    first = packed(folder, tmp_path / "cache").fingerprint
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert packed(moved, tmp_path / "other cache").fingerprint == first
    (moved / "0.txt").rename(moved / "0a.txt")
    assert packed(moved, tmp_path / "cache").fingerprint == first
    (moved / "0a.txt").write_text("Changed. " * 99)
    assert packed(moved, tmp_path / "cache").fingerprint != first


def test_a_prepared_cache_is_read_where_nothing_can_be_written(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = packed(folder, cache).fingerprint

    def refused(*_args, **_kwargs):
        raise OSError(30, os.strerror(30))

    for place in ("pathlib.Path.mkdir", "filelock.FileLock.acquire", "os.open"):
        monkeypatch.setattr(place, refused)
    again = packed(folder, cache)
    assert again.fingerprint == first and len(again.stream("train").read(0, 9)) == 9
    (folder / "0.txt").write_text("Changed, so it has to be built.")
    with pytest.raises(
        UserError, match=r"cannot be written to '.*cache': Read-only file system; choose another folder"
    ):
        packed(folder, cache)


def test_one_packs_and_the_others_say_that_they_wait(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "PATIENCE_SECONDS", 0.01)
    place = packed(folder, tmp_path / "cache").folder
    (place / packing.INDEX).rename(tmp_path / "index")
    begun = threading.Event()

    def pack():
        with filelock.FileLock(f"{place}.lock"):
            begun.set()
            time.sleep(0.1)
            (tmp_path / "index").rename(place / packing.INDEX)

    other = threading.Thread(target=pack)
    other.start()
    assert begun.wait(5.0)
    assert packed(folder, tmp_path / "cache").folder == place
    assert capsys.readouterr().out == "Another process packs the same text: waiting for it.\n"
    other.join()


def test_a_full_disk_leaves_nothing(folder, tmp_path):
    (folder / "3.txt").write_text("More text. " * 20_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written to .* File too large"):
            packed(folder, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path / "cache") == []
    assert packed(folder, tmp_path / "cache").count("train", "documents") == 4


def test_a_bad_file_leaves_nothing(folder, tmp_path):
    (folder / "last.jsonl").write_text('{"text": "a"}\n{"no": 1}\n')
    with pytest.raises(UserError, match=r"last\.jsonl', line 2"):
        packed(folder, tmp_path / "cache")
    assert left(tmp_path / "cache") == []


def test_a_killed_packing_is_not_taken_for_whole(folder, tmp_path):
    with open(folder / "big.txt", "w") as file:
        file.writelines(f"line {number} of a long text\n" for number in range(400_000))
    process = subprocess.Popen([sys.executable, "-c", PACK, str(folder), str(tmp_path / "cache"), "bytes"])
    while not list((tmp_path / "cache").rglob("*.tokens")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = (tmp_path / "cache" / "packed_text").glob("*.part")
    found = packed(folder, tmp_path / "cache")
    expected = 3 * 200 * len("Some text 0. ") + 4 + (folder / "big.txt").stat().st_size
    assert found.count("train", "tokens") == expected and not part.exists()


def test_an_index_that_is_gone_is_built_again_and_a_broken_one_is_named(folder, tmp_path):
    (index,) = [path for path in left(packed(folder, tmp_path).folder) if path.name == packing.INDEX]
    good = json.loads(index.read_text())
    index.unlink()
    assert packed(folder, tmp_path).count("validation", "documents") == 1
    train = good["splits"]["train"]
    wrong = [good | {name: value} for name in ("vocab_size", "blank") for value in ("257", None, 2.5)]
    wrong += [
        good | {"splits": good["splits"] | {"train": train | changed}}
        for changed in ({"checksums": []}, {"checksums": ["1"]}, {"tokens": "3"}, {"tokens": -1}, {"documents": None})
    ]
    for content in ("", "[]", "[" * 10**5, json.dumps({"splits": {"train": 1}}), "\xff", *map(json.dumps, wrong)):
        index.write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match="is damaged"):
            packed(folder, tmp_path)


def peak_bytes(folder, cache, name):
    """Return how much more memory a process holds at most for packing a folder."""
    words = [sys.executable, "-c", PACK, str(folder), str(cache), name]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    return int(lines[-1]) * 1024


def write_text(folder, megabytes):
    block = "".join(f"Line {number} of a long text, as long as others.\n" for number in range(21_000))
    with open(folder / "long.txt", "w") as file:
        file.writelines([block] * megabytes)


def test_memory_does_not_grow_with_the_text(folder, tmp_path):
    write_text(folder, megabytes=12)
    assert peak_bytes(folder, tmp_path / "cache", "bytes") < 120e6  # 46 bytes a byte would be 550 MB


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_large_text_is_packed_in_a_few_hundred_megabytes(folder, tmp_path, name):
    write_text(folder, megabytes=30)
    assert peak_bytes(folder, tmp_path / "cache", name) < 400e6


def test_progress_is_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress("Packing 'x'", 200, stream, patience=0)
    progress.update(50, 1234)
    progress.update(100)
    progress.update(200, 5000)
    progress.close()
    first, second, third = stream.getvalue().splitlines()
    assert first == "Packing 'x': 25%, 1,234 tokens" and third == "Packing 'x': 100%, 5,000 tokens, about 0 s left"
    assert second.startswith("Packing 'x': 50%, about ")
    quiet = io.StringIO()
    Progress("Packing 'x'", 200, quiet).update(100, 1)
    assert quiet.getvalue() == ""


def test_both_passes_over_a_text_are_shown(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Progress.__init__, "__defaults__", (None, 0))
    (folder / "val.txt").unlink()
    packed(folder, tmp_path / "cache")
    said = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(said)) == [f"Reading '{folder}'", f"Packing '{folder}'"]


def test_progress_is_a_bar_on_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress("Packing 'x'", 200, stream)
    progress._bar.delay = progress._bar.mininterval = 0
    progress.update(50, 1234)
    progress.close()
    assert "25%" in stream.getvalue() and "1,234 tokens" in stream.getvalue()
