"""Sizes that the kernels have and that their callers write down once more, for want of Pallas at import."""

import pytest

from based_jax.ops.hopper import limits, recurrence, selective_scan, short_conv, taylor
from pallas_kernels.hopper import mosaic, stream, taylor_packing
from pallas_kernels.hopper import recurrence as recurrence_kernels
from pallas_kernels.hopper import selective_scan as selective_scan_kernels
from pallas_kernels.hopper import short_conv as short_conv_kernels


def test_callers_and_kernels_agree_on_a_chunk():
    assert limits.CHUNK_TOKENS == mosaic.CHUNK_TOKENS


def test_callers_and_kernels_agree_on_taylor_s_features():
    assert (taylor.FEATURE_DIM, taylor.PACKED_DIM) == (taylor_packing.FEATURE_DIM, taylor_packing.PACKED_DIM)


@pytest.mark.parametrize(
    ("caller", "kernels"),
    [
        (recurrence, recurrence_kernels),
        (selective_scan, selective_scan_kernels),
        (short_conv, short_conv_kernels),
    ],
)
def test_callers_fill_time_up_to_the_kernels_tiles(caller, kernels):
    assert caller.TOKEN_MULTIPLE == kernels.TILE_TOKENS


def test_callers_fill_channels_up_to_the_kernels_lanes():
    assert short_conv.CHANNEL_MULTIPLE == stream.WARPGROUP_LANES
    assert selective_scan.CHANNEL_MULTIPLE == mosaic.WARPS * selective_scan_kernels.WARP_CHANNELS
