"""How pictures draw the models of a family: a colour and a marker each."""

import dataclasses
from collections.abc import Iterable

from based_jax.nn.names import FAMILY_NAMES


@dataclasses.dataclass(frozen=True)
class Style:
    """A colour that stands out on white and on black, and a marker of `MARKERS`."""

    colour: str
    marker: str


MARKERS = ("circle", "square", "triangle", "diamond", "down", "plus", "cross")
COLOURS = (
    *("#2f7ed8", "#d9730d", "#2f8f4e", "#d03a3a", "#c2558f", "#8456d6", "#b545c6", "#0f8b8d", "#8f6b3d", "#5a7d12"),
    *("#7a7f87", "#a67c00"),
)


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return the style of each family; that of a single mixer is always the same."""
    found, known = set(names), list(FAMILY_NAMES.values())
    order = known + sorted(found.difference(known))
    return {name: _style(place) for place, name in enumerate(order) if name in found}


def _style(place: int) -> Style:
    return Style(COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)])
