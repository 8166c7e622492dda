import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from based_jax import revision
from based_jax.bench import rows


@pytest.fixture
def clone(tmp_path):
    """Return a clone of a package of one module, that one, with a README and results."""
    for name in ("based_jax/revision.py", "README.md", "experiments/a/results/rows.jsonl", ".gitignore"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("installed\n")
    (tmp_path / "based_jax" / "revision.py").write_bytes(Path(revision.__file__).read_bytes())
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message=one")
    return tmp_path


def git(folder, *words):
    return subprocess.check_output(["git", *words], cwd=folder, text=True).strip()


def revision_of(folder):
    """Return what the module of a folder says, imported anew."""
    spec = importlib.util.spec_from_file_location("revision_of_clone", folder / "revision.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.revision()


def test_a_revision_is_the_commit_and_whether_code_differs_from_it(clone):
    commit = git(clone, "rev-parse", "HEAD")
    for name in ("README.md", "experiments/a/results/rows.jsonl"):
        (clone / name).write_text("more\n")
    assert revision_of(clone / "based_jax") == commit
    with (clone / "based_jax" / "revision.py").open("a") as file:
        file.write("# more\n")
    assert revision_of(clone / "based_jax") == f"{commit}+"


def test_what_is_installed_elsewhere_has_the_revision_that_the_environment_says(clone, monkeypatch):
    (clone / "installed").mkdir()
    (clone / "installed" / "revision.py").write_bytes(Path(revision.__file__).read_bytes())
    assert revision_of(clone / "installed") is None
    monkeypatch.setenv(revision.REVISION_VARIABLE, "0123")
    assert revision_of(clone / "installed") == "0123"
    assert revision_of(clone / "based_jax") != "0123"


def test_a_row_names_the_command_that_a_shell_takes():
    """Modules of `experiments` by their own names, and words that have spaces in quotes."""
    code = "from based_jax.revision import command; print(command())"
    for name, said in (("experiments.some.words", "experiments.some.words"), ("another", "based_jax")):
        run = f"import sys, types; sys.modules['__main__'].__spec__ = types.SimpleNamespace(name='{name}'); {code}"
        found = subprocess.check_output([sys.executable, "-c", run, "--only=a b", "--c=d"], text=True).strip()
        assert found == f"python -m {said} '--only=a b' --c=d"


def test_rows_are_of_the_code_that_was_there_when_their_file_was_opened(clone, tmp_path, monkeypatch):
    commit = git(clone, "rev-parse", "HEAD")
    monkeypatch.setattr(revision, "__file__", str(clone / "based_jax" / "revision.py"))
    revision.revision.cache_clear()
    try:
        with rows.appended(tmp_path / "rows.jsonl"):
            (clone / "based_jax" / "revision.py").write_text("# another\n")
            assert rows.origin()["revision"] == commit
    finally:
        revision.revision.cache_clear()


def test_every_row_of_a_benchmark_names_the_revision(monkeypatch):
    monkeypatch.setattr(rows, "revision", lambda: "0123")
    assert rows.facts()["revision"] == rows.origin()["revision"] == "0123"
