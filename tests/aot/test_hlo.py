"""What is read from the text of programs whose numbers are known by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from based_jax import parallel
from based_jax.aot import collectives, costs
from based_jax.aot.hlo import ArrayType, Program

MESH = {"data": 2, "fsdp": 4}
N = 16


def program(call, *arguments):
    return Program(jax.jit(call).lower(*arguments).compile().as_text())


def scan(body, x, length):
    return jax.lax.scan(lambda carry, _: (body(carry), None), x, length=length)[0]


def test_loops_in_loops_run_as_often_as_they_say():
    def call(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], x)

    found = program(call, jnp.zeros((6, N)), jnp.zeros((5, N, N)))
    assert costs.flops(found) == 3 * 5 * 2 * 6 * N * N
    assert not found.unknown_loops


LOOP = """HloModule m

%body (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %arg = (s32[], f32[4,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[4,8]{{1,0}} get-tuple-element(%arg), index=1
  %w = f32[8,8]{{1,0}} constant({{...}})
  %y = f32[4,8]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out = (s32[], f32[4,8]{{1,0}}) tuple(%next, %y)
}}

%condition (arg.1: (s32[], f32[4,8])) -> pred[] {{
  %arg.1 = (s32[], f32[4,8]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  %bound = s32[]{{:T(128)}} {bound}
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {{
  %p = f32[4,8]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{{1,0}}) tuple(%zero, %p)
  %loop = (s32[], f32[4,8]{{1,0}}) while(%start), condition=%condition, body=%body
  ROOT %end = f32[4,8]{{1,0}} get-tuple-element(%loop), index=1
}}
"""


def test_a_loop_that_a_tpu_compiles_runs_to_the_bound_of_its_counter():
    found = Program(LOOP.format(bound="constant(7)"))
    assert costs.flops(found) == 7 * 2 * 4 * 8 * 8
    assert costs.memory_bytes(found) == 7 * (4 * 3 + 4 * (2 * 4 * 8 + 8 * 8) + 4 * 2 + 1)  # sum, product and comparison


def test_an_array_in_a_loop_s_condition_is_no_bound():
    found = Program(LOOP.format(bound="constant(7)\n  %rows = s32[1]{0} constant({0})"))
    assert costs.flops(found) == 7 * 2 * 4 * 8 * 8


def test_a_loop_without_a_bound_is_named_and_counts_once():
    found = Program(LOOP.format(bound="get-tuple-element(%arg.1), index=0"))
    assert costs.flops(found) == 2 * 4 * 8 * 8
    assert found.unknown_loops == ["loop"]


def test_a_layout_fills_the_last_dimensions_up_to_tiles():
    text = "ENTRY %m (p: f32[]) -> f32[] {\n  %x = bf16[3,5,130]{1,2,0:T(8,128)(2,1)S(1)} custom-call()\n}"
    [x] = Program(text).computations["m"]
    assert x.results == (ArrayType("bf16", (3, 5, 130), (1, 2, 0), (8, 128), 1),)
    assert x.results[0].bytes == 2 * 3 * 5 * 130
    assert x.results[0].padded_bytes == 2 * 3 * 136 * 128


@pytest.mark.parametrize("dtype", ["pred", "s8", "f8e4m3fn", "bf16", "u32", "f32", "f64", "c64"])
def test_an_element_has_the_bits_of_its_type(dtype):
    bits = {"pred": 8, "s8": 8, "f8e4m3fn": 8, "bf16": 16, "u32": 32, "f32": 32, "f64": 64, "c64": 64}
    assert ArrayType(dtype, (3,)).bytes == 3 * bits[dtype] / 8


@pytest.mark.parametrize("padding", [(0, 0), (2, 1)])
@pytest.mark.parametrize(
    ("groups", "stride", "spread", "holes"), [(1, 1, 1, 1), (2, 2, 1, 1), (4, 1, 2, 1), (1, 1, 1, 2)]
)
def test_a_convolution_makes_the_products_that_meet_its_input(padding, groups, stride, spread, holes):
    """Those of the same convolution by loops over outputs and taps."""
    T, D, F, W = 11, 4, 8, 3
    call = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride,),
        padding=(padding,),
        lhs_dilation=(holes,),
        rhs_dilation=(spread,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )
    x, w = jnp.ones((2, T, D)), jnp.ones((W, D // groups, F))
    pairs = np.asarray(jnp.sum(call(x[:1, :, :groups], jnp.ones((W, 1, groups)))[..., 0]))
    assert costs.flops(program(call, x, w)) == 2 * 2 * F * (D // groups) * pairs


def kernel(cost):
    call = 'custom-call(), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{' + cost + "}}"
    return Program(f"ENTRY %m () -> f32[8] {{\n  %k = f32[8]{{0}} {call}\n}}")


def test_a_kernel_has_the_flops_that_it_says():
    told, silent = kernel('"flops":"1234"'), kernel("")
    assert (costs.flops(told), costs.silent_kernels(told)) == (1234, 0)
    assert (costs.flops(silent), costs.silent_kernels(silent)) == (0, 1)


def test_products_in_fp32_count_as_often_as_a_tpu_makes_them():
    text = LOOP.format(bound="constant(1)").replace(
        "rhs_contracting_dims={0}", "rhs_contracting_dims={0}, operand_precision={highest,highest}"
    )
    assert costs.flops(Program(text), passes=True) == 6 * costs.flops(Program(text)) == 6 * 2 * 4 * 8 * 8


def memory(call, *arguments):
    return costs.memory_bytes(program(call, *arguments))


@pytest.mark.parametrize(
    ("scope", "place"),
    [
        ("jit(step)/jvp(stack_0)/while/body/eval_jaxpr/block_3/mlp/project/dot_general", "forward mlp/project"),
        ("jit(step)/transpose(jvp(stack_1))/while/body/checkpoint/block_0/conv/add", "backward conv/add"),
        (
            "jit(step)/transpose(jvp(stack_0))/while/body/checkpoint/rematted_computation/block_1/taylor/taylor_attention"
            "/while/body/exp",
            "recomputed taylor/taylor_attention",
        ),
        ("jit(step)/transpose(jvp(head))/linear_cross_entropy/exp", "backward head"),
        ("", "copy"),
    ],
)
def test_bytes_go_by_pass_layer_and_operation(scope, place):
    line = f'%c = f32[8]{{0}} copy(%p), metadata={{op_name="{scope}"}}'
    found = Program(f"ENTRY %m (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  {line}\n}}")
    assert costs.traffic_by_scope(found) == {place: 2 * 8 * 4}


def test_a_fused_sum_reads_its_operands_and_writes_its_result():
    x = jnp.zeros((64, 32))
    assert memory(lambda x, y: jnp.tanh(x) + y * 2, x, x) == 3 * x.nbytes


def test_a_scan_reads_of_what_it_walks_along_a_slice_at_a_time():
    xs, x = jnp.zeros((50, 1000)), jnp.zeros(1000)
    found = memory(lambda x, xs: jax.lax.scan(lambda x, y: (jnp.tanh(x * y), None), x, xs)[0], x, xs)
    per_turn = found / 50
    assert 3 * x.nbytes <= per_turn <= 6 * x.nbytes


def test_a_scan_writes_of_what_it_stacks_a_slice_at_a_time():
    x = jnp.zeros(1000)
    found = memory(lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x), x * 2), x, length=50)[1], x)
    assert 2 * x.nbytes <= found / 50 <= 8 * x.nbytes


@pytest.mark.parametrize(
    ("source", "target", "bytes"), [("", "", 2), ("", "S(1)", 1), ("S(1)", "", 1), ("S(1)", "S(1)", 0)]
)
def test_a_copy_moves_bytes_of_main_memory_at_the_ends_that_it_has_there(source, target, bytes):
    ends = [f"f32[256]{{0:T(256){space}}}" for space in (target, source)]
    lines = [f"%p = {ends[1]} parameter(0)", f"%c = ({ends[0]}, {ends[1]}, u32[]{{:S(2)}}) copy-start(%p)"]
    found = Program("ENTRY %m (p: f32[256]) -> f32[256] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}")
    assert costs.memory_bytes(found, on_chip=(1, 2)) == bytes * 1024


ASYNCHRONOUS = """
%cut (q: f32[7,1024], i: s32[]) -> f32[1,1024] {
  %q = f32[7,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,1024]{1,0} dynamic-slice(%q, %i, %zero), dynamic_slice_sizes={1,1024}
}

ENTRY %m (p: f32[7,1024], n: s32[]) -> f32[1,1024] {
  %p = f32[7,1024]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %f = ((f32[7,1024]{1,0}, s32[]), f32[1,1024]{1,0}, u32[]) fusion-start(%p, %n), kind=kLoop, calls=%cut
  ROOT %d = f32[1,1024]{1,0} fusion-done(%f)
}
"""


def test_a_fusion_that_runs_beside_others_moves_what_it_moves_by_itself():
    assert costs.memory_bytes(Program(ASYNCHRONOUS)) == 2 * 4 * 1024 + 4


def lowered(call, *specs, shape=(N, N)):
    mesh = parallel.make_mesh(MESH)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
    with jax.set_mesh(mesh):
        return mesh, Program(jax.jit(call).lower(*arguments).compile().as_text())


def constrained(*spec):
    return lambda x: jax.lax.with_sharding_constraint(x, jax.P(*spec))


SIZE = 4 * N * N
BOTH = ("data", "fsdp")


@pytest.mark.parametrize(
    ("call", "specs", "expected"),
    [
        (constrained(), [jax.P("fsdp")], ("all-gather", ("fsdp",), 1, SIZE * 3 / 4)),
        (constrained(), [jax.P(BOTH)], ("all-gather", BOTH, 1, SIZE * 7 / 8)),
        (lambda x: jnp.sum(x, 0), [jax.P("data")], ("all-reduce", ("data",), 1, 2 * 4 * N / 2)),
        (lambda x: jnp.sum(x, 0), [jax.P(BOTH)], ("all-reduce", BOTH, 1, 2 * 4 * N * 7 / 8)),
        (constrained(None, "fsdp"), [jax.P("fsdp")], ("all-to-all", ("fsdp",), 1, SIZE / 4 * 3 / 4)),
        (lambda x: scan(lambda y: jnp.tanh(constrained()(constrained("fsdp")(y))), x, 5), [jax.P("fsdp")], None),
    ],
    ids=["gather", "gather_two_axes", "sum", "sum_two_axes", "transpose", "gather_in_a_loop"],
)
def test_a_collective_has_its_axis_its_bytes_and_its_count(call, specs, expected):
    mesh, found = lowered(call, *specs)
    [moved] = collectives.by_axis(collectives.collectives(found), mesh)
    if expected is None:
        expected = "all-gather", ("fsdp",), moved.count, moved.count * SIZE * 3 / 4
        assert moved.count in (5, 6)
    assert moved == collectives.Moved(*expected)


def test_a_permutation_sends_what_it_is_given():
    mesh = parallel.make_mesh(MESH)
    ring = [(i, (i + 1) % 4) for i in range(4)]
    call = jax.shard_map(
        lambda x: jax.lax.ppermute(x, "fsdp", ring), mesh=mesh, in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp")
    )
    _, found = lowered(call, jax.P("fsdp"))
    assert collectives.by_axis(collectives.collectives(found), mesh) == [
        collectives.Moved("collective-permute", ("fsdp",), 1, SIZE / 4)
    ]


FORMS = {
    "lists": "replica_groups={{0,1,2,3},{4,5,6,7}}",
    "iota": "replica_groups=[2,4]<=[8]",
    "mesh": "replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}",
    "part": "replica_groups=mesh['all'=8] {'all':(2)4}",
}


def reduction(kind, groups):
    call = f"%r = f32[8]{{0}} {kind}(%p), {groups}"
    return Program(f"ENTRY %m (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  {call}\n}}")


@pytest.mark.parametrize("form", FORMS)
def test_groups_are_read_in_every_form(form):
    [found] = collectives.collectives(reduction("all-reduce", FORMS[form]))
    assert found.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.axes((2, 4)) == (1,)


def test_groups_of_a_transposed_iota_are_over_the_first_axis():
    [found] = collectives.collectives(reduction("all-reduce-start", "replica_groups=[4,2]<=[2,4]T(1,0)"))
    assert found.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert (found.kind, found.axes((2, 4))) == ("all-reduce", (0,))


PIECES = """%start (p.1: f32[8]) -> f32[32] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %g.1 = f32[32]{0} all-gather(%p.1), channel_id=1, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%more (p.2: f32[8]) -> f32[32] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %g.2 = f32[32]{0} all-gather(%p.2), channel_id=1, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (p.3: f32[32]) -> f32[8] {
  %p.3 = f32[32]{0} parameter(0)
  %r.3 = f32[32]{0} all-reduce(%p.3), channel_id=2, replica_groups=[2,4]<=[8]
  %at = s32[] constant(0)
  ROOT %s.3 = f32[8]{0} dynamic-slice(%r.3, %at), dynamic_slice_sizes={8}
}

ENTRY %m (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[32]{0} fusion(%p), kind=kLoop, calls=%start
  %b = f32[32]{0} fusion(%p), kind=kLoop, calls=%more
  ROOT %c = f32[8]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_collective_in_pieces_counts_once_and_a_fused_scatter_is_one():
    found = collectives.collectives(Program(PIECES))
    assert [(x.kind, x.sent_bytes(4)) for x in found] == [("all-gather", 32 * 3), ("reduce-scatter", 4 * 32 * 3 / 4)]


def test_the_products_of_devices_are_those_of_one():
    _, found = lowered(lambda x, y: x @ y, jax.P(BOTH), jax.P(None, None))
    assert costs.flops(found) == 2 * N**3 / math.prod(MESH.values())


SCOPES = """
%fused (a: f32[4]) -> f32[4] {
  %a = f32[4] parameter(0)
  %b = f32[4] negate(%a), metadata={op_name="step/block_0/mlp/neg"}
  ROOT %c = f32[4] copy(%b)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  %zeros = (f32[4], f32[4]) fusion(), kind=kLoop, calls=%zero
  %one = f32[4] get-tuple-element(%zeros), index=0
  %inner = f32[4] fusion(%p), kind=kLoop, calls=%fused
  %first = f32[4] add(%one, %inner), metadata={op_name="step/transpose(jvp(stack_1))/while/body/add"}
  %second = f32[4] add(%one, %inner), metadata={op_name="step/optimizer/add"}
  ROOT %alone = f32[4] negate(%second)
}
"""


def test_what_says_not_where_it_comes_from_is_of_what_it_fuses_or_of_what_takes_it():
    found = Program(SCOPES)
    places = {name: costs.place_of(found, found.by_name[name]) for name in ("inner", "zeros", "second", "alone")}
    assert places == {
        "inner": "forward mlp/neg",
        "zeros": "backward stack",
        "second": "forward optimizer",
        "alone": "negate",
    }
