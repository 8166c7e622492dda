import json

import jax
import jax.numpy as jnp
import pytest

from based_jax.__main__ import main
from based_jax.bench import kernels, timing, torch_peers
from based_jax.bench.cases import arrays_of, results_of
from based_jax.bench.catalogue import OPERATIONS, TIMED, timed_case, timed_operation
from based_jax.bench.catalogue.operation import BOTH, FORWARD, PASSES
from based_jax.bench.timing import Kernel
from based_jax.commands.bench.kernels import line, parse_shape
from based_jax.errors import UserError
from based_jax.ops import delta_rule, gated_linear_attention

H100 = "NVIDIA H100 80GB HBM3"


def events(*calls):
    """Return kernels of (name, start, end) in microseconds, in no order."""
    return [Kernel(name, 1e3 * start, 1e3 * end) for call in reversed(calls) for name, start, end in call]


def test_span_is_the_median_from_first_start_to_last_end():
    calls = [[("a", 0, 10), ("b", 12, 30)], [("a", 100, 120), ("b", 110, 115)], [("a", 200, 202), ("b", 250, 260)]]
    assert timing.span(events(*calls), 3) == pytest.approx(30)
    with pytest.raises(RuntimeError, match="6 kernels in 4"):
        timing.span(events(*calls), 4)
    with pytest.raises(RuntimeError, match="0 kernels"):
        timing.span([], 4)


def test_parts_are_the_medians_of_each_name_and_the_gaps():
    calls = [
        [("sums", t, t + 10), ("forward", t + 12, t + 30), ("sums", t + 25, t + 40), ("copy", t + 45, t + 50)]
        for t in (0, 100, 200)
    ]
    found = timing.parts(events(*calls), 3)
    assert found.span == pytest.approx(50) and found.idle == pytest.approx(2 + 5)
    assert found.kernels == [("sums", 2, 25.0), ("forward", 1, 18.0), ("copy", 1, 5.0)]


@pytest.mark.parametrize("repeats, seconds, calls", [(20, 1e-4, 20), (20, 0.1, 15), (20, 2.0, 3), (1, 2.0, 1)])
def test_slow_calls_are_repeated_less(repeats, seconds, calls):
    assert timing.affordable(repeats, seconds) == calls


def cost(name, shape, which):
    """Return the least (bytes, FLOPs) of a token and head."""
    batch, heads, time = shape
    found = timed_operation(name).cost(timed_case(name, shape, "xla"), which)
    return tuple(x / (batch * heads * time) for x in found)


def test_floors_are_those_of_the_notes():
    shape = 8, 16, 2048
    size, flops = cost("taylor_attention", shape, "forward")
    tokens = 8 * 16 * 2048
    assert size == 2 * (16 + 16 + 64 + 64) + 4
    assert kernels.floor_microseconds(size * tokens, flops * tokens, H100) == pytest.approx(28.8, abs=0.1)
    both, _ = cost("taylor_attention", shape, "forward+backward")
    assert both - size == 644
    assert cost("window_attention_64", shape, "forward")[0] == 512
    assert kernels.floor_microseconds(1.0, 1.0, "cpu") is None


@pytest.mark.parametrize(
    "name, backward", [("gated_short_conv", 5 * 128), ("short_conv", 3 * 128), ("residual_rms_norm", 64 * 16)]
)
def test_the_forward_floor_is_what_the_call_takes_and_returns(name, backward):
    shape = batch, heads, time = (2, 2, 4096)
    case = timed_case(name, shape, "xla")
    arrays = [*arrays_of(case).values(), *results_of(case).values()]
    size = sum(x.size * x.dtype.itemsize for x in arrays if time in x.shape)
    (forward, _), (both, _) = (cost(name, shape, which) for which in PASSES)
    assert size == forward * batch * heads * time
    assert both - forward == backward


@pytest.mark.parametrize(
    "name, forward, backward",
    [
        ("taylor_attention", 324, 644),
        ("attention", 516, 1028),
        ("window_attention_128", 512, 896),
        ("gated_linear_attention", 768, 1408),
        ("simple_gla", 516, 904),
        ("delta_rule", 768, 1408),
        ("gated_delta_rule", 516, 904),
        ("dplr", 1280, 2432),
    ],
)
def test_the_bytes_of_a_token_and_head(name, forward, backward):
    (first, _), (both, _) = (cost(name, (1, 2, 64), which) for which in PASSES)
    assert (first, both - first) == (forward, backward)


# The a and b that `dplr` is given are made of one array.
@pytest.mark.parametrize("name", [name for name in TIMED if name != "dplr"])
def test_no_call_takes_fewer_bytes_than_its_cost_and_gradients_cost_more(name):
    case = timed_case(name, (2, 2, 4096), "xla")
    arrays = [*arrays_of(case).values(), *results_of(case).values()]
    forward, *both = [OPERATIONS[case.operation].cost(case, which) for which in timed_operation(name).passes]
    assert forward[0] == pytest.approx(sum(x.size * x.dtype.itemsize for x in arrays), rel=0.02)
    assert all(size > 2 * forward[0] and flops >= forward[1] for size, flops in both)


def test_the_larger_of_memory_and_products_is_the_floor():
    assert kernels.floor_microseconds(2.95e6, 0.0, H100) == pytest.approx(1.0)
    assert kernels.floor_microseconds(2.95e6, 989e6 * 3, H100) == pytest.approx(3.0)


def test_sets_have_the_same_tokens_until_one_row_is_left():
    assert [b * t for b, _, t in kernels.LENGTH_SHAPES] == [1 << 14] * 5 + [1 << 15, 1 << 16]
    assert {b * h * t for b, h, t in kernels.SHORT_SHAPES} == {262_144}
    assert [t for _, _, t in kernels.SHORT_SHAPES] == [64, 128, 256, 512, 1024]


def test_every_peer_has_an_operation():
    assert set(torch_peers.PEERS) <= set(TIMED)


def test_any_entry_of_a_table_can_be_named():
    taylor = OPERATIONS["taylor_attention"]
    assert taylor.usual_impls == ["hopper_chunks", "triton_chunks", "xla_chunks"]
    names = ["hopper_chunks", "xla_chunks", "xla_quadratic", "xla_steps", "oracle"]
    assert taylor.impls(names) == taylor.impls(["hopper", "xla", "quadratic", "recurrent", "oracle"]) == names
    assert OPERATIONS["attention"].usual_impls == ["cudnn_flash", "hopper_turns", "hopper_tiles", "triton_tiles"]
    assert "cudnn_flash" in timed_operation("window_attention_64").usual_impls


@pytest.mark.parametrize(
    "name",
    ["taylor_attention", "short_conv", "attention_step"]
    + [
        pytest.param(name, marks=pytest.mark.long)
        for name in TIMED
        if name not in ("taylor_attention", "short_conv", "attention_step", "window_attention_128")
    ],
)
def test_all_passes_are_compiled_and_timed(name, monkeypatch):
    def timed(call, inputs, repeats):
        assert len(inputs) == repeats == 2
        jax.block_until_ready([call(*x) for x in inputs])
        return 40.0

    monkeypatch.setattr(kernels, "device_microseconds", timed)
    rows = list(kernels._ours(name, (4, 8, 48), ["xla"], 2, H100))
    [impl] = timed_operation(name).impls(["xla"])
    assert [(row["impl"], row["pass"], row.get("error")) for row in rows] == [
        (impl, x, None) for x in timed_operation(name).passes
    ]
    assert all(row["microseconds"] == 40.0 and row["floor_microseconds"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["gated_delta_rule_step", "short_conv_step"])
def test_a_step_is_timed_where_its_state_lies(name):
    case = timed_case(name, (2, 2, 48), "xla")
    (_, arrays), *_ = kernels.inputs(case, 1)
    call, before, wanted = kernels.compiled(case, FORWARD), arrays["before"], kernels.program(case, FORWARD)(arrays)
    found = call(arrays)
    assert before.is_deleted() and arrays["before"] is found["after"]
    assert jnp.allclose(found["after"], wanted["after"], rtol=1e-5, atol=1e-5)
    assert not jnp.array_equal(call(arrays)["after"], wanted["after"])


def unit_keys(k):
    return k * jax.lax.rsqrt(jnp.sum(k.astype(jnp.float32) ** 2, axis=-1, keepdims=True)).astype(k.dtype)


def gated(arrays):
    given = *(arrays[name] for name in ("q", "k", "v")), -jax.nn.softplus(arrays["g"])
    return gated_linear_attention.gated_linear_attention(*given, impl="xla")[0]


def corrected(arrays):
    given = arrays["q"], unit_keys(arrays["k"]), arrays["v"], -jax.nn.softplus(arrays["g"])
    return delta_rule.delta_rule(*given, jax.nn.sigmoid(arrays["beta"][..., 0]), impl="xla")[0]


@pytest.mark.parametrize(
    "name, wanted",
    [
        pytest.param("gated_linear_attention", gated, marks=pytest.mark.long),
        ("simple_gla", gated),
        pytest.param("delta_rule", corrected, marks=pytest.mark.long),
        pytest.param("gated_delta_rule", corrected, marks=pytest.mark.long),
    ],
)
def test_what_is_timed_makes_of_the_arrays_what_the_peers_make(name, wanted):
    """The committed rows are of these programs, and `torch_peers` computes the same."""
    case = timed_case(name, (1, 2, 48), "xla_chunks")
    (gradients, arrays), *_ = kernels.inputs(case, 1)
    out, found = jax.jit(kernels.program(case, BOTH))(gradients, arrays)
    o, pull = jax.jit(lambda x: jax.vjp(wanted, x))(arrays)
    assert jnp.array_equal(out["o"], o)
    [slopes] = pull(gradients["o"])
    assert all(jnp.allclose(x, slopes[key], rtol=1e-2, atol=1e-2) for key, x in found.items())
    assert jnp.array_equal(jax.jit(kernels.program(case, FORWARD))(arrays)["o"], o)


def test_what_cannot_run_is_a_row():
    rows = list(kernels._ours("taylor_attention", (1, 2, 24), ["hopper"], 2, H100))
    assert len(rows) == 2 and all("it needs cuda" in row["error"] for row in rows)


def test_a_failure_is_a_row():
    def fails():
        raise RuntimeError("no memory\nat all")

    row = kernels._row("attention", "cudnn_flash", (1, 2, 3), "forward", fails, "cpu")
    assert row["error"] == "RuntimeError: no memory"
    assert "no memory" in line(row) and "(1,2,3)" in line(row)


def test_a_row_prints_its_numbers():
    measured = kernels._row("taylor_attention", "hopper_chunks", (8, 16, 2048), "forward", lambda: 40.0, H100)
    assert json.loads(json.dumps(measured))["ratio_to_floor"] == pytest.approx(40 / 28.79, abs=0.01)
    assert line(measured).split()[-4:] == ["28.79", "1.39", "2.12", "291"]


@pytest.mark.parametrize("text", ["8x16", "8x16x0", "axbxc", "8x16x2048x0", "tables"])
def test_a_wrong_shape_is_named(text, capsys):
    assert main(["bench", "kernels", "--shapes", text]) == 2
    assert f"'{text}' is no shape" in capsys.readouterr().err


def test_a_call_may_have_dims_of_its_own():
    shape = parse_shape("8x16x2048x16x112")
    assert timed_case("taylor_attention", shape, "xla").dims == (16, 112)
    assert kernels.place("taylor_attention", "xla", shape, FORWARD)["dims"] == [16, 112]
    with pytest.raises(UserError, match="leave out --peers, or the dims"):
        next(kernels.measure(["taylor_attention"], [shape], peers=True))


def test_bad_input_is_one_sentence(capsys):
    assert parse_shape("8x16x2048") == (8, 16, 2048)
    for words, message in (
        (["--shapes", "8x16x2048x2"], "taylor_attention has 2 dims after BxHxT (16x64 by itself), not 1."),
        (["--ops", "nothing"], "Unknown operation 'nothing'"),
        (["--repeats", "0"], "repeats is 0"),
        ([], "measures GPU kernels, and the device here is cpu"),
    ):
        assert main(["bench", "kernels", *words]) == 2
        assert message in capsys.readouterr().err


def test_an_implementation_that_nothing_has_is_named(monkeypatch):
    class Gpu:
        platform, device_kind = "gpu", H100

    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    with pytest.raises(UserError, match="Unknown implementation 'hoper': did you mean 'hopper'"):
        next(kernels.measure(["taylor_attention"], [(1, 1, 1)], impls=["hoper"]))
