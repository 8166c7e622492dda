"""Tuples of tiles in bodies of Triton kernels, for what is done alike to one or to several."""

import triton
import triton.language as tl


@triton.jit
def moved(refs, offset):
    """Return pointers so much further on."""
    found = ()
    for i in tl.static_range(len(refs)):
        found += (refs[i] + offset,)
    return found


@triton.jit
def load(refs, at):
    """Return what is at those places of all."""
    found = ()
    for i in tl.static_range(len(refs)):
        found += (tl.load(refs[i] + at),)
    return found


@triton.jit
def store(refs, at, xs):
    """Store something at those places of all, in their dtypes."""
    for i in tl.static_range(len(refs)):
        tl.store(refs[i] + at, xs[i].to(refs[i].dtype.element_ty))


@triton.jit
def cast(xs, dtype: tl.constexpr):
    """Return all in that dtype."""
    found = ()
    for i in tl.static_range(len(xs)):
        found += (xs[i].to(dtype),)
    return found


@triton.jit
def add(xs, ys):
    """Return the sums of both, one by one."""
    found = ()
    for i in tl.static_range(len(xs)):
        found += (xs[i] + ys[i],)
    return found


@triton.jit
def multiply(xs, ys):
    """Return the products of both, one by one."""
    found = ()
    for i in tl.static_range(len(xs)):
        found += (xs[i] * ys[i],)
    return found


@triton.jit
def times(xs, y):
    """Return the products of all with the same."""
    found = ()
    for i in tl.static_range(len(xs)):
        found += (xs[i] * y,)
    return found


@triton.jit
def exponentials(xs):
    """Return exp(x) of all."""
    found = ()
    for i in tl.static_range(len(xs)):
        found += (tl.exp(xs[i]),)
    return found


@triton.jit
def each_pair(queries, keys):
    """Return the products of every query's rows with every key's, those of the first query first."""
    found = ()
    for n in tl.static_range(len(queries)):
        for m in tl.static_range(len(keys)):
            found += (tl.dot(queries[n], tl.trans(keys[m])),)
    return found
