"""Programs that are kept on the disk: by default in a folder of the user's, read by the next process, or not at all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from based_jax import compilation
from based_jax.__main__ import main
from based_jax.bench import rows
from based_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """Let nothing of a test be kept by others, and nothing in the user's folders."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(compilation.FOLDER_VARIABLE)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_by_default_it_is_the_user_s_own_folder(tmp_path):
    folder = compilation.keep()
    assert folder == tmp_path / "home" / "based_jax" / "compiled"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ[compilation.FOLDER_VARIABLE] == str(folder)  # for the processes that this one starts
    assert compilation.keep("elsewhere") == compilation.kept_in() == folder


def test_what_is_compiled_is_read_the_next_time(tmp_path):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation.keep(str(tmp_path / "kept"))

    def hits() -> int:
        jax.clear_caches()
        with compilation.counted_hits() as found:
            assert jax.jit(lambda x: jnp.sin(x) + 17.0).lower(jnp.ones(3)).compile()(jnp.ones(3)).shape == (3,)
        return found.count

    assert hits() == 0
    assert hits() > 0
    assert list((tmp_path / "kept").glob("*-cache"))


@pytest.mark.parametrize("how", ["argument", "variable", "jax"])
def test_it_can_be_turned_off(how, monkeypatch, tmp_path):
    if how == "variable":
        monkeypatch.setenv(compilation.FOLDER_VARIABLE, "none")
    if how == "jax":
        jax.config.update("jax_enable_compilation_cache", False)
    assert compilation.keep("none" if how == "argument" else None) is None
    assert compilation.kept_in() is None and not (tmp_path / "home").exists()


def test_a_folder_that_cannot_be_is_refused_if_it_was_named_and_left_out_if_not(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="a file is in the way"):
        compilation.keep(str(file / "compiled"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert compilation.keep() is None and compilation.kept_in() is None


def test_a_command_says_where_once_and_others_have_no_such_argument(tmp_path, caplog, capsys):
    store = f"--store={tmp_path / 'store'}"
    sweep = tmp_path / "sweep.py"
    sweep.write_text("from based_jax.sweep import Sweep\ndef get_sweep(): return Sweep({}, [])\n")
    with caplog.at_level("INFO", logger="based_jax"):
        for _ in range(2):
            main(["sweep", "run", str(sweep), store, f"--compiled={tmp_path / 'kept'}"])
    said = [x.message for x in caplog.records if "Compiled programs" in x.message]
    assert said == [f"Compiled programs are kept in '{tmp_path / 'kept'}' (--compiled=none keeps none)."]
    assert main(["describe", "--compiled=none"]) == 2
    assert "--compiled" in capsys.readouterr().err


@pytest.mark.parametrize(
    "task",
    [
        ("train", "--config.batch_size=8", "--steps=1"),
        ("generate", "--sizes=1x8"),
        ("serve", "--config.model.vocab_size=50257", "--clients=1", "--prompt=8", "--new=4", "--texts=1"),
    ],
    ids=lambda task: task[0],
)
def test_programs_are_compiled_alone_and_read_when_they_are_timed(task, tmp_path):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = f"--config={ROOT / 'configs' / 'mqar_tiny.py'}"
    words = ["bench", task[0], config, "--config.model.d_model=16", *task[1:]]
    words += [f"--out={tmp_path / 'rows.jsonl'}", f"--compiled={tmp_path / 'kept'}"]
    assert not main([*words, "--compile-only"])
    assert not (tmp_path / "rows.jsonl").exists()
    jax.clear_caches()
    assert not main(words)
    assert rows.read(tmp_path / "rows.jsonl")[0]["compiled_before"]


@pytest.mark.long
def test_processes_that_compile_at_once_share_a_folder(tmp_path):
    program = (
        "import jax; from based_jax import compilation; compilation.keep();"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
        "print(sum(float(jax.jit(lambda x, n=n: x * n)(2.0)) for n in range(5)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), compilation.FOLDER_VARIABLE: str(tmp_path / "kept")}
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    ended = [process.communicate(timeout=60) for process in started]
    assert [out for out, _ in ended] == [b"20.0\n"] * 3 and not any(b"rror" in err for _, err in ended)
