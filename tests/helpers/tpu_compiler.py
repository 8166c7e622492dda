"""Programs for TPUs that are not there, by libtpu where the extra `tpu` has brought it."""

import importlib.util
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from based_jax.aot import topology

SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1")
"""Of each generation the smallest."""

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="the extra `tpu`, libtpu, is not installed"
)


def compiled_text(name: str, function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> str:
    """Return what a function of such arguments is compiled to for a TPU of a slice, that may write donated ones."""
    mesh = Mesh(np.asarray(topology.find(name).devices[:1]), ("data",))
    whole = NamedSharding(mesh, jax.P())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments)
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=donate).trace(*arguments).lower().compile().as_text()


def lowered_kernels(function: Any, *arguments: Any) -> list[str]:
    """Return the calls of kernels, with the types that they take and make, in what is lowered for TPUs: no libtpu."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    return re.findall(r"@tpu_custom_call\(.*?\) .*?: \(.*", text)
