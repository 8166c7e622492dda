import json
import re

import pytest

from based_jax.train.loop import train
from based_jax.train.run import load_config
from based_jax.train.samples import SampleConfig

PROMPTS = ("The cat", "")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "cats.txt").write_text("The cat sat on the mat, and the dog lay by the door. " * 20)
    values = {
        "model": {"layers": [["conv", {}]], "d_model": 16, "vocab_size": 257, "dtype": "float32"},
        "data": {"kind": "text", "path": str(tmp_path / "corpus"), "tokenizer": "bytes", "seq_len": 32},
        "optim": {"warmup_steps": 1},
        "batch_size": 8,
        "samples": {"prompts": PROMPTS, "max_new_tokens": 4},
    }
    return load_config(values, {"data.cache_dir": str(tmp_path / "cache"), "steps": 3, "sample_every": 2})


def test_a_run_on_text_shows_what_its_model_writes(config, tmp_path, capsys):
    train(config, tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in samples] == [(2, "The cat"), (2, "")]
    said = capsys.readouterr().out
    for row in samples:
        assert f"step 2 sample {row['prompt']!r}: {row['text']!r}\n" in said
    events = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("events.*"))
    assert b"sample 'The cat'" in events
    assert re.search(r"\ntrain: [\d,]+ tokens .*\nvalidation: [\d,]+ tokens ", said)


def test_defaults_are_those_of_generation():
    assert SampleConfig().sampling.temperature == 0.8
