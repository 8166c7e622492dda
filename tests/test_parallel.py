import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from based_jax import parallel, placement
from based_jax.errors import UserError
from based_jax.nn import layers

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def parameter(names, *shape):
    return nnx.Param(jnp.zeros(shape), **layers.logical_axes(*names))


def spec(leaf):
    """Return how a parameter or an array is cut on the mesh."""
    (sharding,) = jax.tree.leaves(parallel.shardings([leaf], parallel.make_mesh(MESH)))
    return sharding.spec


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (None, (8, 1, 1, 1)),
        ({}, (8, 1, 1, 1)),
        ({"fsdp": 8}, (1, 8, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2, 1)),
        ({"data": 4, "tensor": 2}, (4, 1, 2, 1)),
        ({"sequence": 4}, (2, 1, 1, 4)),
    ],
)
def test_data_takes_the_devices_that_are_left(sizes, shape):
    mesh = parallel.make_mesh(sizes)
    assert mesh.axis_names == parallel.AXES
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensr": 2}, r"^Mesh axis 'tensr' does not exist; the axes are data, fsdp, tensor, sequence\.$"),
        ({"tensor": 0}, r"^Mesh axis 'tensor' has 0 devices; it is at least 1\.$"),
        ({"fsdp": -2, "tensor": -4}, r"^Mesh axis 'fsdp' has -2 devices; it is at least 1\.$"),
        ({"fsdp": 3}, r"^Mesh \{'data': 2, 'fsdp': 3, 'tensor': 1, 'sequence': 1\} needs 6 devices; there are 8\.$"),
        ({"data": 2, "fsdp": 2}, r"needs 4 devices; there are 8\.$"),
        ({"tensor": 16}, r"needs 16 devices; there are 8\.$"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        parallel.make_mesh(sizes)


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (parameter(("vocab", "embed"), 16, 8), jax.P("tensor", "fsdp")),
        (parameter(("embed", "mlp"), 8, 32), jax.P("fsdp", "tensor")),
        (parameter(("embed", "heads"), 8, 16), jax.P("fsdp", "tensor")),
        (parameter(("layers", "embed", "mlp"), 4, 8, 16), jax.P(None, "fsdp", "tensor")),
        (nnx.Param(jnp.zeros(8)), jax.P()),
        (jnp.zeros((), jnp.int32), jax.P()),
    ],
)
def test_logical_names_become_mesh_axes(leaf, expected):
    assert spec(leaf) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 8), jax.P(None, "tensor")), ((8, 13), jax.P("fsdp", None)), ((3, 5), jax.P(None, None))],
)
def test_a_small_array_stays_whole_where_its_names_cannot_divide_it(shape, expected):
    assert spec(parameter(("embed", "mlp"), *shape)) == expected


@pytest.mark.parametrize(
    ("names", "shape", "part"),
    [
        (("embed",), (1792,), (1792,)),
        (("layers", "embed"), (36, 1792), (36, 1792)),  # 252 KiB, 7 KiB of a layer
        (("embed",), (2**14 - 16,), (2**14 - 16,)),
        (("embed",), (2**14,), (2**10,)),
        (("embed", "heads"), (1792, 16), (112, 8)),
        (("mlp",), (1792,), (896,)),
    ],
)
def test_what_is_too_small_to_gain_by_fsdp_is_whole_over_it(monkeypatch, names, shape, part):
    monkeypatch.setattr(placement, "SMALL_BYTES", 2**16)
    mesh = AbstractMesh((1, 16, 2, 1), parallel.AXES)
    found = parallel.placement_of(abstract(names, shape), mesh)
    cuts = [math.prod(size for _, size in parts) for parts in found.parts]
    assert tuple(size // cut for size, cut in zip(shape, cuts, strict=True)) == part
    small = parallel.small_parameters({"x": abstract(names, shape)}, mesh)
    assert small == ([4 * math.prod(shape)] if 4 * math.prod(shape) // (36 if "layers" in names else 1) < 2**16 else [])
    assert parallel.small_parameters({"x": abstract(names, shape)}, AbstractMesh((16, 1, 2, 1), parallel.AXES)) == []


ATTENTION_1B = (
    (("layers", "embed", "heads"), (36, 1680, 5040)),
    (("layers", "heads", "embed"), (36, 1680, 1680)),
    (("layers", "embed", "mlp"), (36, 1680, 9216)),
    (("layers", "mlp", "embed"), (36, 4608, 1680)),
)


def abstract(names, shape, dtype=jnp.float32):
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), **layers.logical_axes(*names))


@pytest.mark.parametrize(("names", "shape"), ATTENTION_1B)
@pytest.mark.parametrize("sizes", [{"fsdp": 64}, {"fsdp": 32, "tensor": 2}, {"data": 4, "fsdp": 64}])
def test_a_width_that_64_devices_do_not_divide_leaves_nothing_whole(sizes, names, shape):
    """1680 is 16 x 105: the other dimension, or both, take what it cannot."""
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in parallel.AXES), parallel.AXES)
    found = parallel.placement_of(abstract(names, shape), mesh)
    taken = [(axis, size) for parts in found.parts for axis, size in parts]
    assert math.prod(size for _, size in taken) == math.prod(sizes.values()) // sizes.get("data", 1)
    assert all(size % math.prod(n for _, n in parts) == 0 for size, parts in zip(shape, found.parts, strict=True))
    assert parallel.placement_of(abstract(names, shape, jnp.bfloat16), mesh) == found


@pytest.mark.parametrize(
    ("names", "shape", "tensor", "expected"),
    [
        (("mlp", "embed"), (3584, 1792), 1, jax.P("fsdp", None)),
        (("layers", "heads", "embed"), (36, 1792, 1792), 1, jax.P(None, "fsdp", None)),
        (("mlp", "embed"), (3584, 1792), 2, jax.P("tensor", "fsdp")),
        (("mlp", "embed"), (3583, 1792), 1, jax.P(None, "fsdp")),
        (("embed", "mlp"), (1792, 7168), 1, jax.P("fsdp", None)),
        (("vocab", "embed"), (50264, 1792), 1, jax.P("tensor", "fsdp")),
    ],
)
def test_fsdp_divides_the_outermost_dimension_that_tensor_leaves(names, shape, tensor, expected):
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": tensor}, jax.devices()[: 4 * tensor])
    found = parallel.placement_of(abstract(names, shape), mesh).sharding(mesh)
    assert found.shard_shape(shape) == jax.NamedSharding(mesh, expected).shard_shape(shape)


def test_a_table_is_divided_by_rows_where_its_width_cannot_be():
    """The 50,272 rows of attention at 1.3B can be divided by 32, those of a vocabulary padded to 128 x 8 by 64."""
    mesh = AbstractMesh((1, 64, 1, 1), parallel.AXES)
    for rows, part in ((50272, 32), (51200, 64)):
        found = parallel.placement_of(abstract(("vocab", "embed"), (rows, 1680)), mesh)
        assert (found.parts[0][-1], found.parts[1], found.whole["fsdp"]) == (("fsdp", part), (), 64 // part)


def test_what_is_whole_is_listed_with_its_bytes():
    """A parameter that its names keep whole over an axis, one that no axis divides, and none that is small."""
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = {
        "low_rank": abstract(("embed", None), (2**12, 2**7)),
        "odd": abstract(("embed", "mlp"), (2**10 - 1, 2**10 - 1)),
        "divided": abstract(("embed", "mlp"), (2**10, 2**10)),
        "small": abstract(("embed",), (2**10 + 1,)),
    }
    assert parallel.whole_parameters(params, mesh) == [
        ("low_rank", 2**20, "tensor", 2),
        ("odd", 4 * (2**10 - 1) ** 2, "tensor", 2),
        ("odd", 4 * (2**10 - 1) ** 2, "fsdp", 2),
    ]


def test_rows_of_activations_lie_over_data_and_fsdp():
    """Those of a named dimension that the mesh divides, wherever it stands; without a mesh nothing changes."""
    x = jnp.zeros((3, 8, 4))

    def constrained(*names):
        return jax.jit(lambda x: parallel.constrain(x, *names))(x).sharding

    assert constrained("batch").num_devices == 1
    with jax.set_mesh(parallel.make_mesh(MESH)):
        assert constrained(None, "batch").spec == jax.P(None, parallel.BATCH_AXES)
        assert constrained("batch").is_fully_replicated


def test_a_batch_lies_over_data_and_fsdp():
    mesh = parallel.make_mesh(MESH)
    inputs = np.arange(16).reshape(8, 2)
    feed = parallel.Feed(mesh, 8)
    assert feed.rows.tolist() == list(range(8))
    placed = feed.arrays({"inputs": inputs, "labels": -inputs})
    assert placed["inputs"].sharding == parallel.batch_sharding(mesh, inputs.shape)
    assert {shard.data.shape for shard in placed["inputs"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed["inputs"], inputs)
    np.testing.assert_array_equal(placed["labels"], -inputs)


def test_tokens_of_a_batch_lie_over_sequence():
    """What has no tokens lies by its rows alone."""
    mesh = parallel.make_mesh({"data": 2, "sequence": 4})
    batch = {"inputs": np.arange(32).reshape(4, 8), "weights": np.arange(4)}
    placed = parallel.Feed(mesh, 4).arrays(batch)
    assert {shard.data.shape for shard in placed["inputs"].addressable_shards} == {(2, 2)}
    assert {shard.data.shape for shard in placed["weights"].addressable_shards} == {(2,)}
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)


def test_tokens_that_cannot_be_divided_stay_whole_or_are_refused(caplog):
    parallel._warn_once.cache_clear()
    mesh, message = parallel.make_mesh({"sequence": 4}), "Sequences of 6 tokens cannot be divided over 4 devices"
    placed = parallel.Feed(mesh, 4).arrays({"inputs": np.zeros((4, 6), int)})
    assert {shard.data.shape for shard in placed["inputs"].addressable_shards} == {(2, 6)}
    assert caplog.messages == [f"{message} of the mesh axis 'sequence'; all hold them whole."]
    with pytest.raises(UserError, match=f"^{message} of the mesh axis 'sequence'\\.$"):
        parallel.check_length(6, mesh)


def test_a_mesh_may_be_of_some_devices():
    mesh = parallel.make_mesh({"fsdp": 2}, jax.devices()[2:6])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert set(mesh.devices.flat) == set(jax.devices()[2:6])
    with pytest.raises(UserError, match=r"^Mesh .* needs 3 devices; there are 4\.$"):
        parallel.make_mesh({"data": 1, "fsdp": 3}, jax.devices()[:4])


def test_data_goes_over_slices_of_tpus_and_any_axis_over_hosts_of_gpus():
    def devices(platform, kind):
        for i in range(8):
            half, place = divmod(i, 4)
            near = {"coords": (place % 2, place // 2, 0), "core_on_chip": 0}
            far = {"slice_index": half, "process_index": half}
            yield SimpleNamespace(id=i, platform=platform, device_kind=kind, **near, **far)

    gpus = parallel._laid_out((1, 8, 1), list(devices("gpu", "NVIDIA H200")))
    assert [device.id for device in gpus.flat] == list(range(8))
    for make in (
        lambda sizes: parallel.make_mesh(sizes, list(devices("tpu", "TPU v5 lite"))),
        lambda sizes: parallel.abstract_mesh(sizes, 8, slices=2),
    ):
        with pytest.raises(UserError, match="Mesh axis 'data' has 1 devices; it is a multiple of the 2 slices"):
            make({"data": 1, "fsdp": 8})
    tpus = parallel._laid_out((4, 2, 1), list(devices("tpu", "TPU v5 lite")))
    assert {device.slice_index for device in tpus[:2].flat} == {0}


def test_a_batch_that_cannot_be_divided_is_refused():
    message = r"^batch_size 6 cannot be divided over 4 devices of the mesh axes data and fsdp; it is a multiple of 4\.$"
    with pytest.raises(UserError, match=message):
        parallel.Feed(parallel.make_mesh(MESH), 6)
