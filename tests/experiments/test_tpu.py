"""The rows of experiments/tpu and its table."""

from based_jax.bench.static.calls import CALLS
from based_jax.bench.static.points import SLICES
from experiments.tpu import __main__ as tpu


def test_kernels_that_decode_have_fewer_cycles_than_xla_s_forms_and_copy_no_states():
    """What `auto` takes on TPUs for: each row of a kernel that has one of XLA's form beside it, on every chip one."""
    rows = {row["point"]: row for row in tpu.read()}
    kernels = [row for row in rows.values() if row["impl"] == "tpu"]
    assert {(row["call"], row["chip"]) for row in kernels} == {(a, b) for a in CALLS for b in SLICES}
    decoding = [row for row in kernels if row["call"] != "window of 64"]
    assert not any(row["copied"] for row in decoding)
    beside = [(row, rows.get(f"{row['call']} {row['chip']} xla")) for row in decoding]
    compared = [(kernel, xla) for kernel, xla in beside if xla]
    assert {row["call"] for row, _ in compared} >= {"gated delta rule", "Taylor, float32", "Taylor, int8"}
    assert all(2 * kernel["cycles"] < xla["cycles"] for kernel, xla in compared)


def test_the_readme_has_the_table_of_its_rows():
    assert f"<!-- table -->\n{tpu.table()}\n<!-- end -->" in tpu.README.read_text()
