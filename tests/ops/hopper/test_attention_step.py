"""The Hopper kernel of a token's attention as far as a CPU can tell: refusals, lowering, the interpreter."""

import jax
import jax.numpy as jnp
import pytest
from helpers.devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.errors import UserError
from based_jax.ops import ring_step as ring
from based_jax.ops.decode_calls import AttentionStepCall, RingStepCall
from based_jax.ops.ring_step import ring_step
from based_jax.ops.softmax_step import ATTENTION_STEP, attention_step


def _call(make, *, batch=2, slots=129, heads=16, groups=None, channels=112, dtype="bfloat16") -> AttentionStepCall:
    cache = batch, slots, groups or heads, channels
    arrays = make(batch, heads, channels), make(*cache), make(*cache)
    length = jnp.asarray([slots, slots // 2, 1, 0][:batch], jnp.int32)
    return AttentionStepCall(*(x.astype(dtype) for x in arrays), length)


def _zeros(*shape):
    return jnp.zeros(shape)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "q must be bfloat16, and is float16"),
        ({"heads": 8}, "multiple of 16, each with its keys, and are 8 with keys of 8"),
        ({"heads": 32, "groups": 16}, "are 32 with keys of 16"),
        ({"channels": 72}, "multiple of 16 up to 128, of values as of keys, and are 72 and 72"),
        ({"batch": 0}, "there must be keys"),
    ],
)
def test_refusals_name_the_value(options, words):
    with gpus(), pytest.raises(UserError, match=words):
        attention_step(*_call(_zeros, **options)[:4], impl="hopper")


@pytest.mark.parametrize("where", ["device", pytest.param("mesh", marks=pytest.mark.long)])
def test_lowers_for_an_h100(where):
    call = _call(_zeros, heads=32)
    with gpus(shape=(2, 2), names=("data", "tensor")) if where == "mesh" else gpus():
        step = jax.jit(lambda *arrays: attention_step(*arrays, impl="hopper"))
        assert "attention_step" in step.trace(*call[:4]).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernel in Pallas' interpreter, which looks for races."""
    from pallas_kernels.hopper import attention_step as kernels
    from pallas_kernels.hopper.mosaic import save

    monkeypatch.setattr(kernels, "load_global", lambda ref, layout: ref[...])
    monkeypatch.setattr(kernels, "load_tile", lambda lines, shape: lines[...].reshape(shape).astype(jnp.float32))
    monkeypatch.setattr(kernels, "save_lines", lambda tile, x: save(tile, x.reshape(tile.shape)))
    monkeypatch.setattr(plgpu, "load", lambda ref, **_: ref[...])
    monkeypatch.setattr(kernels, "keep_plain", lambda *refs: None)
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "slots": 5, "channels": 16},
        pytest.param({"batch": 4, "slots": 43, "heads": 32, "channels": 112}, marks=pytest.mark.long),
    ],
)
def test_the_kernel_equals_the_oracle(sizes, normal, close, interpreted):
    """Fewer keys than a tile has; more tiles than a ring has, two blocks of heads, a row of none. NaN lie behind."""
    call = _call(normal, **sizes)
    there = (jnp.arange(call.k.shape[1])[None] < call.length[:, None])[..., None, None]
    stale = {name: jnp.where(there, getattr(call, name), jnp.nan) for name in "kv"}
    found = ATTENTION_STEP["hopper_rows"].compute(call._replace(**stale))
    exact = call._replace(**{name: getattr(call, name).astype(jnp.float32) for name in "qkv"})
    close(found, ATTENTION_STEP["oracle"].compute(exact), "bfloat16")
    assert not get_races().races_found


def ring_call(make, *, batch=2, slots=9, heads=16, channels=32):
    ring = batch, slots, heads, channels
    arrays = [x.astype(jnp.bfloat16) for x in (make(batch, 3 * heads, channels), make(*ring), make(*ring))]
    length = jnp.asarray([2 * slots + 3, slots // 2, 0][:batch], jnp.int32)
    return RingStepCall(*arrays, length, make(batch, channels // 2))


def test_a_ring_lowers_for_an_h100():
    call = ring_call(_zeros, heads=32, slots=129, channels=112)
    with gpus():
        step = jax.jit(lambda *arrays: ring_step(*arrays, impl="hopper"))
        text = step.trace(*call).lower(lowering_platforms=("cuda",)).as_text()
    assert "ring_step" in text and "output_operand_alias" in text


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 3, "slots": 9},
        pytest.param({"batch": 3, "slots": 33, "heads": 32, "channels": 112}, marks=pytest.mark.long),
    ],
)
def test_a_ring_in_the_kernel_equals_the_oracle(sizes, normal, close, interpreted):
    """Rings that have gone round, are begun, and are empty, where what lies in other slots is NaN."""
    call = ring_call(normal, **sizes)
    slots = call.k.shape[1]
    there = jnp.arange(slots)[None] < jnp.minimum(call.length, slots)[:, None]
    stale = there & (jnp.arange(slots)[None] != call.length[:, None] % slots)
    k, v = (jnp.where(stale[..., None, None], x, jnp.nan) for x in (call.k, call.v))
    o, *rings = ring.IMPLEMENTATIONS["hopper_rings"].compute(call._replace(k=k, v=v))
    exact = call._replace(**{name: getattr(call, name).astype(jnp.float32) for name in ("heads", "k", "v")})
    right, *expected = ring.IMPLEMENTATIONS["xla_parts"].compute(exact)
    close(o, right, "bfloat16")
    seen = jnp.arange(slots)[None] < jnp.minimum(call.length + 1, slots)[:, None]
    for found, wanted in zip(rings, expected, strict=True):
        close(jnp.where(seen[..., None, None], found, 0), jnp.where(seen[..., None, None], wanted, 0), "bfloat16")
