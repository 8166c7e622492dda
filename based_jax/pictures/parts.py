"""The parts of Based, alone and together: which models may be compared, because their sizes are equal."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from based_jax.errors import UserError
from based_jax.pictures.configurations import Configuration

PARTS = {"conv": "conv", "base_conv": "conv", "window": "window", "taylor": "Taylor", "linear": "linear"}
"""What mixers are called as parts."""
TOLD_MODELS = 4
"""In a sentence."""
Group = Sequence[Configuration]


def groups_of_equal_size(points: Iterable[Configuration]) -> list[tuple[str, list[Configuration]]]:
    """Return the models of Based's parts by the sizes that they share, "D 128, w 64, K 16", the smallest first.

    A group is a model of all the parts that there are, and every model of fewer that agrees with it.

    Raises:
      UserError: there are none, or no model sets the sizes at which the parts are to be compared.
    """
    found = [x for x in points if parts_of(x)]
    if not found:
        raise UserError(f"No row is of {', '.join(PARTS)} alone; ablation compares them.")
    everything = set().union(*map(parts_of, found))
    whole = {(x.d_model, _sizes(x)): x for x in found if set(parts_of(x)) == everything}
    groups = [
        (_title(x), [y for y in found if y.d_model == x.d_model and _sizes(y) <= _sizes(x)])
        for x in sorted(whole.values(), key=lambda x: (x.d_model, x.state_bytes(convolution=True)))
    ]
    compared = [(title, group) for title, group in groups if len({parts_of(x) for x in group}) > 1]
    if not compared and len({parts_of(x) for x in found}) > 1:
        raise UserError(_refusal(found, everything))
    return compared or groups


def _refusal(found: Group, everything: set[str]) -> str:
    """Return why there is nothing to compare, naming the sizes that differ."""
    there = list(dict.fromkeys(f"{' + '.join(parts_of(x))} ({x.label})" for x in found))
    told = ", ".join(there[:TOLD_MODELS]) + f" and {len(there) - TOLD_MODELS} more" * (len(there) > TOLD_MODELS)
    parts = " + ".join(x for x in dict.fromkeys(PARTS.values()) if x in everything)
    return f"An ablation compares a model of {parts} with those of fewer of its parts, at its sizes; there are {told}."


def parts_of(point: Configuration) -> tuple[str, ...]:
    """Return the parts of Based that a model consists of, () where there are others in it."""
    kinds = {kind for kind, _ in point.layers}
    return () if kinds - PARTS.keys() else tuple(dict.fromkeys(PARTS[kind] for kind in PARTS if kind in kinds))


def _sizes(point: Configuration) -> frozenset[str]:
    """Return the distinct layers of a model with their options, but for the implementation."""
    return frozenset(_layer(kind, options) for kind, options in point.layers)


def _layer(kind: str, options: Mapping[str, Any]) -> str:
    return json.dumps([kind, {key: value for key, value in options.items() if key != "impl"}], sort_keys=True)


def _title(point: Configuration) -> str:
    """Return the sizes of a model: its label, and the taps of its convolutions."""
    taps = sorted({options["kernel_size"] for _, options in point.layers if "kernel_size" in options})
    return ", ".join([point.label, *(f"{size} taps" for size in taps)])


def best_of_each(group: Group) -> list[Configuration]:
    """Return the best model of each combination, the fewest parts first."""
    order = list(dict.fromkeys(PARTS.values()))
    ranked = sorted(group, key=lambda x: (bool(x.chosen), x.median), reverse=True)
    best = {parts: next(x for x in ranked if parts_of(x) == parts) for parts in map(parts_of, ranked)}
    return [best[parts] for parts in sorted(best, key=lambda parts: (len(parts), [order.index(x) for x in parts]))]
