"""From mappings to checked dataclasses: values, types, keys."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.configs import PAIRS, Model, Pairs, Run, Text
from ml_collections import ConfigDict

from based_jax import config
from based_jax.errors import UserError


def test_kind_chooses_the_dataclass():
    run = config.build(Run, ConfigDict({"model": {"d_model": 8}, "data": {"kind": "text", "path": "a"}}))
    assert run.data == Text(path="a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"d_modle": 8}}, "Unknown config key 'model.d_modle': did you mean 'model.d_model'?"),
        ({"modle": {}}, "Unknown config key 'modle': did you mean 'model'?"),
        ({"model": {}}, "Config key 'model.d_model' is missing; it is an int, such as 128."),
        ({"model": 3}, "Config key 'model' is 3; it is a section of keys."),
        ({"model": {"d_model": 8.0}}, "Config key 'model.d_model' is 8.0; it is an int, such as 128."),
        ({"model": {"d_model": True}}, "Config key 'model.d_model' is True; it is an int, such as 128."),
        ({"model": {"d_model": 8, "norm": "l2"}}, "Config key 'model.norm' is 'l2'; it is one of 'rms', 'layer'."),
        (
            {"model": {"d_model": 8, "mlp_dim": "x"}},
            "Config key 'model.mlp_dim' is 'x'; it is an int, such as 128, or None.",
        ),
        (
            {"model": {"d_model": 8, "layers": [["conv"]]}},
            "Config key 'model.layers[0]' is ['conv']; it is a tuple, such as ('conv', {'kernel_size': 3}).",
        ),
        ({"model": {"d_model": 8}, "lr": "fast"}, "Config key 'lr' is 'fast'; it is a float, such as 0.1."),
        ({"model": {"d_model": 8}, "lr": True}, "Config key 'lr' is True; it is a float, such as 0.1."),
        ({"model": {"d_model": 8}, "scan": 1}, "Config key 'scan' is 1; it is True or False."),
        ({"model": {"d_model": 8}, "betas": [0.9]}, "Config key 'betas' is [0.9]; it is a tuple, such as (0.1, 0.1)."),
        ({"model": {"d_model": 8}, "data": {"kind": "txt"}}, "Unknown data.kind 'txt': did you mean 'text'?"),
        ({"model": {"d_model": 8}, "data": {}}, "Config key 'data.kind' is missing; it is one of pairs, text."),
        (
            {"model": {"d_model": 8}, "data": {"kind": "text"}},
            "Config key 'data.path' is missing; it is a str, such as 'name'.",
        ),
        ({"model": {"d_model": 8}, "eval_data": {"p": 1}}, "Unknown config key 'eval_data.p': did you mean"),
        ({"model": {"d_model": 0}}, "model.d_model is 0; it is at least 1."),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(values, message):
    with pytest.raises(UserError) as error:
        config.build(Run, values)
    assert str(error.value).startswith(message)


def test_what_numpy_and_jax_hold_is_python_s_and_has_the_same_id():
    values = {"model": {"d_model": np.int64(8), "layers": [("conv", {"width": np.int32(3)})]}, "lr": jnp.float32(0.5)}
    run = config.build(Run, values | {"betas": np.array([0.5, 0.25]), "scan": np.bool_(True)})
    assert run == Run(Model(8, (("conv", {"width": 3}),)), lr=0.5, betas=(0.5, 0.25), scan=True)
    assert [type(x) for x in (run.model.d_model, run.model.layers[0][1]["width"], run.lr)] == [int, int, float]
    model = config.build(Model, {"d_model": 8, "norm": np.str_("layer")})
    assert model.norm == "layer" and type(model.norm) is str


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"])
def test_a_dtype_is_its_name(dtype):
    assert config.plain({"dtype": dtype}) == {"dtype": "bfloat16"}
    assert config.plain(np.float32) == "float32"


def test_a_dataclass_that_is_made_is_checked_as_one_that_is_built():
    @dataclasses.dataclass(frozen=True)
    class Checked:
        rate: float = 0.1
        sizes: tuple[int, ...] = ()

        def __post_init__(self):
            config.check_types(self)

    assert Checked(rate=np.int64(1), sizes=[np.int8(2)]) == Checked(1.0, (2,))
    with pytest.raises(UserError, match=r"Config key 'sizes\[1\]' is 2.5; it is an int, such as 128."):
        Checked(sizes=(1, 2.5))


def test_every_key_has_its_type_default_and_meaning():
    @dataclasses.dataclass(frozen=True)
    class Base:
        """Of both.

        Attributes:
          steps: how many,
            in all.
        """

        steps: int

    @dataclasses.dataclass(frozen=True)
    class Whole(Base):
        """A whole.

        Attributes:
          data, other, parts: see there.
        """

        data: Annotated[Pairs | Text, {"pairs": Pairs, "text": Text}] = PAIRS
        other: dict[str, int] = dataclasses.field(default_factory=dict)
        parts: dict[str, Base] | None = None

    keys = {(key.name, key.condition): key for key in config.keys_of(Whole)}
    assert list(keys) == [
        ("steps", ""),
        ("data.kind", "data.kind=pairs"),
        ("data.num_pairs", "data.kind=pairs"),
        ("data.path", "data.kind=text"),
        ("data.kind", "data.kind=text"),
        ("other", ""),
        ("parts.NAME.steps", ""),
        ("parts", ""),
    ]
    assert (keys["steps", ""].meaning, keys["steps", ""].default) == ("how many, in all.", dataclasses.MISSING)
    assert (keys["other", ""].meaning, keys["other", ""].default) == ("see there.", {})
