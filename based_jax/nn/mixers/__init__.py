"""Every sequence mixer, one file each, under the contract of `based_jax/nn/mixer.py`.

A new mixer of the package is one new file and one line in `MIXERS`; one from outside it is a class, which stands in
layer lists, and in the calls below, where a name would (`nn/own_mixer.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from based_jax import config as configs
from based_jax.errors import UserError, unknown
from based_jax.nn.layers import INIT_STD, NORM_EPS, Init
from based_jax.nn.mixer import Mixer
from based_jax.nn.mixers.attention import Attention
from based_jax.nn.mixers.base_conv import BaseConv
from based_jax.nn.mixers.conv import GatedConv
from based_jax.nn.mixers.deltanet import DeltaNet
from based_jax.nn.mixers.gated_deltanet import GatedDeltaNet
from based_jax.nn.mixers.gla import GLA
from based_jax.nn.mixers.gsa import GSA
from based_jax.nn.mixers.h3 import H3
from based_jax.nn.mixers.hgrn2 import HGRN2
from based_jax.nn.mixers.hyena import Hyena
from based_jax.nn.mixers.implicit_conv import ImplicitConv
from based_jax.nn.mixers.kda import KDA
from based_jax.nn.mixers.lightning import LightningAttention
from based_jax.nn.mixers.linear import LinearAttention
from based_jax.nn.mixers.long_conv import LongConv
from based_jax.nn.mixers.mamba import Mamba
from based_jax.nn.mixers.mamba2 import Mamba2
from based_jax.nn.mixers.prefix import PrefixLinearAttention
from based_jax.nn.mixers.retnet import RetNet
from based_jax.nn.mixers.rwkv4 import RWKV4
from based_jax.nn.mixers.rwkv4_channel_mix import RWKV4ChannelMix
from based_jax.nn.mixers.rwkv5 import RWKV5
from based_jax.nn.mixers.rwkv6 import RWKV6
from based_jax.nn.mixers.rwkv7 import RWKV7
from based_jax.nn.mixers.rwkv7_channel_mix import RWKV7ChannelMix
from based_jax.nn.mixers.simple_gla import SimpleGLA
from based_jax.nn.mixers.taylor import TaylorAttention
from based_jax.nn.mixers.taylor_window import TaylorWindow
from based_jax.nn.mixers.window import WindowAttention
from based_jax.nn.own_mixer import OwnMixer, is_own, short

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "base_conv": BaseConv,
    "conv": GatedConv,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "gla": GLA,
    "gsa": GSA,
    "h3": H3,
    "hgrn2": HGRN2,
    "hyena": Hyena,
    "implicit_conv": ImplicitConv,
    "kda": KDA,
    "lightning": LightningAttention,
    "linear": LinearAttention,
    "long_conv": LongConv,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "prefix": PrefixLinearAttention,
    "retnet": RetNet,
    "rwkv4": RWKV4,
    "rwkv4_channel_mix": RWKV4ChannelMix,
    "rwkv5": RWKV5,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "rwkv7_channel_mix": RWKV7ChannelMix,
    "simple_gla": SimpleGLA,
    "taylor": TaylorAttention,
    "taylor_window": TaylorWindow,
    "window": WindowAttention,
}


NAMES = {mixer: name for name, mixer in MIXERS.items()}


def kind_of(mixer: str | type) -> str:
    """Return what a layer of a mixer is called: a name as it is, of a class its key in `MIXERS`, or its own name.

    Raises:
      UserError: the class is no complete mixer.
    """
    if not isinstance(mixer, type):
        return mixer
    return NAMES[mixer] if mixer in NAMES else OwnMixer(mixer)


def mixer_class(kind: str) -> type[Mixer]:
    """Return the class of a layer's kind.

    Raises:
      UserError: there is none, or the name is all that is left of a class from outside the package.
    """
    if isinstance(kind, OwnMixer):
        return kind.mixer
    if is_own(kind):
        raise UserError(
            f"'{kind}' is a mixer from outside the package, of which a file keeps no more than the name; give its"
            f" class, of the same source: --mixer=FILE.py:{short(kind)}, or the class itself in Python."
        )
    if kind not in MIXERS:
        raise unknown("mixer", kind, MIXERS)
    return MIXERS[kind]


def make_mixer(
    kind: str | type[Mixer],
    d_model: int,
    *,
    std: float = INIT_STD,
    out_std: float = INIT_STD,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
    norm_eps: float = NORM_EPS,
    **options,
) -> Mixer:
    """Return the mixer named `kind`, or of that class, at width D, with `options` for its Config.

    Raises:
      UserError: the kind or an option is unknown, or a value is impossible.
    """
    return build_mixer(kind, d_model, options, Init(std, out_std, dtype, rngs, norm_eps))


def build_mixer(
    kind: str | type[Mixer], d_model: int, options: Mapping[str, Any], init: Init, where: str = ""
) -> Mixer:
    """Return the mixer of that kind, which starts as `init` says; otherwise as `make_mixer`, for a model's blocks.

    `where` is the dotted key of the options in a whole config, for messages.
    """
    kind = kind_of(kind)
    options = checked_options(kind, options, where)
    if d_model < 1:
        raise UserError(f"d_model is {d_model}; it is at least 1.")
    mixer = mixer_class(kind)
    with configs.errors_within(where, [field.name for field in dataclasses.fields(mixer.Config)]):
        return mixer(d_model, mixer.Config(**options), init)


def checked_options(kind: str, options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a mixer's options, numbers of numpy as Python's; `where` is their dotted key, for messages.

    Raises:
      UserError: the mixer does not exist, an option is not one of its own, or has another type.
    """
    config = mixer_class(kind).Config
    allowed = [field.name for field in dataclasses.fields(config)]
    for option in options:
        if option not in allowed:
            what = f"option of mixer '{short(kind)}'"
            raise unknown(what, option, allowed, configs.meant_key(option, allowed) if allowed else None)
    configs.build(config, options, where)
    return configs.plain(options)
