from pathlib import Path

import pytest

from based_jax.__main__ import main

MQAR = {
    "model": {"layers": [["conv", {}]], "d_model": 16, "vocab_size": 64, "dtype": "float32"},
    "data": {"kind": "mqar", "preset": "tiny"},
    "optim": {"warmup_steps": 1},
    "steps": 2,
    "batch_size": 8,
    "checkpoint": {"every": 1},
}


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """Return what the tables' '<name>' stand for: configs, and finished runs of them on MQAR and on text."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "cats.txt").write_text("The cat sat on the mat, and the dog lay by the door. " * 40)
    data = {"kind": "text", "path": str(folder / "corpus"), "tokenizer": "bytes", "seq_len": 32}
    model = {"layers": [["attention", {"num_heads": 2}]], "d_model": 16, "vocab_size": 257, "dtype": "float32"}
    text = MQAR | {"model": model, "data": data | {"cache_dir": str(tmp_path_factory.mktemp("cache"))}}
    for name, values in {"mqar": MQAR, "text": text}.items():
        (folder / f"{name}.py").write_text(f"def get_config():\n    return {values!r}\n")
        assert main(["train", f"--config={folder / f'{name}.py'}", f"--workdir={folder / f'{name}_run'}"]) == 0
    return {path.name: path for path in folder.iterdir()}
