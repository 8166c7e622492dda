"""A look inside a model on a batch: all that is measured, as a picture and as one page."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from based_jax.inside.maps import LayerMap, attention_maps
from based_jax.inside.measures import Removal, effective_range, entropy, removal_costs, state_norms
from based_jax.nn.lm import LM
from based_jax.nn.own_mixer import short
from based_jax.pictures import paper, styles, web

COLUMNS, PANEL_INCHES, MOST_MAPS = 3, 1.9, 9
"""Of a picture; the last are the heads whose maps it has, those of the layers that are missed most."""
SHADES = "viridis"


@dataclasses.dataclass(frozen=True)
class Look:
    """What a look inside has found.

    Attributes:
      kinds: the mixer of each layer.
      maps: of the layers that have them, of one row alone.
      ranges, entropies: by layer of `maps`, of each head, over all rows.
      norms: of each layer's state after each token, the mean over rows; (T, L).
      removals: what each layer is worth, the dearest first; none of a model of one layer.
    """

    kinds: Sequence[str]
    maps: Sequence[LayerMap]
    ranges: Mapping[int, np.ndarray]
    entropies: Mapping[int, np.ndarray]
    norms: np.ndarray
    removals: Sequence[Removal]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each head with a map, as tables have it."""
        return [
            {
                "layer": layer.layer,
                "mixer": layer.kind,
                "head": head,
                "effective range": float(self.ranges[layer.layer][head]),
                "entropy": float(self.entropies[layer.layer][head]),
            }
            for layer in self.maps
            for head in range(layer.weights.shape[1])
        ]


def look(model: LM, batches: Sequence[tuple[str, Mapping]], rows: int = 16) -> Look:
    """Return what a look inside a model finds on (segment, batch) pairs.

    Args:
      model: with a layer of attention, a window or Taylor attention at least.
      batches: on which layers are left out; maps and norms are of the first rows of the first.
      rows: how many of them.

    Raises:
      UserError: no layer has a map, or the rows are longer than `maps.LARGEST_LENGTH`.
    """
    ids = jnp.asarray(batches[0][1]["inputs"][:rows])
    maps = attention_maps(model, ids)
    kinds = [short(kind) for kind, _ in model.config.layers]
    return Look(
        kinds=kinds,
        maps=[layer._replace(weights=layer.weights[:1]) for layer in maps],
        ranges={layer.layer: np.asarray(effective_range(layer.weights)) for layer in maps},
        entropies={layer.layer: np.asarray(entropy(layer.weights)) for layer in maps},
        norms=np.asarray(state_norms(model, ids)).mean(axis=0),
        removals=removal_costs(model, batches) if len(kinds) > 1 else [],
    )


def draw(found: Look, path: str | os.PathLike) -> list[Path]:
    """Draw maps, norms of states and what layers are worth as PNG, SVG and PDF, and return the files.

    Raises:
      UserError: the files cannot be written.
    """
    return paper.save(figure(found), path)


@matplotlib.rc_context(styles.PAPER)
def figure(found: Look) -> Figure:
    """Return what `draw` draws."""
    heads = _heads(found)
    lines = -(-(len(heads) + 2) // COLUMNS)
    sheet = paper.sheet(styles.PAGE_INCHES, lines * PANEL_INCHES, notes=[_note(found)])
    panels = list(sheet.subplots(lines, COLUMNS, squeeze=False).flat)
    for axes, (layer, head) in zip(panels, heads, strict=False):
        _draw_map(axes, layer, head, found)
    _draw_norms(panels[len(heads)], found)
    _draw_removals(panels[len(heads) + 1], found)
    for axes in panels[len(heads) + 2 :]:
        axes.set_axis_off()
    return sheet


def page(found: Look, path: str | os.PathLike, *, title: str) -> Path:
    """Write the same as one page with every head's map, and return its path.

    Raises:
      UserError: the file cannot be written.
    """
    data = {
        "kinds": list(found.kinds),
        "maps": [{**row, "weights": _bytes(found, row)} for row in found.rows],
        "norms": [[float(f"{x:.4g}") for x in layer] for layer in found.norms.T],
        "removals": [dataclasses.asdict(removal) for removal in found.removals],
    }
    return web.write(path, "inside.html", title=title, data=data, styles=["page.css", "inside.css"], script="inside.js")


def _bytes(found: Look, row: Mapping[str, Any]) -> list[int]:
    """Return the roots of a head's weights in 256 steps, row by row below the diagonal and on it."""
    [layer] = [layer for layer in found.maps if layer.layer == row["layer"]]
    weights = np.asarray(layer.weights)[0, row["head"]]
    return np.rint(255 * np.sqrt(weights[np.tril_indices(len(weights))])).astype(int).tolist()


def _heads(found: Look) -> list[tuple[LayerMap, int]]:
    """Return the heads that a picture has room for: of the layers that are missed most, in their order."""
    order = [removal.layer for removal in found.removals]
    ranked = sorted(found.maps, key=lambda layer: order.index(layer.layer) if order else layer.layer)
    heads = [(layer, head) for layer in ranked for head in range(layer.weights.shape[1])][:MOST_MAPS]
    return sorted(heads, key=lambda pair: (pair[0].layer, pair[1]))


def _draw_map(axes: Axes, layer: LayerMap, head: int, found: Look) -> None:
    axes.imshow(np.sqrt(np.asarray(layer.weights[0, head])), cmap=SHADES, vmin=0, vmax=1, interpolation="nearest")
    reach, keys = found.ranges[layer.layer][head], np.exp(found.entropies[layer.layer][head])
    axes.set_title(f"layer {layer.layer}, {layer.kind}, head {head}\nrange {reach:.1f}, {keys:.1f} keys", loc="left")
    axes.grid(visible=False)


def _draw_norms(axes: Axes, found: Look) -> None:
    for layer, kind in enumerate(found.kinds):
        colour = styles.COLOURS[layer % len(styles.COLOURS)]
        axes.plot(np.arange(1, len(found.norms) + 1), found.norms[:, layer], color=colour)
        axes.annotate(f"{layer} {kind}", (len(found.norms), found.norms[-1, layer]), ha="right", va="bottom")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("norm of the state by tokens read", loc="left")


def _draw_removals(axes: Axes, found: Look) -> None:
    places = range(len(found.removals))
    axes.barh(places, [removal.cost for removal in found.removals], 0.65, color=styles.BLUE)
    axes.set_yticks(places, [f"{removal.layer} {removal.kind}" for removal in found.removals])
    axes.invert_yaxis()
    axes.set_title("accuracy lost without the layer", loc="left")
    axes.grid(axis="y", visible=False)


def _note(found: Look) -> str:
    heads = sum(layer.weights.shape[1] for layer in found.maps)
    shown = f", {MOST_MAPS} of {heads} heads" if heads > MOST_MAPS else ""
    return (
        f"Maps of one row{shown}: the roots of weights, queries down, keys across. Range: mean distance in tokens from"
        " a query to what it reads; keys: e to the entropy of its weights."
    )
