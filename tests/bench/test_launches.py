"""Which instruction of a program's text a recorded kernel is of."""

from based_jax.bench import launches, step_profile
from based_jax.bench.timing import Kernel

TEXT = r"""
HloModule jit_step

%dynamic-slice-fusion (m: f32[4]) -> f32[4] {
  %m = f32[4] parameter(0)
  ROOT %n = f32[4] custom-call(%m), custom_call_target="mosaic_gpu_v2", metadata={op_name="block_1/conv/norm/mpmd_map"}
}

%moves (k: f32[4]) -> f32[4] {
  %k = f32[4] parameter(0)
  ROOT %copy.3 = f32[4] copy(%k)
}

%body (c: f32[4]) -> f32[4] {
  %c = f32[4] parameter(0)
  %scale.7 = f32[4] fusion(%c), kind=kLoop, calls=%f, metadata={op_name="x/block_0/mlp/mul"}
  %dot.1 = f32[4] custom-call(%c), custom_call_target="__cublas$lt$matmul", metadata={op_name="x/block_0/mlp/project"}
  %slices = f32[4] fusion(%c), kind=kCustom, calls=%dynamic-slice-fusion
  ROOT %dot.2 = f32[4] custom-call(%c), custom_call_target="__cublas$gemm", metadata={op_name="x/block_1/conv/project"}
}

%condition (d: f32[4]) -> pred[] {
  %d = f32[4] parameter(0)
  ROOT %go = pred[] fusion(%d), kind=kLoop, calls=%g
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  %scale.9 = f32[4] fusion(%p), kind=kLoop, calls=%f, metadata={op_name="x/head/mul" deduplicated_name="scale.7"}
  %fmha = f32[4] custom-call(%p), custom_call_target="__cudnn$fmhaSoftmaxBackward", \
metadata={op_name="transpose(x)/block_0/attention/y"}
  %w = f32[4] while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %wrapped_convert.1 = bf16[4] fusion(%w), kind=kLoop, calls=%moves, metadata={op_name="x/block_2/taylor/convert"}
  %wrapped_convert.2 = bf16[4] fusion(%p), kind=kLoop, calls=%h, metadata={op_name="x/embed/convert"}
  %wrapped_convert.3 = bf16[8] fusion(%w), kind=kLoop, calls=%h, metadata={op_name="x/optimizer/convert"}
  ROOT %wrapped_convert.4 = bf16[4] fusion(%w), kind=kLoop, calls=%h, metadata={op_name="x/head/convert"}
}
""".replace("\\\n", "")
BODY = ["scale_7", "nvjet_sm90_a", "norm_mosaic_gpu_kernel", "sm90_xmma_gemm_b"]
IN_BODY = ["forward/mlp", "forward/mlp", "forward/conv", "forward/conv"]
STEP = ["scale_7", "cudnn_sdpa_bprop_dot", "cudnn_sdpa_bprop", *BODY, *BODY]
IN_STEP = ["forward/head", "backward/attention", "backward/attention", *IN_BODY, *IN_BODY]


def places(names, steps=1):
    kernels = [Kernel(name, i, i + 1) for i, name in enumerate(names)]
    program = step_profile.program_of(TEXT)
    found = launches.instructions(kernels, program, steps)
    return ["/".join(step_profile.place(program, x, name)[:2]) for x, name in zip(found, names, strict=True)]


def test_kernels_that_are_only_named_are_found_by_the_order_of_the_schedule():
    assert places(STEP * 3, steps=3) == IN_STEP * 3


def test_a_kernel_that_instructions_share_has_the_name_of_any_of_them():
    assert places([name.replace("scale_7", "scale_9") for name in STEP]) == IN_STEP
    converted = ["wrapped_convert_4", "wrapped_convert_1", "wrapped_convert_3", "wrapped_convert_4"]
    assert places(converted) == ["forward/taylor", "forward/embed", "forward/optimizer", "forward/head"]


def test_a_library_may_run_several_kernels_in_a_call_or_none():
    helped = [*STEP[:5], "splitKreduce_kernel", *STEP[5:7], "void splitKreduce_kernel<32>", *STEP[7:]]
    found = [*IN_STEP[:5], "forward/mlp", *IN_STEP[5:7], "forward/conv", *IN_STEP[7:]]
    assert places(helped * 2, steps=2) == found * 2
    assert places([*STEP[:4], *STEP[5:]]) == [*IN_STEP[:4], *IN_STEP[5:]]
    assert places([*STEP[:5], "gemv_kernel", *STEP[5:]]).count("/unknown") == 1


def test_a_fusion_of_a_product_is_no_call_of_a_library():
    assert places([*STEP, "gemm_fusion_dot_3"]) == [*IN_STEP, "/unknown"]
    named = TEXT.replace("scale.7", "gemm_fusion_dot.7")
    program = step_profile.program_of(named)
    [found] = launches.instructions([Kernel("gemm_fusion_dot_7", 0, 1)] * 3, program, 1)[1:2]
    assert found.name == "gemm_fusion_dot.7"


def test_an_instruction_that_was_told_is_that():
    kernels = [Kernel("name", i, i + 1, told) for i, told in enumerate(["dot.2", "fmha", "copy.3", "no.such"])]
    found = launches.instructions(kernels, step_profile.program_of(TEXT), 1)
    assert [x and x.name for x in found] == ["dot.2", "fmha", "copy.3", None]


def test_what_runs_otherwise_than_the_schedule_says_is_unknown_unless_it_is_of_one_place():
    assert places(["nvjet_a"] * 5) == ["/unknown"] * 5
    assert places(["norm_mosaic_gpu_kernel"] * 3) == ["forward/conv"] * 3
    assert places(["splitKreduce_kernel", "a_kernel"]) == ["/unknown"] * 2
