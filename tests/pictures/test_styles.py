"""Colours and markers: each mixer has its own, also for those who see fewer colours."""

import itertools

import numpy as np

from based_jax.nn import names
from based_jax.nn.mixers import MIXERS
from based_jax.pictures import styles

SIGHTS = {
    "all colours": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Of linear RGB, what is seen; Machado et al. 2009, severity 1."""
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE, BLACK = "#ffffff", "#14171c"
"""Of the pages."""


def linear(colour):
    """Return linear RGB of "#rrggbb"."""
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """Return CIELAB of linear RGB."""
    x = XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(axis=1)
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a, b):
    """Return how far two colours are apart for whoever sees the least of it; 2.3 is just noticed."""
    return min(
        np.linalg.norm(lab(sight @ linear(a)) - lab(sight @ linear(b))) for sight in map(np.array, SIGHTS.values())
    )


def contrast(a, b):
    """Return the contrast of WCAG 2.1; graphics need 3."""
    low, high = sorted(XYZ[1] @ linear(colour) + 0.05 for colour in (a, b))
    return high / low


def test_each_mixer_has_a_colour_and_a_marker_of_its_own():
    assert styles.FAMILY_STYLES.keys() == set(names.FAMILY_NAMES.values())
    assert len(set(styles.FAMILY_STYLES.values())) == len(MIXERS)
    assert {x.marker for x in styles.FAMILY_STYLES.values()} <= styles.MARKERS.keys() == styles.MARKER_POINTS.keys()


def test_colours_that_share_a_marker_are_told_apart_by_all():
    pairs = itertools.combinations(styles.FAMILY_STYLES.items(), 2)
    near = {(a, b): distance(x.colour, y.colour) for (a, x), (b, y) in pairs if x.marker == y.marker}
    assert {pair: value for pair, value in near.items() if value < 20} == {}


def test_colours_stand_out_on_both_backgrounds_and_from_each_other():
    assert min(contrast(colour, back) for colour in styles.COLOURS for back in (WHITE, BLACK)) > 2.95
    apart = [np.linalg.norm(lab(linear(a)) - lab(linear(b))) for a, b in itertools.combinations(styles.COLOURS, 2)]
    assert min(apart) > 25


def test_unknown_names_take_what_is_left_and_all_differ():
    several = [f"own {i}" for i in range(30)]
    found = styles.styles(["Based", *several])
    assert found["Based"] == styles.FAMILY_STYLES["Based"] and len(set(found.values())) == 31
    assert len({x.colour for x in styles.styles(several[:12]).values()}) == 12
