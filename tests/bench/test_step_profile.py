"""Where a step's time goes, from kernels that a profiler might have recorded and the text of a program."""

import pytest

from based_jax.bench import step_profile
from based_jax.bench.timing import Kernel

SCOPES = {
    "gemm.1": "jit(step)/jvp(stack_0)/block_1/mlp/project/dot_general",
    "gemm.2": "jit(step)/transpose(jvp(stack_0))/block_1/mlp/project/dot_general",
    "norm": "jit(step)/checkpoint/rematted_computation/block_0/conv/residual_rms_norm/x",
    "update": "jit(step)/optimizer/mul",
}
CALL = """  %{} = f32[4]{{0}} custom-call(%p), custom_call_target="any", metadata={{op_name="{}"}},\
 backend_config={{module = "a \\"quoted\\" = one"}}
"""
TEXT = f"""
HloModule jit_step

ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
{"".join(CALL.format(*item) for item in SCOPES.items())}  %move = f32[4]{{0}} copy(%p)
  ROOT %other = f32[4]{{0}} add(%p, %p)
}}
"""
MS = 1e6


def kernels():
    """Two steps of six kernels, 1 ms each, with a gap of 1 ms before the last and an overlap of the first two."""
    for step in range(2):
        begin = 8 * MS * step
        for i, (name, instruction) in enumerate(
            [("nvjet", "gemm.1"), ("nvjet", "gemm.2"), ("kernel", "norm"), ("loop", "update"), ("MemcpyD2D", None)]
        ):
            yield Kernel(name, begin + i * MS, begin + (i + 1) * MS, instruction)
        yield Kernel("move", begin + 6 * MS, begin + 7 * MS)
        yield Kernel("mystery", begin + 7 * MS, begin + 8 * MS)


def test_a_step_is_told_by_layer_and_pass():
    found = step_profile.breakdown(list(kernels()), step_profile.program_of(TEXT), runs=2)
    assert (found["milliseconds"], found["idle"], found["copies"]) == (8.0, 1.0, 2.0)
    assert found["layers"]["mlp"] == {"forward": 1.0, "backward": 1.0}
    assert found["layers"]["conv"] == {"recomputed": 1.0}
    assert found["layers"]["optimizer"] == {"forward": 1.0}
    assert found["layers"]["copies"] == {"all": 2.0} and found["layers"]["unknown"] == {"all": 1.0}
    assert sum(sum(passes.values()) for passes in found["layers"].values()) == pytest.approx(7.0)
    assert found["sorts"] == {"products": 2.0, "kernels": 2.0, "copies": 2.0, "unknown": 1.0}
    row = {"kernel": "nvjet", "place": "backward mlp/project", "launches": 1.0, "milliseconds": 1.0}
    assert row in found["kernels"]
    lines = step_profile.lines(found)
    assert lines[0] == "8.00 ms on the device, idle 1.00, copies 2.00, 7 launches" and "products 2.00" in lines[1]
    assert "forward 1.00, backward 1.00" in lines[2]


def test_on_a_cpu_there_is_no_breakdown():
    taken = []
    assert step_profile.profile(taken.append, step_profile.program_of(TEXT), 3) is None
    assert taken == [3]


def exchanging():
    """A step on two GPUs of which the first gathers for 4 ms, 3 of them beside a product, and then sums for 2."""
    for gpu in (1, 0):
        yield Kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", 0, 4 * MS, None, gpu)
        yield Kernel("nvjet", 1 * MS, 5 * MS, "gemm.1", gpu)
        yield Kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 6 * MS, 8 * MS, None, gpu)


def test_what_a_gpu_exchanges_is_told_apart_and_what_of_it_nothing_hides(monkeypatch):
    monkeypatch.setattr(step_profile, "recorded", lambda run: [*exchanging()])
    found = step_profile.profile(lambda runs: None, step_profile.program_of(TEXT), 1)
    gather = {"launches": 1.0, "milliseconds": 4.0, "exposed": 1.0}
    total = {"launches": 1.0, "milliseconds": 2.0, "exposed": 2.0}
    kinds = {"all-gather": gather, "all-reduce": total}
    assert found["exchange"] == {"milliseconds": 6.0, "exposed": 3.0, "kinds": kinds}
    assert (found["milliseconds"], found["idle"], found["launches"]) == (8.0, 1.0, 3.0)
    assert found["sorts"]["collectives"] == 6.0 and found["layers"]["collectives"] == {"all": 6.0}
    assert "exchanges 6.00 ms, 3.00 of it alone: all-gather 4.00 (1.00)" in step_profile.lines(found)[2]
