"""The layers of a model one by one: their blocks, what their mixers read, and the model without one of them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.dims import BT, BTD
from based_jax.errors import UserError
from based_jax.nn.block import Block, Stack, Stream
from based_jax.nn.lm import LM


def blocks_of(model: LM) -> list[Block]:
    """Return the block of each layer in order, with parameters of its own where layers are stacked."""
    return [block for stack in model.stacks for block in _unstacked(stack)]


def _unstacked(stack: Stack) -> list[Block]:
    if stack.repeats == 1:
        return list(stack.blocks)
    graphdef, params = nnx.split(stack.blocks)
    copies = (nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], params)) for i in range(stack.repeats))
    return [block for blocks in copies for block in blocks]


def mixer_inputs(model: LM, ids: BT) -> list[BTD]:
    """Return what the mixer of each layer reads of these tokens: the norm of the residual stream."""
    return _mixer_inputs(model, jnp.asarray(ids))


@jax.jit
def _mixer_inputs(model: LM, ids: BT) -> list[BTD]:
    stream, found = Stream(model.embedded(ids)), []
    for block in blocks_of(model):
        r, x = stream.normed(block.norm1, block.dtype)
        found.append(x)
        stream = block.extend(Stream(r))
    return found


def without_layer(model: LM, index: int) -> LM:
    """Return a model that shares all parameters but those of one layer, mixer and MLP, which it does not have.

    Raises:
      UserError: there is no such layer, or no other one.
    """
    layers = model.config.layers
    if not 0 <= index < len(layers):
        raise UserError(f"index is {index}; the model has layers 0 to {len(layers) - 1}.")
    if len(layers) == 1:
        raise UserError("index is 0, and the model has no other layer; it keeps one at least.")
    config = dataclasses.replace(model.config, layers=layers[:index] + layers[index + 1 :], scan_layers=False)
    blocks = blocks_of(model)
    del blocks[index]
    found = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    for name in ("embed", "norm", "embed_norm", "head"):
        if hasattr(model, name):
            setattr(found, name, getattr(model, name))
    for stack, block in zip(found.stacks, blocks, strict=True):
        stack.blocks = nnx.List([block])
    return found
