"""A model whose attention is swapped learns to give the model's own outputs: layer by layer, then as a whole.

Transfer: what each layer of attention reads in the model as it is, it and its substitute are both given, and what is
new in the substitute, maps and gates, is trained to the mean square of the difference of what they return, over that of
attention's; no layer sees another's errors (arXiv 2410.10254, section 3.2). Then adapters of low rank in the swapped
layers' projections are trained on the next token, with maps and gates.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from based_jax.nn import lora
from based_jax.nn.block import Stack, Stream
from based_jax.nn.lm import LM
from based_jax.nn.loss import loss_sums

NEW = ("query_maps", "key_maps", "gate/kernel", "gate/bias")
"""Of a `taylor_window`, the ends of the paths of what attention does not have."""
PROJECTIONS = ("*/mixer/qkv/kernel", "*/mixer/out_proj/kernel")
Batches = Callable[[int], dict[str, np.ndarray]]
"""Of a step: inputs, labels and segment_ids (B, T)."""


class Effort(NamedTuple):
    """How long and how fast both parts are trained."""

    transfer_steps: int = 300
    lora_steps: int = 300
    transfer_lr: float = 1e-2
    maps_lr: float = 1e-3
    lora_lr: float = 1e-3
    rank: int = 16
    seed: int = 0

    def schedule(self, peak: float, steps: int) -> optax.Schedule:
        """Return a cosine to nothing behind a short warmup."""
        return optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 20, 1), max(steps, 2), 0.0)


def swapped_stack(student: LM) -> int:
    """Return which stack has the substitutes, the last one."""
    return len(student.stacks) - 1


def new_paths(params: Any) -> list[str]:
    """Return the paths of the parameters that attention does not have."""
    return [path for path in lora.by_path(params) if any(path.endswith(f"/mixer/{name}") for name in NEW)]


def transfer(teacher: LM, student: LM, batches: Batches, effort: Effort) -> Iterator[tuple[LM, np.ndarray]]:
    """Yield the student after each step of transfer, with the layers' losses in it.

    Args:
      teacher: one stack of equal layers of attention.
      student: the same, whose last layers are swapped for equal ones of `taylor_window`.
    """
    index = swapped_stack(student)
    graphdef, params = nnx.split(student)
    prefix = f"stacks/{index}/blocks/0/"
    new = {path: x for path, x in lora.by_path(params).items() if path in set(new_paths(params))}
    optimizer = optax.adam(effort.schedule(effort.transfer_lr, effort.transfer_steps))
    blocks_def, blocks = nnx.split(student.stacks[index].blocks)
    count = student.stacks[index].repeats

    def of_layer(own, layer):
        frozen, taught, x, ids = layer
        own = {f"0/{path.removeprefix(prefix)}": value for path, value in own.items()}
        mixer = nnx.merge(blocks_def, lora.replaced(frozen, own))[0].mixer
        found, wanted = (y.astype(jnp.float32) for y in (mixer(x, ids), taught))
        real = (ids != 0)[..., None]
        return jnp.sum(real * (found - wanted) ** 2) / jnp.sum(real * wanted**2)

    @jax.jit
    def step(own, state, teacher_params, frozen, batch):
        teacher = nnx.merge(teacher_def, teacher_params)
        inputs, taught = mixed(teacher, batch["inputs"], batch["segment_ids"], count)

        def layer(_, given):
            own, frozen, x, y = given
            return None, jax.value_and_grad(of_layer)(own, (frozen, y, x, batch["segment_ids"]))

        _, (losses, grads) = jax.lax.scan(layer, None, (own, frozen, inputs, taught))
        updates, state = optimizer.update(grads, state, own)
        return optax.apply_updates(own, updates), state, losses

    teacher_def, teacher_params = nnx.split(teacher)
    state = optimizer.init(new)
    for number in range(effort.transfer_steps):
        new, state, losses = step(new, state, teacher_params, blocks, batches(number))
        yield nnx.merge(graphdef, lora.replaced(params, new)), losses


def mixed(teacher: LM, ids: jax.Array, segment_ids: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return what the last layers' mixers read, and what they return, each (layers, B, T, D)."""
    [stack] = teacher.stacks
    graphdef, params = nnx.split(stack.blocks)

    def layer(r, params):
        [block] = nnx.merge(graphdef, params)
        r, x = Stream(r).normed(block.norm1, block.dtype)
        return block.extend(Stream(r), segment_ids).total(), (x, block.mixer(x, segment_ids))

    first, last = (jax.tree.map(lambda x, part=part: x[part], params) for part in _cut(stack, count))
    r = jax.lax.scan(lambda r, p: (layer(r, p)[0], None), teacher.embedded(ids), first)[0]
    return jax.lax.scan(layer, r, last)[1]


def _cut(stack: Stack, count: int) -> tuple[slice, slice]:
    return slice(None, stack.repeats - count), slice(stack.repeats - count, None)


def adapt(student: LM, batches: Batches, effort: Effort) -> Iterator[tuple[Callable[[], LM], jax.Array]]:
    """Yield after each step what makes the student with its adapters merged, and the loss of a token in nats."""
    graphdef, params = nnx.split(student)
    index, key = swapped_stack(student), jax.random.key(effort.seed)
    patterns = [f"stacks/{index}/{pattern}" for pattern in PROJECTIONS]
    new = {path: x for path, x in lora.by_path(params).items() if path in set(new_paths(params))}
    trained = {"adapters": lora.adapters(params, patterns, effort.rank, key), "new": new}
    rates = {"adapters": effort.lora_lr, "new": effort.maps_lr}
    optimizer = optax.partition(
        {name: optax.adamw(effort.schedule(lr, effort.lora_steps)) for name, lr in rates.items()},
        {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in trained.items()},
    )

    def whole(params, trained):
        return lora.merged(lora.replaced(params, trained["new"]), trained["adapters"])

    @jax.jit
    def step(trained, state, params, batch):
        def loss(trained):
            sums = loss_sums(nnx.merge(graphdef, whole(params, trained)), batch)
            return sums["loss"] / sums["count"]

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state = optimizer.init(trained)
    for number in range(effort.lora_steps):
        trained, state, value = step(trained, state, params, batches(number))
        yield lambda trained=trained: nnx.merge(graphdef, whole(params, trained)), value


def parameters_trained(student: LM, effort: Effort) -> int:
    """Return how many parameters `adapt` trains."""
    params = nnx.state(student)
    patterns = [f"stacks/{swapped_stack(student)}/{pattern}" for pattern in PROJECTIONS]
    thin = lora.adapters(params, patterns, effort.rank, jax.random.key(0))
    new = [x for path, x in lora.by_path(params).items() if path in set(new_paths(params))]
    return sum(x.size for x in jax.tree.leaves((thin, new)))
