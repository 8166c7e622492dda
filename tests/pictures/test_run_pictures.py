"""The curves of runs: what is read, what runs are called, the picture, the page and the command."""

import json

import numpy as np
import pytest
from helpers import pictures
from helpers.browser import OVERLAPS, needs_browser

from based_jax.__main__ import main
from based_jax.pictures import curves, runs


def write(folder, steps, lr=1e-3, lost=(), more="", every=1, layers=(("mamba", {}),)):
    """Write a workdir with a row for each step, and an evaluation at the last one."""
    folder.mkdir(parents=True)
    config = {"model": {"layers": layers, "d_model": 64}, "optim": {"lr": lr}, "seed": 0}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {"step": step, "loss": None if step in lost else 5 / step, "lr": lr, "tokens_per_second": 1e5, "device": "cpu"}
        for step in range(every, steps + 1, every)
    ]
    rows.append({"step": steps, "eval/loss": 2.0, "eval/accuracy": 0.5, "eval/perplexity": 7.4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return runs: one to step 300, one that goes on and is not finite at its end, one of a single row."""
    folder = tmp_path_factory.mktemp("runs")
    going = write(folder / "going", 40, lr=1e-2, lost=(39, 40), more='{"step": 41, "lo')
    return curves.read_runs([write(folder / "long", 300), going, write(folder / "one", 1, lr=3e-3)])


def test_a_run_that_goes_on_is_read_up_to_its_last_whole_row(found):
    assert [run.last_step for run in found] == [300, 40, 1]
    loss = found[1].curves["loss"]
    assert loss.steps.tolist() == list(range(1, 41)) and loss.lost.tolist() == [39, 40]
    assert loss.lost_from.tolist() == [39] and loss.values[1] == 2.5
    assert found[0].curves.keys() == {"loss", "eval/loss", "eval/accuracy", "lr", "tokens_per_second"}


def test_runs_are_called_by_what_differs_or_by_their_folders(tmp_path):
    a, b = write(tmp_path / "x" / "a", 1), write(tmp_path / "y" / "a", 1)
    assert [run.name for run in curves.read_runs([a])] == ["a"]
    assert [run.name for run in curves.read_runs([a, b, a / ".." / "a"])] == ["x/a", "y/a"]
    c = write(tmp_path / "c", 1, lr=0.5, layers=(("attention", {"num_heads": 2}),))
    assert [run.name for run in curves.read_runs([a, c])] == ["Mamba D 64, lr=0.001", "Attention D 64, 2 heads, lr=0.5"]
    unknown = write(tmp_path / "unknown", 1, layers=(("a mixer of another version, with a long name", {}),))
    assert [run.name for run in curves.read_runs([a, unknown])] == ["a", "unknown"]
    (c / "config.json").unlink()
    assert [run.name for run in curves.read_runs([a, c])] == ["a", "c"]


def test_a_long_curve_keeps_its_extremes_and_where_it_is_lost():
    steps = np.arange(100_000)
    values = np.sin(steps / 5e3)
    values[[12_345, 54_321]] = 9, -9
    values[77_777] = np.nan
    thin = curves.Curve(steps, values).thinned()
    assert len(thin.steps) <= curves.MOST_POINTS and {0, 99_999} <= set(thin.steps.tolist())
    assert (np.nanmax(thin.values), np.nanmin(thin.values), thin.lost.tolist()) == (9, -9, [77_777])


def test_the_picture_names_the_runs_and_marks_what_is_not_finite(found):
    figure = runs.runs_figure(found)
    told = [text.get_text() for text in pictures.shown_texts(figure)]
    assert {"lr=0.001", "lr=0.01", "lr=0.003", "not finite (2)", "training loss", "evaluation accuracy"} <= set(told)
    assert "gradient norm" not in told
    lost = [x for x in figure.axes[0].get_lines() if x.get_marker() == "x" and len(x.get_xdata())]
    assert [x.get_xdata().tolist() for x in lost] == [[39]]
    assert pictures.faults(figure) == {"cut off": [], "overlapping": [], "wider than its panel": []}
    assert {text.get_fontsize() for text in pictures.shown_texts(figure)} == {7}


def test_the_command_writes_four_files(found, tmp_path, capsys):
    folders = [str(run.folder) for run in found]
    assert main(["plot", *folders, f"--out={tmp_path / 'new'}"]) == 0
    assert {x.name for x in (tmp_path / "new").iterdir()} == {f"runs.{x}" for x in ("png", "svg", "pdf", "html")}
    assert capsys.readouterr().out.startswith("Drawn: ")


@needs_browser
def test_the_page_shows_hides_smooths_zooms_and_tells(found, tmp_path, opened):
    view = opened(runs.page(found, tmp_path / "runs.html", title="<b>Runs</b>"))
    assert view.locator("h1").inner_text() == "<b>Runs</b>"
    assert view.locator(".chart").count() == 5 and view.locator("tbody tr").count() == 3
    box = view.locator(".chart").first.bounding_box()
    view.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 90)
    assert "lr=0.001" in view.locator("#readout").inner_text() and view.locator(".cursor").count() == 5
    ticks = view.locator(".chart").nth(3).text_content()
    view.mouse.wheel(0, -300)
    assert view.locator(".chart").nth(3).text_content() != ticks  # all charts show the same steps
    assert view.evaluate(OVERLAPS) == []
    view.click("#zoom .reset")
    assert view.locator(".chart").nth(3).text_content() == ticks
    before = view.locator("path.curve").count()
    view.locator("#smoothing").fill("0.9")
    assert view.locator("path.raw").count() > 0
    view.uncheck("#families input[value='0']")
    assert view.locator("tbody tr").count() == 2 and view.locator("path.curve:not(.raw)").count() < before
    view.click("th button:text('last step')")
    assert view.locator("tbody tr td:nth-child(3)").all_inner_texts() == ["40", "1"]
    view.set_viewport_size({"width": 390, "height": 900})
    view.wait_for_function("document.documentElement.scrollWidth <= 390")
