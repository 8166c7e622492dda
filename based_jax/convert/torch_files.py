"""Tensors of a torch file (pytorch_model.bin) without torch, and without running what its pickle asks for.

Such a file is a zip: `data.pkl`, a pickle in which a tensor is a call of torch's `_rebuild_tensor_v2` on a persistent
id, and one record of raw elements for each id. The pickle can name any function; here it gets three, which make
descriptions of tensors, and all others end the reading.
"""

import collections
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from based_jax.errors import UserError

ELEMENTS = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool,
}
STATE_DICT = "state_dict"  # where a training checkpoint keeps its model
AS_SAFETENSORS = (
    'python -c "import torch, safetensors.torch as s; s.save_file({k: v.clone() for k, v in'
    " torch.load('pytorch_model.bin', map_location='cpu', weights_only=True).items()}, 'model.safetensors')\""
)


class ElementType(NamedTuple):
    """The type of a storage, which the pickle names by torch's class."""

    name: str


class Storage(NamedTuple):
    """A record of raw elements."""

    element: ElementType
    key: str
    size: int


class Tensor(NamedTuple):
    """A view of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the arrays of a torch file by name; a `state_dict` inside a training checkpoint is that.

    Raises:
      UserError: the file is missing, damaged or older than torch 1.6, holds anything but tensors, or its pickle asks
        for a function that makes none; nothing of it has been called.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(_no_zip(path))
    try:
        with zipfile.ZipFile(path) as archive:
            return _arrays(archive)
    except UserError as error:
        raise UserError(f"'{path}' cannot be read: {error}") from None
    except OSError:
        raise
    except Exception as error:  # a pickle or a zip that is damaged fails in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise UserError(f"'{path}' is damaged: {reason}.") from None


def _no_zip(path: str | os.PathLike) -> str:
    """Return what a file is that is no zip; a missing one raises its OSError."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            return f"'{path}' is damaged: the end of the zip is missing."
    return f"'{path}' is no zip file, as torch has written them since 1.6; with torch, {AS_SAFETENSORS} rewrites it."


def _arrays(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    root = next((name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("data.pkl")), None)
    if root is None:
        raise UserError("it has no data.pkl, as torch's files have.")
    with archive.open(f"{root}data.pkl") as file:
        found = _TensorUnpickler(file).load()
    tensors = found.get(STATE_DICT, found) if isinstance(found, dict) else found
    if not isinstance(tensors, dict):
        raise UserError(f"it holds a {type(tensors).__name__}; it holds tensors by name.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{name!r:.60} is a {type(tensor).__name__} there; it is a tensor.")
    records = _records(archive, root, tensors)
    return {name: _array(tensor, records[tensor.storage]) for name, tensor in tensors.items()}


class _TensorUnpickler(pickle.Unpickler):
    """Calls nothing but what describes a tensor."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global of torch here."""
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and name in ELEMENTS:
            return ElementType(name)
        raise UserError(f"its pickle asks for '{module}.{name}', which makes no tensor; nothing was run.")

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage of a persistent id: ("storage", type, key, device, elements)."""
        kind, element, key, _, size = pid
        if kind != "storage" or not isinstance(element, ElementType) or not isinstance(key, str):
            raise UserError(f"{pid!r:.60} is no storage of a known type.")
        return Storage(element, key, _count(size))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """Take the place of `torch._utils._rebuild_tensor_v2`."""
    if not isinstance(storage, Storage):
        raise UserError(f"a tensor is made of {storage!r:.60}; it is made of a storage.")
    tensor = Tensor(storage, _count(offset), tuple(map(_count, shape)), tuple(map(_count, strides)))
    if len(tensor.shape) != len(tensor.strides):
        raise UserError(f"a tensor of shape {tensor.shape} has strides {tensor.strides}.")
    return tensor


def _parameter(tensor: Any, *_: Any) -> Any:
    """Take the place of `torch._utils._rebuild_parameter`."""
    return tensor


ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise UserError(f"a tensor has a size, a stride or an offset of {value!r:.40}.")
    return value


def _records(archive: zipfile.ZipFile, root: str, tensors: Mapping[str, Tensor]) -> dict[Storage, np.ndarray]:
    """Return the elements of each storage, which several tensors may share."""
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.namelist() else b"little"
    records = {}
    for storage in {tensor.storage for tensor in tensors.values()}:
        dtype = np.dtype(ELEMENTS[storage.element.name])
        content = np.frombuffer(archive.read(f"{root}data/{storage.key}"), np.uint8)
        if content.size < storage.size * dtype.itemsize:
            raise UserError(f"record {storage.key} has {content.size} bytes for {storage.size} {dtype}.")
        elements = content[: storage.size * dtype.itemsize].reshape(storage.size, dtype.itemsize)
        elements = elements[:, ::-1] if order == b"big" else elements
        records[storage] = np.ascontiguousarray(elements).reshape(-1).view(dtype)
    return records


def _array(tensor: Tensor, elements: np.ndarray) -> np.ndarray:
    """Return a contiguous copy of the view, after a check that it lies within its storage."""
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, elements.dtype)
    if last >= len(elements) or math.prod(tensor.shape) > len(elements):
        raise UserError(f"a tensor of shape {tensor.shape} does not lie in its storage of {len(elements)} elements.")
    strides = [stride * elements.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(elements[tensor.offset :], tensor.shape, strides).copy()
