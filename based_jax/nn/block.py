"""A residual block, and a repeated pattern of blocks that is stacked and scanned."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from based_jax import parallel
from based_jax.dims import BP, SegmentIds
from based_jax.errors import UserError
from based_jax.nn import layers, mlps, projections
from based_jax.nn.init_recipes import initialise
from based_jax.nn.mixers import build_mixer
from based_jax.nn.own_mixer import short
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.dispatch import target_platform
from based_jax.ops.few_tokens import few_tokens_residual_norm
from based_jax.ops.norm import residual_layer_norm, residual_rms_norm

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat_of(remat: str) -> str:
    """Return the entry of `REMAT_POLICIES` that a config's `remat` stands for on the device being compiled for."""
    if remat != "auto":
        return remat
    return "none" if target_platform() == "cuda" else "dots"


class Stream(NamedTuple):
    """The residual stream r, and the output y of a layer that is still to be added: the norm after it does both."""

    r: Float[Array, "*B D"]
    y: Float[Array, "*B D"] | projections.Projected | Pieces | None = None

    def filled(self, dtype) -> "Stream":
        """Return the stream with an output to add, of zeros if there is none, as a loop over layers carries it."""
        return self if self.y is not None else Stream(self.r, jnp.zeros_like(self.r, dtype))

    def total(self) -> Float[Array, "*B D"]:
        """Return the stream with nothing left to add."""
        y = self.added()
        return self.r if y is None else self.r + y

    def added(self) -> Float[Array, "*B D"] | None:
        """Return what is to be added, computed if it still has to be."""
        return self.y.value() if isinstance(self.y, projections.Projected | Pieces) else self.y

    def pieces(self) -> Pieces | None:
        """Return what is to be added to a token in pieces."""
        y = self.y if isinstance(self.y, Pieces) else self.added()
        return y if y is None or isinstance(y, Pieces) else Pieces(y[None])

    def constrained(self) -> "Stream":
        """Return the stream with rows and tokens over the mesh, lest XLA gathers activations instead of weights."""
        is_left = isinstance(self.y, projections.Projected | Pieces)
        return self if is_left else jax.tree.map(parallel.constrain_tokens, self)

    def normed(self, norm: Any, dtype) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """Return the stream with nothing left to add, and its norm by an `nnx.RMSNorm` or `nnx.LayerNorm`."""
        scale, options = norm.scale[...], {"eps": norm.epsilon, "dtype": dtype}
        if not isinstance(norm, nnx.RMSNorm):
            return residual_layer_norm(self.r, self.added(), scale, norm.bias[...], **options)
        if isinstance(self.y, projections.Projected) and self.y.x.dtype == dtype:
            return few_tokens_residual_norm(self.r, *self.y, scale, eps=norm.epsilon)
        return residual_rms_norm(self.r, self.added(), scale, **options)


class Block(nnx.Module):
    """Pre-norm mixer, and pre-norm MLP if there is one, around a fp32 residual stream.

    Source: HazyResearch/based:based/models/block.py.
    """

    def __init__(self, kind: str, options: dict, config, *, rngs: nnx.Rngs):
        init = config.init(rngs)
        norm, mlp = layers.NORMS[config.norm], mlps.MLPS[config.mlp]
        self.dtype, self.kind = init.dtype, short(kind)
        self.norm1 = norm(config.d_model, config.norm_eps, rngs=rngs)
        first = config.layers.index((kind, options))  # layers that are equal are wrong alike
        self.mixer = build_mixer(kind, config.d_model, options, init, where=f"model.layers[{first}]")
        initialise(self.mixer, self.kind, config.init_recipe, init)
        if mlp is None:
            self.mlp = None
        else:
            self.norm2 = norm(config.d_model, config.norm_eps, rngs=rngs)
            self.mlp = mlp(config.d_model, config.hidden_dim, init)
            initialise(self.mlp, "mlp", config.init_recipe, init)

    def extend(self, stream: Stream, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> Stream:
        """Return the stream after the block, with the last addition left to the next norm.

        With `positions` it is the stream there alone, and so is what follows the mixer.
        """
        return self._through(stream, lambda x: (self.mixer(x, segment_ids, positions), None), positions)[0]

    def init_cache(self, batch: int, max_len: int):
        """Return the mixer's cache before the first token."""
        return self.mixer.init_cache(batch, max_len)

    def prefill(self, stream: Stream, cache, segment_ids: SegmentIds | None = None):
        """Return the stream of next tokens after the block, with the last addition left, and the cache after them."""
        return self._through(stream, lambda x: self.mixer.prefill(x, cache, segment_ids))

    def step(self, stream: Stream, cache):
        """Return the stream of one token after the block, with the last addition left, and the cache after it."""
        if stream.r.shape[0] > 1 or not isinstance(self.norm1, nnx.RMSNorm):
            return self._through(stream, lambda x: self.mixer.step(x, cache))
        with jax.named_scope(self.kind):
            stream, cache = self._mixed(stream, cache)
        if self.mlp is None:
            return stream.constrained(), cache
        with jax.named_scope("mlp"):
            return self._fed(self.mlp, stream).constrained(), cache

    def try_tokens(self, stream: Stream, cache):
        """Return the stream of the next few tokens after the block, and the mixer's trial of them."""
        return self._through(stream, lambda x: self.mixer.try_tokens(x, cache))

    def _mixed(self, stream: Stream, cache) -> tuple[Stream, Any]:
        """Return the stream of one sequence's token after the mixer."""
        if (found := self.mixer.step_whole(stream.r, stream.pieces(), self.norm1, cache)) is not None:
            r, pieces, cache = found
            return Stream(r, pieces), cache
        r, x = stream.normed(self.norm1, self.dtype)
        y, cache = self.mixer.step(x, cache)
        return Stream(r, y), cache

    def _fed(self, mlp: Callable, stream: Stream) -> Stream:
        """Return the stream of one sequence's token after the MLP."""
        if isinstance(mlp, mlps.SwiGLU):
            return Stream(*mlp.step_whole(stream.r, stream.pieces(), self.norm2))
        r, x = stream.normed(self.norm2, self.dtype)
        return Stream(r, mlp(x))

    def _through(self, stream: Stream, mix: Callable, positions: BP | None = None) -> tuple[Stream, Any]:
        with jax.named_scope(self.kind):
            r, x = stream.normed(self.norm1, self.dtype)
            y, cache = mix(x)
            [r] = layers.at(positions, r)
        stream = Stream(r, y)
        if self.mlp is None:
            return stream.constrained(), cache
        with jax.named_scope("mlp"):
            r, x = stream.normed(self.norm2, self.dtype)
            return Stream(r, self.mlp(x)).constrained(), cache


class Stack(nnx.Module):
    """`repeats` copies of a pattern of blocks; more than one are stacked along a leading axis and scanned.

    A pass over whole sequences is unrolled on GPUs: a loop there copies what it keeps for the backward pass, which
    takes a tenth of a training step.
    """

    def __init__(self, pattern: Sequence[tuple[str, dict]], repeats: int, config, *, rngs: nnx.Rngs):
        def build(rngs):
            return nnx.List([Block(kind, dict(options), config, rngs=rngs) for kind, options in pattern])

        self.repeats = repeats
        self.remat = config.remat
        if repeats == 1:
            self.blocks = build(rngs)
        else:
            stacked = nnx.vmap(build, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
            self.blocks = stacked(rngs.split(repeats))

    def extend(self, stream: Stream, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> Stream:
        """Return the stream after all blocks, or at some positions; see `Block.extend`, if no block is repeated."""
        early = positions if self.repeats == 1 else None

        def through(blocks, stream: Stream) -> Stream:
            for i, block in enumerate(blocks):
                with jax.named_scope(f"block_{i}"):
                    stream = block.extend(stream, segment_ids, early if i == len(blocks) - 1 else None)
            return stream

        if remat_of(self.remat) == "none" and not self._loops(None):
            carried = stream if self.repeats == 1 else stream.filled(self.blocks[0].dtype)
            return self._run(lambda blocks, stream, _: (through(blocks, stream), None), carried, None)[0]
        # One array for a loop to carry, and for a backward pass that computes the rest again to keep.
        total, _ = self._run(lambda blocks, r, _: (through(blocks, Stream(r)).total(), None), stream.total(), None)
        return Stream(total if early is positions else layers.at(positions, total)[0])

    def init_cache(self, batch: int, max_len: int):
        """Return the caches of all blocks, stacked like the parameters."""
        caches = tuple(block.init_cache(batch, max_len) for block in self.blocks)
        if self.repeats == 1:
            return caches
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (self.repeats, *x.shape)), caches)

    def prefill(self, stream: Stream, caches, segment_ids: SegmentIds | None = None):
        """Return the stream of the next tokens after all blocks, and the caches after them."""
        return self._decode(lambda block, stream, cache: block.prefill(stream, cache, segment_ids), stream, caches)

    def step(self, stream: Stream, caches):
        """Return the stream of one token after all blocks, and the caches after it."""
        return self._decode(lambda block, stream, cache: block.step(stream, cache), stream, caches)

    def try_tokens(self, stream: Stream, caches):
        """Return the stream of the next few tokens after all blocks, and the trials of them."""
        return self._decode(lambda block, stream, cache: block.try_tokens(stream, cache), stream, caches)

    def keep(self, trials, counts: Int[Array, "B"]):
        """Return the caches after the first tokens of each row of a trial."""
        keep = _through(lambda block, counts, trial: (counts, block.mixer.keep(trial, counts)))
        return self._run(keep, counts, trials)[1]

    def _decode(self, call: Callable, stream: Stream, caches) -> tuple[Stream, Any]:
        """Return the stream after `call(block, stream, cache)` of each block, and the caches; loops carry its total."""
        through = _through(call)
        if self.repeats == 1:
            return self._run(through, stream, caches)

        def add_all(blocks, r, caches):
            stream, after = through(blocks, Stream(r), caches)
            return stream.total(), after

        total, after = self._run(add_all, stream.total(), caches)
        return Stream(total), after

    def _run(self, forward: Callable, r, caches) -> tuple[Any, Any]:
        """Call `forward(blocks, r, caches)` for each copy of the pattern, rematerialised as the config says."""
        graphdef, params = nnx.split(self.blocks)

        def body(r, inputs):
            params, caches = inputs
            return forward(nnx.merge(graphdef, params), r, caches)

        loops = self._loops(caches)
        if (remat := remat_of(self.remat)) != "none":
            body = jax.checkpoint(body, prevent_cse=not loops, policy=REMAT_POLICIES[remat])
        if self.repeats == 1:
            self._check_single()
            return body(r, (params, caches))
        self._check_repeats("parameter", params)
        self._check_repeats("cache", caches)
        return jax.lax.scan(body, r, (params, caches), length=self.repeats, unroll=1 if loops else self.repeats)

    def _loops(self, caches) -> bool:
        """Return whether the program has a loop over the copies; caches are updated in place in one."""
        return self.repeats > 1 and (caches is not None or target_platform() != "cuda")

    def _check_single(self) -> None:
        """Check that the arrays are not stacked, by that of the first norm."""
        scale = self.blocks[0].norm1.scale[...]
        if scale.ndim != 1:
            raise UserError(f"A layer that is not repeated has stacked arrays: its norm's scale is {scale.shape}.")

    def _check_repeats(self, what: str, tree: Any) -> None:
        """Check that arrays, which may come from another model, are stacked as often as the pattern is repeated."""
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if leaf.shape[:1] != (self.repeats,):
                path = jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/.value")
                raise UserError(
                    f"The {what} '{path}' of a pattern of layers that is repeated {self.repeats} times has shape"
                    f" {leaf.shape}; its first axis is {self.repeats}."
                )


def traced_once() -> Callable:
    """Return `Stack.extend` for one trace of a model, which traces and lowers stacks that are equal once."""

    @functools.partial(jax.jit, static_argnums=0)
    def extend(graphdef, params, *inputs):
        return nnx.merge(graphdef, params).extend(*inputs)

    return lambda stack, *inputs: extend(*nnx.split(stack), *inputs)


def _through(call: Callable) -> Callable:
    """Return a pass through a pattern's blocks that collects each one's new cache."""

    def forward(blocks, stream, caches):
        after = []
        for i, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
            with jax.named_scope(f"block_{i}"):
                stream, cache = call(block, stream, cache)
            after.append(cache)
        return stream, tuple(after)

    return forward


def repeating_patterns(layers: Sequence) -> list[tuple[Sequence, int]]:
    """Cut a layer list into (pattern, repeats), at each place the pattern that covers most, the shortest if equal."""
    groups, start = [], 0
    while start < len(layers):
        period, repeats = max(
            ((p, _repeats(layers[start:], p)) for p in range(1, len(layers) - start + 1)),
            key=lambda pr: (pr[0] * pr[1] if pr[1] > 1 else 1, -pr[0]),
        )
        groups.append((layers[start : start + period], repeats))
        start += period * repeats
    return groups


def _repeats(layers: Sequence, period: int) -> int:
    repeats = 1
    while layers[repeats * period : (repeats + 1) * period] == layers[:period]:
        repeats += 1
    return repeats
