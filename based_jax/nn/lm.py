"""The language model: an embedding, the layers that a list names, a norm, and the head, which may be the embedding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer

from based_jax import parallel
from based_jax.dims import BD, BP, BPD, BT, BTD, DropoutKey, SegmentIds, Tokens
from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.nn.block import Stack, Stream, repeating_patterns, traced_once
from based_jax.nn.init_recipes import initialise
from based_jax.nn.lm_config import LMConfig
from based_jax.nn.mixers import Mixer
from based_jax.ops import sequence
from based_jax.ops.arguments import checked
from based_jax.ops.cross_entropy import linear_cross_entropy
from based_jax.ops.embedding import lookup

MLP_MATRICES = {"swiglu": 3, "gelu": 2, "identity": 0, "none": 0}


class LM(nnx.Module):
    """A causal language model over the mixers of `config.layers`.

    Every pass returns hidden states; `logits` maps them to the padded vocabulary. Keys enter at construction, and a
    pass of training gets that of dropout. An id outside the vocabulary is a UserError where its value is known, and an
    embedding of NaN in a compiled program, which knows none: never another id's.
    """

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        self.config = config
        patterns = repeating_patterns(config.layers) if config.scan_layers else [((x,), 1) for x in config.layers]
        self.embed = nnx.Embed(
            config.padded_vocab_size,
            config.d_model,
            embedding_init=nnx.initializers.normal(config.init_std),
            embedding_metadata=layers.logical_axes("vocab", "embed"),
            rngs=rngs,
        )
        initialise(self.embed, "embed", config.init_recipe, config.init(rngs))
        self.stacks = nnx.List([Stack(pattern, repeats, config, rngs=rngs) for pattern, repeats in patterns])
        self.norm = layers.NORMS[config.last_norm](config.d_model, config.norm_eps, rngs=rngs)
        if config.embed_norm:
            self.embed_norm = layers.NORMS[config.norm](config.d_model, config.norm_eps, rngs=rngs)
        if not config.tie_embeddings:
            self.head = layers.linear(config.d_model, config.padded_vocab_size, ("embed", "vocab"), config.init(rngs))
            initialise(self.head, "head", config.init_recipe, config.init(rngs))

    @checked
    def __call__(self, ids: BT, segment_ids: BT | None = None) -> Float[Array, "B T vocab"]:
        """Return fp32 logits of every position."""
        return self.logits(self.hidden(ids, segment_ids))

    @checked
    def hidden(
        self,
        ids: BT,
        segment_ids: BT | None = None,
        positions: BP | None = None,
        *,
        dropout_key: DropoutKey | None = None,
    ) -> BPD:
        """Return the final hidden state of every position, or of P distinct `positions` (B, P) of each sequence.

        A pass of training has the `dropout_key`; without it nothing is dropped.

        What follows the operation of the last mixer is computed at the positions alone, unless its layer is one of
        those that are scanned.
        """
        if positions is not None:
            _check_positions(positions, ids.shape[1])
        if segment_ids is None or positions is not None:
            return self._read(ids, segment_ids, positions, dropout_key)
        ids, unbroken = sequence.compacted(ids, segment_ids)
        return sequence.restored(self._read(ids, unbroken, None, dropout_key), segment_ids)

    def _read(self, ids, segment_ids, positions, dropout_key):
        """Return what `hidden` does, of tokens that stay where they are."""
        stream, last = Stream(self.embedded(ids, dropout_key)), len(self.stacks) - 1
        extend = traced_once() if isinstance(ids, jax.core.Tracer) else Stack.extend
        for i, stack in enumerate(self.stacks):
            with jax.named_scope(f"stack_{i}"):
                stream = extend(stack, stream, segment_ids, positions if i == last else None)
        return self._out(stream)

    @jax.named_scope("head")
    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B vocab"]:
        """Return fp32 logits over the padded vocabulary."""
        table = self._table().astype(hidden.dtype)
        return jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)

    @jax.named_scope("head")
    def cross_entropy(
        self, hidden: Float[Array, "*B D"], labels: Int[Array, "*B"]
    ) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
        """Return fp32 losses of the logits in nats, and whether no token is likelier than the label.

        Where the label is negative they are 0 and False. The logits need not come to be (`ops/cross_entropy.py`).
        """
        return linear_cross_entropy(hidden, self._table(), labels)

    def _table(self) -> Float[Array, "vocab D"]:
        """Return the head's weights, a row for each token."""
        return self.embed.embedding[...] if self.config.tie_embeddings else self.head.kernel[...].T

    @property
    def max_len(self) -> int | None:
        """The most tokens that a document may have, or None."""
        return min((mixer.max_len for mixer in self.mixers() if mixer.max_len is not None), default=None)

    @checked
    def init_cache(self, batch: int, max_len: int) -> tuple:
        """Return the caches of all layers for `batch` sequences of up to `max_len` tokens."""
        return tuple(stack.init_cache(batch, max_len) for stack in self.stacks)

    @checked
    def prefill(self, ids: BT, cache: tuple, segment_ids: SegmentIds | None = None) -> tuple[BTD, tuple]:
        """Read the next tokens of a sequence; return their hidden states and the caches after them."""
        return self._decode(ids, cache, lambda stack, stream, old: stack.prefill(stream, old, segment_ids))

    @checked
    def step(self, ids: Tokens, cache: tuple) -> tuple[BD, tuple]:
        """Read one token; return its hidden state and the caches after it."""
        return self._decode(ids, cache, Stack.step)

    @checked
    def try_tokens(self, ids: BT, cache: tuple) -> tuple[BTD, tuple]:
        """Read the next few tokens on trial, all of which may not stay; return their hidden states, and for `keep`.

        So a model verifies tokens that were drafted: at a place the hidden state is that behind those before it.
        """
        return self._decode(ids, cache, Stack.try_tokens)

    def keep(self, trials: tuple, counts: Int[Array, "B"]) -> tuple:
        """Return the caches after the first `counts` tokens of each row that were read on trial."""
        return tuple(stack.keep(trial, counts) for stack, trial in zip(self.stacks, trials, strict=True))

    def mixers(self) -> list[Mixer]:
        """Return each layer's mixer in order; the layers of one repeated pattern share a module."""
        return [block.mixer for stack in self.stacks for _ in range(stack.repeats) for block in stack.blocks]

    def num_params(self) -> int:
        """Return the number of parameters; a tied head counts once."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def state_size(self, seq_len: int) -> int:
        """Return the decode state of one sequence in elements, by the paper's accounting."""
        return sum(mixer.state_size(seq_len) for mixer in self.mixers())

    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs of one token: mixers, MLPs and head."""
        mlp = 2 * MLP_MATRICES[self.config.mlp] * self.config.d_model * self.config.hidden_dim
        head = 2 * self.config.d_model * self.config.padded_vocab_size
        return sum(mixer.flops_per_token(seq_len) + mlp for mixer in self.mixers()) + head

    def _decode(self, ids, cache: tuple, read: Callable) -> tuple[Array, tuple]:
        self._check_cache(cache)
        stream, after = Stream(self.embedded(ids)), []
        for i, (stack, old) in enumerate(zip(self.stacks, cache, strict=True)):
            with jax.named_scope(f"stack_{i}"):
                stream, new = read(stack, stream, old)
            after.append(new)
        return self._out(stream), tuple(after)

    def _check_known(self, ids) -> None:
        """Raise UserError for ids outside the vocabulary, where this process knows their values."""
        values = _known(ids)
        for id in values[(values < 0) | (values >= self.config.vocab_size)][:1]:
            raise UserError(f"ids has {id}; the model knows ids 0 to {self.config.vocab_size - 1}.")

    def _check_cache(self, cache: tuple) -> None:
        """Raise UserError for a cache that is another model's, by its tree and the ranks of its arrays."""
        own = jax.eval_shape(lambda: self.init_cache(1, 1))
        trees: Any = [jax.tree.structure(tree) for tree in (cache, own)]
        if trees[0] != trees[1]:
            raise UserError("The cache is not one of this model; its `init_cache` makes one.")
        for (keys, leaf), like in zip(jax.tree_util.tree_leaves_with_path(cache), jax.tree.leaves(own), strict=True):
            if jnp.ndim(leaf) != like.ndim:
                path = jax.tree_util.keystr(keys, simple=True, separator="/")
                raise UserError(
                    f"'{path}' of the cache has shape {jnp.shape(leaf)}; of this model it has {like.ndim} axes."
                )

    @jax.named_scope("embed")
    def embedded(self, ids: Integer[Array, "*B"], dropout_key: DropoutKey | None = None) -> Float[Array, "*B D"]:
        """Return the residual stream before the first layer."""
        self._check_known(ids)
        ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))  # JAX wraps a number that int8 lacks
        beyond = self.config.padded_vocab_size  # whose embedding is NaN
        ids = jnp.where((ids >= 0) & (ids < self.config.vocab_size), ids, beyond)
        # Left to itself XLA reads the table again wherever the embedding is used, and there across its rows.
        r = jax.lax.optimization_barrier(parallel.constrain_tokens(lookup(self.embed.embedding[...], ids)))
        if dropout_key is not None:
            r = layers.dropout(r, self.config.embed_dropout, dropout_key)
        return self.embed_norm(r) if self.config.embed_norm else r

    @jax.named_scope("norm")
    def _out(self, stream):
        return stream.normed(self.norm, jnp.dtype(self.config.dtype))[1]


def _known(x: jax.Array) -> np.ndarray:
    """Return the values of an array, none where this process does not know them."""
    return np.empty(0, x.dtype) if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable else np.asarray(x)


def _check_positions(positions: BP, length: int) -> None:
    """Raise UserError for positions outside a sequence, or one given twice, where this process knows their values."""
    values = _known(positions)
    for place in values[(values < 0) | (values >= length)][:1]:
        raise UserError(f"positions has {place}; a sequence of {length} tokens has 0 to {length - 1}.")
    if values.size and (np.diff(np.sort(values, axis=1), axis=1) == 0).any():
        raise UserError("positions has the same one twice; those of a sequence are distinct.")
