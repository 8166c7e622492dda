"""A language model as decoding reads it: one array a layer, and the weights in what they are multiplied in."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.generate.fingerprint import fingerprint
from based_jax.nn.divided import check_tensor
from based_jax.nn.lm import LM
from based_jax.nn.lm_config import LMConfig, with_options, with_taylor_options

Path = tuple[Any, ...]
Caches = tuple
Params = tuple[Array, ...]
"""The arrays of a model, in the order of `Layout.shapes`: a call with them begins sooner than with `nnx.Variable`s."""


DECODING_AXES = frozenset(("data", "tensor"))
"""Of a mesh that a model decodes over: weights that lie over another one would be gathered for each token."""
_TRACING = threading.Lock()


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The structure of a model for decoding, equal to itself alone: compiled programs are found by it at once.

    Attributes:
      config: of the model, its layers not stacked; the head is apart from the embedding where it is narrower.
      graphdef: the modules without their arrays.
      shapes: of the arrays, and their dtypes, with the names of their axes.
    """

    config: LMConfig
    graphdef: nnx.GraphDef
    shapes: nnx.State

    def model(self, params: Params | nnx.State) -> LM:
        """Return the model with these arrays."""
        return nnx.merge(self.graphdef, self.state(params))

    def state(self, params: Params | nnx.State) -> nnx.State:
        """Return arrays under their names."""
        return jax.tree.unflatten(jax.tree.structure(self.shapes), jax.tree.leaves(params))


@functools.lru_cache(maxsize=16)
def layout_of(config: LMConfig) -> Layout:
    """Return the layout of models of a config."""
    tied = config.tie_embeddings and config.dtype == "float32"
    config = dataclasses.replace(config, scan_layers=False, remat="none", tie_embeddings=tied)
    model = nnx.merge(*jax.eval_shape(lambda: nnx.split(LM(config, rngs=nnx.Rngs(0)))))
    for linear, dtype in _products(model):
        kernel = linear.kernel
        kernel.set_value(jax.ShapeDtypeStruct(kernel.shape, dtype))
    return Layout(config, *nnx.split(model))


def _products(model: LM) -> Iterator[tuple[nnx.Linear, Any]]:
    """Yield each linear layer, and what it computes in."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Linear):
            yield module, module.dtype or jnp.float32


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """A model ready to decode.

    Stacked layers come apart, since a loop over stacked caches copies every state for each token and reads slices of
    weights twice. Kernels are in the dtype that their products have, to which the model rounds them anyway: what it
    computes is the same, and a token reads half the bytes. The embedding stays as it is, and a tied head of bf16 is a
    copy of it.

    Attributes:
      layout, params: the model.
      mesh: of the devices that its programs run on together; None for one device.
    """

    layout: Layout
    params: Params
    mesh: Mesh | None = None

    @classmethod
    def of(
        cls,
        model: "LM | Decoder",
        dtype: str | None = None,
        *,
        flush: int | None = None,
        state_dtype: str | None = None,
        options: Sequence[str] = (),
    ) -> "Decoder":
        """Return a model's decoder.

        Args:
          model: whose own dtype and options are the defaults of what follows.
          dtype: what it computes in, as of `LMConfig`.
          flush, state_dtype: how often Taylor layers write their state, and in what (`ops/taylor_decode.py`).
          options: of all layers of a mixer, as in "attention.cache_policy=streaming"; they may change what the model
            does, but not its parameters.

        Raises:
          UserError: a value is impossible, or the model has no Taylor layer, no such mixer, or other parameters.
        """
        if isinstance(model, Decoder):
            return model
        config = model.config if dtype is None else dataclasses.replace(model.config, dtype=dtype)
        config = _with_options(with_taylor_options(config, flush=flush, state_dtype=state_dtype), options)
        layout, sources = layout_of(config), tuple(_sources(model))
        arrays = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
        return cls(layout, _laid_out(layout, sources, arrays))

    def over(self, mesh: Mesh) -> "Decoder":
        """Return the same model over a mesh: rows lie over "data", heads and widths as in training over "tensor".

        Raises:
          UserError: another axis has several devices, or the model's heads or widths cannot be divided.
        """
        for axis in sorted(mesh.shape.keys() - DECODING_AXES):
            if mesh.shape[axis] > 1:
                held = f"Mesh axis '{axis}' has {mesh.shape[axis]} devices"
                raise UserError(f"{held}; a model decodes over {' and '.join(map(repr, sorted(DECODING_AXES)))} alone.")
        check_tensor(self.config, mesh)
        placed = jax.device_put(self.layout.state(self.params), parallel.shardings(self.layout.shapes, mesh))
        return Decoder(self.layout, tuple(jax.tree.leaves(placed)), mesh)

    def running(self) -> contextlib.AbstractContextManager:
        """Return a context in which the model's programs are compiled and run, in this thread."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @property
    def config(self) -> LMConfig:
        """The config of the model."""
        return self.layout.config

    @functools.cached_property
    def max_len(self) -> int | None:
        """The most tokens that a sequence may have, or None."""
        return self.layout.model(self.layout.shapes).max_len

    def state_bytes(self, max_len: int) -> int:
        """Return the bytes that decoding keeps of a sequence of up to `max_len` tokens."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.row_shapes(max_len)))

    def row_shapes(self, max_len: int) -> Caches:
        """Return the shapes of the caches of one row, without the axis of the rows."""
        model = self.layout.model(self.layout.shapes)
        return jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], model.init_cache(1, max_len)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """What states of this model are told from those of another by; the first use reads every parameter."""
        return fingerprint(self.config, self.layout.state(self.params))

    @functools.cached_property
    def prefix_length(self) -> int:
        """The tokens at the beginning of a sequence that have to be read at once."""
        return max(mixer.prefix_length for mixer in self.layout.model(self.layout.shapes).mixers())

    @functools.cached_property
    def rows_are_apart(self) -> bool:
        """Whether rows of like beginnings are read alike in any company."""
        return all(mixer.rows_are_apart for mixer in self.layout.model(self.layout.shapes).mixers())

    def init_cache(self, batch: int, max_len: int) -> Caches:
        """Return the caches of all layers before the first token, the leading axis of all arrays the rows'."""
        with self.running():
            return _init_cache(self.layout, batch, max_len, self.params)


def compile_ahead(program: Any, *arguments: Any) -> None:
    """Compile a jitted program for arguments, or their shapes, beside others that other threads compile.

    One is traced at a time: Python would go back and forth between several, and be no sooner done with any.
    """
    with _TRACING:
        lowered = program.lower(*arguments)
    lowered.compile()


def _with_options(config: LMConfig, options: Sequence[str]) -> LMConfig:
    """Return a config with options that are no others of its parameters."""
    changed = with_options(config, options)
    own, others = map(_parameter_shapes, (config, changed))
    for path in sorted((path for path in own.keys() | others.keys() if own.get(path) != others.get(path)), key=str):
        shapes = f"{others.get(path, 'not there')}, and the model's is {own.get(path, 'not there')}"
        raise UserError(f"With {', '.join(options)} it is another model: '{'/'.join(map(str, path))}' is {shapes}.")
    return changed


def _parameter_shapes(config: LMConfig) -> dict[Path, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in nnx.to_flat_state(layout_of(config).shapes)}


class Source(NamedTuple):
    """Where a layer's block stands in a model: its path, and its place among those that are stacked, or None."""

    path: Path
    place: int | None


def _sources(model: LM) -> Iterator[Source]:
    """Yield the source of each layer in order."""
    for i, stack in enumerate(model.stacks):
        for r in range(stack.repeats):
            for j in range(len(stack.blocks)):
                yield Source(("stacks", i, "blocks", j), None if stack.repeats == 1 else r)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _laid_out(layout: Layout, sources: tuple[Source, ...], arrays: Mapping[Path, Array]) -> Params:
    """Return the arrays of a layout from those of a model by path."""

    def array(path: Path) -> Array:
        if path == ("head", "kernel") and path not in arrays:
            return arrays["embed", "embedding"].T
        if path[0] != "stacks":
            return arrays[path]
        source = sources[path[1]]
        x = arrays[*source.path, *path[4:]]
        return x if source.place is None else x[source.place]

    return tuple(array(path).astype(leaf.dtype) for path, leaf in nnx.to_flat_state(layout.shapes))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init_cache(layout: Layout, batch: int, max_len: int, params: Params) -> Caches:
    caches = layout.model(params).init_cache(batch, max_len)
    return jax.tree.map(parallel.constrain_rows, caches)
