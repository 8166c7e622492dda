import re

import pytest

from based_jax.__main__ import main
from based_jax.errors import UserError
from tests.bad_inputs import (
    configs,
    data,
    evals,
    generation,
    mixers,
    newcomers,
    operations,
    pictures,
    runs,
    sweeps,
    weights,
)
from tests.bad_inputs.cases import Call, Command

TABLES = (configs, runs, sweeps, data, weights, evals, generation, mixers, newcomers, operations, pictures)
COMMANDS = [case for table in TABLES for case in table.CASES if isinstance(case, Command)]
CALLS = [case for table in TABLES for case in table.CASES if isinstance(case, Call)]


def contents(*folders):
    """Return every path below the folders, with the bytes of files."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def one_sentence(text, sentence):
    """Return whether a text is one line that ends as a sentence does and holds this part."""
    return text.count("\n") == 0 and text[-1] in ".?!" and "Traceback" not in text and sentence in text


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.name)
def test_a_command_is_refused_in_one_sentence_and_writes_nothing(case, files, capsys, tmp_path, monkeypatch):
    places = files | {"new": tmp_path / "new", "tmp": tmp_path}

    def placed(text):
        return re.sub(r"<([\w.]+)>", lambda found: str(places[found[1]]), text)

    case.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    folders = (tmp_path, next(iter(files.values())).parent)
    before = contents(*folders)
    capsys.readouterr()
    code = main([placed(word) for word in case.words])
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert error.startswith("Error: ") and error.endswith("\n")
    assert one_sentence(error.removeprefix("Error: ").removesuffix("\n"), placed(case.sentence)), error
    assert contents(*folders) == before


@pytest.mark.parametrize("case", CALLS, ids=lambda case: case.name)
def test_a_call_is_refused_in_one_sentence_and_writes_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        case.call(tmp_path)
    assert one_sentence(str(caught.value), case.sentence), caught.value
    assert contents(tmp_path) == {}


def test_names_are_distinct():
    names = [case.name for case in (*COMMANDS, *CALLS)]
    assert len(names) == len(set(names))
