"""How the parameters of a model start: recipes by name, each a table from the parameters' names to distributions.

A parameter's name is its path in its mixer behind the mixer's kind ("gated_deltanet/A_log"), or that of "mlp", "embed"
or "head" ("mlp/fc1/kernel"); norms start at scale 1 and bias 0 everywhere. The first rule whose pattern matches holds.
Rules go by name alone and are followed in each layer before layers are stacked, so that stacked parameters start like
others. Letters: std is `LMConfig.init_std`, L the number of layers.
"""

import fnmatch
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from based_jax.nn.layers import Init


class Request(NamedTuple):
    """What a distribution is asked for: values of a shape, in a module that starts by `init`.

    `fan_in` is the inputs of the linear layer that the parameter belongs to, 0 where it belongs to none.
    """

    key: Array
    shape: tuple[int, ...]
    fan_in: int
    init: Init


Distribution = Callable[[Request], Float[Array, "..."]]


def normal(request: Request) -> Array:
    """Return values of N(0, std^2)."""
    return request.init.std * standard_normal(request)


def normal_by_depth(request: Request) -> Array:
    """Return values of N(0, std^2 / (2 L))."""
    return request.init.out_std * standard_normal(request)


def standard_normal(request: Request) -> Array:
    """Return values of N(0, 1)."""
    return jax.random.normal(request.key, request.shape)


def uniform_by_fan_in(request: Request) -> Array:
    """Return values of U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as torch starts a linear layer's weights and biases."""
    return jax.random.uniform(request.key, request.shape, minval=-1.0) / request.fan_in**0.5


def zeros(request: Request) -> Array:
    """Return zeros."""
    return jnp.zeros(request.shape)


def log_uniform_below(largest: float) -> Distribution:
    """Return the logarithm of U(0, largest)."""
    return lambda request: jnp.log(largest * (1 - jax.random.uniform(request.key, request.shape)))


def ramps(*powers: float) -> Distribution:
    """Return (i / D)^power over the D channels of each row, one for each power."""

    def rows(request: Request) -> Array:
        channels = jnp.arange(request.shape[-1]) / request.shape[-1]
        return jnp.stack([channels**power for power in powers])

    return rows


def falling_ramp(request: Request) -> Array:
    """Return 1 - i / D over D channels."""
    return 1 - ramps(1)(request)


def bent(first: float, last: float) -> Distribution:
    """Return values from the first to the last over all channels, along their place to the power of 0.7."""
    return lambda request: (
        first + (last - first) * jnp.linspace(0, 1, math.prod(request.shape)).reshape(request.shape) ** 0.7
    )


def zigzag(middle: float, height: float) -> Distribution:
    """Return middle + (0, height, -height, 0, ...) over all channels."""
    return lambda request: (
        middle + height * ((jnp.arange(math.prod(request.shape)) + 1) % 3 - 1.0).reshape(request.shape)
    )


AS_BUILT = None
"""The distribution that stands in the module's constructor, which names its own source."""


class Rule(NamedTuple):
    """What parameters start with whose names match a pattern (of `fnmatch`), and where the publication says so."""

    pattern: str
    distribution: Distribution | None
    source: str


REFERENCE = (
    Rule(
        "*",
        AS_BUILT,
        "HazyResearch/based@32c1bd4:based/models/gpt.py, `_init_weights`: N(0, std) for linear layers and embedding,"
        " over sqrt(2 L) for the projections back into the residual stream, biases 0; Mamba's and a filter's as torch"
        " starts them, Mamba's over sqrt(L) on the way out; the rest by each module's own source",
    ),
)
"""HazyResearch/based."""

ZOOLOGY = (
    Rule("embed/embedding", normal, "zoology/model.py:148-150"),
    Rule("mamba/*", AS_BUILT, "zoology/model.py:135-139,162-170: torch's linear layers, over sqrt(L) on the way out"),
    Rule("mamba2/*", AS_BUILT, "zoology/model.py:135-139,162-170"),
    Rule("gated_deltanet/A_log", log_uniform_below(16), "zoology/mixers/gated_delta_net.py:131-133"),
    Rule("rwkv4/mix", ramps(1, 1, 0.5), "zoology/mixers/rwkv.py:194-199, layer 0"),
    Rule("rwkv4/time_decay", bent(-5, 3), "zoology/mixers/rwkv.py:183-186, layer 0"),
    Rule("rwkv4/time_first", zigzag(math.log(0.3), 0.5), "zoology/mixers/rwkv.py:190-191"),
    Rule("rwkv4_channel_mix/mix", ramps(1, 1), "zoology/mixers/rwkv.py:258-265, layer 0"),
    Rule("rwkv5/mix", ramps(0.5, 1, 1, 0.5), "zoology/mixers/rwkv5.py:124-132, layer 0"),
    Rule("rwkv5/time_decay", bent(-6, -1), "zoology/mixers/rwkv5.py:135-138, layer 0"),
    Rule("rwkv5/bonus", zigzag(0, 0.1), "zoology/mixers/rwkv5.py:141-146, layer 0"),
    Rule("rwkv6/bonus", zeros, "fla/layers/rwkv6.py:82"),
    Rule("rwkv7/mix", zeros, "zoology/mixers/rwkv7.py:71"),
    Rule("rwkv7/k_[ka]", zeros, "zoology/mixers/rwkv7.py:73-74"),
    Rule("rwkv7_channel_mix/mix", falling_ramp, "fla/models/rwkv7/modeling_rwkv7.py:92, layer 0"),
    Rule("attention/out_proj/kernel", normal_by_depth, "zoology/model.py:173-177, zoology/mixers/attention.py:58"),
    Rule("window/out_proj/kernel", normal_by_depth, "zoology/model.py:173-177, zoology/mixers/slide_attn.py:50"),
    Rule("taylor_window/out_proj/kernel", normal_by_depth, "as window's"),
    Rule("taylor_window/gate/bias", AS_BUILT, "nn/mixers/taylor_window.py: nearly the window alone"),
    Rule("hyena/out_proj/kernel", normal_by_depth, "zoology/model.py:173-177, zoology/mixers/hyena.py:276"),
    Rule("conv/out_proj/kernel", normal_by_depth, "zoology/model.py:173-177, named so in HazyResearch/based"),
    Rule("prefix/out_proj/kernel", normal_by_depth, "zoology/model.py:173-177, named so in its publication"),
    Rule("mlp/fc2/kernel", normal_by_depth, "zoology/model.py:173-177, zoology/mixers/mlp.py:19"),
    Rule("*/kernel", normal, "zoology/model.py:144-145"),
    Rule("*norm/bias", AS_BUILT, "torch and fla: 0"),
    Rule("*/bias", zeros, "zoology/model.py:146-147"),
    Rule("*", AS_BUILT, "the mixer's own source"),
)
"""HazyResearch/zoology@d88d6f5; layers that it lacks as those of fla-org/flash-linear-attention@bc3b101 in its model.

Only what is named `out_proj.weight` or `fc2.weight` there is divided by sqrt(2 L): the output of Based (`proj_o`), of
fla's layers (`o_proj`), of H3 (`output_linear`) and of RWKV (`output`) is not. RWKV-4 and -5 spread some parameters by
the layer's place, which a mixer does not know: every layer has the first one's.
"""

TORCH = (
    Rule("embed/embedding", standard_normal, "torch/nn/modules/sparse.py, `Embedding.reset_parameters`"),
    Rule("*/kernel", uniform_by_fan_in, "torch/nn/modules/linear.py, `Linear.reset_parameters`"),
    Rule("*norm/bias", AS_BUILT, "torch/nn/modules/normalization.py: 0"),
    Rule("mamba/dt_proj/bias", AS_BUILT, "HazyResearch/based@32c1bd4:based/models/mixers/mamba: its own draw"),
    Rule("*/bias", uniform_by_fan_in, "torch/nn/modules/linear.py, `Linear.reset_parameters`"),
    Rule("*", AS_BUILT, "the mixer's own source, which for convolutions is torch's default"),
)
"""What modules of torch start with if no model draws them again; std has no part in it."""

INIT_RECIPES: dict[str, tuple[Rule, ...]] = {"reference": REFERENCE, "zoology": ZOOLOGY, "torch": TORCH}


def rule(recipe: str, name: str) -> Rule:
    """Return the rule of a recipe that a parameter of this name follows."""
    return next(rule for rule in INIT_RECIPES[recipe] if fnmatch.fnmatchcase(name, rule.pattern))


def initialise(module: nnx.Module, name: str, recipe: str, init: Init) -> None:
    """Give the parameters of a module the values that a recipe of `INIT_RECIPES` draws.

    Args:
      module: one layer's mixer or MLP, an embedding or a head, as its constructor made it.
      name: what the names of its parameters begin with.
      recipe: the recipe's name.
      init: the deviations, and where keys come from.
    """
    found = {path: leaf for path, leaf in nnx.iter_graph(module) if isinstance(leaf, nnx.Param)}
    for path, parameter in found.items():
        distribution = rule(recipe, "/".join([name, *map(str, path)])).distribution
        if distribution is not None:
            kernel = found.get((*path[:-1], "kernel"))
            fan_in = 0 if kernel is None else kernel.shape[0]
            parameter[...] = distribution(Request(init.rngs.params(), parameter.shape, fan_in, init))
