"""Files as torch.save writes them, made by hand: torch is not installed here."""

import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

STORAGES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


class View(NamedTuple):
    """A tensor that is a part of a storage, in elements."""

    key: str
    elements: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def view_of(key, array):
    """Return an array as the whole of a storage of its own."""
    array = np.asarray(array)
    strides = tuple(stride // array.itemsize for stride in np.ascontiguousarray(array).strides)
    return View(key, np.ascontiguousarray(array).reshape(-1), 0, array.shape, strides if array.shape else ())


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def pickled_tensor(view):
    """Return the opcodes of a tensor: torch's function, called with a persistent id, offset, shape and strides."""
    kind = f"ctorch\n{STORAGES[view.elements.dtype.name]}Storage\n".encode()
    storage = b"(" + text("storage") + kind + text(view.key) + text("cpu") + number(view.elements.size) + b"tQ"
    place = number(view.offset) + numbers(view.shape) + numbers(view.strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + b"\x89" + ORDERED_DICT + b"tR"


def pickled(views):
    """Return the pickle of a state dict, which has its attribute `_metadata`."""
    items = b"".join(text(name) + pickled_tensor(view) for name, view in views.items())
    return b"\x80\x02" + ORDERED_DICT + b"(" + items + b"u}" + text("_metadata") + ORDERED_DICT + b"sb."


def write(path, tensors, *, content=None, order="little"):
    """Write arrays or views as a torch file, or one with another pickle as its content."""
    found = {name: x if isinstance(x, View) else view_of(str(i), x) for i, (name, x) in enumerate(tensors.items())}
    root = Path(path).stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", pickled(found) if content is None else content)
        archive.writestr(f"{root}/byteorder", order)
        for view in found.values():
            elements = view.elements.view(np.uint8).reshape(-1, view.elements.itemsize)
            elements = elements[:, ::-1] if order == "big" else elements
            if f"{root}/data/{view.key}" not in archive.namelist():
                archive.writestr(f"{root}/data/{view.key}", elements.tobytes())
        archive.writestr(f"{root}/version", "3\n")
