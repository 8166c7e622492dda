"""Published points of MQAR accuracy against bytes of state: what ours are drawn over.

Protocol of both: two layers, vocabulary 8192, tests of 64 tokens with 4 pairs to 1,024 with 256, the best learning
rate. Accuracies were read off the pictures; bytes are calculated (fp32, one sequence, 1,024 tokens).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from based_jax.pictures.references import ReferencePoint, ReferenceSource

PAPER = ReferenceSource("paper, Fig. 2", "arXiv 2402.18668 v2, Figure 2 left (read off the picture)")
RERUN = ReferenceSource(
    "re-run, 2026", "HazyResearch/zoology@4293e43, README picture of January 2026 (read off the picture)"
)

TEST_SEGMENTS = {"64x4", "64x8", "64x16", "128x32", "256x64", "512x128", "1024x256"}

# (D, K or w): bytes of the main mixer, accuracy
BASED = {
    (32, 8): (5_940, 0.538),
    (64, 8): (11_700, 0.710),
    (128, 8): (23_220, 0.816),
    (64, 16): (39_780, 0.890),
    (256, 8): (46_260, 0.852),
    (128, 16): (78_948, 0.974),
    (64, 24): (84_500, 0.956),
    (512, 8): (92_340, 0.870),
    (256, 16): (157_284, 0.990),
    (512, 16): (313_956, 0.991),
    (512, 24): (666_900, 0.996),
}
WINDOW = {8 << i: (1 << 13 + i, y) for i, y in enumerate((0.072, 0.144, 0.312, 0.514, 0.654, 0.797, 0.936, 1.0))}
ATTENTION = {64: (1 << 19, 1.0), 256: (1 << 21, 1.0)}

# log2 of the bytes, as the picture's axis has them: several (D, N) share a place. Those between are 1.5 * 2^n.
MAMBA = {
    1 << 13: (0.572,),
    1 << 14: (0.579, 0.609),
    3 << 13: (0.582,),
    1 << 15: (0.652, 0.699, 0.774),
    3 << 14: (0.822,),
    1 << 16: (0.752, 0.803),
    3 << 15: (0.822,),
    1 << 17: (0.832, 0.893),
    3 << 16: (0.856,),
    1 << 18: (0.864, 0.909),
    3 << 17: (0.883,),
    1 << 19: (0.864,),
}
H3 = {1 << 13: 0.186, 1 << 15: 0.256, 1 << 17: 0.314, 1 << 19: 0.360}
HYENA = {1 << 19: 0.205, 1 << 20: 0.340, 1 << 21: 0.455, 1 << 22: 0.506}

# (D, K or w): bytes with the convolution layer, accuracy
BASED_RERUN = {
    (48, 8): (9_396, 0.667),
    (48, 16): (30_564, 0.836),
    (48, 24): (64_276, 0.856),
    (64, 8): (12_468, 0.719),
    (64, 16): (40_548, 0.913),
    (64, 24): (85_268, 0.970),
    (64, 32): (146_628, 0.966),
    (64, 64): (558_468, 0.975),
    (128, 8): (24_756, 0.840),
    (128, 16): (80_484, 0.986),
    (128, 24): (169_236, 0.991),
    (128, 32): (291_012, 0.996),
    (128, 64): (1_108_356, 0.999),
    (256, 16): (160_356, 0.990),
    (256, 32): (579_780, 1.0),
    (256, 64): (2_208_132, 1.0),
}
WINDOW_RERUN = {
    8: (9_728, 0.081),
    16: (17_920, 0.145),
    32: (34_304, 0.310),
    64: (67_072, 0.514),
    128: (132_608, 0.655),
    256: (263_680, 0.797),
    512: (525_824, 0.936),
    1024: (1_050_112, 1.0),
}
# By D, with two heads except in RWKV-7. RWKV-7 at H 64^2 elements: the picture's own places come from a formula that
# was corrected later.
BY_WIDTH_RERUN = {
    "Attention": {64: (525_056, 1.0), 128: (1_050_112, 1.0)},
    "DeltaNet": {64: (8_960, 0.793), 128: (34_304, 0.963), 256: (134_144, 0.995)},
    "Gated DeltaNet": {64: (17_152, 0.890), 128: (67_072, 0.988), 256: (265_216, 0.994)},
    "RWKV-7": {64: (17_152, 0.816), 128: (34_304, 0.914), 256: (68_608, 0.981)},
    "GLA": {64: (4_864, 0.532), 128: (17_920, 0.771), 256: (68_608, 0.950)},
}
# By bytes; of H3 the points whose place could be read.
BY_BYTES_RERUN = {
    "Mamba-2": {
        8_192: 0.520,
        16_384: 0.690,
        24_576: 0.728,
        32_768: 0.784,
        49_152: 0.796,
        65_536: 0.832,
        98_304: 0.844,
    },
    "Mamba": {16_384: 0.70, 24_576: 0.697, 49_152: 0.758, 98_304: 0.855},
    "H3": {8_192: 0.189, 32_768: 0.248, 131_072: 0.247},
    "Hyena": {524_288: 0.185, 1_048_576: 0.304, 2_097_152: 0.409},
}


def _convolution_bytes(d_model: int) -> int:
    """Return the bytes of a layer of three taps."""
    return 4 * 3 * d_model


def _paper() -> list[ReferencePoint]:
    """Return the paper's points; their bytes are those of the main mixer."""
    hybrids = [("Based", f"D {d}, K {k}", d, *found) for (d, k), found in BASED.items()]
    hybrids += [("Sliding window", f"D 128, w {w}", 128, *found) for w, found in WINDOW.items()]
    hybrids += [("Attention", f"D {d}", d, *found) for d, found in ATTENTION.items()]
    points = [ReferencePoint(f, label, size, y, PAPER, _convolution_bytes(d)) for f, label, d, size, y in hybrids]
    points += [ReferencePoint("Mamba", "", size, y, PAPER) for size, found in MAMBA.items() for y in found]
    return points + [
        ReferencePoint(family, "", size, y, PAPER)
        for family, found in (("H3", H3), ("Hyena", HYENA))
        for size, y in found.items()
    ]


def _rerun() -> list[ReferencePoint]:
    """Return the re-run's points; their bytes have the convolution layer in them."""
    hybrids = [("Based", f"D {d}, K {k}", d, *found) for (d, k), found in BASED_RERUN.items()]
    hybrids += [("Sliding window", f"D 128, w {w}", 128, *found) for w, found in WINDOW_RERUN.items()]
    for family, by_width in BY_WIDTH_RERUN.items():
        heads = "" if family == "RWKV-7" else ", 2 heads"
        hybrids += [(family, f"D {d}{heads}", d, *found) for d, found in by_width.items()]
    points = []
    for family, label, d_model, whole, y in hybrids:
        convolution = _convolution_bytes(d_model)
        points.append(ReferencePoint(family, label, whole - convolution, y, RERUN, convolution))
    return points + [
        ReferencePoint(family, "", size, y, RERUN)
        for family, found in BY_BYTES_RERUN.items()
        for size, y in found.items()
    ]


POINTS = (*_paper(), *_rerun())


def comparable(rows: Iterable[Mapping[str, Any]]) -> tuple[ReferencePoint, ...]:
    """Return the published points, or none where a row was tested on something else: they belong to one protocol.

    A run that diverged may have no tests at all.
    """
    same = all(
        (not row["segments"] or row["segments"].keys() == TEST_SEGMENTS) and _task(row) == "mqar" for row in rows
    )
    return POINTS if same else ()


def _task(row: Mapping[str, Any]) -> str:
    return row["config"].get("data", {}).get("kind", "mqar")
