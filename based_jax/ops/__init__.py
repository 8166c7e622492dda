"""What is computed: per operation an oracle, a token scan and an XLA form, behind one table of implementations."""

from based_jax.ops.conv import short_conv
from based_jax.ops.softmax import attention, window_attention
from based_jax.ops.taylor import taylor_attention

__all__ = ["attention", "short_conv", "taylor_attention", "window_attention"]
