"""A run on a mixture: it goes on as an unbroken one, and each part is evaluated."""

import pytest

from based_jax import config as configs
from based_jax.data.text import TextSource
from based_jax.errors import UserError
from based_jax.train.loop import train
from based_jax.train.run import TrainConfig
from tests.helpers.tiny_runs import VALUES, assert_same_run, rows, saved_steps


@pytest.fixture
def config(tmp_path):
    """Return the config of a run on two small corpora."""
    for name, words in {"cats": "The cat sat on the mat. ", "dogs": "A dog lay by the door. "}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "all.txt").write_text(words * 99)
    parts = {name: {"path": str(tmp_path / name), "weight": weight} for name, weight in (("cats", 1.0), ("dogs", 3.0))}
    data = {"kind": "text", "tokenizer": "bytes", "seq_len": 16, "mixture": parts, "cache_dir": str(tmp_path / "cache")}
    values = VALUES | {"model": VALUES["model"] | {"vocab_size": 257}, "data": data}
    return configs.build(TrainConfig, values)


@pytest.mark.long
def test_a_run_on_a_mixture_goes_on_as_an_unbroken_one(config, tmp_path, monkeypatch):
    def damaged(self, step):
        if step == 6:
            raise UserError("The data are damaged.")
        return read(self, step)

    results = train(config, tmp_path / "whole")
    assert {"cats/loss", "dogs/loss", "cats/accuracy"} <= results.keys()
    assert [row["eval/dogs/loss"] for row in rows(tmp_path / "whole") if "eval/dogs/loss" in row]
    read = TextSource.batch
    with monkeypatch.context() as patch, pytest.raises(UserError, match="step 6 is saved"):
        patch.setattr(TextSource, "batch", damaged)
        train(config, tmp_path / "broken")
    assert saved_steps(tmp_path / "broken") == [4, 6]
    train(config, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
