"""What a parameter is, by its path, and what follows from it: which decay, which Muon updates."""

from pathlib import PurePosixPath as PurePath
from typing import Any

import jax
import optax
from flax import nnx

from based_jax.errors import UserError

PARAMETER_GROUPS: dict[str, tuple[str, ...]] = {
    "kernel": ("kernel",),
    "short filter": ("conv_kernel",),
    "long filter": ("taps", "pos_emb", "frequency"),
    "embedding": ("embedding",),
    "bias": ("bias", "conv_bias"),
    "norm scale": ("scale",),
    "decay": ("A_log", "dt_bias", "log_dt", "log_a_real", "a_imag", "time_decay"),
    "bonus": ("time_first", "bonus"),
    "skip": ("D",),
    "long skip": ("skip", "shift_skip"),
    "state matrix": ("b", "c", "shift_b", "shift_c"),
    "token shift": ("mix", "shift_mix"),
    "key gain": ("k_k", "k_a", "r_k"),
    "feature map": ("maps", "query_maps", "key_maps"),
    "constant": ("directions",),
}
"""What a parameter is, by the end of its path: each pattern of `PurePath.match` in one group alone.

A scale with a bias beside it is of a LayerNorm or GroupNorm, "centred norm scale"; RMSNorm has none.
"""
CENTRED_NORM_SCALE = "centred norm scale"
NO_DECAY: dict[str, frozenset[str]] = {
    # HazyResearch/based, with Mamba's and the delta rules' `_no_weight_decay`, then what H3 and RWKV exempt
    "reference": frozenset({"embedding", "bias", CENTRED_NORM_SCALE, "decay", "bonus", "skip", "constant"}),
    "kernels": frozenset({*PARAMETER_GROUPS, CENTRED_NORM_SCALE} - {"kernel", "short filter"}),
    "all": frozenset({"constant"}),
}
"""Which groups of parameters do not decay; constants, which get no gradient, never do."""
NO_MUON = ("head/kernel", "shift_down/kernel", "shift_up/kernel")
"""Kernels that AdamW updates: the head, which is an embedding, and what makes RWKV-6's token shifts, one beside the
other along both axes.
"""
INNER_AXES = frozenset({"embed", "mlp", "heads"})
"""Logical axes of the stream and of a layer's width; a kernel with none of them maps no tokens, but times to filters or
components to features.
"""


def decay_mask(params, decay: str):
    """Return a tree like `params` with True where weight decay applies.

    Ranks play no part, since stacking layers changes them. Source: HazyResearch/based:train/optim/param_grouping.py.

    Raises:
      UserError: a parameter is of no group.
    """
    groups = parameter_groups(params)
    return jax.tree_util.tree_map_with_path(lambda keys, _: groups[path_of(keys)] not in NO_DECAY[decay], params)


def decay_groups(params, decay: str) -> tuple[list[str], list[str]]:
    """Return the sorted paths of the parameters that decay, and of those that do not; errors as `decay_mask`."""
    groups = sorted(parameter_groups(params).items())
    exempt = NO_DECAY[decay]
    return [path for path, group in groups if group not in exempt], [p for p, group in groups if group in exempt]


def muon_labels(params: Any) -> Any:
    """Return a tree like `params` with "muon" for what Muon updates, and "adamw" elsewhere; errors as `decay_mask`."""
    chosen = set(muon_groups(params)[0])
    label = {True: "muon", False: "adamw"}
    return jax.tree_util.tree_map_with_path(lambda keys, _: label[path_of(keys) in chosen], params)


def muon_groups(params: Any) -> tuple[list[str], list[str]]:
    """Return the sorted paths of what Muon updates in an `nnx.State`, the kernels of layers, and of AdamW's.

    Raises:
      UserError: a parameter is of no group.
    """
    groups = parameter_groups(params)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    inner = {path_of(keys) for keys, leaf in leaves if not INNER_AXES.isdisjoint(axes_of(leaf))}
    exempt = {path for path in inner if groups[path] != "kernel" or any(map(PurePath(path).match, NO_MUON))}
    return sorted(inner - exempt), sorted(groups.keys() - inner | exempt)


def is_variable(leaf: Any) -> bool:
    """Return whether a node of a tree is an nnx variable, which has what is known of an array beside it."""
    return isinstance(leaf, nnx.Variable)


def axes_of(leaf: nnx.Variable) -> tuple[str | None, ...]:
    """Return the logical names of a variable's axes (`nn/layers.logical_axes`)."""
    return tuple(leaf.get_metadata().get("out_sharding") or ())


def parts_of(leaf: nnx.Variable) -> tuple[int, ...]:
    """Return the widths of the maps that a kernel joins along its last axis (`nn/layers.linear`); of one map none."""
    return tuple(leaf.get_metadata().get("parts") or ())


def parameter_groups(params) -> dict[str, str]:
    """Return the group of each parameter by its path: a key of `PARAMETER_GROUPS`, or `CENTRED_NORM_SCALE`.

    Raises:
      UserError: a parameter is of no group.
    """
    paths = {path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)}
    groups = {path: group for path in paths if (group := _group(path)) is not None}
    _check_known(sorted(paths - groups.keys()))
    centred = {
        path for path in paths if groups[path] == "norm scale" and str(PurePath(path).with_name("bias")) in paths
    }
    return groups | dict.fromkeys(centred, CENTRED_NORM_SCALE)


def _group(path: str) -> str | None:
    for group, patterns in PARAMETER_GROUPS.items():
        if any(PurePath(path).match(pattern) for pattern in patterns):
            return group
    return None


def _check_known(lacking: list[str]) -> None:
    """Raise UserError for paths of parameters that are of no group."""
    if lacking:
        known = ", ".join(pattern for patterns in PARAMETER_GROUPS.values() for pattern in patterns)
        raise UserError(
            f"Parameter {', '.join(map(repr, lacking))} is in none of optim.PARAMETER_GROUPS, which ends of paths are"
            f" in: {known}."
        )


def path_of(keys: tuple) -> str:
    """Return a key path of `jax.tree_util` as 'stacks/0/norm1/scale': the array inside an nnx variable adds no part."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def updates_taken(opt_state: Any) -> jax.Array:
    """Return the updates that the state of `optimizer` has seen: each of its counts has them."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]
