"""The initial values of every mixer by the recipe "zoology", parameter by parameter, as the public code draws them.

Sources: zoology is HazyResearch/zoology@d88d6f5 and model.py its zoology/model.py, which draws all linear layers of a
model again, fla is fla-org/flash-linear-attention@bc3b101, based is HazyResearch/based@32c1bd4.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.cases import parametrize_some
from scipy import stats

from based_jax.errors import UserError
from based_jax.nn.block import Block
from based_jax.nn.init_recipes import INIT_RECIPES, rule
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS

D, DEPTH, SEEDS = 64, 3, 64
OPTIONS = {
    "attention": {"num_heads": 4, "bias": True},
    "gated_deltanet": {"num_heads": 16},
    "gsa": {"num_slots": 8},
    "h3": {"d_state": 16},
    "hgrn2": {"expand_ratio": 16},
    "hyena": {"l_max": 32, "filter_order": 16},
    "implicit_conv": {"l_max": 32},
    "kda": {"num_heads": 16, "head_dim": 4},
    "linear": {"num_heads": 4, "feature_dim": 8, "feature_map": "all_poly"},
    "long_conv": {"l_max": 32},
    "mamba2": {"headdim": 8, "d_state": 16},
    "prefix": {"num_heads": 4, "feature_dim": 8},
    "rwkv5": {"head_size": 16},
    "rwkv7": {"head_dim": 16},
    "taylor": {"num_heads": 4, "feature_dim": 8},
    "taylor_window": {"num_heads": 4, "feature_dim": 8},
    "window": {"num_heads": 4, "bias": True},
}
TABLE = """\
attention/out_proj/bias | 0 | zoology/mixers/attention.py:58; model.py:146
attention/out_proj/kernel | N(0, 0.02/sqrt(2L)) | zoology/mixers/attention.py:58; model.py:173
attention/qkv/bias | 0 | zoology/mixers/attention.py:54; model.py:146
attention/qkv/kernel | N(0, 0.02) | zoology/mixers/attention.py:54; model.py:144
base_conv/conv_bias | U(1/sqrt(3)) | zoology/mixers/convolution.py:45
base_conv/conv_kernel | U(1/sqrt(3)) | zoology/mixers/convolution.py:45
base_conv/projection/bias | 0 | zoology/mixers/base_conv.py:32; model.py:146
base_conv/projection/kernel | N(0, 0.02) | zoology/mixers/base_conv.py:32; model.py:144
conv/conv_kernel | U(1/sqrt(3)) | based/models/mixers/convolution.py
conv/in_proj/bias | 0 | based/models/mixers/convolution.py; model.py:146
conv/in_proj/kernel | N(0, 0.02) | based/models/mixers/convolution.py; model.py:144
conv/out_proj/bias | 0 | based/models/mixers/convolution.py; model.py:146
conv/out_proj/kernel | N(0, 0.02/sqrt(2L)) | based/models/mixers/convolution.py; model.py:173
deltanet/conv_kernel | U(1/sqrt(4)) | zoology/mixers/delta_net.py:135; fla/modules/conv/short_conv.py:63
deltanet/norm/scale | 1 | zoology/mixers/delta_net.py:159
deltanet/out_proj/kernel | N(0, 0.02) | zoology/mixers/delta_net.py:161; model.py:144
deltanet/qkv/kernel | N(0, 0.02) | zoology/mixers/delta_net.py:126; model.py:144
deltanet/rate/kernel | N(0, 0.02) | zoology/mixers/delta_net.py:132; model.py:144
gated_deltanet/A_log | log U(0, 16) | zoology/mixers/gated_delta_net.py:131
gated_deltanet/conv_kernel | U(1/sqrt(4)) | zoology/mixers/gated_delta_net.py:155; fla/modules/conv/short_conv.py:63
gated_deltanet/decay/kernel | N(0, 0.02) | zoology/mixers/gated_delta_net.py:130; model.py:144
gated_deltanet/dt_bias | softplus^-1 of exp U(log 0.001, log 0.1) | zoology/mixers/gated_delta_net.py:141
gated_deltanet/gate/kernel | N(0, 0.02) | zoology/mixers/gated_delta_net.py:176; model.py:144
gated_deltanet/norm/scale | 1 | zoology/mixers/gated_delta_net.py:179
gated_deltanet/out_proj/kernel | N(0, 0.02) | zoology/mixers/gated_delta_net.py:180; model.py:144
gated_deltanet/qkv/kernel | N(0, 0.02) | zoology/mixers/gated_delta_net.py:126; model.py:144
gated_deltanet/rate/kernel | N(0, 0.02) | zoology/mixers/gated_delta_net.py:129; model.py:144
gla/decay_down/kernel | N(0, 0.02) | zoology/mixers/gla.py:137; model.py:144
gla/decay_up/bias | 0 | zoology/mixers/gla.py:138; model.py:146
gla/decay_up/kernel | N(0, 0.02) | zoology/mixers/gla.py:138; model.py:144
gla/gate/kernel | N(0, 0.02) | zoology/mixers/gla.py:129; model.py:144
gla/norm/scale | 1 | zoology/mixers/gla.py:142
gla/out_proj/kernel | N(0, 0.02) | zoology/mixers/gla.py:139; model.py:144
gla/qkv/kernel | N(0, 0.02) | zoology/mixers/gla.py:125; model.py:144
gsa/decay/kernel | N(0, 0.02) | fla/layers/gsa.py:106; model.py:144
gsa/norm/scale | 1 | fla/layers/gsa.py:129
gsa/out_proj/kernel | N(0, 0.02) | fla/layers/gsa.py:130; model.py:144
gsa/qkv/kernel | N(0, 0.02) | fla/layers/gsa.py:103; model.py:144
h3/a_imag | pi (0 .. N/2) | zoology/mixers/h3/ss_kernel_diag.py:81
h3/b | (1, 0) | zoology/mixers/h3/ss_kernel.py:107
h3/c | N(0, sqrt(1/2)) | zoology/mixers/h3/ss_kernel.py:99
h3/k_proj/bias | 0 | zoology/mixers/h3/h3.py:54; model.py:146
h3/k_proj/kernel | N(0, 0.02) | zoology/mixers/h3/h3.py:54; model.py:144
h3/log_a_real | log 0.5 | zoology/mixers/h3/ss_kernel_diag.py:80
h3/log_dt | U(log 0.001, log 0.1) | zoology/mixers/h3/ss_kernel.py:82
h3/out_proj/bias | 0 | zoology/mixers/h3/h3.py:68; model.py:146
h3/out_proj/kernel | N(0, 0.02) | zoology/mixers/h3/h3.py:68; model.py:144
h3/q_proj/bias | 0 | zoology/mixers/h3/h3.py:53; model.py:146
h3/q_proj/kernel | N(0, 0.02) | zoology/mixers/h3/h3.py:53; model.py:144
h3/shift_b | e_1 of N | zoology/mixers/h3/ss_kernel.py:122
h3/shift_c | U(1/sqrt(N)) | zoology/mixers/h3/ss_kernel.py:125
h3/shift_skip | N(0, 1) | zoology/mixers/h3/h3.py:60
h3/skip | N(0, 1) | zoology/mixers/h3/h3.py:63
h3/v_proj/bias | 0 | zoology/mixers/h3/h3.py:55; model.py:146
h3/v_proj/kernel | N(0, 0.02) | zoology/mixers/h3/h3.py:55; model.py:144
hgrn2/norm/scale | 1 | fla/layers/hgrn2.py:100
hgrn2/out_proj/kernel | N(0, 0.02) | fla/layers/hgrn2.py:102; model.py:144
hgrn2/qkv/kernel | N(0, 0.02) | fla/layers/hgrn2.py:75; model.py:144
hyena/conv_bias | U(1/sqrt(3)) | zoology/mixers/hyena.py:282
hyena/conv_kernel | U(1/sqrt(3)) | zoology/mixers/hyena.py:282
hyena/filter/frequency | 1 | zoology/mixers/hyena.py:55
hyena/filter/hidden/0/bias | 0 | zoology/mixers/hyena.py:165; model.py:146
hyena/filter/hidden/0/kernel | N(0, 0.02) | zoology/mixers/hyena.py:165; model.py:144
hyena/filter/hidden/1/bias | 0 | zoology/mixers/hyena.py:169; model.py:146
hyena/filter/hidden/1/kernel | N(0, 0.02) | zoology/mixers/hyena.py:169; model.py:144
hyena/filter/hidden/2/bias | 0 | zoology/mixers/hyena.py:169; model.py:146
hyena/filter/hidden/2/kernel | N(0, 0.02) | zoology/mixers/hyena.py:169; model.py:144
hyena/filter/out/kernel | N(0, 0.02) | zoology/mixers/hyena.py:172; model.py:144
hyena/filter/pos_emb | time | zoology/mixers/hyena.py:71
hyena/in_proj/bias | 0 | zoology/mixers/hyena.py:275; model.py:146
hyena/in_proj/kernel | N(0, 0.02) | zoology/mixers/hyena.py:275; model.py:144
hyena/out_proj/bias | 0 | zoology/mixers/hyena.py:276; model.py:146
hyena/out_proj/kernel | N(0, 0.02/sqrt(2L)) | zoology/mixers/hyena.py:276; model.py:173
hyena/skip | N(0, 1) | zoology/mixers/hyena.py:153
implicit_conv/hidden/bias | 0 | zoology/mixers/convolution.py:177; model.py:146
implicit_conv/hidden/kernel | N(0, 0.02) | zoology/mixers/convolution.py:177; model.py:144
implicit_conv/out/bias | 0 | zoology/mixers/convolution.py:179; model.py:146
implicit_conv/out/kernel | N(0, 0.02) | zoology/mixers/convolution.py:179; model.py:144
implicit_conv/projection/bias | 0 | zoology/mixers/base_conv.py:32; model.py:146
implicit_conv/projection/kernel | N(0, 0.02) | zoology/mixers/base_conv.py:32; model.py:144
kda/A_log | log U(1, 16) | fla/layers/kda.py:178
kda/conv_kernel | U(1/sqrt(4)) | fla/layers/kda.py:147; fla/modules/conv/short_conv.py:63
kda/decay_down/kernel | N(0, 0.02) | fla/layers/kda.py:169; model.py:144
kda/decay_up/kernel | N(0, 0.02) | fla/layers/kda.py:170; model.py:144
kda/dt_bias | softplus^-1 of exp U(log 0.001, log 0.1) | fla/layers/kda.py:180
kda/gate_down/kernel | N(0, 0.02) | fla/layers/kda.py:188; model.py:144
kda/gate_up/bias | 0 | fla/layers/kda.py:189; model.py:146
kda/gate_up/kernel | N(0, 0.02) | fla/layers/kda.py:189; model.py:144
kda/norm/scale | 1 | fla/layers/kda.py:191
kda/out_proj/kernel | N(0, 0.02) | fla/layers/kda.py:192; model.py:144
kda/qkv/kernel | N(0, 0.02) | fla/layers/kda.py:142; model.py:144
kda/rate/kernel | N(0, 0.02) | fla/layers/kda.py:172; model.py:144
lightning/gate/kernel | N(0, 0.02) | arXiv 2501.08313; model.py:144
lightning/norm/scale | 1 | arXiv 2501.08313
lightning/out_proj/kernel | N(0, 0.02) | arXiv 2501.08313; model.py:144
lightning/qkv/kernel | N(0, 0.02) | arXiv 2501.08313; model.py:144
linear/feature_map/proj_1/kernel | N(0, 0.02) | zoology/mixers/feature_maps/all_poly.py:25; model.py:144
linear/feature_map/proj_2/kernel | N(0, 0.02) | zoology/mixers/feature_maps/all_poly.py:26; model.py:144
linear/out_proj/kernel | N(0, 0.02) | zoology/mixers/based.py:100; model.py:144
linear/proj_k/kernel | N(0, 0.02) | zoology/mixers/based.py:98; model.py:144
linear/proj_q/kernel | N(0, 0.02) | zoology/mixers/based.py:97; model.py:144
linear/proj_v/kernel | N(0, 0.02) | zoology/mixers/based.py:99; model.py:144
long_conv/projection/bias | 0 | zoology/mixers/base_conv.py:32; model.py:146
long_conv/projection/kernel | N(0, 0.02) | zoology/mixers/base_conv.py:32; model.py:144
long_conv/taps | N(0, 1) | zoology/mixers/convolution.py:93
mamba/A_log | log (1 .. N) | zoology/mixers/mamba.py:102
mamba/D | 1 | zoology/mixers/mamba.py:107
mamba/conv_bias | U(1/sqrt(4)) | zoology/mixers/mamba.py:57
mamba/conv_kernel | U(1/sqrt(4)) | zoology/mixers/mamba.py:57
mamba/dt_proj/bias | softplus^-1 of exp U(log 0.001, log 0.1) | zoology/mixers/mamba.py:85
mamba/dt_proj/kernel | U(1/sqrt(fan_in)) | zoology/mixers/mamba.py:80
mamba/in_proj/kernel | U(1/sqrt(fan_in)) | zoology/mixers/mamba.py:55
mamba/out_proj/kernel | U(1/sqrt(L fan_in)) | zoology/mixers/mamba.py:109; model.py:162
mamba/x_proj/kernel | U(1/sqrt(fan_in)) | zoology/mixers/mamba.py:70
mamba2/A_log | log U(1, 16) | zoology/mixers/mamba2.py:124
mamba2/D | 1 | zoology/mixers/mamba2.py:130
mamba2/conv_bias | U(1/sqrt(4)) | zoology/mixers/mamba2.py:96
mamba2/conv_kernel | U(1/sqrt(4)) | zoology/mixers/mamba2.py:96
mamba2/dt_bias | softplus^-1 of exp U(log 0.001, log 0.1) | zoology/mixers/mamba2.py:111
mamba2/in_proj/kernel | U(1/sqrt(fan_in)) | zoology/mixers/mamba2.py:93
mamba2/norm/scale | 1 | zoology/mixers/mamba2.py:135
mamba2/out_proj/kernel | U(1/sqrt(L fan_in)) | zoology/mixers/mamba2.py:138; model.py:162
prefix/out_proj/kernel | N(0, 0.02/sqrt(2L)) | based/models/mixers/prefix_linear_attention.py; model.py:173
prefix/proj_k/kernel | N(0, 0.02) | based/models/mixers/prefix_linear_attention.py; model.py:144
prefix/proj_k_enc/kernel | N(0, 0.02) | based/models/mixers/prefix_linear_attention.py; model.py:144
prefix/proj_q/kernel | N(0, 0.02) | based/models/mixers/prefix_linear_attention.py; model.py:144
prefix/proj_v/kernel | N(0, 0.02) | based/models/mixers/prefix_linear_attention.py; model.py:144
prefix/proj_v_enc/kernel | N(0, 0.02) | based/models/mixers/prefix_linear_attention.py; model.py:144
retnet/gate/kernel | N(0, 0.02) | fla/layers/multiscale_retention.py:123; model.py:144
retnet/norm/scale | 1 | fla/layers/multiscale_retention.py:149
retnet/out_proj/kernel | N(0, 0.02) | fla/layers/multiscale_retention.py:146; model.py:144
retnet/qkv/kernel | N(0, 0.02) | fla/layers/multiscale_retention.py:119; model.py:144
rwkv4/key/kernel | N(0, 0.02) | zoology/mixers/rwkv.py:203; model.py:144
rwkv4/mix | (i/D)^(1, 1, 1/2) | zoology/mixers/rwkv.py:194
rwkv4/out_proj/kernel | N(0, 0.02) | zoology/mixers/rwkv.py:207; model.py:144
rwkv4/receptance/kernel | N(0, 0.02) | zoology/mixers/rwkv.py:205; model.py:144
rwkv4/time_decay | -5 + 8 r^0.7 | zoology/mixers/rwkv.py:185
rwkv4/time_first | log 0.3 + 0.5 zigzag | zoology/mixers/rwkv.py:190
rwkv4/value/kernel | N(0, 0.02) | zoology/mixers/rwkv.py:204; model.py:144
rwkv4_channel_mix/key/kernel | N(0, 0.02) | zoology/mixers/rwkv.py:269; model.py:144
rwkv4_channel_mix/mix | (i/D)^(1, 1) | zoology/mixers/rwkv.py:265
rwkv4_channel_mix/receptance/kernel | N(0, 0.02) | zoology/mixers/rwkv.py:270; model.py:144
rwkv4_channel_mix/value/kernel | N(0, 0.02) | zoology/mixers/rwkv.py:271; model.py:144
rwkv5/bonus | 0.1 zigzag | zoology/mixers/rwkv5.py:143
rwkv5/gate/kernel | N(0, 0.02) | zoology/mixers/rwkv5.py:154; model.py:144
rwkv5/key/kernel | N(0, 0.02) | zoology/mixers/rwkv5.py:150; model.py:144
rwkv5/mix | (i/D)^(1/2, 1, 1, 1/2) | zoology/mixers/rwkv5.py:129
rwkv5/norm/bias | 0 | zoology/mixers/rwkv5.py:155
rwkv5/norm/scale | 1 | zoology/mixers/rwkv5.py:155
rwkv5/out_proj/kernel | N(0, 0.02) | zoology/mixers/rwkv5.py:153; model.py:144
rwkv5/receptance/kernel | N(0, 0.02) | zoology/mixers/rwkv5.py:149; model.py:144
rwkv5/time_decay | -6 + 5 r^0.7 | zoology/mixers/rwkv5.py:137
rwkv5/value/kernel | N(0, 0.02) | zoology/mixers/rwkv5.py:152; model.py:144
rwkv6/bonus | 0 | fla/layers/rwkv6.py:82
rwkv6/decay/down/kernel | N(0, 0.02) | fla/layers/rwkv6.py:240; model.py:144
rwkv6/decay/up/bias | 0 | fla/layers/rwkv6.py:242; model.py:146
rwkv6/decay/up/kernel | N(0, 0.02) | fla/layers/rwkv6.py:242; model.py:144
rwkv6/gate/kernel | N(0, 0.02) | fla/layers/rwkv6.py:81; model.py:144
rwkv6/k_proj/kernel | N(0, 0.02) | fla/layers/rwkv6.py:79; model.py:144
rwkv6/mix | 0 | fla/layers/rwkv6.py:75
rwkv6/norm/bias | 0 | fla/layers/rwkv6.py:85
rwkv6/norm/scale | 1 | fla/layers/rwkv6.py:85
rwkv6/out_proj/kernel | N(0, 0.02) | fla/layers/rwkv6.py:86; model.py:144
rwkv6/r_proj/kernel | N(0, 0.02) | fla/layers/rwkv6.py:77; model.py:144
rwkv6/shift_down/kernel | N(0, 0.02) | fla/layers/rwkv6.py:314; model.py:144
rwkv6/shift_mix | 0 | fla/layers/rwkv6.py:317
rwkv6/shift_up/kernel | N(0, 0.02) | fla/layers/rwkv6.py:73; model.py:144
rwkv6/v_proj/kernel | N(0, 0.02) | fla/layers/rwkv6.py:80; model.py:144
rwkv7/a_lora/down/kernel | N(0, 0.02) | zoology/mixers/rwkv7.py:87; model.py:144
rwkv7/a_lora/up/bias | 0 | zoology/mixers/rwkv7.py:87; model.py:146
rwkv7/a_lora/up/kernel | N(0, 0.02) | zoology/mixers/rwkv7.py:87; model.py:144
rwkv7/g_lora/down/kernel | N(0, 0.02) | zoology/mixers/rwkv7.py:88; model.py:144
rwkv7/g_lora/up/kernel | N(0, 0.02) | zoology/mixers/rwkv7.py:88; model.py:144
rwkv7/k_a | 0 | zoology/mixers/rwkv7.py:74
rwkv7/k_k | 0 | zoology/mixers/rwkv7.py:73
rwkv7/k_proj/kernel | N(0, 0.02) | zoology/mixers/rwkv7.py:80; model.py:144
rwkv7/mix | 0 | zoology/mixers/rwkv7.py:71
rwkv7/norm/bias | 0 | zoology/mixers/rwkv7.py:90
rwkv7/norm/scale | 1 | zoology/mixers/rwkv7.py:90
rwkv7/out_proj/kernel | N(0, 0.02) | zoology/mixers/rwkv7.py:82; model.py:144
rwkv7/r_k | 0 | zoology/mixers/rwkv7.py:75
rwkv7/r_proj/kernel | N(0, 0.02) | zoology/mixers/rwkv7.py:79; model.py:144
rwkv7/v_proj/kernel | N(0, 0.02) | zoology/mixers/rwkv7.py:81; model.py:144
rwkv7/w_lora/down/kernel | N(0, 0.02) | zoology/mixers/rwkv7.py:84; model.py:144
rwkv7/w_lora/up/bias | 0 | zoology/mixers/rwkv7.py:84; model.py:146
rwkv7/w_lora/up/kernel | N(0, 0.02) | zoology/mixers/rwkv7.py:84; model.py:144
rwkv7_channel_mix/key/kernel | N(0, 0.02) | fla/models/rwkv7/modeling_rwkv7.py:69; model.py:144
rwkv7_channel_mix/mix | 1 - i/D | fla/models/rwkv7/modeling_rwkv7.py:92
rwkv7_channel_mix/value/kernel | N(0, 0.02) | fla/models/rwkv7/modeling_rwkv7.py:70; model.py:144
simple_gla/conv_kernel | U(1/sqrt(4)) | fla/layers/simple_gla.py:122; fla/modules/conv/short_conv.py:63
simple_gla/decay/bias | 0 | fla/layers/simple_gla.py:141; model.py:146
simple_gla/decay/kernel | N(0, 0.02) | fla/layers/simple_gla.py:141; model.py:144
simple_gla/gate/kernel | N(0, 0.02) | fla/layers/simple_gla.py:118; model.py:144
simple_gla/norm/scale | 1 | fla/layers/simple_gla.py:144
simple_gla/out_proj/kernel | N(0, 0.02) | fla/layers/simple_gla.py:159; model.py:144
simple_gla/qkv/kernel | N(0, 0.02) | fla/layers/simple_gla.py:115; model.py:144
taylor/out_proj/kernel | N(0, 0.02) | zoology/mixers/based.py:100; model.py:144
taylor/proj_k/kernel | N(0, 0.02) | zoology/mixers/based.py:98; model.py:144
taylor/proj_q/kernel | N(0, 0.02) | zoology/mixers/based.py:97; model.py:144
taylor/proj_v/kernel | N(0, 0.02) | zoology/mixers/based.py:99; model.py:144
taylor_window/gate/bias | -2 | nn/mixers/taylor_window.py
taylor_window/gate/kernel | N(0, 0.02) | nn/mixers/taylor_window.py
taylor_window/key_maps | N(0, 1/sqrt(head)) | nn/mixers/taylor_window.py
taylor_window/out_proj/kernel | N(0, 0.02/sqrt(2L)) | as window
taylor_window/qkv/kernel | N(0, 0.02) | as window
taylor_window/query_maps | N(0, 1/sqrt(head)) | nn/mixers/taylor_window.py
window/out_proj/bias | 0 | zoology/mixers/slide_attn.py:50; model.py:146
window/out_proj/kernel | N(0, 0.02/sqrt(2L)) | zoology/mixers/slide_attn.py:50; model.py:173
window/qkv/bias | 0 | zoology/mixers/slide_attn.py:47; model.py:146
window/qkv/kernel | N(0, 0.02) | zoology/mixers/slide_attn.py:47; model.py:144
"""
"""Parameter | distribution | source."""
ROWS = {name: (values, source) for name, values, source in (line.split(" | ") for line in TABLE.split("\n") if line)}

PLACES = (np.arange(20000) + 0.5) / 20000
NORMAL, UNIFORM = stats.norm.ppf(PLACES), 2 * PLACES - 1
STEPS = np.exp(math.log(1e-3) + PLACES * math.log(100))
RANDOM = {
    "N(0, 0.02)": lambda shape: 0.02 * NORMAL,
    "N(0, 0.02/sqrt(2L))": lambda shape: 0.02 / math.sqrt(2 * DEPTH) * NORMAL,
    "N(0, 1/sqrt(head))": lambda shape: NORMAL / math.sqrt(shape[1]),
    "N(0, 1)": lambda shape: NORMAL,
    "N(0, sqrt(1/2))": lambda shape: math.sqrt(0.5) * NORMAL,
    "U(1/sqrt(3))": lambda shape: UNIFORM / math.sqrt(3),
    "U(1/sqrt(4))": lambda shape: UNIFORM / math.sqrt(4),
    "U(1/sqrt(N))": lambda shape: UNIFORM / math.sqrt(shape[-1]),
    "U(1/sqrt(D))": lambda shape: UNIFORM / math.sqrt(D),
    "U(1/sqrt(fan_in))": lambda shape: UNIFORM / math.sqrt(shape[0]),
    "U(1/sqrt(L fan_in))": lambda shape: UNIFORM / math.sqrt(DEPTH * shape[0]),
    "U(log 0.001, log 0.1)": lambda shape: np.log(STEPS),
    "log U(0, 16)": lambda shape: np.log(16 * PLACES),
    "log U(1, 16)": lambda shape: np.log(1 + 15 * PLACES),
    "softplus^-1 of exp U(log 0.001, log 0.1)": lambda shape: STEPS + np.log(-np.expm1(-STEPS)),
}
"""By distribution: its quantiles at `PLACES`, which may depend on the parameter's shape."""


def powers(*exponents):
    return lambda shape: np.stack([(np.arange(shape[-1]) / shape[-1]) ** x for x in exponents])


def along(values):
    """Return values of the places 0 to 1, and the indices, of all channels."""
    return lambda shape: values(np.linspace(0, 1, math.prod(shape)), np.arange(math.prod(shape))).reshape(shape)


def time_features(shape):
    angles = 1e-4 * 2 * np.pi * np.arange(shape[0]) / shape[0]
    return np.stack([np.linspace(0, 1, shape[0]), np.cos(angles), -np.sin(angles)], axis=1)


CONSTANT = {
    "-2": lambda shape: np.full(1, -2.0),
    "0": lambda shape: np.zeros(1),
    "1": lambda shape: np.ones(1),
    "log 0.5": lambda shape: np.full(1, math.log(0.5)),
    "e_1 of N": lambda shape: np.eye(shape[-1])[0],
    "(1, 0)": lambda shape: np.eye(2)[0],
    "pi (0 .. N/2)": lambda shape: np.pi * np.arange(shape[-1]),
    "log (1 .. N)": lambda shape: np.log(1 + np.arange(shape[-1])),
    "time": time_features,
    "(i/D)^(1, 1)": powers(1, 1),
    "(i/D)^(1, 1, 1/2)": powers(1, 1, 0.5),
    "(i/D)^(1/2, 1, 1, 1/2)": powers(0.5, 1, 1, 0.5),
    "1 - i/D": lambda shape: 1 - powers(1)(shape),
    "-5 + 8 r^0.7": along(lambda r, i: -5 + 8 * r**0.7),
    "-6 + 5 r^0.7": along(lambda r, i: -6 + 5 * r**0.7),
    "0.1 zigzag": along(lambda r, i: 0.1 * ((i + 1) % 3 - 1)),
    "log 0.3 + 0.5 zigzag": along(lambda r, i: math.log(0.3) + 0.5 * ((i + 1) % 3 - 1)),
}
"""By name: the values themselves, broadcast to the parameter's shape."""

REFERENCE_DIFFERS = {
    "deltanet": {"out_proj/kernel"},
    "gated_deltanet": {"A_log", "out_proj/kernel"},
    "gla": {"out_proj/kernel"},
    "gsa": {"out_proj/kernel"},
    "h3": {"out_proj/kernel"},
    "hgrn2": {"out_proj/kernel"},
    "hyena": {
        *(f"filter/hidden/{i}/{part}" for i in range(3) for part in ("kernel", "bias")),
        "filter/out/kernel",
    },
    "implicit_conv": {"hidden/kernel", "hidden/bias", "out/kernel", "out/bias"},
    "kda": {"out_proj/kernel"},
    "lightning": {"out_proj/kernel"},
    "linear": {"feature_map/proj_1/kernel", "feature_map/proj_2/kernel", "out_proj/kernel"},
    "retnet": {"out_proj/kernel"},
    "rwkv4": {"mix", "out_proj/kernel", "time_decay", "time_first"},
    "rwkv4_channel_mix": {"mix", "value/kernel"},
    "rwkv5": {"bonus", "mix", "out_proj/kernel", "time_decay"},
    "rwkv6": {"bonus", "out_proj/kernel"},
    "rwkv7": {"k_a", "k_k", "mix", "out_proj/kernel"},
    "rwkv7_channel_mix": {"mix", "value/kernel"},
    "simple_gla": {"out_proj/kernel"},
    "taylor": {"out_proj/kernel"},
}
"""By mixer: the parameters that start otherwise by the recipe "reference"; of the mixers left out none does."""


def model_config(kind, recipe, **changes):
    fields = {"d_model": D, "vocab_size": 512, "mlp": "none", "dtype": "float32", "init_recipe": recipe} | changes
    return LMConfig(((kind, OPTIONS.get(kind, {})),) * DEPTH, **fields)


def parameters(module):
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def drawn(kind, recipe):
    """Return the parameters of a mixer of a model of three, by name, along a first axis those of each seed."""
    config = model_config(kind, recipe)

    def one(key):
        return parameters(Block(*config.layers[0], config, rngs=nnx.Rngs(key)).mixer)

    return jax.device_get(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0, impl="rbg"), SEEDS)))


def follows(values, distribution):
    """Return whether values (seeds, ...) are those of a constant, or have a distribution's mean and deviation.

    Five deviations of either, of as many draws as there are values.
    """
    shape = values.shape[1:]
    if distribution in CONSTANT:
        return np.allclose(values, np.broadcast_to(CONSTANT[distribution](shape), values.shape), atol=1e-6)
    expected = RANDOM[distribution](shape)
    mean, deviation = expected.mean(), expected.std()
    kurtosis = np.mean((expected - mean) ** 4) / deviation**4
    close_mean = abs(values.mean() - mean) < 5 * deviation / math.sqrt(values.size)
    return close_mean and abs(values.std() / deviation - 1) < 5 * math.sqrt((kurtosis - 1) / (4 * values.size))


def differing(kind, recipe):
    found = drawn(kind, recipe)
    assert {f"{kind}/{name}" for name in found} == {name for name in ROWS if name.startswith(f"{kind}/")}
    return {name for name, values in found.items() if not follows(values, ROWS[f"{kind}/{name}"][0])}


def test_the_table_has_every_mixer():
    assert {name.partition("/")[0] for name in ROWS} == set(MIXERS)
    assert {values for values, _ in ROWS.values()} <= {*RANDOM, *CONSTANT}


@pytest.mark.parametrize("kind", MIXERS)
def test_zoology_draws_each_parameter_as_the_public_code_does(kind):
    assert differing(kind, "zoology") == set()


@parametrize_some("kind", MIXERS, ("attention", "mamba", *REFERENCE_DIFFERS))
def test_reference_draws_these_parameters_otherwise(kind):
    assert differing(kind, "reference") == REFERENCE_DIFFERS.get(kind, set())


NORMAL_MODEL = {
    "embed/embedding": "N(0, 0.02)",
    "head/kernel": "N(0, 0.02)",
    "mlp/fc1/kernel": "N(0, 0.02)",
    "mlp/fc2/kernel": "N(0, 0.02/sqrt(2L))",
    "mixer/out_proj/kernel": "N(0, 0.02/sqrt(2L))",
    "mixer/qkv/bias": "0",
}
TORCH_MODEL = dict.fromkeys(NORMAL_MODEL, "U(1/sqrt(fan_in))") | {
    "embed/embedding": "N(0, 1)",
    "mixer/qkv/bias": "U(1/sqrt(D))",
}


@parametrize_some(
    "recipe, scan_layers",
    [(recipe, scan_layers) for recipe in ("reference", "zoology", "torch") for scan_layers in (False, True)],
    [("reference", False), ("zoology", True), ("torch", False), ("torch", True)],
)
def test_a_whole_model_follows_the_recipe_stacked_or_not(recipe, scan_layers):
    expected = TORCH_MODEL if recipe == "torch" else NORMAL_MODEL
    config = model_config("attention", recipe, mlp="swiglu", tie_embeddings=False, scan_layers=scan_layers)
    found = jax.device_get(parameters(jax.jit(lambda: LM(config, rngs=nnx.Rngs(0)))()))
    for name, distribution in expected.items():
        layers = [values for path, values in found.items() if path.endswith(name)]
        assert len(layers) == (1 if name.partition("/")[0] in ("embed", "head") or scan_layers else DEPTH)
        values = layers[0] if scan_layers and len(layers[0].shape) > 2 else np.stack(layers)
        assert follows(values, distribution), name


def test_every_rule_says_where_it_comes_from_and_is_followed_by_something():
    names = [*ROWS, "embed/embedding", "head/kernel", "mlp/fc1/kernel", "mlp/fc2/kernel"]
    for recipe, rules in INIT_RECIPES.items():
        assert all(rule.source for rule in rules)
        assert {rule(recipe, name) for name in names} == set(rules)


def test_zoology_s_rwkv7_never_learns_to_remove(rng):
    """Its removal keys start at 0, and where they are 0 nothing has a gradient to them."""
    config = model_config("rwkv7", "zoology")
    ids = rng.integers(512, size=(2, 16))

    @jax.jit
    def gradients():
        model = LM(dataclasses.replace(config, layers=config.layers[:1]), rngs=nnx.Rngs(0))
        return nnx.grad(lambda model: jnp.sum(model.hidden(ids) ** 3))(model)

    found = parameters(gradients().stacks[0].blocks[0].mixer)
    assert not np.any(found["k_k"])
    assert all(np.any(found[name]) for name in ("k_a", "r_k", "mix"))


def test_torch_takes_no_deviation():
    with pytest.raises(UserError, match=r"^init_std is 0\.1, but init_recipe 'torch' takes none; leave it out\.$"):
        model_config("taylor", "torch", init_std=0.1)
    with pytest.raises(UserError, match="init_recipe 'zoologi'"):
        model_config("taylor", "zoologi")
