"""Where a step's time goes, from kernels that a profiler might have recorded and the text of a program."""

import pytest

from based_jax.bench import launches, step_profile
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
    found = step_profile.breakdown(list(kernels()), step_profile.program_of(TEXT), steps=2)
    assert (found["milliseconds"], found["idle"], found["copies"]) == (8.0, 1.0, 2.0)
    assert found["layers"]["mlp"] == {"forward": 1.0, "backward": 1.0}
    assert found["layers"]["conv"] == {"recomputed": 1.0}
    assert found["layers"]["optimizer"] == {"forward": 1.0}
    assert found["layers"]["copies"] == {"all": 2.0} and found["layers"]["unknown"] == {"all": 1.0}
    assert sum(sum(passes.values()) for passes in found["layers"].values()) == pytest.approx(7.0)
    row = {"kernel": "nvjet", "place": "backward mlp/project", "launches": 1.0, "milliseconds": 1.0}
    assert row in found["kernels"]
    lines = step_profile.lines(found)
    assert lines[0] == "8.00 ms on the device, idle 1.00, copies 2.00" and "forward 1.00, backward 1.00" in lines[1]


LOOP = r"""
HloModule jit_step

%body (c: f32[4]) -> f32[4] {
  %c = f32[4] parameter(0)
  %scale.7 = f32[4] fusion(%c), kind=kLoop, calls=%f, metadata={op_name="x/block_0/mlp/mul"}
  %dot.1 = f32[4] custom-call(%c), custom_call_target="__cublas$lt$matmul", metadata={op_name="x/block_0/mlp/project"}
  %dot.2 = f32[4] custom-call(%c), custom_call_target="__cublas$gemm", metadata={op_name="x/block_1/conv/project"}
  ROOT %n = f32[4] custom-call(%c), custom_call_target="mosaic_gpu_v2", metadata={op_name="block_1/conv/norm/mpmd_map"}
}

%condition (d: f32[4]) -> pred[] {
  %d = f32[4] parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  %scale.9 = f32[4] fusion(%p), kind=kLoop, calls=%f, metadata={op_name="x/head/mul" deduplicated_name="scale.7"}
  %fmha = f32[4] custom-call(%p), custom_call_target="__cudnn$fmhaSoftmaxBackward", \
metadata={op_name="transpose(x)/block_0/attention/y"}
  ROOT %w = f32[4] while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"2"}}
}
""".replace("\\\n", "")


def places(names, steps=1):
    kernels = [Kernel(name, i, i + 1) for i, name in enumerate(names)]
    found = launches.instructions(kernels, step_profile.program_of(LOOP), steps)
    return ["/".join(step_profile.place(x, name)[:2]) for x, name in zip(found, names, strict=True)]


def test_kernels_that_are_only_named_are_found_by_the_order_of_the_schedule():
    body = ["scale_7", "nvjet_sm90_a", "sm90_xmma_gemm_b", "norm_mosaic_gpu_kernel"]
    inner = ["forward/mlp", "forward/mlp", "forward/conv", "forward/conv"]
    step = ["scale_7", "cudnn_sdpa_bprop_dot", "cudnn_sdpa_bprop", *body, *body]
    expected = ["forward/head", "backward/attention", "backward/attention", *inner, *inner]
    assert places(step * 3, steps=3) == expected * 3


def test_what_runs_more_often_than_the_schedule_says_is_unknown_unless_it_is_of_one_place():
    assert places(["nvjet_a"] * 5) == ["/unknown"] * 5
    assert places(["norm_mosaic_gpu_kernel"] * 3) == ["forward/conv"] * 3
    assert places(["splitKreduce_kernel", "a_kernel"]) == ["/unknown"] * 2


def test_on_a_cpu_there_is_no_breakdown():
    taken = []
    assert step_profile.profile(taken.append, step_profile.program_of(TEXT), 3) is None
    assert taken == [3]
