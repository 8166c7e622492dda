"""How long programs take by their schedules, of text as XLA writes it."""

import jax

from based_jax import parallel
from based_jax.aot import collectives, costs, schedule
from based_jax.aot.hlo import Program

TEXT = """
HloModule jit_step

%fused (p: f32[8,8], q: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  ROOT %dot.2 = f32[8,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[4,8]) -> f32[8,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %begin = ((f32[4,8]{1,0}), f32[8,8]{1,0}) all-gather-start(%a), replica_groups={{0,1}}, dimensions={0}
  %other = f32[4,8]{1,0} negate(%a)
  %end = f32[8,8]{1,0} all-gather-done(%begin)
  %product = f32[8,8]{1,0} fusion(%end, %end), kind=kOutput, calls=%fused
  ROOT %sum = f32[8,8]{1,0} all-reduce(%product), replica_groups={{0,1}}, to_apply=%add
}
"""


def test_what_stands_until_it_is_waited_for_hides_an_exchange():
    """A gather of 5 beside 2, and a sum of 5 beside nothing."""
    seconds = {"other": 2.0, "product": 3.0, "begin": 5.0, "sum": 5.0}
    found = schedule.scheduled(Program(TEXT), lambda x: seconds.get(x.name, 0.0), lambda x: seconds[x.name])
    assert (found.total, found.exposed) == (13.0, 8.0)


def test_exchanges_run_one_after_the_other():
    found = schedule.Scheduled()
    first, second = found.begin(4.0), found.begin(1.0)
    found.compute(2.0)
    found.wait(second)
    found.wait(first)
    assert (first, second, found.total, found.exposed) == (4.0, 5.0, 5.0, 3.0)


def test_an_instruction_takes_what_its_products_or_its_bytes_do():
    program = Program(TEXT)
    product, other = (program.by_name[name] for name in ("product", "other"))
    fast_memory = costs.seconds_by_instruction(program, 2.0 * 8**3, 1e30)
    assert (fast_memory(product), fast_memory(other) < 1e-20) == (1.0, True)
    assert costs.seconds_by_instruction(program, 1e30, 4.0 * 32)(other) == 2.0


def test_what_a_collective_that_begins_gets_is_told_by_array():
    mesh = parallel.make_mesh({"fsdp": 2}, jax.devices()[:2])
    found = collectives.by_array(collectives.collectives(Program(TEXT)), mesh)
    assert [(x.kind, x.axes, x.array, x.count) for x in found] == [
        ("all-gather", ("fsdp",), "f32[8,8]", 1),
        ("all-reduce", ("fsdp",), "f32[8,8]", 1),
    ]
