"""Weights under the state_dict keys of the publications, as numpy arrays.

A mixer's class holds the keys of its parameters (`REFERENCE`); here are those of whole models, and the layouts. Axes of
size 1 come and go.
"""

from collections.abc import Mapping

import einops
import jax.numpy as jnp
import numpy as np
from flax import nnx

from based_jax.convert.skeletons import OWN, REPEATED_HEADS, SKELETONS, KeyGroup, Layer, Skeleton, skeleton_of
from based_jax.errors import UserError, unknown
from based_jax.nn.block import Block
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixer import Buffer, Mixer
from based_jax.nn.mixers import MIXERS, make_mixer

Weights = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


NORM_KEYS = {"scale": "weight", "bias": "bias"}
LAYOUTS = {"conv_kernel": ("W C", "C 1 W"), "/kernel": ("D_in D_out", "D_out D_in")}
"""By the end of a parameter's path: our axes, and the reference's."""
WRAPPER_PREFIX = "model.transformer."  # a released checkpoint keeps its training wrapper's prefix on every key
UNREAD_BUFFERS = ("transformer.decay.decay", "rotary_emb.inv_freq")
"""Ends of keys: a buffer of based-1b that no layer reads, and frequencies, which follow from the config."""


def window_from_based(window_size: int) -> int:
    """Return the keys that a query sees in HazyResearch/based: itself, and half of `window_size` before it."""
    return window_size // 2 + 1


def window_from_zoology(block_size: int) -> int:
    """Return the keys that a query sees in zoology: itself, and `block_size` before it."""
    return block_size + 1


def mixer_from_reference(kind: str, weights: Weights, **config) -> Mixer:
    """Return the mixer `kind` with the parameters of a reference layer; its width is read off the arrays.

    Args:
      kind: a key of `MIXERS`.
      weights: arrays of any float dtype under the layer's state_dict keys, in any layout of its `REFERENCE`.
      config: options of the mixer's Config, and `norm_eps` of its norms; `window_from_based` and `window_from_zoology`
        translate the window. Where a publication takes another value than our default, that is the default here.

    Raises:
      UserError: a key is missing or left over, an array has another shape than the options say, or a buffer other
        values.
    """
    if kind not in MIXERS:
        raise unknown("mixer", kind, MIXERS)
    reference = MIXERS[kind].REFERENCE
    if not reference:
        raise UserError(f"No publication of mixer '{kind}' has a known layout of its weights.")
    publication = max(reference, key=lambda name: _shared_keys(_groups(reference[name]), weights))
    table, options = _groups(reference[publication]), MIXERS[kind].REFERENCE_OPTIONS.get(publication, {})
    output = next(iter(table.values()))
    if any(key not in weights for key in output):
        raise UserError(f"The weights lack the output projection '{output[0]}' of mixer '{kind}'.")
    width = weights[output[0]].shape[0]
    mixer = nnx.eval_shape(lambda: make_mixer(kind, width, rngs=nnx.Rngs(0), **{**options, **config}))
    own = {path: [keys] for path, keys in _of_parameters(mixer, table).items()}
    _fill(mixer, own, _without_buffers(weights, mixer.reference_buffers()))
    return mixer


def lm_from_reference(weights: Weights, config: LMConfig) -> LM:
    """Return the language model of a config with the parameters of a reference model.

    Based, attention, zoology, Mamba, RWKV-4 and Llama layouts are told apart by the embedding's name, zoology's own by
    that of the first mixer. As in the reference's own loader, a prefix `model.` is stripped and keys that contain
    `metrics` are dropped. A tied head may be absent, and so may buffers, which are compared with what is computed here,
    but for `UNREAD_BUFFERS`.

    Args:
      weights: arrays of any float dtype under state_dict keys; parameters become fp32.
      config: the model; `scan_layers` is free, since copies of a repeated pattern are stacked here.

    Raises:
      UserError: a key is missing or left over, an array has another shape, a buffer other values, or the head is not
        the embedding.
    """
    weights = unwrapped(weights)
    name = skeleton_of(weights)
    skeleton = SKELETONS[name]
    embedding, head = weights.get(skeleton.embedding), weights.get(skeleton.head)
    if config.tie_embeddings and head is not None:
        if embedding is not None and not np.array_equal(head, embedding):
            raise UserError(f"'{skeleton.head}' differs from the embedding; set tie_embeddings to False.")
        weights.pop(skeleton.head)
    wanted = (config.padded_vocab_size, config.d_model)
    if embedding is not None and embedding.shape != wanted:
        raise UserError(f"'{skeleton.embedding}' has shape {embedding.shape}; the model's is {wanted}.")
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    _fill(model, reference_keys(model, name), _without_buffers(weights, _model_buffers(model, skeleton)))
    return model


def check_layers(weights: Weights, name: str, count: int) -> None:
    """Check that there are arrays of as many layers as a config.json says, before a model of them is made.

    Raises:
      UserError: there are fewer, or the number is not above 0.
    """
    root = SKELETONS[skeleton_of(weights)].layers[0].norm1.partition("{}")[0]
    stored = len({key.removeprefix(root).partition(".")[0] for key in weights if key.startswith(root)})
    if count < 1:
        raise UserError(f"{name} is {count}; it is at least 1.")
    if count > stored:
        raise UserError(f"The weights lack '{root}{stored}': they are of {stored} layers, and {name} is {count}.")


def reference_weights(model: LM, skeleton: str = "based") -> dict[str, np.ndarray]:
    """Return fp32 arrays under the keys of a publication, by default those of the released Based and attention models.

    Args:
      model: the model.
      skeleton: an entry of `SKELETONS`; those of `REPEATED_HEADS` hold a tied head as well.

    Raises:
      UserError: a mixer has no place there.
    """
    found, weights = parameters(model), dict[str, np.ndarray]()
    for path, groups in reference_keys(model, skeleton).items():
        value = np.asarray(found[path][...], np.float32)
        for group, array in zip(groups, value if len(groups) > 1 else [value], strict=True):
            parts = _parts(found, path, _to_reference(path, array), len(group))
            weights |= {key: np.ascontiguousarray(part) for key, part in zip(group, parts, strict=True)}
    names = SKELETONS[skeleton]
    repeated = model.config.tie_embeddings and skeleton in REPEATED_HEADS
    return weights | ({names.head: weights[names.embedding]} if repeated else {})


def _parts(found: Mapping[str, nnx.Variable], path: str, array: np.ndarray, count: int) -> list[np.ndarray]:
    """Return the arrays that are joined in one of ours, of the widths that its kernel knows, or else of equal ones."""
    if count == 1:
        return [array]
    kernel = found[f"{path.rpartition('/')[0]}/kernel"]
    return np.split(array, np.cumsum(kernel.get_metadata("parts"))[:-1])


def reference_keys(model: LM, skeleton: str = "based") -> dict[str, list[KeyGroup]]:
    """Return for each parameter's path its reference keys, or those of each copy where a pattern is stacked."""
    names = SKELETONS[skeleton]
    keys: dict[str, list[KeyGroup]] = {"embed/embedding": [(names.embedding,)], "head/kernel": [(names.head,)]}
    for ours, theirs in (("norm", names.norm), ("embed_norm", names.embed_norm)):
        keys |= {f"{ours}/{p}": [(f"{theirs}.{key}",)] for p, key in NORM_KEYS.items()}
    first, period = 0, len(names.layers)
    for s, stack in enumerate(model.stacks):
        for b, block in enumerate(stack.blocks):
            copies = [first + b + copy * len(stack.blocks) for copy in range(stack.repeats)]
            for path, group in _block_keys(block, names.layers[copies[0] % period], names.publication).items():
                keys[f"stacks/{s}/blocks/{b}/{path}"] = [
                    tuple(key.format(index // period) for key in group) for index in copies
                ]
        first += len(stack.blocks) * stack.repeats
    return _of_parameters(model, keys)


def reference_shapes(module: nnx.Module, keys: Mapping[str, list[KeyGroup]]) -> dict[KeyGroup, Shape]:
    """Return the shape of each group of keys in the reference's layout; the module's arrays may be abstract."""
    shapes: dict[KeyGroup, Shape] = {}
    for path, variable in parameters(module).items():
        shape = variable.shape[1:] if len(keys[path]) > 1 else variable.shape
        layout = _to_reference(path, np.broadcast_to(np.float32(0), shape)).shape
        shapes |= dict.fromkeys(keys[path], layout)
    return shapes


def unwrapped(weights: Weights) -> dict[str, np.ndarray]:
    """Return a model's own arrays: without the training wrapper's prefix and metrics, and without unread buffers."""
    own = {key: value for key, value in weights.items() if "metrics" not in key}
    if any(key.startswith(WRAPPER_PREFIX) for key in own):
        own = {key.removeprefix("model."): value for key, value in own.items()}
    return {key: value for key, value in own.items() if not key.endswith(UNREAD_BUFFERS)}


def _model_buffers(model: LM, names: Skeleton) -> dict[str, Buffer]:
    """Return what each layer may store beside its parameters, under the keys of the whole model."""
    buffers: dict[str, Buffer] = {}
    for i, mixer in enumerate(model.mixers()):
        layer, period = names.layers[i % len(names.layers)], len(names.layers)
        prefix = f"{layer.mixer.format(i // period)}."
        for key, buffer in mixer.reference_buffers().items():
            buffers[prefix + key] = prefix + buffer if isinstance(buffer, str) else buffer
    return buffers


def _without_buffers(weights: Weights, buffers: Mapping[str, Buffer]) -> Weights:
    """Return the weights that are parameters, after a check that buffers among the others are what they are here."""
    found = {key: buffer for key, buffer in buffers.items() if key in weights}
    for key, buffer in found.items():
        wanted = weights.get(buffer, weights[key]) if isinstance(buffer, str) else buffer
        shape = wanted if isinstance(wanted, tuple) else wanted.shape
        if _squeezed(shape) != _squeezed(weights[key].shape):
            raise UserError(f"'{key}' has shape {weights[key].shape}; the model's is {shape}.")
        if not isinstance(wanted, tuple) and not _equal(weights[key], wanted):
            raise UserError(f"'{key}' is no parameter here, and its values are not those that the model computes.")
    return {key: value for key, value in weights.items() if key not in found}


def _equal(array: np.ndarray, wanted: np.ndarray) -> bool:
    """Return whether two arrays are the same but for axes of size 1 and the rounding of the first one's dtype."""
    array, wanted = np.squeeze(array), np.squeeze(wanted)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return False
    error = max(1e-5, float(jnp.finfo(array.dtype).eps))
    return np.allclose(array.astype(np.float64), wanted.astype(np.float64), rtol=error, atol=error)


def _block_keys(block: Block, names: Layer, publication: str) -> dict[str, KeyGroup]:
    keys: dict[str, KeyGroup] = {}
    for ours, group in (("fc1", names.fc1), ("fc2", names.fc2)):
        keys |= {f"mlp/{ours}/kernel": group, f"mlp/{ours}/bias": tuple(_bias_key(key) for key in group)}
    for ours, theirs in (("norm1", names.norm1), ("norm2", names.norm2)):
        keys |= {f"{ours}/{p}": (f"{theirs}.{key}",) for p, key in NORM_KEYS.items()}
    for path, group in _mixer_keys(block.mixer, publication).items():
        keys[f"mixer/{path}"] = tuple(f"{names.mixer}.{key}" for key in group)
    return keys


def _mixer_keys(mixer: Mixer, publication: str) -> dict[str, KeyGroup]:
    if publication == OWN:
        return {path: (_own_key(path),) for path in parameters(mixer)}
    if publication not in mixer.REFERENCE:
        raise UserError(f"The layout of '{publication}' has no place for {type(mixer).__name__}.")
    return _groups(mixer.REFERENCE[publication])


def _own_key(path: str) -> str:
    return path.replace("/kernel", "/weight").replace("/", ".")


def _bias_key(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def _groups(keys: Mapping[str, str | KeyGroup]) -> dict[str, KeyGroup]:
    return {path: (group,) if isinstance(group, str) else group for path, group in keys.items()}


def _shared_keys(keys: Mapping[str, KeyGroup], weights: Weights) -> int:
    return sum(key in weights for group in keys.values() for key in group)


def _of_parameters[T](module: nnx.Module, keys: Mapping[str, T]) -> dict[str, T]:
    """Return the part of a table that a module has parameters for: biases, norms and MLPs differ between models.

    Raises:
      UserError: the table has no key for a parameter.
    """
    if absent := sorted(parameters(module).keys() - keys.keys()):
        raise UserError(f"The layout has no place for '{absent[0]}'.")
    return {path: keys[path] for path in parameters(module)}


def parameters(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the parameters of a module by path."""
    return {_path(keys): variable for keys, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def _path(keys: tuple) -> str:
    return "/".join(map(str, keys))


def _fill(module: nnx.Module, keys: Mapping[str, list[KeyGroup]], weights: Weights) -> None:
    """Give an abstract module its parameters in fp32, after a check that the weights are exactly these."""
    shapes = reference_shapes(module, keys)
    _check_weights(weights, shapes)
    values = []
    for parts, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        path = _path(parts)
        arrays = [_from_reference(path, _joined_array(weights, group).reshape(shapes[group])) for group in keys[path]]
        values.append((parts, variable.replace(jnp.asarray(np.stack(arrays) if len(arrays) > 1 else arrays[0]))))
    nnx.update(module, nnx.from_flat_state(values))


def _joined_array(weights: Weights, group: KeyGroup) -> np.ndarray:
    arrays = [np.asarray(weights[key], np.float32) for key in group]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _check_weights(weights: Weights, shapes: Mapping[KeyGroup, Shape]) -> None:
    missing = sorted((key, shape) for group, shape in shapes.items() for key in group if key not in weights)
    surplus = sorted(weights.keys() - {key for group in shapes for key in group})
    if missing:
        key, shape = missing[0]
        raise UserError(f"The weights lack '{key}' {shape}; {len(missing)} keys are missing.")
    if surplus:
        key = surplus[0]
        raise UserError(
            f"The weights have '{key}' {weights[key].shape}, which the model does not; {len(surplus)} do so."
        )
    for key, array in weights.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"'{key}' is of {array.dtype}; parameters are floating-point numbers.")
    for group, shape in shapes.items():
        found = _joined_shape(weights, group)
        if _squeezed(found) != _squeezed(shape):
            raise UserError(f"'{' + '.join(group)}' has shape {found}; the model's is {shape}.")


def _joined_shape(weights: Weights, group: KeyGroup) -> Shape:
    first = weights[group[0]].shape
    return first if len(group) == 1 else (sum(weights[key].shape[0] for key in group), *first[1:])


def _squeezed(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def _from_reference(path: str, array: np.ndarray) -> np.ndarray:
    ours, theirs = _layout(path)
    return einops.rearrange(array, f"{theirs} -> {ours}")


def _to_reference(path: str, array: np.ndarray) -> np.ndarray:
    ours, theirs = _layout(path)
    return einops.rearrange(array, f"{ours} -> {theirs}")


def _layout(path: str) -> tuple[str, str]:
    return next((layout for ending, layout in LAYOUTS.items() if path.endswith(ending)), ("...", "..."))
