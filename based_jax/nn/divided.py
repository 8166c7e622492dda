"""What the mesh axis "tensor" divides of a model, checked before anything is compiled."""

import math

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.nn.lm import LM
from based_jax.nn.lm_config import LMConfig
from based_jax.optim import axes_of, is_variable, path_of


def check_tensor(config: LMConfig, mesh: Mesh | AbstractMesh) -> None:
    """Check that a mesh divides a model's heads and widths.

    Raises:
      UserError: it does not; the first number that it does not divide, and what the axis can have.
    """
    devices = mesh.shape["tensor"]
    sizes = tensor_sizes(config) if devices > 1 else {}
    for what, size in sizes.items():
        if size % devices:
            most = math.gcd(*sizes.values())
            allowed = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
            raise UserError(
                f"{what} is {size}, which cannot be divided over {devices} devices of the mesh axis tensor; for this"
                f" model that can have {allowed}."
            )


def tensor_sizes(config: LMConfig) -> dict[str, int]:
    """Return what the mesh axis "tensor" divides in a model, in words: heads, widths and the vocabulary."""
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    heads = {
        f"{name} of model.layers[{i}], '{config.layers[i][0]}',": count
        for i, mixer in enumerate(model.mixers())
        for name, count in mixer.head_counts.items()
    }
    vocabulary = f"model.vocab_size, padded to a multiple of pad_vocab_multiple, {config.pad_vocab_multiple},"
    mlp = {"model.mlp_dim, or twice d_model,": config.hidden_dim} if config.mlp in ("swiglu", "gelu") else {}
    return heads | mlp | {vocabulary: config.padded_vocab_size} | _widths(nnx.state(model, nnx.Param))


def _widths(params: nnx.State) -> dict[str, int]:
    """Return the sizes of what the rules of `parallel` divide over "tensor" in each parameter, by what it is."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable):
        for name, size in zip(axes_of(leaf), leaf.get_value().shape, strict=False):
            if parallel.PARAMETER_RULES.get(name or "") == "tensor":
                found[f"The axis '{name}' of '{path_of(keys)}'"] = size
    return found
