"""What is measured of pictures: their texts where matplotlib's renderer puts them, and what an SVG file says."""

import itertools
import xml.etree.ElementTree as ET

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def words(path):
    """Return the texts of an SVG file."""
    return ["".join(x.itertext()) for x in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def faults(figure):
    """Return what a reader would complain about: text that overlaps, is cut off, or is wider than its panel."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    found = [(text.get_text(), text.get_window_extent(renderer)) for text in shown_texts(figure)]
    edge = figure.bbox.padded(1)
    cut = [name for name, box in found if not (edge.contains(*box.min) and edge.contains(*box.max))]
    pairs = [(a, b) for (a, x), (b, y) in itertools.combinations(found, 2) if x.padded(-1).overlaps(y.padded(-1))]
    wide = []
    for axes in figure.axes:
        panel = axes.get_window_extent(renderer)
        wide += [
            x.get_text() for x in (axes.xaxis.label, axes.title) if x.get_window_extent(renderer).width > panel.width
        ]
        wide += [x for x in (axes.yaxis.label,) if x.get_window_extent(renderer).height > panel.height]
    return {"cut off": cut, "overlapping": pairs, "wider than its panel": wide}


def shown_texts(figure):
    """Return the texts that are seen; ticks beyond the ends of an axis are not."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {
                label for tick in ticks if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)
            }
        if not axes.axison:
            hidden |= set(axes.findobj(Text))
    return [x for x in figure.findobj(Text) if x.get_visible() and x.get_text().strip() and x not in hidden]
