"""The rows of experiments/tpu and its table."""

from based_jax.bench.static.points import FORMS, POINTS
from experiments.tpu import __main__ as tpu

DECODING = "Taylor, float32", "Taylor, bfloat16", "Taylor, int8", "Taylor, float8_e4m3fn", "gated delta rule"
PASSES = "window of 129, gradients", "gated convolution, gradients"


def test_kernels_that_decode_have_fewer_cycles_than_xla_s_forms_and_copy_no_states():
    """What `auto` takes on TPUs for: each row of a kernel that has one of XLA's form beside it, on every chip one."""
    rows = {row["point"]: row for row in tpu.read()}
    kernels = [row for row in rows.values() if row["impl"] == "tpu"]
    assert {row["point"] for row in kernels} == {name for name, (*_, impl) in POINTS.items() if impl == "tpu"}
    decoding = [row for row in kernels if row["call"] in DECODING]
    assert not any(row["copied"] for row in decoding)
    beside = [(row, rows.get(f"{row['call']} {row['chip']} xla")) for row in decoding]
    compared = [(kernel, xla) for kernel, xla in beside if xla]
    assert {row["call"] for row, _ in compared} >= {"gated delta rule", "Taylor, float32", "Taylor, int8"}
    assert all(2 * kernel["cycles"] < xla["cycles"] for kernel, xla in compared)


def test_kernels_that_auto_takes_over_a_sequence_have_fewer_cycles_than_xla_s_forms_and_copy_no_tokens():
    rows = {row["point"]: row for row in tpu.read()}
    kernels = [row for row in rows.values() if row["impl"] == "tpu" and row["call"] in ("window of 64", *PASSES)]
    assert len({row["chip"] for row in kernels}) == 4 and not any(row["relayouts"] for row in kernels)
    compared = [(row, rows[f"{row['call']} {row['chip']} xla"]) for row in kernels if row["call"] == "window of 64"]
    compared += [(row, rows[f"{row['call']} v5e xla"]) for row in kernels if row["chip"] == "v5e"]
    assert all(kernel["cycles"] < xla["cycles"] for kernel, xla in compared)


def test_taylor_attention_takes_few_bundles_and_no_copies():
    """Forward, of V 64, on chips of one core a device."""
    rows = {row["point"]: row for row in tpu.read()}
    kernels = [row for row in rows.values() if row["impl"] == "tpu" and row["call"].startswith("Taylor by chunks")]
    assert len(kernels) == 16 and not any(row["relayouts"] or row["copies"] for row in kernels)
    for chip, most in {"v5e": 1.9, "v6e": 1.5, "v7x": 1.35}.items():
        kernel, xla = (rows[f"Taylor by chunks {chip} {impl}"]["bundles_per_token_and_head"] for impl in FORMS)
        assert kernel <= most and 4 * kernel < xla
        gradients = rows[f"Taylor by chunks, gradients {chip} tpu"]["bundles_per_token_and_head"]
        assert gradients <= (1 + 2.5) * most


def test_matrix_states_by_chunks_have_a_fifth_of_the_cycles_of_xla_s_forms_at_most():
    rows = {row["point"]: row for row in tpu.read() if ", a decay a " in row["call"]}
    compared = [(rows[point.replace(" xla", " tpu")], xla) for point, xla in rows.items() if xla["impl"] == "xla"]
    assert len({xla["call"] for _, xla in compared}) >= 6
    assert all(5 * kernel["cycles"] < xla["cycles"] for kernel, xla in compared)


def test_what_is_left_to_xla_is_told_by_bytes_and_by_passes():
    xla = {
        "cycles": 300,
        "moved_bytes": 100,
        "program_bytes": 130,
        "program_flops": 0,
        "flops": 0,
        "hbm_microseconds": 7,
    }
    plain, kernel = xla | {"cycles": 50, "moved_bytes": 50}, xla | {"cycles": 120, "program_bytes": 100}
    assert tpu.left("a", "v5e", {"xla": xla, "tpu": kernel}, plain) == {
        "call": "a",
        "chip": "v5e",
        "HBM, us": "7",
        "bytes": "1.30",
        "FLOPs": "-",
        "time": "3.00",
        "the kernel's bytes": "1.00",
        "its time": "1.20",
    }
