"""Which instruction of a program's text a recorded kernel is of."""

import collections
import json
import lzma
import random
from pathlib import Path

import pytest

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


RECORDED = json.loads(lzma.decompress((Path(__file__).parent / "assets" / "recorded_step.json.xz").read_bytes()))
"""Two steps of a convolution and a Taylor layer on an H200: the kernels with their times, and the program's lines."""


@pytest.fixture(scope="module")
def program():
    return step_profile.program_of("\n".join(RECORDED["program"]))


@pytest.fixture(scope="module")
def recorded(program):
    kernels = [Kernel(name, begin, begin + length) for name, begin, length in RECORDED["kernels"]]
    return kernels, launches.instructions(kernels, program, RECORDED["steps"])


def test_of_a_recording_each_launch_is_bound_once_a_step(program, recorded):
    kernels, found = recorded
    assert {kernel.name for kernel, x in zip(kernels, found, strict=True) if x is None} == {"Memset 0"}
    bound = collections.Counter(x.name for x in found if x is not None)
    assert bound == {x.name: RECORDED["steps"] for x in launches.Schedule(program).launches}


def test_the_kernels_of_equal_products_take_equally_long(program, recorded):
    times = collections.defaultdict(list)
    for kernel, x in zip(*recorded, strict=True):
        if kernel.name.startswith("nvjet"):
            times[kernel.name, str(program.operands(x)), x.results].append(kernel.end - kernel.start)
    assert len(times) == 9 and all(max(same) < 1.2 * min(same) for same in times.values())


@pytest.mark.parametrize("seed", range(3))
def test_a_recording_with_defects_is_bound_alike(program, recorded, seed):
    rng = random.Random(seed)
    whole = [(kernel, x) for kernel, x in zip(*recorded, strict=True) if x is not None]
    fewer = [whole[i] for i in sorted(rng.sample(range(len(whole)), k=len(whole) - 4))]
    mixed = sorted(fewer, key=lambda pair: pair[0].start + rng.uniform(0, 20e3))
    helped = [pair for kernel, x in mixed for pair in [(kernel, x), *helpers(kernel, x)]]
    found = launches.instructions([kernel for kernel, _ in helped], program, RECORDED["steps"])
    places = [[step_profile.place(program, x, "")[:2] for x in those] for those in (found, [x for _, x in helped])]
    assert sum(a != b for a, b in zip(*places, strict=True)) <= 0.02 * len(helped)


def helpers(kernel, x):
    """Yield what a library runs after some of its kernels."""
    if kernel.name.startswith("nvjet") and "coop" in kernel.name:
        yield Kernel("void splitKreduce_kernel<32>", kernel.end, kernel.end), x
