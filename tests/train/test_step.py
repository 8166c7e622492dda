import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from based_jax import optim, parallel
from based_jax.labels import NO_LABEL
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.loss import loss_sums
from based_jax.train.compile import train_program
from based_jax.train.run import TrainConfig
from based_jax.train.step import initial_state, make_train_step
from based_jax.train.tasks import TASKS

VOCAB = 64
LAYERS = (("attention", {"num_heads": 2}),)
SGD = optax.sgd(1.0)  # a step moves the parameters by exactly minus the gradient


def model_config(**changes):
    return LMConfig(**{"layers": LAYERS, "d_model": 16, "vocab_size": VOCAB, "dtype": "float32", **changes})


@functools.cache
def make_model(**changes):
    return nnx.jit(lambda: LM(model_config(init_std=0.2, **changes), rngs=nnx.Rngs(0)))()


def first_step(batch, microbatches=1, tx=SGD, **changes):
    """Return the state before a step, the one after it, and the metrics."""
    state = initial_state(make_model(**changes), tx)
    return state, *compiled(microbatches, tx, **changes)(state, batch)


@functools.cache
def compiled(microbatches, tx, **changes):
    return jax.jit(make_train_step(nnx.graphdef(make_model(**changes)), tx, microbatches))


def difference(after, before):
    return jax.tree.map(np.subtract, after.params, before.params)


def largest(tree):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


@pytest.fixture
def batch(rng):
    """Return 8 rows that have 8, 5, 1, 0, 0, 0, 3 and 8 labels."""
    inputs, labels = rng.integers(VOCAB, size=(2, 8, 8), dtype=np.int32)
    counts = np.array([8, 5, 1, 0, 0, 0, 3, 8])
    labels = np.where(np.arange(8) < counts[:, None], labels, NO_LABEL)
    return {"inputs": inputs, "labels": labels}


def by_hand(batch):
    """Return loss, accuracy and labels of the initial model, from its logits."""
    logits = np.asarray(nnx.jit(make_model())(batch["inputs"]), np.float64)
    labels = np.asarray(batch["labels"])
    picked, labels = logits[labels != NO_LABEL], labels[labels != NO_LABEL]
    losses = np.log(np.exp(picked).sum(-1)) - picked[np.arange(len(labels)), labels]
    return losses.mean(), (picked.argmax(-1) == labels).mean(), len(labels)


def test_the_loss_is_a_sum_over_the_labels_and_one_division(batch):
    before, after, metrics = first_step(batch)
    loss, accuracy, count = by_hand(batch)
    sums = nnx.jit(loss_sums)(make_model(), batch)
    assert sums["count"] == count == 25
    np.testing.assert_allclose(sums["loss"], loss * count, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    squares = [np.square(x).sum() for x in jax.tree.leaves(difference(after, before))]
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(squares)), rtol=1e-4)
    assert (before.step, after.step) == (0, 1)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulated_gradients_are_those_of_one_batch(batch, microbatches, close):
    before, whole, metrics = first_step(batch)
    _, accumulated, again = first_step(batch, microbatches)
    assert largest(difference(whole, before)) > 1e-3
    close(difference(accumulated, before), difference(whole, before))
    close(again, metrics)


def test_positions_without_a_label_count_for_nothing(batch, close):
    """Labels come first in each row here, so the inputs where there is none cannot matter to a causal model."""
    _, after, metrics = first_step(batch)
    other_inputs = np.where(batch["labels"] == NO_LABEL, 7, batch["inputs"])
    assert (other_inputs != batch["inputs"]).any()
    _, same, again = first_step(batch | {"inputs": other_inputs})
    close(same.params, after.params)
    close(again, metrics)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_batch_without_labels_changes_nothing(batch, microbatches):
    none = batch | {"labels": np.full_like(batch["labels"], NO_LABEL)}
    before, after, metrics = first_step(none, microbatches)
    assert {name: float(value) for name, value in metrics.items()} == {"loss": 0, "accuracy": 0, "grad_norm": 0}
    assert largest(difference(after, before)) == 0


def test_bf16_compute_keeps_fp32_master_parameters(batch):
    lr = 1e-5  # too little to move a bf16 parameter of size 0.2
    tx = optim.optimizer(optim.OptimConfig(lr=lr, schedule="constant", weight_decay=0.0), 10)
    before, after, _ = first_step(batch, tx=tx, dtype="bfloat16")
    floats = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    moved = np.abs(difference(after, before).embed.embedding[...])
    np.testing.assert_allclose(np.median(moved[moved > 0]), lr, rtol=0.01)
    assert uses_bf16("bfloat16", batch) and not uses_bf16("float32", batch)


def uses_bf16(dtype, batch):
    model = make_model(dtype=dtype)
    return "bf16[8,8,16]" in str(jax.make_jaxpr(lambda batch: loss_sums(model, batch)["loss"])(batch))


def test_the_loss_falls_on_mqar_and_the_step_compiles_once():
    model = make_model()
    tx = optim.optimizer(optim.OptimConfig(lr=1e-2, schedule="constant"), 100)
    source = TASKS["mqar"](preset="tiny").open(8)
    step = jax.jit(make_train_step(nnx.graphdef(model), tx))
    state, losses = initial_state(model, tx), []
    for i in range(40):
        state, metrics = step(state, source.batch(i % 2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0]
    assert step._cache_size() == 1


def train_config(mesh):
    return TrainConfig(
        model_config(layers=(("conv", {}), *LAYERS)),
        TASKS["mqar"](preset="tiny"),
        optim.OptimConfig(warmup_steps=0, lr=1e-2),
        steps=4,
        batch_size=8,
        mesh=mesh,
    )


def sharded_steps(config):
    program = train_program(config, parallel.make_mesh(config.mesh))
    state, metrics = program.initial_state(), {}
    for i in range(config.steps):
        batch = config.data.open(8).batch(i)
        state, metrics = program.step(state, parallel.Feed(program.mesh, 8).arrays(batch))
    assert program.jitted_step._cache_size() == 1
    return state, metrics


def unsharded_steps(config):
    tx = optim.optimizer(config.optim, config.steps)
    model = LM(config.model, rngs=nnx.Rngs(jax.random.key(0)))
    step, state, metrics = jax.jit(make_train_step(nnx.graphdef(model), tx)), initial_state(model, tx), {}
    for i in range(config.steps):
        state, metrics = step(state, config.data.open(8).batch(i))
    return state, metrics


def test_sharded_training_equals_unsharded(close):
    config = train_config({"data": 2, "fsdp": 2, "tensor": 2})
    state, metrics = sharded_steps(config)
    expected, expected_metrics = unsharded_steps(config)
    close(state.params, expected.params, tolerance=1e-3)  # Adam divides by gradients as small as rounding errors
    close(metrics, expected_metrics, tolerance=1e-4)
    assert_sharded_alike(state)


def assert_sharded_alike(state):
    """Check that Adam's moments lie where their parameter does, and that parameters are cut over fsdp and tensor."""
    adam = state.opt_state[1]
    leaves = zip(*map(jax.tree.leaves, (state.params, adam.mu, adam.nu)), strict=True)
    assert all(p.sharding == mu.sharding == nu.sharding for p, mu, nu in leaves)
    table, kernel = state.params.embed.embedding[...], state.params.stacks[1].blocks[0].mixer.out_proj.kernel[...]
    assert table.sharding.spec == jax.P("tensor", "fsdp")
    assert kernel.sharding.spec == jax.P("tensor", "fsdp")
    assert kernel.addressable_shards[0].data.shape == (8, 8)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_each_step_and_each_key_drops_something_else(microbatches, batch):
    """The rate is 0: from one step to the next nothing else changes."""
    model, tx = make_model(embed_dropout=0.5), optax.sgd(0.0)
    step = jax.jit(make_train_step(nnx.graphdef(model), tx, microbatches))

    def losses(seed):
        state, found = initial_state(model, tx, jax.random.key(seed)), []
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
        return found

    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1)}) == 6
    with pytest.raises(AssertionError, match="needs a key"):
        initial_state(model, tx)
