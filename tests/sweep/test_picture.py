"""The reduction from rows to points, and the pictures of them."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
import synthetic_rows as synthetic

from based_jax.errors import UserError
from based_jax.nn.mixers import MIXERS
from based_jax.sweep import families, picture, published
from based_jax.sweep.best import best, by_feature_map, front

BASED = [synthetic.CONV, ("taylor", {"num_heads": 1, "feature_dim": 16})]
FORMS = {
    picture.frontier: synthetic.rows,
    picture.figure3: synthetic.map_rows,
    picture.ablation: synthetic.part_rows,
}


def texts(path):
    """Return the words of an SVG file."""
    return ["".join(x.itertext()) for x in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_best_takes_the_best_rate_of_each_seed_then_the_median():
    accuracies = {0: [0.1, 0.7, 0.2], 1: [0.9, 0.3, 0.2], 2: [0.4, 0.5, 0.6]}
    rows = [
        synthetic.row(BASED, 64, lr=10.0 ** (i - 3), seed=seed, accuracy=value)
        for seed, values in accuracies.items()
        for i, value in enumerate(values)
    ]
    [point] = best(rows)
    assert (point.low, point.median, point.high) == (0.6, 0.7, 0.9)
    assert (point.row["config"]["optim"]["lr"], point.row["config"]["seed"]) == (1e-2, 0)
    assert len(point.chosen) == 3 and len(point.rows) == 9
    assert (point.family, point.label) == ("Based", "D 64, K 16")
    assert [point.state_bytes(convolution=x) for x in (False, True)] == [39_780, 40_548]


def test_an_even_number_of_seeds_has_its_median_between_two():
    [point] = best([synthetic.row(BASED, 64, seed=seed, accuracy=seed / 10) for seed in range(4)])
    assert point.median == pytest.approx(0.15) and point.row["accuracy"] == 0.1


def test_what_differs_in_anything_else_is_another_configuration():
    rows = synthetic.rows(seeds=2)
    heavier = [{**row, "config": row["config"] | {"epochs": 64}} for row in rows]
    architectures = len(list(synthetic.architectures()))
    assert len(best(rows)) == architectures
    assert len(best(rows + heavier)) == 2 * architectures


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_run_without_accuracy_counts_as_nothing_answered(value):
    lost = synthetic.row(BASED, 64, lr=1e-1, accuracy=0.5) | {"accuracy": value, "status": "diverged"}
    [point] = best([lost])
    assert point.median == 0
    [point] = best([lost, synthetic.row(BASED, 64, accuracy=0.2)])
    assert point.median == 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"config": {}}, "is not of a sweep"), ({"segments": {"mean": 1.0}}, "no length of a test segment")],
)
def test_a_row_of_something_else_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        picture.frontier([synthetic.row(BASED, 64) | change], tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_front_is_what_nothing_smaller_beats():
    assert front([(4, 0.5), (1, 0.2), (2, 0.6), (2, 0.3), (8, 0.6), (16, 0.9)]) == [(1, 0.2), (2, 0.6), (16, 0.9)]


@pytest.mark.parametrize(
    ("layers", "name", "label"),
    [
        ([("mamba", {"d_state": 8})] * 2, "Mamba", "D 64, N 8"),
        ([("window", {"window": 32, "num_heads": 1}), BASED[1]], "Sliding window + Based", "D 64, w 32, K 16"),
        ([("deltanet", {"num_heads": 2})], "DeltaNet", "D 64, 2 heads"),
        ([synthetic.CONV] * 2, "Convolution", "D 64, taps 3"),
        ([("linear", {"feature_map": "elu", "feature_dim": 8})], "Linear attention", "D 64, K 8, elu"),
    ],
)
def test_names(layers, name, label):
    assert (families.family(layers), families.label(layers, 64)) == (name, label)


def test_each_mixer_has_a_look_of_its_own():
    looks = families.styles(families.NAMES.values()).values()
    assert len(set(looks)) == len(MIXERS)
    assert {x.marker for x in looks} <= picture.MARKERS.keys() == set(families.MARKERS)


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
    words = texts(picture.frontier(synthetic.rows(seeds=1), tmp_path / "x", convolution=True)[1])
    assert {"Based", "Gated DeltaNet", "RWKV-7", "64 KiB", "1 MiB"} <= set(words)
    assert any("with convolution layers" in word and "1,024 tokens" in word for word in words)


def test_the_frontier_draws_every_point(tmp_path):
    rows = [synthetic.row(BASED, d) for d in (64, 128, 256)]
    drawn = picture.frontier(rows, tmp_path / "x")[1].read_text()
    colour = families.styles(["Based"])["Based"].colour
    theirs = [x for x in published.POINTS if x.family == "Based"]
    # Ours are filled with a white edge, once more in the legend; theirs are hollow and pale.
    filled = len(re.findall(rf"<use [^>]*fill: {colour}[^>]*stroke: #ffffff", drawn))
    hollow = len(re.findall(rf"<use [^>]*fill-opacity: 0; stroke: {colour}; stroke-opacity: 0.4", drawn))
    assert (filled, hollow) == (4, len(theirs))


def test_a_mixer_of_ones_own_has_its_own_name_and_its_cache_s_size(tmp_path, monkeypatch):
    monkeypatch.setitem(MIXERS, "own", MIXERS["retnet"])
    rows = [synthetic.row([synthetic.CONV, (name, {"num_heads": 1})], 64) for name in ("own", "retnet")]
    assert [point.family for point in best(rows)] == ["own", "RetNet"]
    assert len({point.state_bytes(convolution=False) for point in best(rows)}) == 1
    assert "own" in texts(picture.frontier(rows, tmp_path / "x")[1])


def test_feature_maps_are_drawn_against_bytes_and_parameters(tmp_path):
    drawn = picture.figure3(synthetic.map_rows(), tmp_path / "x")[1]
    assert {"Taylor, 2nd order", "relu", "K = D", "K = 16", "parameters", "1 M", "64 KiB"} <= set(texts(drawn))
    colour = families.styles({"Taylor, 2nd order", "relu", "elu", "cosformer", "hedgehog"})["relu"].colour
    lines = re.findall(rf'<path d="[^"]*" [^>]*style="fill: none; ([^"]*)stroke: {colour}; [^"]*"', drawn.read_text())
    assert ["dasharray" in line for line in lines] == [False, True] * 2  # in both panels, D before 16


def test_of_several_models_with_a_map_at_a_width_the_best_counts():
    taylor = ("taylor", {"num_heads": 1, "feature_dim": 16})
    stacks = {0.2: [taylor, taylor], 0.9: [synthetic.CONV, taylor], 0.4: [taylor]}
    points = best([synthetic.row(layers, 64, accuracy=value) for value, layers in stacks.items()])
    assert {key: [x.median for x in line] for key, line in by_feature_map(points).items()} == {
        ("Taylor, 2nd order", "K = 16"): [0.9]
    }


def test_the_parts_of_an_ablation_are_named(tmp_path):
    words = " ".join(texts(picture.ablation(synthetic.part_rows(), tmp_path / "p")[1]))
    assert "conv + window + Taylor" in words


def test_rows_of_other_models_are_no_ablation(tmp_path):
    rows = [synthetic.row([("mamba", {})] * 2, 64)]
    with pytest.raises(UserError, match="ablation compares"):
        picture.ablation(rows, tmp_path / "x")
    with pytest.raises(UserError, match="figure3 compares"):
        picture.figure3(rows, tmp_path / "x")


def test_the_published_points_are_the_tables():
    counts = {source: sum(x.source == source for x in published.POINTS) for source in picture.SOURCES}
    assert counts == {published.PAPER: 47, published.RERUN: 55}
    assert all(0 < x.accuracy <= 1 for x in published.POINTS)


@pytest.mark.parametrize(
    "change", [{"segments": {"64x4": 1.0}}, {"config": {"data": {"kind": "needle", "test": [{"seq_len": 64}]}}}]
)
def test_published_points_are_not_shown_beside_other_tests(tmp_path, change):
    row = synthetic.row(BASED, 64)
    other = row | change | {"config": row["config"] | change.get("config", {})}
    assert published.comparable([row]) == published.POINTS
    assert published.comparable([row, other]) == ()
    words = texts(picture.frontier([other], tmp_path / "x")[1])
    assert "Based" in words and "Hyena" not in words and not any("published" in word for word in words)
    assert any("of 64 tokens" in word for word in words)
