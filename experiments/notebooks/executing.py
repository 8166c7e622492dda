"""Notebooks from their .py files: read, given parameters, executed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
NAMES = ("quickstart", "frontier", "own_mixer", "look_inside", "generation", "scale_up")
"""In the order in which they are read."""
PARAMETERS_TAG = "parameters"
SECONDS_PER_CELL = 900
OUTPUT_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(name: str, parameters: Mapping[str, Any] | None = None) -> NotebookNode:
    """Return the notebook of a .py, without outputs, its parameters replaced by those that are given.

    Cells are named by their place, so that the same text makes the same file.
    """
    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    if parameters:
        [place] = [i for i, cell in enumerate(notebook.cells) if PARAMETERS_TAG in cell.metadata.get("tags", ())]
        assignments = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(assignments))
    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"{name}-{place}"
    notebook.metadata = nbformat.from_dict(OUTPUT_METADATA)
    return notebook


def execute(*notebooks: NotebookNode, environment: Mapping[str, str] | None = None) -> None:
    """Execute notebooks one after the other in one kernel, each with names of its own, and keep their outputs.

    `environment` are variables that the kernel has besides those of this process.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
    """
    cells = [cell for notebook in notebooks for cell in (nbformat.v4.new_code_cell("%reset -f"), *notebook.cells)]
    together = nbformat.v4.new_notebook(cells=cells, metadata=OUTPUT_METADATA)
    options = {"timeout": SECONDS_PER_CELL, "record_timing": False, "coalesce_streams": True}
    with _with_variables(environment or {}):
        NotebookClient(together, resources={"metadata": {"path": str(FOLDER)}}, **options).execute()
    for notebook in notebooks:
        code = (cell for cell in notebook.cells if cell.cell_type == "code")
        for count, cell in enumerate(code, start=1):
            cell.execution_count = count
            cell.outputs = [_without_paths(output, count) for output in cell.outputs]


def _without_paths(output: NotebookNode, count: int) -> NotebookNode:
    """Return an output that does not tell where the checkout lies, nor how many cells ran before its notebook."""
    text = output.get("text", "")
    if str(ROOT) in text:
        output.text = text.replace(str(ROOT), "...")
    if output.output_type == "execute_result":
        output.execution_count = count
    return output


@contextmanager
def _with_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Let kernels find this checkout, and have these variables."""
    before = dict(os.environ)
    path = os.pathsep.join([str(ROOT), *filter(None, [before.get("PYTHONPATH")])])
    os.environ |= {"PYTHONPATH": path, **variables}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
