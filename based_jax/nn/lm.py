"""The language model: an embedding, the layers that a list names, a norm, and the head, which may be the embedding."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from based_jax import parallel
from based_jax.config import added_later
from based_jax.dims import BD, BP, BPD, BT, BTD, DropoutKey, Tokens
from based_jax.errors import UserError, unknown
from based_jax.nn import layers
from based_jax.nn.block import REMAT_POLICIES, Stack, Stream, repeating_patterns
from based_jax.nn.init_recipes import INIT_RECIPES, initialise
from based_jax.nn.layers import INIT_STD, NORM_EPS
from based_jax.nn.mixers import Mixer, check_options
from based_jax.ops.cross_entropy import linear_cross_entropy

DTYPES = ("bfloat16", "float16", "float32")

LEAST_VALUES = {"d_model": 1, "vocab_size": 1, "pad_vocab_multiple": 1, "mlp_dim": 0, "init_std": 0}


class Options(dict):
    """A mixer's options as a dict that hashes, since configs are static to compilation; not to be changed."""

    def __hash__(self):  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A model: the layer list is the architecture.

    Attributes:
      layers: one (mixer name, options of its Config) per layer, in order.
      d_model: width D of the residual stream.
      vocab_size: tokens of the tokenizer; the embedding is padded to a multiple of `pad_vocab_multiple`.
      mlp, norm: "swiglu", "identity" or "none" (layers are mixers alone); "rms" or "layer".
      final_norm: the norm after the last layer; None for that of the layers. zoology's Mamba models have "rms" in the
        layers, "none" behind the mixers and "layer" at the end.
      mlp_dim: hidden width F of the MLP; 0 for 2 D.
      norm_eps: what all norms add to the variance, those of the mixers too.
      init_std: deviation of the initial kernels and embedding; projections back into the residual stream get it
        divided by sqrt(2 L). Narrow models learn recall much sooner with about 1 / sqrt(D).
      init_recipe: what initial values are drawn by, a table of `nn/init_recipes.py`: "reference" as HazyResearch/based,
        "zoology", or "torch", which takes no init_std.
      tie_embeddings: whether the head is the embedding.
      embed_dropout: share of the embedding's components that training sets to 0, the others growing to make up for it.
      embed_norm: a norm right after the embedding (RWKV).
      dtype: what layers compute in; parameters, norms, the residual, states and logits are fp32.
      scan_layers: stack and scan repeated patterns of layers, which compiles faster and shards the same.
      remat: what a layer keeps for its backward pass: "none" recomputes nothing, "dots" keeps projections only,
        "full" keeps nothing.
    """

    layers: tuple[tuple[str, dict[str, Any]], ...]
    d_model: int
    vocab_size: int = 50257
    pad_vocab_multiple: int = 8
    mlp: str = "swiglu"
    mlp_dim: int = 0
    norm: str = "rms"
    final_norm: str | None = added_later(None)
    norm_eps: float = added_later(NORM_EPS)
    init_std: float = INIT_STD
    init_recipe: str = added_later("reference")
    tie_embeddings: bool = True
    embed_dropout: float = added_later(0.0)
    embed_norm: bool = False
    dtype: str = "bfloat16"
    scan_layers: bool = False
    remat: str = "none"

    def __post_init__(self):
        if not self.layers:
            raise UserError("layers is empty; name at least one mixer.")
        for name, least in LEAST_VALUES.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it is at least {least}.")
        if not 0 < self.norm_eps < math.inf:
            raise UserError(f"norm_eps is {self.norm_eps}; it is above 0.")
        if not 0 <= self.embed_dropout < 1:
            raise UserError(f"embed_dropout is {self.embed_dropout}; it is at least 0 and below 1.")
        object.__setattr__(self, "layers", tuple((kind, Options(options)) for kind, options in self.layers))
        for kind, options in self.layers:
            check_options(kind, options)
        _check("norm", self.norm, layers.NORMS)
        _check("final_norm", self.last_norm, layers.NORMS)
        _check("mlp", self.mlp, layers.MLPS)
        _check("init_recipe", self.init_recipe, INIT_RECIPES)
        if self.init_recipe == "torch" and self.init_std != INIT_STD:
            raise UserError(f"init_std is {self.init_std}, but init_recipe 'torch' takes none; leave it out.")
        _check("dtype", self.dtype, DTYPES)
        _check("remat", self.remat, REMAT_POLICIES)

    @property
    def hidden_dim(self) -> int:
        """Width F of the MLP."""
        return self.mlp_dim or 2 * self.d_model

    @property
    def last_norm(self) -> str:
        """Norm after the last layer."""
        return self.norm if self.final_norm is None else self.final_norm

    @property
    def residual_init_std(self) -> float:
        """Deviation of the initial projections back into the residual stream."""
        return self.init_std / math.sqrt(2 * len(self.layers))

    def init(self, rngs: nnx.Rngs) -> layers.Init:
        """Return how the model's modules start and what they compute in."""
        return layers.Init(self.init_std, self.residual_init_std, jnp.dtype(self.dtype), rngs, self.norm_eps)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple


def _check(what: str, name: str, allowed: Collection[str]) -> None:
    if name not in allowed:
        raise unknown(what, name, allowed)


class LM(nnx.Module):
    """A causal language model over the mixers of `config.layers`.

    Every pass returns hidden states; `logits` maps them to the padded vocabulary. Keys enter at construction, and a
    pass of training gets that of dropout.
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

    def __call__(self, ids: BT, segment_ids: BT | None = None) -> Float[Array, "B T vocab"]:
        """Return fp32 logits of every position."""
        return self.logits(self.hidden(ids, segment_ids))

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
        stream, last = Stream(self._in(ids, dropout_key)), len(self.stacks) - 1
        for i, stack in enumerate(self.stacks):
            with jax.named_scope(f"stack_{i}"):
                stream = stack.extend(stream, segment_ids, positions if i == last else None)
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

    def init_cache(self, batch: int, max_len: int) -> tuple:
        """Return the caches of all layers for `batch` sequences of up to `max_len` tokens."""
        return tuple(stack.init_cache(batch, max_len) for stack in self.stacks)

    def prefill(self, ids: BT, cache: tuple, segment_ids: BT | None = None) -> tuple[BTD, tuple]:
        """Read the next tokens of a sequence; return their hidden states and the caches after them."""
        return self._decode(ids, cache, lambda stack, r, old: stack.prefill(r, old, segment_ids))

    def step(self, ids: Tokens, cache: tuple) -> tuple[BD, tuple]:
        """Read one token; return its hidden state and the caches after it."""
        return self._decode(ids, cache, lambda stack, r, old: stack.step(r, old))

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
        mlp = 6 * self.config.d_model * self.config.hidden_dim if self.config.mlp == "swiglu" else 0
        head = 2 * self.config.d_model * self.config.padded_vocab_size
        return sum(mixer.flops_per_token(seq_len) + mlp for mixer in self.mixers()) + head

    def _decode(self, ids, cache: tuple, read: Callable) -> tuple[Array, tuple]:
        r, after = self._in(ids), []
        for i, (stack, old) in enumerate(zip(self.stacks, cache, strict=True)):
            with jax.named_scope(f"stack_{i}"):
                r, new = read(stack, r, old)
            after.append(new)
        return self._out(Stream(r)), tuple(after)

    @jax.named_scope("embed")
    def _in(self, ids, dropout_key=None):
        # Left to itself XLA reads the table again wherever the embedding is used, and there across its rows.
        r = jax.lax.optimization_barrier(parallel.constrain(self.embed(ids), "batch"))
        if dropout_key is not None:
            r = layers.dropout(r, self.config.embed_dropout, dropout_key)
        return self.embed_norm(r) if self.config.embed_norm else r

    @jax.named_scope("norm")
    def _out(self, stream):
        return stream.normed(self.norm, jnp.dtype(self.config.dtype))[1]
