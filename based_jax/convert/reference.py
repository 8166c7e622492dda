"""Weights under the state_dict keys of HazyResearch/based and of zoology, as numpy arrays.

The tables serve both directions. Two of our parameters have another layout there: a linear kernel (in, out) is
[out, in], and the kernel of a depthwise convolution (W, C) is [C, 1, W].
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from based_jax.errors import UserError, unknown
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import make_mixer

Weights = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
Keys = dict[str, tuple[str, ...]]

# our path -> reference key; where the publications differ, HazyResearch/based comes first and zoology last
QKV: Keys = {"qkv/kernel": ("Wqkv.weight",), "qkv/bias": ("Wqkv.bias",)}
OUT: Keys = {"out_proj/kernel": ("out_proj.weight",), "out_proj/bias": ("out_proj.bias",)}
MIXER_KEYS: dict[str, Keys] = {
    "attention": QKV | OUT,
    "window": QKV | OUT,
    "taylor": {
        "proj_q/kernel": ("proj_q.weight",),
        "proj_k/kernel": ("proj_k.weight",),
        "proj_v/kernel": ("proj_v.weight",),
        "out_proj/kernel": ("out_proj.weight", "proj_o.weight"),
    },
    "conv": {
        "in_proj/kernel": ("in_proj.weight",),
        "in_proj/bias": ("in_proj.bias",),
        "conv_kernel": ("conv.conv.weight",),
        **OUT,
    },
    "base_conv": {
        "projection/kernel": ("projection.weight",),
        "projection/bias": ("projection.bias",),
        "conv_kernel": ("conv.conv.weight",),
        "conv_bias": ("conv.conv.bias",),
    },
}
MLP_KEYS = {"fc1/kernel": "fc1.weight", "fc2/kernel": "fc2.weight"}
NORM_KEYS = {"scale": "weight", "bias": "bias"}
OUTPUTS = ("out_proj.weight", "proj_o.weight", "projection.weight")  # a mixer has one of them; its rows are D


class Skeleton(NamedTuple):
    """Where a publication keeps a language model's embedding, last norm, layers, and each layer's mixer."""

    embedding: str
    norm: str
    layer: str
    mixer: str
    publication: int  # index into the keys of `MIXER_KEYS`


SKELETONS = {
    "based": Skeleton(
        "transformer.embeddings.word_embeddings.weight", "transformer.ln_f", "transformer.layers.{}", "mixer", 0
    ),
    "zoology": Skeleton(
        "backbone.embeddings.word_embeddings.weight", "backbone.ln_f", "backbone.layers.{}", "sequence_mixer.mixer", -1
    ),
}
HEAD = "lm_head.weight"
DEAD = ("transformer.decay.decay",)  # a buffer of based-1b that no layer reads


def window_from_based(window_size: int) -> int:
    """Return the keys that a query sees in HazyResearch/based: itself, and half of `window_size` before it."""
    return window_size // 2 + 1


def window_from_zoology(block_size: int) -> int:
    """Return the keys that a query sees in zoology: itself, and `block_size` before it."""
    return block_size + 1


def mixer_from_reference(kind: str, weights: Weights, **config) -> nnx.Module:
    """Return the mixer `kind` with the parameters of a reference layer; its width is read off the arrays.

    Args:
      kind: a key of `MIXERS`.
      weights: arrays of any float dtype under the layer's state_dict keys, of HazyResearch/based or of zoology.
      config: options of the mixer's Config; `window_from_based` and `window_from_zoology` translate the window.

    Raises:
      UserError: a key is missing or left over, or an array has another shape than the options say.
    """
    if kind not in MIXER_KEYS:
        raise unknown("mixer", kind, MIXER_KEYS)
    output = next((key for key in OUTPUTS if key in weights), None)
    if output is None:
        raise UserError(f"The weights lack an output projection; it is one of {', '.join(OUTPUTS)}.")
    width = weights[output].shape[0]
    mixer = nnx.eval_shape(lambda: make_mixer(kind, width, rngs=nnx.Rngs(0), **config))
    present = {path: [output if output in keys else keys[0]] for path, keys in MIXER_KEYS[kind].items()}
    _fill(mixer, _own(mixer, present), weights)
    return mixer


def lm_from_reference(weights: Weights, config: LMConfig) -> LM:
    """Return the language model of a config with the parameters of a reference model, of either publication.

    As in the reference's own loader, a prefix `model.` is stripped and keys that contain `metrics` are dropped. The
    tied head may be absent. `transformer.decay.decay` is ignored: a buffer of based-1b that no layer reads.

    Args:
      weights: arrays of any float dtype under state_dict keys; parameters become fp32.
      config: the model; `scan_layers` is free, since copies of a repeated pattern are stacked here.

    Raises:
      UserError: a key is missing or left over, an array has another shape, or the head is not the embedding.
    """
    parameters = unwrapped(weights)
    skeleton = "zoology" if any(key.startswith("backbone.") for key in parameters) else "based"
    embedding, head = parameters.get(SKELETONS[skeleton].embedding), parameters.pop(HEAD, None)
    if head is not None and embedding is not None and not np.array_equal(head, embedding):
        raise UserError(f"'{HEAD}' differs from the embedding; only models with a tied head are supported.")
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    _fill(model, reference_keys(model, skeleton), parameters)
    return model


def reference_weights(model: LM) -> dict[str, np.ndarray]:
    """Return fp32 arrays under the keys of the released checkpoints, the tied head included."""
    parameters, weights = _parameters(model), {}
    for path, keys in reference_keys(model).items():
        value = np.asarray(parameters[path][...])
        for key, array in zip(keys, value if len(keys) > 1 else [value], strict=True):
            weights[key] = np.ascontiguousarray(_to_reference(path, array))
    return weights | {HEAD: weights[SKELETONS["based"].embedding]}


def reference_keys(model: LM, skeleton: str = "based") -> dict[str, list[str]]:
    """Return for each parameter's path its reference key, or one for each copy where a repeated pattern is stacked."""
    names = SKELETONS[skeleton]
    keys = {"embed/embedding": [names.embedding]}
    keys |= {f"norm/{ours}": [f"{names.norm}.{theirs}"] for ours, theirs in NORM_KEYS.items()}
    first = 0
    for s, stack in enumerate(model.stacks):
        period = len(stack.blocks)
        for b in range(period):
            layers = [names.layer.format(first + b + copy * period) for copy in range(stack.repeats)]
            for ours, theirs in _block_keys(model.config.layers[first + b][0], names).items():
                keys[f"stacks/{s}/blocks/{b}/{ours}"] = [f"{layer}.{theirs}" for layer in layers]
        first += period * stack.repeats
    return _own(model, keys)


def reference_shapes(module: nnx.Module, keys: Mapping[str, list[str]]) -> dict[str, Shape]:
    """Return the shape of each reference key in the reference's layout; the module's arrays may be abstract."""
    shapes: dict[str, Shape] = {}
    for path, variable in _parameters(module).items():
        shape = variable.shape[1:] if len(keys[path]) > 1 else variable.shape
        layout = _to_reference(path, np.broadcast_to(np.float32(0), shape)).shape
        shapes |= dict.fromkeys(keys[path], layout)
    return shapes


def unwrapped(weights: Weights) -> dict[str, np.ndarray]:
    """Return a model's own arrays: without the training wrapper's prefix and metrics, and without dead buffers."""
    own = {key.removeprefix("model."): value for key, value in weights.items() if "metrics" not in key}
    return {key: value for key, value in own.items() if key not in DEAD}


def _block_keys(kind: str, names: Skeleton) -> dict[str, str]:
    keys = {f"mlp/{ours}": f"mlp.{theirs}" for ours, theirs in MLP_KEYS.items()}
    keys |= {f"{norm}/{ours}": f"{norm}.{theirs}" for norm in ("norm1", "norm2") for ours, theirs in NORM_KEYS.items()}
    return keys | {
        f"mixer/{ours}": f"{names.mixer}.{theirs[names.publication]}" for ours, theirs in MIXER_KEYS[kind].items()
    }


def _own[T](module: nnx.Module, keys: Mapping[str, T]) -> dict[str, T]:
    """Return the part of a table that a module has parameters for: biases, norms and MLPs differ between models."""
    return {path: keys[path] for path in _parameters(module)}


def _parameters(module: nnx.Module) -> dict[str, nnx.Variable]:
    return {_path(keys): variable for keys, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def _path(keys: tuple) -> str:
    return "/".join(map(str, keys))


def _fill(module: nnx.Module, keys: Mapping[str, list[str]], weights: Weights) -> None:
    """Give an abstract module its parameters in fp32, after a check that the weights are exactly these."""
    _check(weights, reference_shapes(module, keys))
    values = []
    for parts, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        path = _path(parts)
        arrays = [_from_reference(path, np.asarray(weights[key], np.float32)) for key in keys[path]]
        values.append((parts, variable.replace(jnp.asarray(np.stack(arrays) if len(arrays) > 1 else arrays[0]))))
    nnx.update(module, nnx.from_flat_state(values))


def _check(weights: Weights, shapes: Mapping[str, Shape]) -> None:
    missing, surplus = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing:
        raise UserError(f"The weights lack '{missing[0]}' {shapes[missing[0]]}; {len(missing)} keys are missing.")
    if surplus:
        key = surplus[0]
        raise UserError(
            f"The weights have '{key}' {weights[key].shape}, which the model does not; {len(surplus)} do so."
        )
    for key, shape in shapes.items():
        if weights[key].shape != shape:
            raise UserError(f"'{key}' has shape {weights[key].shape}; the model's is {shape}.")


def _from_reference(path: str, array: np.ndarray) -> np.ndarray:
    name = path.split("/")[-1]
    return array.T if name == "kernel" else array[:, 0].T if name == "conv_kernel" else array


def _to_reference(path: str, array: np.ndarray) -> np.ndarray:
    name = path.split("/")[-1]
    return array.T if name == "kernel" else array.T[:, None] if name == "conv_kernel" else array
