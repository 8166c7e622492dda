"""The page of a sweep, as a file and as Debian's Chromium shows it."""

import itertools
import json
import re

import pytest
from helpers import synthetic_rows as synthetic
from helpers.browser import OVERLAPS, needs_browser

from based_jax.errors import UserError
from based_jax.nn import names
from based_jax.pictures import page, web
from based_jax.pictures.configurations import configurations
from experiments.mqar_pareto import published

ROWS = synthetic.rows(seeds=2)
LOST = "DeltaNet"
"""The family whose runs all diverged."""
TITLE = "Recall </script><b>{{data}}</b> & state"
BASED = [synthetic.CONV, ("taylor", {"num_heads": 1, "feature_dim": 16})]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    hostile = ROWS[0] | {"command": "</script><script>throw 1</script><!--", "sweep": "<i>&amp;\u2028"}
    lost = [row | {"diverged": True} if names.family(row["config"]["model"]["layers"]) == LOST else row for row in ROWS]
    return page.write(
        [hostile, *lost[1:]],
        tmp_path_factory.mktemp("page") / "new" / "index.html",
        title=TITLE,
        published=published.POINTS,
    )


@pytest.fixture
def view(opened, path):
    return opened(path)


BOXES = """() => [...document.querySelectorAll('.point .hit, .published')].map((x) => {
  const { x: left, y: top } = x.getBoundingClientRect();
  return { x: left, y: top };
})"""


def marker(view, family, label):
    return view.locator(f'.point[aria-label^="{family}, {label}:"]')


def test_the_file_fetches_nothing_and_no_string_leaves_the_data(path):
    text = path.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(""", text)
    assert text.count("</script>") == 2
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    data = json.loads(embedded)
    assert "</script><script>throw 1</script><!--" in data["made"]["command"]
    assert len(data["points"]) == len(configurations(ROWS)) and len(data["published"]) == len(published.POINTS)
    assert "&lt;/script&gt;&lt;b&gt;{{data}}&lt;/b&gt; &amp; state" in text


def test_numbers_that_json_lacks_are_none():
    lost = synthetic.row(BASED, 64, accuracy=0.5, segments={"64x4": float("nan")}) | {"accuracy": float("nan")}
    [point] = page.data(configurations([lost]))["points"]
    assert (point["accuracy"], point["low"], point["segments"]) == (None, None, {"64x4": None})
    assert (point["lost"], point["lostSeeds"], point["runs"][0][1]) == (1, 1, None)
    web.embedded(point)


def test_no_rows_make_no_page(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        page.write([], tmp_path / "x.html", title="nothing")
    assert not list(tmp_path.iterdir())


@needs_browser
def test_all_points_are_drawn_and_listed(view):
    number = len(configurations(ROWS))
    assert view.locator("h1").inner_text() == TITLE
    assert view.locator(".point").count() == view.locator("tbody tr").count() == number
    assert view.locator(".published").count() == len(published.POINTS)
    assert f"{number} configurations from {len(ROWS)} runs" in view.locator("#summary").inner_text()


@needs_browser
def test_a_filter_hides_a_family_everywhere(view):
    before = view.locator(".point").count()
    mine = view.locator('.point[aria-label^="Mamba,"]').count()
    assert mine == 9
    view.uncheck("#families input[value=Mamba]")
    assert view.locator(".point").count() == before - mine
    assert view.locator('[aria-label^="Mamba,"]').count() == 0
    assert "Mamba" not in view.locator("tbody").inner_text()
    assert view.locator("#count").inner_text() == f"{before - mine} of {before}"
    view.click("#none")
    assert view.locator(".point, .published, .front, tbody tr").count() == 0
    view.click("#all")
    assert view.locator(".point").count() == before


@needs_browser
def test_hovering_shows_the_configuration_and_both_charts(view):
    marker(view, "Based", "D 64, K 16").hover(force=True)
    words = view.locator("#details").inner_text()
    assert "Based D 64, K 16" in words and "feature_dim=16" in words and "39,780 bytes" in words
    assert view.locator("#details svg.rates .run").count() == len(synthetic.RATES) * 2
    assert view.locator("#details svg.segments .bar").count() == len(synthetic.SEGMENTS)
    assert view.locator(".point.chosen").count() == view.locator("tr.chosen").count() == 1


@needs_browser
def test_published_points_say_where_they_stand(view):
    view.locator('.published[aria-label^="DeltaNet, D 64, 2 heads"]').hover(force=True)
    assert "HazyResearch/zoology" in view.locator("#details").inner_text()
    view.uncheck("#published")
    assert view.locator(".published").count() == 0


@needs_browser
def test_the_switches_move_the_points(view):
    def place():
        box = marker(view, "Based", "D 64, K 8").locator(".hit").bounding_box()
        return box["x"], box["y"]

    places = [place()]
    for switch in ("#convolution", "#linear", "#errors"):
        view.check(switch)
        places.append(place())
    moved = [(a[0] != b[0], a[1] != b[1]) for a, b in itertools.pairwise(places)]
    assert moved == [(True, False), (True, False), (False, True)]
    assert "12,468" in view.locator("tbody").inner_text()


@needs_browser
def test_the_chart_is_one_stop_of_the_tab_key_and_arrows_move_in_it(view):
    view.focus("#errors")
    view.keyboard.press("Tab")
    seen = []
    for key in ("Home", "ArrowRight", "ArrowRight", "End"):
        view.keyboard.press(key)
        seen.append(view.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert len(set(seen)) == 4
    assert seen[0].startswith("GLA, D 64, 2 heads, published: 4 KiB")
    assert view.locator(".chosen .ring").count() == 1
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.id") == "scroll"


@needs_browser
def test_columns_sort_both_ways(view):
    def column(place):
        return view.locator(f"tbody tr td:nth-child({place})").all_inner_texts()

    for way, reverse in (("descending", True), ("ascending", False)):
        view.click("th button:text('accuracy')")
        *known, none, also_none, last = column(4)
        assert none == also_none == last == "diverged"
        assert [float(x) for x in known] == sorted(map(float, known), reverse=reverse)
        assert view.locator(f"th[aria-sort={way}]").inner_text().startswith("accuracy")
    view.click("th button:text('configuration')")
    labels = [[int(x) for x in re.findall(r"\d+", label)][:2] for label in column(2)]
    assert [d for d, *_ in labels] == sorted(d for d, *_ in labels)  # D 64 before D 128
    assert labels.index([128, 8]) < labels.index([128, 32]) < labels.index([128, 512])


@needs_browser
def test_what_diverged_stands_at_the_edge_and_is_counted(view):
    lost = sum(len(point.rows) for point in configurations(ROWS) if point.family == LOST)
    assert f"{lost} of the runs diverged" in view.locator("#summary").inner_text()
    assert view.locator(f'.point[aria-label^="{LOST},"][aria-label$="diverged"]').count() == 3
    assert view.locator(".point .lost").count() == 3
    marker(view, LOST, "D 64, 2 heads").hover(force=True)
    assert "8 of 8 runs" in view.locator("#details").inner_text()


@needs_browser
def test_wheel_drag_and_buttons_zoom_and_reset_shows_everything(view):
    def places():
        return [x["x"] for x in view.evaluate(BOXES)]

    whole, box = places(), view.locator("#chart").bounding_box()
    x, y = box["x"] + 0.6 * box["width"], box["y"] + 0.3 * box["height"]
    view.mouse.move(x, y)
    view.mouse.wheel(0, -200)
    assert 0 < len(places()) < len(whole) and view.locator("#zoom .reset").is_enabled()
    view.dblclick("#chart", position={"x": 100, "y": 60})
    assert places() == whole and view.locator("#zoom .reset").is_disabled()
    view.mouse.move(x, y)
    view.mouse.down()
    view.mouse.move(x - 0.4 * box["width"], y + 0.3 * box["height"], steps=3)
    assert view.locator(".selection").count() == 1
    view.mouse.up()
    assert 0 < len(places()) < len(whole) and view.locator(".selection").count() == 0
    assert view.evaluate(OVERLAPS) == []
    view.click("#zoom .reset")
    assert places() == whole
    view.click("#zoom button[title='zoom in']")
    assert len(places()) < len(whole)


@needs_browser
def test_both_axes_are_named(view):
    labels = view.locator("#chart .label").all_text_contents()
    assert labels == ["state of one sequence, fp32", "accuracy, mean over tests"]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_have_contrast(view, scheme):
    view.emulate_media(color_scheme=scheme)
    text, back = (
        [int(x) for x in re.findall(r"\d+", view.evaluate(f"getComputedStyle(document.body).{name}"))[:3]]
        for name in ("color", "backgroundColor")
    )
    assert abs(sum(text) - sum(back)) > 500
    assert (sum(back) > sum(text)) == (scheme == "light")


@needs_browser
@pytest.mark.parametrize("width", [360, pytest.param(800, marks=pytest.mark.long), 1600])
@pytest.mark.parametrize("linear", [False, True])
def test_no_text_overlaps_and_nothing_is_wider_than_the_window(view, width, linear):
    view.set_viewport_size({"width": width, "height": 900})
    view.set_checked("#linear", linear)
    view.set_checked("#errors", linear)
    marker(view, "Based", "D 64, K 16").focus()
    assert view.evaluate(OVERLAPS) == []
    assert view.evaluate("document.documentElement.scrollWidth") <= width


def test_a_title_that_is_no_utf8_is_spelled(tmp_path):
    file = page.write([synthetic.row([("mamba", {})], 64)], tmp_path / "x.html", title="a \udcff")
    assert r"a \udcff" in file.read_text(encoding="utf-8")
