"""The rows of experiments/tpu, its table, and how schedules are read."""

from experiments.tpu import __main__ as tpu
from experiments.tpu import points, schedules
from experiments.tpu.schedules import Loop, Schedule

SCHEDULE = """= control target key start
LB: loop body
   0x0   :  { %s1_s2 = smov [#allocation8] }
  0x7b   : > { %598 = sbr.rel target = $region60 }
  0xf1   : >> { %p7055_p9 = scmp.ge.s32.totalorder %s1128_s9, 16 /* loop exit test */ }
  0xf2 LB: >>> { %v4524_v2 = vld [vmem:[%s1150_s1 + $0x18] sm:$0xff] }
 0x107   : >> { %1219 = vst [vmem:[%s6966_s28 + $0x48] sm:$0xff] }
 0x244 PF: > { %2651 = sbr.rel (%p3971_p7) target = $region155 }
 0x245   : >> { %v1 = vadd.f32 %v2, %v3 }
"""


def test_bundles_are_counted_by_loop():
    assert schedules.parsed(SCHEDULE) == Schedule(3, [Loop(2, 1), Loop(1, 0)])


def test_cycles_of_xla_are_those_of_its_top_but_copies():
    text = """%loop (x: f32[4]) -> f32[4] {
  %fusion.1 = f32[4]{0} fusion(%x), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %copy.1 = f32[4]{0} copy(%x), backend_config={"estimated_cycles":"100"}
  %fusion.2 = f32[4]{0} fusion(%copy.1), backend_config={"estimated_cycles":"10"}
  ROOT %fusion.3 = f32[4]{0} fusion(%fusion.2), backend_config={"estimated_cycles":"1"}
}
"""
    assert points.cycles_of_xla(text) == 11


def test_every_kernel_has_fewer_cycles_than_xla_s_form_and_states_are_not_copied():
    """What `auto` takes on TPUs for: each row of a kernel that has one of XLA's form beside it, on every chip one."""
    rows = {row["point"]: row for row in tpu.read()}
    kernels = [row for row in rows.values() if row["impl"] == "tpu"]
    assert {(row["call"], row["chip"]) for row in kernels} == {(a, b) for a in points.CALLS for b in points.SLICES}
    assert not any(row["copied"] for row in kernels)
    beside = [(row, rows.get(f"{row['call']} {row['chip']} xla")) for row in kernels]
    compared = [(kernel, xla) for kernel, xla in beside if xla]
    assert {row["call"] for row, _ in compared} >= {"gated delta rule", "Taylor, float32", "Taylor, int8"}
    assert all(2 * kernel["cycles"] < xla["cycles"] for kernel, xla in compared)


def test_the_readme_has_the_table_of_its_rows():
    assert f"<!-- table -->\n{tpu.table()}\n<!-- end -->" in tpu.README.read_text()
