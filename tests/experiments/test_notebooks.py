"""The notebooks are executed, and what is committed beside them is what they say, with its outputs."""

import json
import runpy
import sys

import pytest

jupytext = pytest.importorskip("jupytext", reason="the extra 'dev' has it")
nbformat = pytest.importorskip("nbformat")

from based_jax.store import Store  # noqa: E402
from experiments import notebooks  # noqa: E402
from experiments.notebooks import executing  # noqa: E402

SEGMENT = {"seq_len": 64, "num_kv_pairs": 8}
SHORT = {
    "quickstart": {"steps": 2, "eval_every": 1, "test_examples": 64},
    "frontier": {"families": ["Based", "Attention"]},
    "own_mixer": {
        "overrides": {
            "data.train": (SEGMENT | {"num_examples": 64},),
            "data.test": (SEGMENT | {"num_examples": 64},),
            "optim.warmup_steps": 0,
        }
    },
    "look_inside": {"steps": 2, "test_examples": 64},
    "generation": {"steps": 2, "new_tokens": 6, "smaller": {"model.d_model": 16, "data.seq_len": 512}},
    "scale_up": {"d_model": 64, "steps": 1},
}
EIGHT_DEVICES = {"JAX_NUM_CPU_DEVICES": "8"}
"""For one of them, which cannot ask for them where another has used jax before it."""
LARGEST_OUTPUT, LARGEST_FILE = 200_000, 600_000
"""In bytes."""


def committed(name):
    return nbformat.read(executing.FOLDER / f"{name}.ipynb", as_version=4)


def printed(notebook):
    return "".join(output.get("text", "") for cell in code_of(notebook) for output in cell.outputs)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_each_file_is_a_notebook():
    names = sorted(path.stem for path in executing.FOLDER.glob("*.ipynb"))
    assert names == sorted(executing.NAMES) == sorted(SHORT)


@pytest.mark.parametrize("name", executing.NAMES)
def test_what_is_committed_is_in_step_and_has_its_outputs(name):
    read, found = executing.read(name), committed(name)
    assert [(x.cell_type, x.source, x.metadata) for x in found.cells] == [
        (x.cell_type, x.source, x.metadata) for x in read.cells
    ]
    cells = code_of(found)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert max(len(json.dumps(output)) for output in outputs) < LARGEST_OUTPUT
    text = (executing.FOLDER / f"{name}.ipynb").read_text()
    assert len(text) < LARGEST_FILE and str(executing.ROOT) not in text and "/tmp/" not in text


@pytest.mark.parametrize("lacking", ["jupytext", "nbformat", "nbclient"])
def test_what_is_not_installed_is_told_in_a_sentence(lacking, monkeypatch):
    monkeypatch.setitem(sys.modules, lacking, None)
    monkeypatch.delitem(sys.modules, "experiments.notebooks.executing")
    monkeypatch.delattr(notebooks, "executing")
    with pytest.raises(SystemExit, match=rf"^Error: {lacking} is not installed; .*notebooks.* brings it\.$"):
        runpy.run_module("experiments.notebooks", run_name="__main__")


def test_all_run_one_after_the_other_in_small():
    found = {name: executing.read(name, SHORT[name]) for name in executing.NAMES}
    executing.execute(*found.values(), environment=EIGHT_DEVICES)
    assert "said after 2 steps" in printed(found["quickstart"])
    rows = Store(executing.ROOT / "experiments" / "mqar_pareto" / "results" / "figure2").rows()
    assert f"{len(rows)} runs by " in printed(found["frontier"])
    assert printed(found["own_mixer"]).count("kept ") == 20
    assert "29 tokens in " in printed(found["generation"])
    assert "error of the feature map, by head: [" in printed(found["look_inside"])
    assert printed(found["scale_up"]).count("step 0: loss") == 2


@pytest.mark.long
@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("name", executing.NAMES)
def test_a_notebook_runs_whole(name):
    notebook = executing.read(name)
    executing.execute(notebook)
    shapes = [[output.output_type for output in cell.outputs] for cell in code_of(notebook)]
    assert shapes == [[output.output_type for output in cell.outputs] for cell in code_of(committed(name))]
