"""Half a layer for one token: from the residual stream to what is added to it next.

    t = r + y        [u, g] = norm(t) W_1 + b_1        h = f(u, g)        y' = h W_2 + b_2

    f = u silu(g)                                                            the gated MLP
    f = silu(sum_w kernel_w u_w) g, as in `ops/gated_conv.py`                the gated short convolution

The norm is the RMS norm. What is added comes in pieces, which whatever reads it adds up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from based_jax.dims import BD, BWD, WD
from based_jax.ops.arguments import checked
from based_jax.ops.calls import Channels, TokenConvCall, TokenMLPCall
from based_jax.ops.dispatch import Implementation, dispatch, not_run
from based_jax.ops.gated_conv import gated_short_conv_step
from based_jax.ops.hopper import token_layer as hopper_token_layer
from based_jax.ops.norm import residual_rms_norm
from based_jax.ops.projection import multiply
