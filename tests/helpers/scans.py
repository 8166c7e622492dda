"""Operations that scan, each of one array."""

import jax.numpy as jnp

from based_jax.ops import (
    delta_rule,
    diagonal_ssm,
    gated_linear_attention,
    gated_slot_attention,
    linear_attention,
    selective_scan,
    ssd,
    taylor,
    wkv4,
)

MODES, RATES, CHANNELS = jnp.full((2, 3), -0.5 + 1j), -jnp.ones((4, 3)), -jnp.ones(4)
SCANS = {
    "taylor_attention": lambda x, **options: taylor.taylor_attention(x, x, x, **options),
    "linear_attention": lambda x, **options: linear_attention.linear_attention(x * x, x * x, x, **options),
    "gated_linear_attention": lambda x, **options: gated_linear_attention.gated_linear_attention(
        x, x, x, -x * x, **options
    ),
    "delta_rule": lambda x, **options: delta_rule.delta_rule(x, x, x, -x * x, x[..., 0], **options),
    "dplr": lambda x, **options: delta_rule.dplr(x, x, x, -x * x, x, -x, **options),
    "gated_slot_attention": lambda x, **options: gated_slot_attention.gated_slot_attention(
        x, x, x, x, -x * x, **options
    ),
    "ssd": lambda x, **options: ssd.ssd(x, x[..., 0] ** 2, CHANNELS[:2], x[:, :, :1], x[:, :, :1], **options),
    "selective_scan": lambda x, **options: selective_scan.selective_scan(
        x[:, :, 0], x[:, :, 0] ** 2, RATES, x[:, :, 0, :3], x[:, :, 1, :3], **options
    ),
    "diagonal_ssm": lambda x, **options: diagonal_ssm.diagonal_ssm(x, MODES, MODES, MODES, **options),
    "wkv4": lambda x, **options: wkv4.wkv4(x[:, :, 0], x[:, :, 1], CHANNELS, CHANNELS, **options),
}
"""Of x (B, T, 2, 4)."""
