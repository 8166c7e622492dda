"""The catalogue of operations: what checks, times and profiles know of each, one file a family."""

import dataclasses

from based_jax.bench.catalogue import (
    cached_attention,
    convolutions,
    cross_entropy,
    few_tokens,
    gated_scan_step,
    long_convolutions,
    matrix_states,
    norms,
    ring_step,
    softmax,
    state_spaces,
    steps,
    taylor,
    taylor_decode,
    token_layers,
    token_products,
    unit_delta_step,
)
from based_jax.bench.catalogue.operation import Case, Operation
from based_jax.errors import UserError, unknown

TimedShape = tuple[int, ...]
"""(B, H, T), and the dims of `Case` where they are not the usual ones."""

OPERATIONS: dict[str, Operation] = {
    "taylor_attention": taylor.TAYLOR_ATTENTION,
    "attention": softmax.ATTENTION,
    "window_attention": softmax.WINDOW_ATTENTION,
    "gated_short_conv": convolutions.GATED_SHORT_CONV,
    "short_conv": convolutions.SHORT_CONV,
    "long_conv": long_convolutions.LONG_CONV,
    "diagonal_ssm": long_convolutions.DIAGONAL_SSM,
    "residual_rms_norm": norms.RESIDUAL_RMS_NORM,
    "residual_layer_norm": norms.RESIDUAL_LAYER_NORM,
    "rms_norm": norms.RMS_NORM,
    "layer_norm": norms.LAYER_NORM,
    "gated_skip": norms.GATED_SKIP,
    "gated_rms_norm": norms.GATED_RMS_NORM,
    "selective_scan": state_spaces.SELECTIVE_SCAN,
    "raw_selective_scan": state_spaces.RAW_SELECTIVE_SCAN,
    "ssd": state_spaces.SSD,
    "wkv4": state_spaces.WKV4,
    "gated_linear_attention": matrix_states.GATED_LINEAR_ATTENTION,
    "simple_gla": matrix_states.SIMPLE_GLA,
    "delta_rule": matrix_states.DELTA_RULE,
    "gated_delta_rule": matrix_states.GATED_DELTA_RULE,
    "dplr": matrix_states.DPLR,
    "linear_cross_entropy": cross_entropy.LINEAR_CROSS_ENTROPY,
    # What decodes:
    "taylor_attention_decode": taylor_decode.TAYLOR_ATTENTION_DECODE,
    "attention_step": cached_attention.ATTENTION_STEP,
    "attention_step_weights": cached_attention.ATTENTION_STEP_WEIGHTS,
    "ring_step": ring_step.RING_STEP,
    "attention_trial": cached_attention.ATTENTION_TRIAL,
    "attention_prefill": cached_attention.ATTENTION_PREFILL,
    "gated_linear_attention_step": steps.GATED_LINEAR_ATTENTION_STEP,
    "simple_gla_step": steps.SIMPLE_GLA_STEP,
    "delta_rule_step": steps.DELTA_RULE_STEP,
    "gated_delta_rule_step": steps.GATED_DELTA_RULE_STEP,
    "dplr_step": steps.DPLR_STEP,
    "unit_delta_step": unit_delta_step.UNIT_DELTA_STEP,
    "selective_scan_step": steps.SELECTIVE_SCAN_STEP,
    "raw_selective_scan_step": steps.RAW_SELECTIVE_SCAN_STEP,
    "gated_scan_step": gated_scan_step.GATED_SCAN_STEP,
    "token_mlp": token_layers.TOKEN_MLP,
    "token_conv": token_layers.TOKEN_CONV,
    "token_products": token_products.TOKEN_PRODUCTS,
    "token_sums": token_products.TOKEN_SUMS,
    "short_conv_step": steps.SHORT_CONV_STEP,
    "gated_short_conv_step": steps.GATED_SHORT_CONV_STEP,
    "few_tokens_product": few_tokens.FEW_TOKENS_PRODUCT,
    "few_tokens_products": few_tokens.FEW_TOKENS_PRODUCTS,
    "few_tokens_gated": few_tokens.FEW_TOKENS_GATED,
    "few_tokens_residual_norm": few_tokens.FEW_TOKENS_RESIDUAL_NORM,
}

TIMED = {name: key for key, operation in OPERATIONS.items() for name in operation.timed}
"""The benchmark's names, and whose each is."""


def timed_operation(name: str) -> Operation:
    """Return the operation of a name in the benchmark.

    Raises:
      UserError: there is none.
    """
    if name not in TIMED:
        raise unknown("operation", name, TIMED)
    return OPERATIONS[TIMED[name]]


def timed_case(name: str, shape: TimedShape, impl: str) -> Case:
    """Return the case that a name in the benchmark stands for, of (B, H, T) or, with dims of its own, (B, H, T, K, V).

    Raises:
      UserError: the operation has another number of dims.
    """
    batch, heads, time, *dims = shape
    case = timed_operation(name).timed[name]((batch, heads, time)).by(impl)
    if dims and len(dims) != len(case.dims):
        usual = "x".join(map(str, case.dims)) or "none"
        raise UserError(f"{name} has {len(case.dims)} dims after BxHxT ({usual} by itself), not {len(dims)}.")
    return dataclasses.replace(case, dims=tuple(dims)) if dims else case
