"""Which kernels a program runs, and what is copied for them."""

from based_jax.aot import costs
from based_jax.aot.hlo import Program
from based_jax.aot.kernels import KernelRuns, kernels

KERNEL = 'custom-call({}), custom_call_target="tpu_custom_call"'
ROWS, COLUMNS, ON_CHIP = "{1,0:T(8,128)}", "{0,1:T(8,128)}", "{1,0:T(8,128)S(1)}"
PROGRAM = f"""
%moved (p: f32[128,128]) -> f32[128,128] {{
  %p = f32[128,128]{COLUMNS} parameter(0)
  ROOT %turned = f32[128,128]{ROWS} copy(%p)
}}

%scaled (q: f32[128,128]) -> f32[128,128] {{
  %q = f32[128,128]{COLUMNS} parameter(0)
  %turned.1 = f32[128,128]{ROWS} copy(%q)
  ROOT %twice = f32[128,128]{ROWS} add(%turned.1, %turned.1)
}}

ENTRY %main (x: f32[128,128]) -> f32[128,128] {{
  %x = f32[128,128]{COLUMNS} parameter(0)
  %fusion = f32[128,128]{ROWS} fusion(%x), kind=kLoop, calls=%moved
  %fusion.1 = f32[128,128]{ROWS} fusion(%x), kind=kLoop, calls=%scaled
  %here = f32[128,128]{ON_CHIP} copy(%fusion.1)
  %named = f32[128,128]{ROWS} bitcast(%fusion)
  %walk.7 = (f32[128,128]{ROWS}, f32[128,128]{ROWS}) {KERNEL.format("%fusion, %here, %named")}
  %one = f32[128,128]{ROWS} get-tuple-element(%walk.7), index=0
  %back = f32[128,128]{COLUMNS} copy(%one)
  %walk.8 = f32[128,128]{ROWS} {KERNEL.format("%here, %here")}
  %other = f32[128,128]{ROWS} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %step = f32[128,128]{ROWS} {KERNEL.format("%walk.8")}
}}
"""


def test_copies_into_another_layout_before_and_behind_a_kernel_are_counted_once():
    """Not one that a fusion makes beside a sum, nor one to another memory."""
    found = kernels(Program(PROGRAM))
    assert found == {"step": KernelRuns(1, 0, 0.0), "walk": KernelRuns(2, 2, 2 * 65536.0)}


def test_what_a_kernel_takes_twice_is_read_once():
    program = Program(PROGRAM)
    [moved] = [count for x, count in costs.traffic(program, on_chip=(1,)) if x.name == "walk.7"]
    assert moved == 3 * 65536
