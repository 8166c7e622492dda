"""The published points: where their architectures stand, and beside which rows they are drawn."""

import re
import xml.etree.ElementTree as ET

import pytest
from helpers import synthetic_rows as synthetic

from based_jax.nn.accounting import state_bytes
from based_jax.nn.names import FAMILY_NAMES
from based_jax.ops.taylor import expanded_dim
from based_jax.store import Store
from experiments.mqar_pareto import __main__ as command
from experiments.mqar_pareto import published
from experiments.mqar_pareto.throughput import RESULTS

CONV = ("base_conv", {})
HYBRIDS = {"Based": "taylor", "Sliding window": "window"} | {
    name: kind for kind, name in FAMILY_NAMES.items() if name in published.BY_WIDTH_RERUN
}
BASED = [CONV, ("taylor", {"num_heads": 1, "feature_dim": 16})]
LETTERS = {"K": "feature_dim", "w": "window"}
OWN = {"feature_dim": 0, "window": 1}  # what publications do not count: a window's key of the query itself


def texts(path):
    """Return the words of an SVG file."""
    return ["".join(x.itertext()) for x in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def our_bytes(family, d_model, options):
    """Return the bytes of a convolution below a mixer, without and with the former; K = 64 is more than ours takes."""
    if options.get("feature_dim", 0) > 32:
        main = 4 * (d_model + 1) * expanded_dim(options["feature_dim"])
        return main, main + state_bytes([CONV], d_model, 1024, convolution=True)
    layers = [CONV, (HYBRIDS[family], options)]
    return tuple(state_bytes(layers, d_model, 1024, convolution=counted) for counted in (False, True))


@pytest.mark.parametrize("point", [x for x in published.POINTS if x.label], ids=lambda x: f"{x.family} {x.label}")
def test_published_points_stand_where_their_architecture_does(point):
    d_model = int(re.search(r"D (\d+)", point.label)[1])
    found = {LETTERS[letter]: int(value) for letter, value in re.findall(r"([Kw]) (\d+)", point.label)}
    options = {name: value + OWN[name] for name, value in found.items()}
    if point.family != "RWKV-7":
        options["num_heads"] = 2 if "2 heads" in point.label else 1
    found = our_bytes(point.family, d_model, options)
    assert found == (point.state_bytes(convolution=False), point.state_bytes(convolution=True))


def test_the_published_points_are_the_tables():
    counts = {
        source: sum(x.source == source for x in published.POINTS) for source in (published.PAPER, published.RERUN)
    }
    assert counts == {published.PAPER: 47, published.RERUN: 55} and sum(counts.values()) == len(published.POINTS)
    assert all(0 < x.accuracy <= 1 for x in published.POINTS)


@pytest.mark.parametrize(
    "change", [{"segments": {"64x4": 1.0}}, {"config": {"data": {"kind": "needle", "test": [{"seq_len": 64}]}}}]
)
def test_published_points_are_not_shown_beside_other_tests(tmp_path, change):
    row = synthetic.row(BASED, 64)
    other = row | change | {"config": row["config"] | change.get("config", {})}
    assert published.comparable([row]) == published.POINTS
    assert published.comparable([row, other]) == ()
    Store(tmp_path / "figure2").append(other)
    assert command.main(["pictures", f"--results={tmp_path}", f"--out={tmp_path}"]) == 0
    words = texts(tmp_path / "frontier.svg")
    assert "Based" in words and "Hyena" not in words and not any("published" in word for word in words)
    assert any("of 64 tokens" in word for word in words)


@pytest.mark.long
def test_the_committed_pictures_are_those_of_the_rows(tmp_path):
    assert command.main(["pictures", f"--out={tmp_path}"]) == 0
    assert (tmp_path / "frontier.html").read_text() == (RESULTS / "frontier.html").read_text()
    for name in ("frontier.svg", "figure3.svg", "ablation.svg"):
        assert texts(tmp_path / name) == texts(RESULTS / name)
        assert (tmp_path / name).read_text().count("<use ") == (RESULTS / name).read_text().count("<use ")
