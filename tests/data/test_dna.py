"""DNA: what FASTA files hold, which bases are held out, and batches as pure functions of the step."""

import gzip

import numpy as np
import pytest

from based_jax.data.dna import SHORTEST_GAP, DnaSource, Windows
from based_jax.data.fasta import COMPLEMENTS, LETTERS, NOT_READ, read_fasta
from based_jax.labels import NO_LABEL
from based_jax.train.tasks import TASKS

BATCH, LENGTH = 4, 32


def letters(ids):
    return "".join(LETTERS[i] for i in ids)


def bases(seed, number):
    return letters(np.random.default_rng(seed).integers(0, 4, number))


@pytest.fixture
def folder(tmp_path):
    """Return a folder of two files: one of two records, the first with a gap, and one packed."""
    gapped = bases(0, 301) + "N" * SHORTEST_GAP + bases(1, 199)
    lines = "\n".join(gapped[i : i + 60] for i in range(0, len(gapped), 60))
    (tmp_path / "a.fa").write_text(f">one of a\n{lines}\n>two\r\n{bases(2, 400).lower()}\r\n")
    (tmp_path / "b.fasta.gz").write_bytes(gzip.compress(f">b\n{bases(3, 250)}".encode()))
    (tmp_path / "readme.txt").write_text("no FASTA")
    return tmp_path


def source(folder, **options):
    return DnaSource(folder, LENGTH, BATCH, **options)


def test_letters_are_read_in_either_case_and_ambiguous_ones_as_not_read(tmp_path):
    (tmp_path / "x.fna").write_text(">first record\nACGT\nacgt N\n\n>second\nRYn\n")
    records = read_fasta(tmp_path / "x.fna")
    assert [(record.name, letters(record.ids)) for record in records] == [
        ("first record", "ACGTACGTN"),
        ("second", "NNN"),
    ]
    assert letters(COMPLEMENTS[records[0].ids[::-1]]) == "NACGTACGT"


def test_the_last_tenth_of_each_record_is_held_out_and_gaps_cut(folder):
    found = source(folder)
    assert found.names == ("a", "b")
    assert [letters(x) for x in found.held_out("a")] == [bases(1, 199)[-60:], bases(2, 400)[-40:]]
    assert [letters(x) for x in found.kept] == [
        bases(0, 301),
        bases(1, 199)[:-60],
        bases(2, 400)[:-40],
        bases(3, 250)[:-25],
    ]
    assert found.summary == ("a: 800 bases to train on, 100 held out", "b: 225 bases to train on, 25 held out")


@pytest.mark.parametrize("length", [1, 7, 24, 100])
def test_an_evaluation_asks_every_held_out_base_but_the_first_once(folder, length):
    found = source(folder, test_lengths=(length,))
    assert found.eval_names == (f"a@{length}", f"b@{length}")
    for name, stretches in {"a": found.held_out("a"), "b": found.held_out("b")}.items():
        batches = list(found.eval_batches(f"{name}@{length}"))
        assert all(batch["inputs"].shape == (BATCH, length) for batch in batches)
        asked = np.concatenate([batch["labels"].ravel() for batch in batches])
        assert letters(asked[asked != NO_LABEL]) == "".join(letters(x[1:]) for x in stretches)


def test_training_reads_both_strands_of_what_is_kept_and_nothing_else(folder):
    found = source(folder, seed=7)
    kept = [letters(x) for x in found.kept]
    strands = [*kept, *(letters(COMPLEMENTS[x[::-1]]) for x in found.kept)]
    met = set()
    for step in range(60):
        batch = found.batch(step)
        assert {name: x.dtype for name, x in batch.items()} == {"inputs": np.int32, "labels": np.int32}
        assert np.array_equal(batch["inputs"][:, 1:], batch["labels"][:, :-1])
        for inputs, labels in zip(batch["inputs"], batch["labels"], strict=True):
            row = letters([*inputs, labels[-1]])
            places = {i for i, strand in enumerate(strands) if row in strand}
            assert places
            met |= places
    assert met == set(range(len(strands)))
    forward = source(folder, reverse_complement=False)
    rows = [letters([*x, y[-1]]) for t in range(9) for x, y in zip(*forward.batch(t).values(), strict=True)]
    assert all(any(row in x for x in kept) for row in rows)


def test_a_batch_is_a_function_of_the_step_and_a_host_feeds_its_rows_of_it(folder):
    found, again = source(folder), source(folder)
    for step in (11, 0, 3):
        assert all(np.array_equal(found.batch(step)[name], x) for name, x in again.batch(step).items())
        part = source(folder, rows=(1, 2)).batch(step)
        assert np.array_equal(part["inputs"], found.batch(step)["inputs"][1:3])
    assert not np.array_equal(found.batch(0)["inputs"], source(folder, seed=1).batch(0)["inputs"])
    assert not np.array_equal(found.batch(0)["inputs"], found.batch(8)["inputs"])


def test_a_stretch_that_is_shorter_than_a_window_is_filled_up():
    windows = Windows([np.asarray([0, 1, 2], np.uint8), np.asarray([3], np.uint8)], 4)
    assert len(windows) == 1 and windows[0].tolist() == [0, 1, 2, NOT_READ, NOT_READ]
    assert windows.drawn(0, np.random.default_rng(0)).tolist() == windows[0].tolist()


def test_windows_begin_everywhere():
    stretch = np.arange(10, dtype=np.uint8)
    windows, rng = Windows([stretch], 3), np.random.default_rng(0)
    begins = [{int(windows.drawn(i, rng)[0]) for _ in range(200)} for i in range(len(windows))]
    assert [sorted(x) for x in begins] == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]


def test_the_shipped_sequences_are_what_their_source_says():
    found = TASKS["dna"]().open(2)
    assert found.summary == (
        "ecoli_536: 4,445,028 bases to train on, 493,892 held out",
        "human_chr22_20M_21M: 800,000 bases to train on, 100,000 held out",
    )
    assert found.batch(3)["inputs"].shape == (2, 8192)
