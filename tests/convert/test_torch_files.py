"""Torch's files are read without torch: every dtype, views of shared storages, and nothing that a pickle asks for."""

import ml_dtypes
import numpy as np
import pytest
from helpers import torch_files
from helpers.torch_files import View, text

from based_jax.convert.torch_files import ELEMENTS, read_tensors
from based_jax.errors import UserError


@pytest.mark.parametrize("order", ["little", "big"])
def test_every_dtype(order, tmp_path, rng):
    wanted = {name: (10 * rng.standard_normal((2, 3))).astype(dtype) for name, dtype in ELEMENTS.items()}
    wanted |= {"scalar": np.float32(3), "empty": np.zeros((0, 4), ml_dtypes.bfloat16)}
    torch_files.write(tmp_path / "x.bin", wanted, order=order)
    found = read_tensors(tmp_path / "x.bin")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == np.asarray(array).dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_views_of_one_storage(tmp_path):
    elements = np.arange(12, dtype=np.float32)
    views = {
        "whole": View("0", elements, 0, (3, 4), (4, 1)),
        "tied": View("0", elements, 0, (3, 4), (4, 1)),
        "transposed": View("0", elements, 0, (4, 3), (1, 4)),
        "column": View("0", elements, 2, (3,), (4,)),
    }
    torch_files.write(tmp_path / "x.bin", views)
    found = read_tensors(tmp_path / "x.bin")
    whole = elements.reshape(3, 4)
    for name, array in {"whole": whole, "tied": whole, "transposed": whole.T, "column": whole[:, 2]}.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].flags.c_contiguous


def test_the_state_dict_inside_a_training_checkpoint(tmp_path):
    inner = torch_files.pickled({"a": torch_files.view_of("0", np.ones(2, np.float32))})[2:-1]
    content = b"\x80\x02}(" + text("epoch") + b"K\x03" + text("state_dict") + inner + b"u."
    torch_files.write(tmp_path / "x.bin", {"a": np.ones(2, np.float32)}, content=content)
    assert read_tensors(tmp_path / "x.bin")["a"].tolist() == [1, 1]


CALL = b"(" + text("touch ran") + b"tR."
PICKLES = {
    "a command": (b"\x80\x02cos\nsystem\n" + CALL, "'os.system'"),
    "python": (b"\x80\x02c__builtin__\neval\n" + CALL, "'__builtin__.eval'"),
    "an object": (b"\x80\x02(" + text("touch ran") + b"ios\nsystem\n.", "'os.system'"),
    "by stack": (b"\x80\x04" + text("posix") + text("system") + b"\x93" + CALL, "'posix.system'"),
    "inside": (b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93.", "__globals__'"),
    "of torch": (b"\x80\x02ctorch.hub\nload\n" + CALL, "'torch.hub.load'"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_what_a_pickle_asks_for_is_not_run(name, tmp_path, monkeypatch):
    content, named = PICKLES[name]
    monkeypatch.chdir(tmp_path)
    torch_files.write("x.bin", {}, content=content)
    with pytest.raises(UserError, match=f"{named}, which makes no tensor; nothing was run\\.$"):
        read_tensors("x.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


ONES = np.ones(4, np.float32)
DAMAGED = {
    "behind the end": ({"a": View("0", ONES, 2, (3,), (1,))}, {}, "does not lie in its storage of 4 elements"),
    "one element many times": ({"a": View("0", ONES, 0, (2**30,), (0,))}, {}, "does not lie in its storage"),
    "a negative offset": ({"a": View("0", ONES, -1, (3,), (1,))}, {}, "an offset of -1"),
    "two strides": ({"a": View("0", ONES, 0, (4,), (1, 1))}, {}, "has strides"),
    "no mapping": ({}, {"content": b"\x80\x02K\x03."}, "it holds a int; it holds tensors by name"),
    "no tensor": ({}, {"content": b"\x80\x02}" + text("a") + b"K\x03s."}, "'a' is a int there; it is a tensor"),
    "half a pickle": ({}, {"content": b"\x80\x02}("}, "is damaged"),
    "a missing record": ({}, {"content": torch_files.pickled({"a": torch_files.view_of("7", ONES)})}, "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_file_of_tensors(name, tmp_path):
    tensors, options, message = DAMAGED[name]
    torch_files.write(tmp_path / "x.bin", tensors, **options)
    with pytest.raises(UserError, match=message) as caught:
        read_tensors(tmp_path / "x.bin")
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_file_cut_short_and_one_of_old_torch(tmp_path):
    path = tmp_path / "x.bin"
    torch_files.write(path, {"a": ONES})
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"is damaged: the end of the zip is missing\.$"):
        read_tensors(path)
    path.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(
        UserError, match=r"no zip file, as torch has written them since 1\.6; with torch, python -c .*\.$"
    ):
        read_tensors(path)
