"""The text of a run: it goes on with the same one wherever it lies, and with no other."""

import pytest

from based_jax import config
from based_jax.errors import UserError
from based_jax.train import data_record
from based_jax.train.run import TrainConfig
from based_jax.train.tasks import TASKS, TextTask

LINES = [f"Line {number} of a text.\n" for number in range(200)]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(LINES[:150]))
    (folder / "b.txt").write_text("".join(LINES[150:]))
    return folder


def source(folder):
    return TextTask(path=str(folder), tokenizer="bytes", seq_len=16, cache_dir=str(folder.parent / "cache")).open(4)


def test_the_same_text_is_accepted_wherever_it_lies(corpus, tmp_path):
    data_record.check_same(source(corpus), tmp_path)  # a new run
    data_record.save(source(corpus), tmp_path)
    corpus.rename(tmp_path / "moved")
    assert data_record.changed_since(source(tmp_path / "moved"), tmp_path) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "b.txt").write_text("Other text. " * 99), "b.txt has changed; bring"),
        (lambda folder: (folder / "c.txt").write_text("More text. " * 99), "c.txt is new; bring"),
        (lambda folder: (folder / "a.txt").unlink(), "a.txt is gone; bring"),
    ],
)
def test_changed_text_is_named(corpus, tmp_path, change, sentence):
    data_record.save(source(corpus), tmp_path)
    change(corpus)
    with pytest.raises(UserError, match=f"is not what the run in '{tmp_path}' began with: {sentence}"):
        data_record.check_same(source(corpus), tmp_path)


def test_many_changes_are_counted(corpus, tmp_path):
    data_record.save(source(corpus), tmp_path)
    for number in range(9):
        (corpus / f"{number}.txt").write_text("More.")
    assert data_record.changed_since(source(corpus), tmp_path).endswith(
        "0.txt is new, 1.txt is new, 2.txt is new and 6 more"
    )


def test_a_damaged_record_is_named(corpus, tmp_path):
    (tmp_path / "data.json").write_text("[1]")
    with pytest.raises(UserError, match=r"data\.json' is damaged"):
        data_record.check_same(source(corpus), tmp_path)


def test_a_synthetic_task_has_none(tmp_path):
    data_record.save(TASKS["mqar"](preset="tiny").open(4), tmp_path)
    data_record.check_same(TASKS["mqar"](preset="tiny").open(4), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_recorded_has_absolute_paths_and_no_name_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    values = {"model": {"layers": [["conv", {}]], "d_model": 8, "vocab_size": 257}}
    task = TextTask(path="corpus", tokenizer="bytes", seq_len=16, cache_dir="~/cache")
    assert (task.located.path, task.located.cache_dir) == (str(tmp_path / "corpus"), str(tmp_path / "home" / "cache"))
    assert task.located.located == task.located
    run = config.build(TrainConfig, values | {"data": config.to_dict(task)})
    assert run.resolved["data"]["path"] == "corpus"
    for unmoved in (TextTask(), TextTask(path="tfds:lm1b"), TASKS["mqar"](preset="tiny")):
        assert unmoved.located == unmoved
