"""Triton's own interpreter for kernels that `jax_triton.triton_call` runs: without a GPU and without torch.

Memory is what a call is given, checked: a program fails that reads or writes beside its arrays, writes what another one
has written, or reads results that it has not; what nothing has written is NaN.
"""

import contextlib
import functools
import importlib
import itertools
import pkgutil
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import jax
import jax_triton
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.language import standard
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

import pallas_kernels.triton

ADDRESS_SPACE = 1 << 40
"""Of each array: the first is at this address."""
TYPES = {
    "float32": tl.float32,
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "int32": tl.int32,
    "int8": tl.int8,
    "bool": tl.int1,
}
ONE_AT_A_TIME = threading.Lock()
"""The interpreter has one grid and one memory."""


class Memory:
    """The arrays of a call, and which program has written what."""

    def __init__(self, arrays: list[np.ndarray], results: list[np.ndarray]):
        self.arrays = [x.reshape(-1) for x in (*arrays, *results)]
        self.writers = [np.full(x.size, -1) for x in self.arrays]
        self.writable = len(arrays)
        self.program = 0

    def pointers(self) -> list[tl.tensor]:
        """Return the address of each array."""

        def pointer(n, x):
            address = TensorHandle(np.array([(n + 1) * ADDRESS_SPACE], np.uint64), tl.pointer_type(type_of(x)))
            return tl.tensor(address, address.dtype)

        return [pointer(n, x) for n, x in enumerate(self.arrays)]

    def places(self, addresses: np.ndarray) -> tuple[int, np.ndarray]:
        """Return the array that addresses are of, and where they are in it."""
        addresses = addresses.astype(np.int64)
        n = int(addresses[0] // ADDRESS_SPACE) - 1
        places = (addresses - (n + 1) * ADDRESS_SPACE) // self.arrays[n].itemsize
        assert 0 <= n < len(self.arrays) and places.min() >= 0 and places.max() < self.arrays[n].size, "beside an array"
        return n, places

    def load(self, pointers, mask, other, *_) -> TensorHandle:
        dtype = interpreter._get_np_dtype(pointers.get_element_ty())
        chosen = np.broadcast_to(mask.data, pointers.data.shape)
        found = np.array(np.broadcast_to(np.zeros(1, dtype) if other is None else other.data, chosen.shape))
        if chosen.any():
            n, places = self.places(pointers.data[chosen])
            own = self.writers[n][places] == self.program
            assert n < self.writable or own.all(), "a program reads what it has not written"
            found[chosen] = self.arrays[n][places]
        return TensorHandle(found, pointers.get_element_ty())

    def store(self, pointers, value, mask, *_) -> None:
        chosen = np.broadcast_to(mask.data, pointers.data.shape)
        if chosen.any():
            n, places = self.places(pointers.data[chosen])
            assert n >= self.writable, "an argument is written"
            assert np.isin(self.writers[n][places], (-1, self.program)).all(), "two programs write one place"
            self.writers[n][places] = self.program
            self.arrays[n][places] = np.broadcast_to(value.data, chosen.shape)[chosen]


def type_of(x: np.ndarray) -> tl.dtype:
    return TYPES[x.dtype.name]


def numpy_type(type_, original=interpreter._get_np_dtype) -> np.dtype:
    """Return what holds elements of a type: for bfloat16 what can be computed with, where Triton has bits."""
    return np.dtype(ml_dtypes.bfloat16) if type_.scalar == tl.bfloat16 else original(type_)


def cast(builder, x: TensorHandle, type_) -> TensorHandle:
    return TensorHandle(x.data.astype(numpy_type(type_)), type_.scalar)


def dot(builder, a: TensorHandle, b: TensorHandle, sums: TensorHandle, *_) -> TensorHandle:
    product = np.matmul(a.data.astype(np.float32), b.data.astype(np.float32))
    return TensorHandle(product + sums.data, sums.dtype.scalar)


def bitcast(builder, x: TensorHandle, type_) -> TensorHandle:
    return TensorHandle(x.data.view(numpy_type(type_)), type_.scalar)


def fp_to_fp(builder, x: TensorHandle, type_, rounding) -> TensorHandle:
    return cast(builder, x, type_)


def run(kernel: Callable, grid, arrays, types, constants: dict) -> list[np.ndarray]:
    """Run every program of a grid, one after another, and return the results."""
    results = [np.full(x.shape, np.nan if "float" in x.dtype.name else -1, x.dtype) for x in types]
    memory = Memory([np.asarray(x) for x in arrays], results)
    builder, arguments = interpreter.interpreter_builder, memory.pointers()
    with ONE_AT_A_TIME, patched_language(kernel), np.errstate(over="ignore"):
        builder.create_masked_load, builder.create_masked_store = memory.load, memory.store
        builder.set_grid_dim(*grid)
        for memory.program, place in enumerate(itertools.product(*map(range, grid))):
            builder.set_grid_idx(*place)
            kernel(*arguments, **constants)
    return results


@contextlib.contextmanager
def patched_language(kernel: Callable) -> Iterator[None]:
    """Let what a kernel and Triton's own functions call compute."""
    scopes = [interpreter._patch_lang(function) for function in (standard.max, kernel)]
    scopes[0].set_attr(tl.tensor, "__index__", lambda x: x.handle.data.item())  # Triton's fails with numpy 2.5
    try:
        yield
    finally:
        for scope in reversed(scopes):
            scope.restore()


def triton_call(
    *arrays, kernel, out_shape, grid, name, num_warps, num_stages, compute_capability=None, **constants
) -> list[jax.Array]:
    """Stand for `jax_triton.triton_call`."""
    axes = jax.typeof(arrays[0]).manual_axis_type
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes) for x in out_shape]
    grid = (*grid, 1, 1)[:3]
    call = functools.partial(run, kernel, grid, types=types, constants=constants)
    return jax.pure_callback(lambda *arrays: call(arrays=arrays), types, *arrays)


def interpret(monkeypatch, *modules: ModuleType) -> None:
    """Let `jax_triton.triton_call` interpret the kernels of `pallas_kernels.triton`, and of more modules."""
    monkeypatch.setattr(jax_triton, "triton_call", triton_call)
    monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_type)
    unchecked = interpreter.InterpreterOptions(sanitize_overflow=False)  # of integers: a third of the time
    monkeypatch.setattr(interpreter.interpreter_builder, "options", unchecked)
    replaced = {"cast_impl": cast, "create_dot": dot, "create_bitcast": bitcast, "create_fp_to_fp": fp_to_fp}
    for name, method in replaced.items():
        monkeypatch.setattr(InterpreterBuilder, name, method)
    for place in (*kernel_modules(), *modules, standard, tl, tl.tensor):
        for name, value in list(vars(place).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(place, name, plain(value))


def kernel_modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(pallas_kernels.triton.__path__)]
    return [importlib.import_module(f"pallas_kernels.triton.{name}") for name in names]


def plain(function: JITFunction) -> Callable:
    """Return what Python can call, under the patches of `run`."""
    found = InterpretedFunction(function.fn).rewrite()
    found.fn = found  # as reductions call it
    return found
