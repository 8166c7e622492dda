import jax
import jax.numpy as jnp
import numpy as np
from helpers.cases import parametrize_some
from helpers.hlo import Program

from based_jax import parallel
from based_jax.ops.embedding import lookup

V, D = 24, 16


def with_gradient(table, ids):
    x, pull = jax.vjp(lambda table: lookup(table, ids), table)
    return x, *pull(jnp.cos(x))


def test_unknown_ids_are_nan(normal):
    x = jax.jit(lookup)(normal(V, D), np.int32([0, V - 1, V]))
    assert np.isnan(x).all(axis=1).tolist() == [False, False, True]


MESHES = [
    {"data": 2, "fsdp": 4},
    {"fsdp": 2, "tensor": 2, "sequence": 2},
    {"data": 1, "tensor": 8},
    {"data": 2, "sequence": 4},
]


@parametrize_some(
    "sizes, shape",
    [(sizes, shape) for sizes in MESHES for shape in ((8, 12), (8,), (3, 5))],
    [(MESHES[0], (8,)), (MESHES[1], (8, 12))],
)
def test_the_parts_of_a_table_together_are_the_table(sizes, shape, rng, normal, close):
    """Of rows that the mesh does not divide, too, and of ids that are none."""
    table, ids = normal(V, D), rng.integers(0, V, shape).astype(np.int32)
    expected = jax.jit(with_gradient)(table, ids)
    wrong = ids.copy()
    wrong[0] = V
    mesh = parallel.make_mesh(sizes)
    placed = jax.device_put(table, jax.NamedSharding(mesh, jax.P("tensor", "fsdp")))
    with jax.set_mesh(mesh):
        close(jax.jit(with_gradient)(placed, ids), expected)
        beyond = np.asarray(jax.jit(lookup)(placed, wrong))
    assert np.isnan(beyond[0]).all() and not np.isnan(beyond[1:]).any()


def test_devices_exchange_tokens_and_neither_the_table_nor_its_gradient(rng, normal):
    mesh = parallel.make_mesh({"data": 2, "fsdp": 4})
    placed = jax.device_put(normal(V, D), jax.NamedSharding(mesh, jax.P(None, "fsdp")))
    ids = jax.device_put(rng.integers(0, V, (8, 3)), parallel.batch_sharding(mesh, (8, 3)))
    with jax.set_mesh(mesh):
        program = Program(jax.jit(with_gradient).lower(placed, ids).compile().as_text())
    over_fsdp = program.exchanged((2, 4, 1, 1), parallel.AXES.index("fsdp"))
    assert {found.kind for found in over_fsdp} == {"all-gather", "all-to-all"}
    assert [found.shape for found in over_fsdp if found.kind == "all-gather"] == [(4, 3)]  # ids
    over_data = program.exchanged((2, 4, 1, 1), parallel.AXES.index("data"))
    assert [(found.kind, found.shape) for found in over_data] == [("all-reduce", (V, D // 4))]
