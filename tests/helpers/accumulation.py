"""Sums over tokens in low precision, found in what JAX makes of a function."""

import jax
import jax.extend.core as core
import jax.numpy as jnp

SUMS = {"reduce_sum", "cumsum", "reduce_window_sum", "scatter-add", "reduce", "psum"}
ADDITIONS = {"add", "add_any"}


def narrow_sums(function, *arguments, sizes):
    """Return the sums of a function's program that add up tokens in less than fp32, a line for each.

    A sum is over tokens where it adds up a multiple of one of `sizes`, which no other dimension is. What a loop carries
    is a sum if the loop adds to it. Products of matrices are none: their units sum in fp32, and round once.
    """
    found = []
    for equation in _equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        name = equation.primitive.name
        if name in SUMS and _is_narrow(equation.outvars[0]) and any(_added(equation) % size == 0 for size in sizes):
            found.append(f"{name} of {equation.invars[0].aval} to {equation.outvars[0].aval}: {_place(equation)}")
        if name == "scan":
            found += [f"a loop adds to {var.aval}: {_place(equation)}" for var in _sums_carried(equation)]
    return found


def _added(equation):
    """Return how many elements each result of a sum is of."""
    before, after = equation.invars[0].aval.size, equation.outvars[0].aval.size
    if equation.primitive.name == "scatter-add":
        return equation.invars[2].aval.size
    if equation.primitive.name == "cumsum":
        return equation.invars[0].aval.shape[equation.params["axis"]]
    return before // max(after, 1)


def _sums_carried(equation):
    """Return what a loop carries in low precision and adds to."""
    consts, carries, _ = (len(part) for part in equation.params["ft_in"].unpack())
    body = equation.params["jaxpr"]
    makers = {out: e for e in body.eqns for out in e.outvars}
    carried = zip(body.invars[consts : consts + carries], body.outvars, strict=False)
    return [
        before
        for before, after in carried
        if _is_narrow(before)
        and not isinstance(after, core.Literal)
        and after in makers
        and makers[after].primitive.name in ADDITIONS
        and before in makers[after].invars
    ]


def _is_narrow(var):
    dtype = getattr(var.aval, "dtype", jnp.float32)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name == "pallas_call":
            continue  # kernels say themselves what they sum in
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, core.Jaxpr)):
            if isinstance(inner, core.Jaxpr):
                yield from _equations(inner)


def _place(equation):
    frames = [frame for frame in equation.source_info.traceback.frames if "based_jax" in frame.file_name]
    return " < ".join(f"{frame.file_name.rpartition('based_jax/')[2]}:{frame.line_num}" for frame in frames[:3])
