"""Numbers of a look inside: how far and how widely heads read, what states grow to, what a layer is worth."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from based_jax.dims import BT
from based_jax.evals.evaluate import evaluate, model_sums
from based_jax.inside.layers import without_layer
from based_jax.inside.maps import Weights
from based_jax.nn.lm import LM
from based_jax.nn.own_mixer import short


def effective_range(weights: Weights) -> Float[Array, "H"]:
    """Return the mean distance in tokens from a query to what it reads, of each head."""
    T = weights.shape[-1]
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    return jnp.einsum("BHTS,TS->BHT", weights, np.maximum(distance, 0).astype(np.float32)).mean(axis=(0, 2))


def entropy(weights: Weights) -> Float[Array, "H"]:
    """Return the mean entropy of a query's weights in nats, of each head: e to it is about how many keys it reads."""
    return -jax.scipy.special.xlogy(weights, weights).sum(axis=-1).mean(axis=(0, 2))


def total_variation(weights: Weights, others: Weights) -> Float[Array, "H"]:
    """Return the mean share of a query's weight that lies elsewhere in other maps, between 0 and 1, of each head."""
    return 0.5 * jnp.abs(weights - others).sum(axis=-1).mean(axis=(0, 2))


def state_norms(model: LM, ids: BT) -> Float[Array, "B T L"]:
    """Return the Euclidean norm of what each layer keeps of each row, after each token, read one by one."""

    return _state_norms(model, jnp.asarray(ids))


@jax.jit
def _state_norms(model: LM, ids: BT) -> Float[Array, "B T L"]:
    def read(cache, token):
        _, cache = model.step(token, cache)
        return cache, jnp.stack(_norms(model, cache), axis=-1)

    _, norms = jax.lax.scan(read, model.init_cache(*ids.shape), jnp.moveaxis(ids, 1, 0))
    return jnp.moveaxis(norms, 0, 1)


def _norms(model: LM, caches: tuple) -> list[Float[Array, "B"]]:
    """Return the norm of each layer's state, of each row; stacked caches have the repeats of a pattern in front."""
    found = []
    for stack, of_stack in zip(model.stacks, caches, strict=True):
        for repeat in range(stack.repeats):
            for cache in of_stack:
                state = cache.state if stack.repeats == 1 else jax.tree.map(lambda x, i=repeat: x[i], cache.state)
                found.append(_norm(state))
    return found


def _norm(state: object) -> Float[Array, "B"]:
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32)).reshape(len(x), -1), axis=1) for x in floats))


@dataclasses.dataclass(frozen=True)
class Removal:
    """What a model comes to without one of its layers.

    Attributes:
      layer, kind: which one, of what mixer.
      accuracy, loss: of the model without it.
      cost: the accuracy that it loses.
    """

    layer: int
    kind: str
    accuracy: float
    loss: float
    cost: float


def removal_costs(model: LM, batches: Iterable[tuple[str, Mapping]]) -> list[Removal]:
    """Return what leaving out each layer, its MLP included, costs on (segment, batch) pairs; the dearest first.

    Raises:
      UserError: the model has a single layer.
    """
    batches = list(batches)
    whole = evaluate(model_sums(model), batches)["accuracy"]
    found = []
    for index, (kind, _) in enumerate(model.config.layers):
        left = evaluate(model_sums(without_layer(model, index)), batches)
        found.append(Removal(index, short(kind), left["accuracy"], left["loss"], whole - left["accuracy"]))
    return sorted(found, key=lambda x: (-x.cost, -x.loss))
