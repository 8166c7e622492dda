"""Points of other sources, which ours are drawn over: what a publication reports, where it stands and how it counts."""

import dataclasses
import itertools
from collections.abc import Iterable

from based_jax.pictures.styles import MARKERS


@dataclasses.dataclass(frozen=True)
class ReferenceSource:
    """Where points were published: a short name for a legend, and the citation."""

    name: str
    citation: str


@dataclasses.dataclass(frozen=True)
class ReferencePoint:
    """A published point.

    Attributes:
      family: as `nn.names.family` names it.
      label: the configuration, "" where the source does not tell.
      main_bytes: of state of the main mixers.
      accuracy: share of queries answered.
      source: where it stands.
      convolution_bytes: of state of the model's short-convolution layers.
    """

    family: str
    label: str
    main_bytes: int
    accuracy: float
    source: ReferenceSource
    convolution_bytes: int = 0

    def state_bytes(self, *, convolution: bool) -> int:
        """Return the bytes with or without the convolution layers."""
        return self.main_bytes + self.convolution_bytes * convolution


def source_markers(points: Iterable[ReferencePoint]) -> dict[ReferenceSource, str]:
    """Return a marker of `styles.MARKERS` for each source of the points, in the order of the points."""
    sources = dict.fromkeys(point.source for point in points)
    return dict(zip(sources, itertools.cycle(MARKERS), strict=False))
