"""The pictures of rows."""

import re
import xml.etree.ElementTree as ET

import pytest
from helpers import synthetic_rows as synthetic

from based_jax.errors import UserError
from based_jax.nn import names
from based_jax.nn.mixers import MIXERS
from based_jax.pictures import figures, references, styles
from based_jax.pictures.configurations import configurations
from based_jax.pictures.references import ReferencePoint, ReferenceSource
from experiments.mqar_pareto import published

BASED = [synthetic.CONV, ("taylor", {"num_heads": 1, "feature_dim": 16})]
FORMS = {
    figures.frontier: synthetic.rows,
    figures.figure3: synthetic.map_rows,
    figures.ablation: synthetic.part_rows,
}


def texts(path):
    """Return the words of an SVG file."""
    return ["".join(x.itertext()) for x in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"config": {}}, "is not of a sweep"), ({"segments": {"mean": 1.0}}, "no length of a test segment")],
)
def test_a_row_of_something_else_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        figures.frontier([synthetic.row(BASED, 64) | change], tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_each_mixer_has_a_look_of_its_own():
    looks = styles.styles(names.FAMILY_NAMES.values()).values()
    assert len(set(looks)) == len(MIXERS)
    assert {x.marker for x in looks} <= figures.MATPLOTLIB_MARKERS.keys() == set(styles.MARKERS)


@pytest.mark.parametrize("draw", FORMS)
def test_pictures_are_two_files_and_the_same_each_time(tmp_path, draw):
    rows = FORMS[draw]()
    files = draw(rows, tmp_path / "new" / "a.png")
    assert [x.name for x in files] == ["a.png", "a.svg"] and all(x.stat().st_size > 5000 for x in files)
    again = draw(rows, tmp_path / "b")
    assert files[1].read_bytes() == again[1].read_bytes()
    assert f"{len(rows)} runs, invented device, revision 01234567" in " ".join(texts(files[1]))


@pytest.mark.parametrize("draw", FORMS)
def test_no_rows_are_said_to_be_missing(tmp_path, draw):
    with pytest.raises(UserError, match=r"^There are no rows"):
        draw([], tmp_path / "x")


def test_the_frontier_names_ours_and_the_published(tmp_path):
    words = texts(
        figures.frontier(synthetic.rows(seeds=1), tmp_path / "x", published=published.POINTS, convolution=True)[1]
    )
    assert {"Based", "Gated DeltaNet", "RWKV-7", "64 KiB", "1 MiB"} <= set(words)
    assert any("with convolution layers" in word and "1,024 tokens" in word for word in words)


def test_the_frontier_draws_every_point(tmp_path):
    rows = [synthetic.row(BASED, d) for d in (64, 128, 256)]
    drawn = figures.frontier(rows, tmp_path / "x", published=published.POINTS)[1].read_text()
    colour = styles.styles(["Based"])["Based"].colour
    theirs = [x for x in published.POINTS if x.family == "Based"]
    # Ours are filled with a white edge, once more in the legend; theirs are hollow and pale.
    filled = len(re.findall(rf"<use [^>]*fill: {colour}[^>]*stroke: #ffffff", drawn))
    hollow = len(re.findall(rf"<use [^>]*fill-opacity: 0; stroke: {colour}; stroke-opacity: 0.4", drawn))
    assert (filled, hollow) == (4, len(theirs))


def test_without_published_points_nothing_is_said_of_them(tmp_path):
    words = texts(figures.frontier([synthetic.row(BASED, 64)], tmp_path / "x")[1])
    assert "Based" in words and not any("published" in word for word in words)


def test_a_published_point_stands_where_its_source_counts_it_and_each_source_has_its_marker():
    paper, again = ReferenceSource("paper", "Paper 2024"), ReferenceSource("again", "Repository 2026")
    points = [ReferencePoint("Based", "D 64", 100, 0.5, x, convolution_bytes=12) for x in (again, paper, again)]
    assert [points[0].state_bytes(convolution=counted) for counted in (False, True)] == [100, 112]
    assert references.source_markers(points) == {again: "circle", paper: "square"}


def test_a_mixer_of_ones_own_has_its_own_name_and_its_cache_s_size(tmp_path, monkeypatch):
    monkeypatch.setitem(MIXERS, "own", MIXERS["retnet"])
    rows = [synthetic.row([synthetic.CONV, (name, {"num_heads": 1})], 64) for name in ("own", "retnet")]
    assert [point.family for point in configurations(rows)] == ["own", "RetNet"]
    assert len({point.state_bytes(convolution=False) for point in configurations(rows)}) == 1
    assert "own" in texts(figures.frontier(rows, tmp_path / "x")[1])


def test_feature_maps_are_drawn_against_bytes_and_parameters(tmp_path):
    drawn = figures.figure3(synthetic.map_rows(), tmp_path / "x")[1]
    assert {"Taylor, 2nd order", "relu", "K = D", "K = 16", "parameters", "1 M", "64 KiB"} <= set(texts(drawn))
    colour = styles.styles({"Taylor, 2nd order", "relu", "elu", "cosformer", "hedgehog"})["relu"].colour
    lines = re.findall(rf'<path d="[^"]*" [^>]*style="fill: none; ([^"]*)stroke: {colour}; [^"]*"', drawn.read_text())
    assert ["dasharray" in line for line in lines] == [False, True] * 2  # in both panels, D before 16


def test_the_parts_of_an_ablation_are_named(tmp_path):
    words = " ".join(texts(figures.ablation(synthetic.part_rows(), tmp_path / "p")[1]))
    assert "conv + window + Taylor" in words


def test_rows_of_other_models_are_no_ablation(tmp_path):
    rows = [synthetic.row([("mamba", {})] * 2, 64)]
    with pytest.raises(UserError, match="ablation compares"):
        figures.ablation(rows, tmp_path / "x")
    with pytest.raises(UserError, match="figure3 compares"):
        figures.figure3(rows, tmp_path / "x")
