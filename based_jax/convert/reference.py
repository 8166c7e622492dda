"""Weights under the state_dict keys of HazyResearch/based and of zoology, as numpy arrays.

One table serves both directions. A linear kernel is the transpose of the reference's [out, in]; the kernel of a
depthwise convolution (W, C) is the reference's [C, 1, W].
"""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from based_jax.errors import UserError
from based_jax.nn.block import repeating_patterns
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import check_options, make_mixer

Weights = Mapping[str, np.ndarray]

# our path -> reference key; where two publications differ, the released language models' comes first
QKV = {"qkv/kernel": ("Wqkv.weight",), "qkv/bias": ("Wqkv.bias",)}
OUT = {"out_proj/kernel": ("out_proj.weight", "proj_o.weight"), "out_proj/bias": ("out_proj.bias",)}
MIXER_KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": QKV | OUT,
    "window": QKV | OUT,
    "taylor": {f"{name}/kernel": (f"{name}.weight",) for name in ("proj_q", "proj_k", "proj_v")} | OUT,
    "conv": OUT
    | {
        "in_proj/kernel": ("in_proj.weight",),
        "in_proj/bias": ("in_proj.bias",),
        "conv_kernel": ("conv.conv.weight",),
    },
    "base_conv": {
        "projection/kernel": ("projection.weight",),
        "projection/bias": ("projection.bias",),
        "conv_kernel": ("conv.conv.weight",),
        "conv_bias": ("conv.conv.bias",),
    },
}

# where a publication keeps a language model's embedding, last norm, layers and mixers
SKELETONS = {
    "based": ("transformer.embeddings.word_embeddings.weight", "transformer.ln_f", "transformer.layers.{}", "mixer"),
    "zoology": (
        "backbone.embeddings.word_embeddings.weight",
        "backbone.ln_f",
        "backbone.layers.{}",
        "sequence_mixer.mixer",
    ),
}
NORM_KEYS = {"scale": "weight", "bias": "bias"}
HEAD = "lm_head.weight"
DEAD = ("transformer.decay.decay",)  # a buffer of based-1b that no layer reads


def mixer_from_reference(kind: str, weights: Weights, **config) -> nnx.Module:
    """Return the mixer `kind` with the parameters of a reference layer.

    Args:
      kind: a key of `MIXERS`.
      weights: arrays under the layer's state_dict keys.
      config: options of the mixer; a reference `window_size` of n is a window of n // 2 + 1 keys in
        HazyResearch/based and of n + 1 keys in zoology.

    Raises:
      UserError: a key is missing or left over, or an array has another shape than the options say.
    """
    check_options(kind, config)
    outputs = [key for key in ("out_proj.weight", "proj_o.weight", "projection.weight") if key in weights]
    if not outputs:
        raise UserError(f"These weights of '{kind}' have no output projection, only {', '.join(sorted(weights))}.")
    mixer = make_mixer(kind, weights[outputs[0]].shape[0], rngs=nnx.Rngs(0), **config)
    keys = {path: [_present(alternatives, weights)] for path, alternatives in _own(mixer, MIXER_KEYS[kind]).items()}
    _fill(mixer, keys, weights)
    return mixer


def lm_from_reference(weights: Weights, config: LMConfig) -> LM:
    """Return the language model of a config with the parameters of a reference model.

    A prefix `model.` is stripped and metrics are dropped, as the reference's own loader does; the tied head may be
    present or not.

    Raises:
      UserError: a key is missing or left over, an array has another shape, or the head is not the embedding.
    """
    weights = {
        key.removeprefix("model."): value for key, value in weights.items() if "metrics" not in key and key not in DEAD
    }
    skeleton = "zoology" if any(key.startswith("backbone.") for key in weights) else "based"
    model = LM(config, rngs=nnx.Rngs(0))
    embedding = SKELETONS[skeleton][0]
    head = weights.pop(HEAD, None)
    if head is not None and embedding in weights and not np.array_equal(head, weights[embedding]):
        raise UserError(f"'{HEAD}' differs from '{embedding}'; only models with a tied head are supported.")
    _fill(model, _lm_keys(model, skeleton, weights), weights)
    return model


def reference_weights(model: LM) -> dict[str, np.ndarray]:
    """Return fp32 arrays under the keys of the released checkpoints, the tied head included."""
    weights = {}
    for path, keys in _lm_keys(model, "based", None).items():
        value = np.asarray(_flat(model)[path][...])
        for key, array in zip(keys, value if len(keys) > 1 else [value], strict=True):
            weights[key] = np.ascontiguousarray(_to_reference(path, array))
    weights[HEAD] = weights[SKELETONS["based"][0]]
    return weights


def _lm_keys(model: LM, skeleton: str, weights: Weights | None) -> dict[str, list[str]]:
    """Return for each path of the model its reference key, or one per copy where a repeated pattern is stacked."""
    embedding, last_norm, layer, mixer = SKELETONS[skeleton]
    keys = {"embed/embedding": [embedding]}
    keys |= {f"norm/{ours}": [f"{last_norm}.{theirs}"] for ours, theirs in NORM_KEYS.items()}
    first = 0
    for s, (pattern, repeats) in enumerate(_patterns(model.config)):
        for b, (kind, _) in enumerate(pattern):
            names = [layer.format(first + copy * len(pattern) + b) for copy in range(repeats)]
            for ours, theirs in _block_keys(kind, mixer, names[0], weights).items():
                keys[f"stacks/{s}/blocks/{b}/{ours}"] = [f"{name}.{theirs}" for name in names]
        first += repeats * len(pattern)
    return _own(model, keys)


def _block_keys(kind: str, mixer: str, layer: str, weights: Weights | None) -> dict[str, str]:
    keys = {f"mlp/{name}/kernel": f"mlp.{name}.weight" for name in ("fc1", "fc2")}
    keys |= {f"{norm}/{ours}": f"{norm}.{theirs}" for norm in ("norm1", "norm2") for ours, theirs in NORM_KEYS.items()}
    for ours, alternatives in MIXER_KEYS[kind].items():
        full = tuple(f"{layer}.{mixer}.{key}" for key in alternatives)
        keys[f"mixer/{ours}"] = (_present(full, weights) if weights else full[0]).removeprefix(f"{layer}.")
    return keys


def _patterns(config: LMConfig):
    return repeating_patterns(config.layers) if config.scan_layers else [((entry,), 1) for entry in config.layers]


def _present(alternatives: tuple[str, ...], weights: Weights) -> str:
    return next((key for key in alternatives if key in weights), alternatives[0])


def _own[T](module: nnx.Module, keys: Mapping[str, T]) -> dict[str, T]:
    """Return the part of a table that a module has parameters for: biases and norms differ between models."""
    return {path: keys[path] for path in _flat(module)}


def _flat(module: nnx.Module) -> dict[str, nnx.Variable]:
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def _fill(module: nnx.Module, keys: Mapping[str, list[str]], weights: Weights) -> None:
    """Set every parameter of a module from the weights, and check that none is left over."""
    _check_names({key for names in keys.values() for key in names}, weights)
    values = []
    for path, variable in _flat(module).items():
        arrays = [_from_reference(path, np.asarray(weights[key], np.float32)) for key in keys[path]]
        value = np.stack(arrays) if len(arrays) > 1 else arrays[0]
        if value.shape != variable.shape:
            first = keys[path][0]
            raise UserError(f"'{first}' has shape {weights[first].shape}, but '{path}' is {variable.shape}.")
        values.append((_split(path), variable.replace(jnp.asarray(value))))
    nnx.update(module, nnx.from_flat_state(values))


def _check_names(wanted: set[str], weights: Iterable[str]) -> None:
    missing, surplus = sorted(wanted - set(weights)), sorted(set(weights) - wanted)
    if missing:
        raise UserError(f"The weights lack '{missing[0]}' ({len(missing)} keys missing in all).")
    if surplus:
        raise UserError(f"The weights have '{surplus[0]}', which the model does not ({len(surplus)} such keys in all).")


def _split(path: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in path.split("/"))


def _from_reference(path: str, array: np.ndarray) -> np.ndarray:
    name = path.split("/")[-1]
    return array.T if name == "kernel" else array[:, 0].T if name == "conv_kernel" else array


def _to_reference(path: str, array: np.ndarray) -> np.ndarray:
    name = path.split("/")[-1]
    return array.T if name == "kernel" else array.T[:, None] if name == "conv_kernel" else array
