"""The pictures of rows."""

import matplotlib
import numpy as np
import pytest
from helpers import pictures
from helpers import synthetic_rows as synthetic
from helpers.cases import parametrize_some
from helpers.pictures import words
from matplotlib.figure import Figure

from based_jax.errors import UserError
from based_jax.nn import names
from based_jax.nn.mixers import MIXERS
from based_jax.pictures import figures, references, styles
from based_jax.pictures.configurations import configurations
from based_jax.pictures.panels import AccuracyPanel
from based_jax.pictures.references import ReferencePoint, ReferenceSource
from experiments.mqar_pareto import published

BASED = [synthetic.CONV, ("taylor", {"num_heads": 1, "feature_dim": 16})]
FORMS = {
    figures.frontier: lambda: synthetic.rows(seeds=2)[::3],
    figures.figure3: synthetic.map_rows,
    figures.ablation: synthetic.part_rows,
}


POINTS_OF_ALL = tuple(
    ReferencePoint(name, "", 4096 << i % 8, i / 28, ReferenceSource("elsewhere", "Elsewhere 2026"))
    for i, name in enumerate(names.FAMILY_NAMES.values())
)
LOST = {"accuracy": None, "status": "diverged"}


def marks(axes, **form):
    """Return where markers stand, of the lines that have these properties."""
    lines = [x for x in axes.get_lines() if all(getattr(x, f"get_{key}")() == value for key, value in form.items())]
    return [(x, y) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"config": {}}, "is not of a sweep"), ({"segments": {"mean": 1.0}}, "no length of a test segment")],
)
def test_a_row_of_something_else_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        figures.frontier([synthetic.row(BASED, 64) | change], tmp_path / "x")
    assert not list(tmp_path.iterdir())


@parametrize_some("draw", FORMS, (figures.frontier, figures.ablation))
def test_pictures_are_three_files_and_the_same_each_time(tmp_path, draw):
    rows = FORMS[draw]()
    files = draw(rows, tmp_path / "new" / "a.png")
    assert [x.name for x in files] == ["a.png", "a.svg", "a.pdf"] and all(x.stat().st_size > 5000 for x in files)
    again = draw(rows, tmp_path / "b")
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(files, again, strict=True))
    assert f"{len(rows)} runs, invented device, revision 01234567" in " ".join(words(files[1]))


@pytest.mark.parametrize("draw", FORMS)
def test_no_rows_are_said_to_be_missing(tmp_path, draw):
    with pytest.raises(UserError, match=r"^There are no rows"):
        draw([], tmp_path / "x")


def test_the_frontier_names_ours_and_the_published(tmp_path):
    told = words(
        figures.frontier(synthetic.rows(seeds=1)[::4], tmp_path / "x", published=published.POINTS, convolution=True)[1]
    )
    assert {"Based", "Gated DeltaNet", "RWKV-7", "64 KiB", "1 MiB"} <= set(told)
    assert any("with convolution layers" in text and "1,024 tokens" in text for text in told)


def test_the_frontier_draws_every_point_and_magnifies_the_best():
    rows = [synthetic.row(BASED, d, accuracy=y) for d, y in ((64, 0.5), (128, 0.98), (256, 1.0))]
    upper, lower = figures.frontier_figure(rows, published=published.POINTS).axes
    colour = styles.FAMILY_STYLES["Based"].colour
    ours = {"color": colour, "marker": "o", "markeredgecolor": "white"}
    theirs = [x.accuracy for x in published.POINTS if x.family == "Based"]
    assert [y for _, y in marks(lower, **ours)] == [0.5, 0.98, 1.0]
    assert [y for _, y in marks(upper, **ours)] == [0.98, 0.999]
    assert len(marks(lower, color=colour, markerfacecolor="none")) == len(theirs)
    assert len(marks(upper, color=colour, markerfacecolor="none")) == sum(y >= 0.95 for y in theirs)
    assert np.diff(upper.transData.transform([(1e4, 0.98), (1e4, 0.99), (1e4, 0.995)])[:, 1]).std() < 1  # by the error


def test_what_diverged_is_marked_at_the_edge_and_counted():
    rows = [synthetic.row(BASED, 64, accuracy=0.5), synthetic.row(BASED, 128, accuracy=0.01) | LOST]
    rows += [synthetic.row(BASED, 256, seed=seed, accuracy=0.7) | (LOST if seed else {}) for seed in (0, 1)]
    figure = figures.frontier_figure(rows)
    [axes] = figure.axes
    lost = marks(axes, marker="x", color=styles.FAMILY_STYLES["Based"].colour)
    assert [y for _, y in lost] == [0.0, 0.0] and axes.get_ylim()[0] < -0.05  # of the axes' height: below accuracy 0
    assert [y for _, y in marks(axes, marker="o", markeredgecolor="white")] == [0.5, 0.7]
    told = [text.get_text() for text in pictures.shown_texts(figure)]
    assert "diverged (2)" in told and any(text.startswith("2 of 4 runs diverged") for text in told)


def test_feature_maps_and_parts_that_diverged_are_marked(tmp_path):
    maps = [row | (LOST if row["config"]["model"]["d_model"] == 128 else {}) for row in synthetic.map_rows()]
    for axes in figures.figure3_figure(maps).axes[-2:]:
        assert len(marks(axes, marker="x")) >= 9
    parts = [row | (LOST if len(row["config"]["model"]["layers"]) == 1 else {}) for row in synthetic.part_rows()]
    told = words(figures.ablation(parts, tmp_path / "p")[1])
    assert told.count("diverged") == 3 and "0.000" not in told


def test_without_published_points_nothing_is_said_of_them(tmp_path):
    told = words(figures.frontier([synthetic.row(BASED, 64)], tmp_path / "x")[1])
    assert "Based" in told and not any("published" in text for text in told)


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
    assert "own" in words(figures.frontier(rows, tmp_path / "x")[1])


def test_feature_maps_are_drawn_against_bytes_and_parameters(tmp_path):
    drawn = figures.figure3(synthetic.map_rows(), tmp_path / "x")[1]
    assert {"Taylor, 2nd order", "relu", "K = D", "K = 16", "parameters", "1 M", "64 KiB"} <= set(words(drawn))
    lower = figures.figure3_figure(synthetic.map_rows()).axes[-2:]
    colour = styles.styles({"Taylor, 2nd order", "relu", "elu", "cosformer", "hedgehog"})["relu"].colour
    for axes in lower:  # bytes, parameters
        forms = [x.get_linestyle() for x in axes.get_lines() if x.get_color() == colour and len(x.get_xdata()) > 1]
        assert forms == ["-", "--"]  # D before 16


@pytest.mark.parametrize(
    ("others", "aligned"),
    [
        ([], ("left", "top")),
        ([(110, 0.35)], ("left", "bottom")),
        ([(110, 0.35), (110, 0.45)], ("right", "top")),
        ([(900, 0.35), (110, 0.6)], ("left", "top")),
    ],
)
def test_a_name_stands_where_nothing_else_does(others, aligned):
    panel = AccuracyPanel(Figure().subplots())
    panel.name(100, 0.4, "Mine", others)
    [text] = panel.axes.texts
    assert (text.get_horizontalalignment(), text.get_verticalalignment()) == aligned


def test_the_parts_of_an_ablation_are_named(tmp_path):
    told = " ".join(words(figures.ablation(synthetic.part_rows(), tmp_path / "p")[1]))
    assert "conv + window + Taylor" in told


def test_rows_of_other_models_are_no_ablation(tmp_path):
    rows = [synthetic.row([("mamba", {})] * 2, 64)]
    with pytest.raises(UserError, match="ablation compares"):
        figures.ablation(rows, tmp_path / "x")
    with pytest.raises(UserError, match="figure3 compares"):
        figures.figure3(rows, tmp_path / "x")


def test_parts_are_compared_at_equal_sizes_and_each_size_is_a_panel(tmp_path):
    wide = [
        row | {"config": row["config"] | {"model": row["config"]["model"] | {"d_model": 64}}}
        for row in synthetic.part_rows()
    ]
    window = synthetic.row([synthetic.CONV, ("window", {"num_heads": 1, "window": 1024})], 128, accuracy=1.0)
    told = words(figures.ablation([*synthetic.part_rows(), *wide, window], tmp_path / "p")[1])
    titles = ["D 64, w 64, K 16, 3 taps", "D 128, w 64, K 16, 3 taps"]
    assert [text for text in told if text.startswith("D ")] == titles and "1.000" not in told
    taylor = synthetic.row([synthetic.CONV, ("taylor", {"num_heads": 1})], 128)
    with pytest.raises(UserError, match=r"there are conv \+ window \(D 128, w 1024\), conv \+ Taylor \(D 128, K 16\)"):
        figures.ablation([window, taylor], tmp_path / "none")
    assert not (tmp_path / "none.png").exists()


FIGURES = {
    "a few": lambda: figures.frontier_figure(
        synthetic.rows(seeds=2)[::3], published=published.POINTS, convolution=True
    ),
    "every mixer": lambda: figures.frontier_figure([synthetic.row(BASED, 64) | LOST], published=POINTS_OF_ALL),
    "one point": lambda: figures.frontier_figure([synthetic.row(BASED, 64)]),
    "feature maps": lambda: figures.figure3_figure(synthetic.map_rows()),
    "parts": lambda: figures.ablation_figure(synthetic.part_rows()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_text_has_the_size_of_a_paper_s_and_nothing_overlaps_or_is_cut_off(name):
    with matplotlib.rc_context({"font.size": 20, "axes.labelsize": 30}):  # a reader's own settings change nothing
        figure = FIGURES[name]()
        assert pictures.faults(figure) == {"cut off": [], "overlapping": [], "wider than its panel": []}
    assert figure.get_figwidth() in (styles.COLUMN_INCHES, styles.PAGE_INCHES) == (3.3, 6.9)
    assert {text.get_fontsize() for text in pictures.shown_texts(figure)} == {7}
