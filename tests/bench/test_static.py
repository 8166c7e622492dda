"""`bench static`: how schedules are read, what a regression is, and that no kernel is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tpu_compiler import needs_libtpu

from based_jax.__main__ import main
from based_jax.bench.static import points, schedules
from based_jax.commands.bench import static
from based_jax.ops.tpu.bundles import Loop, Schedule

ROWS = Path(__file__).parents[2] / "experiments" / "tpu" / "results" / "static.jsonl"
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
UTILIZATION = """== CAPACTIY:
MXU, XLU, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     3     1     1     2
== UTILIZATION:
0 0 0 0 1 0
1 0 2 0 0 3
0 0 0 1 1 0
"""
PROGRAM = """
%turn.1 (x: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.7 = f32[4]{0} fusion(%x), backend_config={"estimated_cycles":"1000"}
}

%more.1 (x: (s32[], f32[4])) -> pred[] {
  %constant.8 = s32[]{:T(128)} constant(3)
  ROOT %lt.9 = pred[]{:T(512)} compare(%x, %constant.8), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %while.4 = (s32[], f32[4]) while(%x), condition=%more.1, body=%turn.1, metadata={op_name="while"}
  %copy.1 = f32[4]{0} copy(%x), backend_config={"estimated_cycles":"100"}
  %fusion.2 = f32[4]{0} fusion(%copy.1), backend_config={"estimated_cycles":"10"}
  ROOT %fusion.3 = f32[4]{0} fusion(%fusion.2), backend_config={"estimated_cycles":"1"}
}
"""


def test_bundles_are_counted_by_loop_and_spills_summed():
    assert schedules.parsed(SCHEDULE) == Schedule(3, [Loop(2, 1), Loop(1, 0)])
    assert schedules.spills_of(UTILIZATION) == 2


def test_cycles_of_xla_are_those_of_all_but_copies_in_loops_as_often_as_they_run():
    assert points.cycles_of_xla(PROGRAM) == 3011
    until = PROGRAM.replace("  %constant.8 = s32[]{:T(128)} constant(3)\n", "").replace("%constant.8", "%x")
    assert points.cycles_of_xla(until) == 11


@pytest.mark.parametrize(("impl", "bundles", "worse"), [("tpu", 11.1, True), ("tpu", 10.9, False), ("xla", 20, False)])
def test_a_kernel_of_a_tenth_more_bundles_is_worse(impl, bundles, worse):
    row = {"point": "a", "impl": impl, "bundles_per_token_and_head": 10.0}
    told = points.regression(row | {"bundles_per_token_and_head": bundles}, [row])
    assert told == ("a: 11.10 bundles a token and head, and were 10.00" if worse else None)
    assert points.regression(row, []) is None


def test_a_row_takes_the_place_of_the_one_of_its_point(tmp_path):
    *_, last = points.POINTS
    first, path = next(iter(points.POINTS)), tmp_path / "rows.jsonl"
    for row in ({"point": last, "x": 1}, {"point": first, "x": 2}, {"point": last, "x": 3}):
        points.keep(row, path)
    assert points.read(path) == [{"point": first, "x": 2}, {"point": last, "x": 3}]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only=tailor"], "No point of v5e has 'tailor' in its name; their calls are Taylor, float32, "),
        (["--baseline=nowhere.jsonl"], "There are no rows at 'nowhere.jsonl'."),
    ],
)
def test_bad_input_is_told_before_anything_is_compiled(words, told, capsys):
    assert main(["bench", "static", *words]) == 2
    assert told in capsys.readouterr().err


def test_the_command_has_the_chips_of_the_points():
    assert tuple(points.SLICES) == static.CHIPS


def test_every_kernel_has_a_row_on_every_chip():
    kept = {row["point"] for row in map(json.loads, ROWS.read_text().splitlines())}
    assert kept >= {name for name, (*_, impl) in points.POINTS.items() if impl == "tpu"}


@needs_libtpu
@pytest.mark.long
@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("point", points.chosen(["v5e"], " tpu"))
def test_no_kernel_has_become_worse(point):
    """Each in a process of its own: libtpu is told once where it writes its schedules, and some compile for minutes."""
    words = ["bench", "static", "--topology=v5e", f"--only={point}", f"--baseline={ROWS}"]
    done = subprocess.run([sys.executable, "-m", "based_jax", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bundles a token and head") == len(points.chosen(["v5e"], point))
