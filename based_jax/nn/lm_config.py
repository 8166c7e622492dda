"""What a model is: its layers, widths, norms and initial values, checked as they are given."""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from based_jax.config import added_later, check_types, shown
from based_jax.errors import UserError, unknown
from based_jax.nn import layers, mlps
from based_jax.nn.block import REMAT_POLICIES
from based_jax.nn.init_recipes import INIT_RECIPES
from based_jax.nn.layers import INIT_STD, NORM_EPS
from based_jax.nn.mixers import checked_options, kind_of, mixer_class
from based_jax.nn.mixers.taylor import TaylorConfig
from based_jax.nn.own_mixer import short

DTYPES = ("bfloat16", "float32")
"""float16 is none of them: what overflows there is no rare case in training, and nothing scales the loss for it."""

LARGEST_SIZE = 2**31 - 1
"""Of an axis: ids and positions are int32."""
_SMALLEST, _LARGEST = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max)

LEAST_VALUES = {"d_model": 1, "vocab_size": 1, "pad_vocab_multiple": 1, "mlp_dim": 0}


class Options(dict):
    """A mixer's options as a dict that hashes, since configs are static to compilation; not to be changed."""

    def __hash__(self):  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A model: the layer list is the architecture.

    Attributes:
      layers: one (mixer name, options of its Config) per layer, in order; in place of a name, a mixer's class, which a
        config.json keeps no more than the name of (`nn/own_mixer.py`).
      d_model: width D of the residual stream.
      vocab_size: tokens of the tokenizer.
      pad_vocab_multiple: what the rows of the embedding are a multiple of.
      mlp: "swiglu", "gelu" (with biases), "identity" or "none" (layers are mixers alone).
      norm: "rms" or "layer".
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
      dtype: what layers compute in, "bfloat16" or "float32"; parameters, norms, the residual, states and logits are
        fp32.
      scan_layers: stack and scan repeated patterns of layers, which compiles faster and shards the same; on GPUs a
        training step has the layers in a row all the same, which is faster there.
      remat: what a layer keeps for its backward pass: "none" recomputes nothing, "dots" keeps projections only,
        "full" keeps nothing; "auto" is "none" on GPUs and "dots" elsewhere.
    """

    layers: tuple[tuple[Any, dict[str, Any]], ...]
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
        check_types(self)
        if not self.layers:
            raise UserError("layers is empty; name at least one mixer.")
        for name, least in LEAST_VALUES.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it is at least {least}.")
            if getattr(self, name) > LARGEST_SIZE:
                raise UserError(f"{name} is {getattr(self, name)}; it is at most {LARGEST_SIZE}.")
        if self.padded_vocab_size > LARGEST_SIZE:
            raise UserError(
                f"pad_vocab_multiple is {self.pad_vocab_multiple}, which pads vocab_size to {self.padded_vocab_size};"
                f" that is at most {LARGEST_SIZE}."
            )
        for name in ("norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it is above 0, and finite.")
            if not _SMALLEST <= getattr(self, name) <= _LARGEST:
                raise UserError(f"{name} is {getattr(self, name)}, which fp32 does not hold.")
        if not 0 <= self.embed_dropout < 1:
            raise UserError(f"embed_dropout is {self.embed_dropout}; it is at least 0 and below 1.")
        object.__setattr__(self, "layers", tuple(_layer(i, *layer) for i, layer in enumerate(self.layers)))
        _check("norm", self.norm, layers.NORMS)
        _check("final_norm", self.last_norm, layers.NORMS)
        _check("mlp", self.mlp, mlps.MLPS)
        _check("init_recipe", self.init_recipe, INIT_RECIPES)
        if self.init_recipe == "torch" and self.init_std != INIT_STD:
            raise UserError(f"init_std is {self.init_std}, but init_recipe 'torch' takes none; leave it out.")
        _check("dtype", self.dtype, DTYPES)
        _check("remat", self.remat, ("auto", *REMAT_POLICIES))

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


def with_options(config: LMConfig, options: Sequence[str]) -> LMConfig:
    """Return a model whose layers of a mixer have other options, each as "taylor.flush=16".

    Raises:
      UserError: a text is no such thing, the model has no such mixer, or the mixer no such option or value.
    """
    kinds = {short(kind): kind for kind in sorted(_kinds(config))}
    new: dict[str, dict[str, Any]] = {kind: {} for kind in kinds.values()}
    for text in options:
        name, equals, value = text.partition("=")
        kind, dot, option = name.partition(".")
        if not (equals and dot and option):
            raise UserError(f"'{text}' is no option: give mixer.name=value, such as taylor.flush=16.")
        if kind not in kinds:
            raise unknown("mixer", kind, kinds)
        new[kinds[kind]][option] = _value(value)
    return _with(config, new)


def _value(text: str) -> Any:
    """Return a number, true, false or null as JSON writes them, and any other text as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def with_taylor_options(config: LMConfig, **options: Any) -> LMConfig:
    """Return a config with other options of all its Taylor layers; those that are None stay as they are.

    Raises:
      UserError: there is no such layer, or a value is impossible.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return config
    taylor = [kind for kind in _kinds(config) if issubclass(mixer_class(kind).Config, TaylorConfig)]
    if not taylor:
        name, value = next(iter(given.items()))
        raise UserError(f"{name} is {value}, but the model has no Taylor layer; leave it out.")
    return _with(config, dict.fromkeys(taylor, given))


def _kinds(config: LMConfig) -> set[str]:
    return {kind for kind, _ in config.layers}


def _with(config: LMConfig, new: Mapping[str, Mapping[str, Any]]) -> LMConfig:
    """Return a config with other options of layers, by mixer."""
    layers = tuple((kind, dict(options) | dict(new.get(kind, {}))) for kind, options in config.layers)
    return dataclasses.replace(config, layers=layers)


def _layer(index: int, mixer: Any, options: Mapping[str, Any]) -> tuple[str, Options]:
    """Return a layer with what its mixer is called, and its options checked."""
    if not isinstance(mixer, str | type):
        raise UserError(f"layers[{index}] is of {shown(mixer)}; it is of a mixer's name or class.")
    try:
        kind = kind_of(mixer)
    except UserError as error:
        raise UserError(f"layers[{index}]: {error}") from None
    return kind, Options(checked_options(kind, options, f"layers[{index}]"))


def _check(what: str, name: str, allowed: Collection[str]) -> None:
    if name not in allowed:
        raise unknown(what, name, allowed)
