"""The picture, the page and the command of a look inside."""

import numpy as np
import pytest
from flax import nnx
from helpers.browser import OVERLAPS, launched, needs_browser

from based_jax.inside import report
from based_jax.nn.lm import LM, LMConfig

T = 12
LAYERS = (
    ("taylor", {"num_heads": 2, "feature_dim": 4}),
    ("window", {"num_heads": 2, "window": 4}),
)


@pytest.fixture(scope="module")
def found():
    config = LMConfig(LAYERS, 16, vocab_size=32, init_std=0.3, dtype="float32", mlp="none")
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 32, (4, T)).astype(np.int32) for name in ("inputs", "labels")}
    return report.look(LM(config, rngs=nnx.Rngs(0)), [("own", batch)], rows=2)


def test_a_row_tells_of_each_head(found):
    assert [(row["layer"], row["mixer"], row["head"]) for row in found.rows] == [
        (layer, kind, head) for layer, (kind, _) in enumerate(LAYERS) for head in range(2)
    ]
    assert all(0 < row["effective range"] < T and 0 < row["entropy"] < np.log(T) for row in found.rows)
    assert all(row["effective range"] < 4 and row["entropy"] < np.log(4) + 1e-6 for row in found.rows[2:])
    assert found.norms.shape == (T, 2) and {removal.kind for removal in found.removals} == {"taylor", "window"}


def test_the_picture_has_each_map_and_what_layers_are_worth(found, tmp_path):
    files = report.draw(found, tmp_path / "inside")
    assert [path.suffix for path in files] == [".png", ".svg", ".pdf"]
    text = (tmp_path / "inside.svg").read_text()
    assert all(
        f"layer {layer}, {kind}, head {head}" in text for layer, (kind, _) in enumerate(LAYERS) for head in (0, 1)
    )
    assert "norm of the state by tokens read" in text and "accuracy lost without the layer" in text


@needs_browser
def test_the_page_tells_what_is_pointed_at(found, tmp_path):
    path = report.page(found, tmp_path / "inside.html", title="Inside <a run>")
    with launched() as browser:
        for width in (390, 1280):
            page = browser.new_page(viewport={"width": width, "height": 900})
            errors = []
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.on("console", lambda message, errors=errors: errors.append(message.text))
            page.goto(path.as_uri())
            assert page.title() == "Inside <a run>" and page.locator("#maps canvas").count() == 4
            page.locator("#maps canvas").first.scroll_into_view_if_needed()
            box = page.locator("#maps canvas").first.bounding_box()
            page.mouse.move(box["x"] + box["width"] * 0.5 / T, box["y"] + box["height"] * 0.5 / T)
            assert page.locator("#told").inner_text() == "layer 0, taylor, head 0: query 0 reads 100.0 % of key 0"
            assert page.locator("#removals tbody tr").count() == 2
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(OVERLAPS) == [] and errors == []
            page.close()
