import dataclasses
import json
import sys
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from based_jax import config
from based_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    d_model: int
    layers: tuple[tuple[str, dict[str, Any]], ...] = ()
    norm: Literal["rms", "layer"] = "rms"
    mlp_dim: int | None = None

    def __post_init__(self):
        if self.d_model < 1:
            raise UserError(f"d_model is {self.d_model}; it is at least 1.")


@dataclasses.dataclass(frozen=True)
class Pairs:
    kind: Literal["pairs"] = "pairs"
    num_pairs: int = 4


@dataclasses.dataclass(frozen=True)
class Text:
    path: str
    kind: Literal["text"] = "text"


@dataclasses.dataclass(frozen=True)
class Run:
    model: Model
    data: Annotated[Pairs | Text, {"pairs": Pairs, "text": Text}] = Pairs()
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    scan: bool = False
    eval_data: Text | None = None
    steps: int = 10


FILE = """
import ml_collections

VARIANTS = {"small": 8, "large": 16}


def get_config(variant="small"):
    model = {"d_model": VARIANTS[variant], "layers": [("conv", {}), ("taylor", {"feature_dim": 4})]}
    return ml_collections.ConfigDict({"model": model, "data": {"kind": "pairs"}})
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(FILE)
    return str(path)


def test_a_file_becomes_nested_dataclasses(file):
    run = config.build(Run, config.load(f"{file}:large"))
    layers = (("conv", {}), ("taylor", {"feature_dim": 4}))
    assert run == Run(model=Model(d_model=16, layers=layers), data=Pairs())


def test_loading_leaves_no_bytecode_and_sees_edits(file, tmp_path):
    config.load(file)
    (tmp_path / "example.py").write_text(FILE.replace("8", "9"))
    assert config.load(file).model.d_model == 9
    assert [path.name for path in tmp_path.iterdir()] == ["example.py"]


def test_overrides_reach_keys_that_the_file_leaves_out(file):
    overrides = [
        ("model.d_model", "32"),
        ("model.norm", "layer"),
        ("lr", "1"),
        ("eval_data.path", "corpus/a.txt"),
        ("model.layers", "[('window', {'window': 8})]"),
        ("steps", "5"),
        ("steps", "6"),
    ]
    run = config.build(Run, config.load(file, overrides))
    assert run.model == Model(d_model=32, norm="layer", layers=(("window", {"window": 8}),))
    assert run.eval_data == Text(path="corpus/a.txt")
    assert run.steps == 6
    assert isinstance(run.lr, float)


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


@pytest.mark.parametrize(
    ("text", "variant", "message"),
    [
        (FILE, "smal", "Unknown variant of '{path}' 'smal': did you mean"),
        ("def f(: pass", "", "Config file '{path}' fails with SyntaxError"),
        ("x = 1", "", "Config file '{path}' has no function get_config"),
        ("def get_config():\n    return {}", "big", "Config file '{path}' has no variants, so not 'big'"),
        ("def get_config(v):\n    return {'a': 1}[v]", "big", "Config '{path}:big' fails with KeyError: 'big'"),
        ("def get_config():\n    return 3", "", "Config '{path}' is 3; get_config returns a ConfigDict"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, variant, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config.load(f"{path}:{variant}" if variant else str(path))
    assert str(error.value).startswith(message.format(path=path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Config file '.*nowhere.py' cannot be read: No such file"):
        config.load(str(tmp_path / "nowhere.py"))


def test_an_override_through_a_value_is_named(file):
    with pytest.raises(UserError, match=r"Override 'model.d_model.x': 'model.d_model' is 8, which has no keys"):
        config.load(file, [("model.d_model.x", "1")])


FOLLOWING = """
import ml_collections


def get_config():
    config = ml_collections.ConfigDict({"model": {"d_model": 8}, "data": {"kind": "pairs"}, "steps": 400})
    config.data.num_pairs = config.get_ref("steps") // 100
    config.model.layers = (("conv", {"width": config.get_ref("steps") // 50}),)
    config.lr = 1 / config.data.get_ref("num_pairs").to_float()
    return config
"""


@pytest.fixture
def following(tmp_path):
    path = tmp_path / "following.py"
    path.write_text(FOLLOWING)
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "steps", "pairs", "width", "lr"),
    [
        ([], 400, 4, 8, 0.25),
        ([("steps", "1000")], 1000, 10, 20, 0.1),
        ([("data.num_pairs", "5")], 400, 5, 8, 0.2),
        ([("data.num_pairs", "5"), ("steps", "1000")], 1000, 5, 20, 0.2),
    ],
)
def test_references_follow_overrides(following, overrides, steps, pairs, width, lr):
    run = config.build(Run, config.load(following, overrides))
    assert (run.steps, run.data.num_pairs, run.model.layers, run.lr) == (
        steps,
        pairs,
        (("conv", {"width": width}),),
        lr,
    )


def test_an_override_leaves_the_config_alone_that_it_is_made_from(following):
    base = config.load(following)
    assert config.build(Run, config.overridden(base, {"steps": 800})).data.num_pairs == 8
    assert config.build(Run, base).data.num_pairs == 4


def test_values_that_nothing_follows_may_change_their_type():
    base = {"model": {"d_model": 8}, "lr": 1, "betas": (0, 0), "data": {"kind": "pairs"}}
    values = {"lr": 1e-3, "betas": [0.5, 0.5], "data": {"kind": "text", "path": "a"}, "model.mlp_dim": 3}
    run = config.build(Run, config.overridden(base, values))
    assert run == Run(model=Model(d_model=8, mlp_dim=3), lr=1e-3, betas=(0.5, 0.5), data=Text(path="a"))
    with pytest.raises(UserError, match="Config key 'lr' is True; it is a float"):
        config.build(Run, config.overridden(base | {"lr": 0.1}, {"lr": True}))


def test_a_dotted_key_of_a_plain_base_is_named():
    with pytest.raises(UserError, match=r"Config key 'model.norm' has a dot; in a mapping a section is a mapping"):
        config.build(Run, config.overridden({"model": {"d_model": 8}, "model.norm": "rms"}, {"steps": 3}))


def test_one_object_in_two_sections_is_two_sections():
    shared = {"path": "a", "kind": "text"}
    base = {"model": {"d_model": 8}, "data": shared, "eval_data": shared}
    run = config.build(Run, config.overridden(base, {"eval_data.path": "b"}))
    assert (run.data.path, run.eval_data.path) == ("a", "b")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("steps", "many")], "Config key 'steps' is 'many'; it is an int, such as 128."),
        ([("steps", "2.5")], "Config key 'steps' is 2.5; it is an int, such as 128."),
        ([("steps", "None")], "Config key 'data.num_pairs' is None; it is an int, such as 128."),
        ([("steps", "0")], "Config key 'lr' is a reference that fails with ZeroDivisionError"),
        ([("stepz", "1")], "Unknown config key 'stepz': did you mean 'steps'?"),
        ([("steps.x", "1")], "Override 'steps.x': 'steps' is 400, which has no keys."),
    ],
)
def test_a_reference_that_cannot_be_set_or_followed_is_named(following, overrides, message):
    with pytest.raises(UserError) as error:
        config.build(Run, config.load(following, overrides))
    assert str(error.value).startswith(message)


def test_a_required_value_that_is_not_given_is_named(tmp_path):
    path = tmp_path / "required.py"
    path.write_text(
        "import ml_collections\n\ndef get_config():\n"
        "    path = ml_collections.config_dict.required_placeholder(str)\n"
        "    return ml_collections.ConfigDict({'model': {'d_model': 8}, 'data': {'kind': 'text', 'path': path}})\n"
    )
    assert config.build(Run, config.load(str(path), [("data.path", "a")])).data.path == "a"
    with pytest.raises(UserError, match=r"Config key 'data.path' is a reference that fails with RequiredValueError"):
        config.build(Run, config.load(str(path)))


def write_family(folder, width):
    folder.mkdir()
    (folder / "family.py").write_text(
        "from recipe import model\n\ndef get_config():\n    import recipe\n    assert recipe.model is model\n"
        "    return {'model': model()}\n"
    )
    (folder / "recipe.py").write_text("from widths import WIDTH\n\ndef model():\n    return {'d_model': WIDTH}\n")
    (folder / "widths.py").write_text(f"WIDTH = {width}\n")
    return folder / "family.py"


def test_a_file_imports_the_files_of_its_own_folder_and_nobody_else_does(tmp_path, monkeypatch):
    first, second = write_family(tmp_path / "first", 8), write_family(tmp_path / "second", 16)
    elsewhere = write_family(tmp_path / "elsewhere", 32).parent
    paths, modules = list(sys.path), set(sys.modules)
    assert config.load(str(first)).model.d_model == 8
    assert config.load(str(second)).model.d_model == 16
    monkeypatch.chdir(elsewhere)
    assert config.load(str(first)).model.d_model == 8
    assert config.load("../second/family.py").model.d_model == 16
    assert config.load("family.py").model.d_model == 32
    assert sys.path == paths and not {"family", "recipe", "widths"} & set(sys.modules) - modules
    assert sorted(path.name for path in elsewhere.iterdir()) == ["family.py", "recipe.py", "widths.py"]
    (first.parent / "widths.py").write_text("WIDTH = 9")
    assert config.load(str(first)).model.d_model == 9


def test_a_library_does_not_import_a_file_beside_the_config(tmp_path, monkeypatch):
    library, family = tmp_path / "library", tmp_path / "family"
    for folder, own in ((library, "the library's"), (family, "the family's")):
        folder.mkdir()
        (folder / "of_that_name.py").write_text(f"OWNER = {own!r}")
    (library / "some_library.py").write_text("import of_that_name\nOWNER = of_that_name.OWNER")
    (family / "family.py").write_text(
        "import of_that_name\nimport some_library\n\n"
        "def get_config():\n    return {'own': of_that_name.OWNER, 'library': some_library.OWNER}\n"
    )
    monkeypatch.syspath_prepend(library)
    assert config.load(str(family / "family.py")).to_dict() == {"own": "the family's", "library": "the library's"}
    assert sys.modules.pop("some_library") and sys.modules.pop("of_that_name").OWNER == "the library's"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("other.py", "", "fails with ModuleNotFoundError: No module named 'recipe'"),
        ("recipe.py", "def f(: pass", "fails with SyntaxError: invalid syntax (recipe.py, line 1)"),
        ("recipe.py", "x = 1", "fails with AttributeError: module 'recipe' has no attribute 'MODEL'"),
    ],
)
def test_a_bad_file_beside_the_config_is_named(tmp_path, name, text, message):
    (tmp_path / "family.py").write_text("import recipe\nMODEL = recipe.MODEL\n")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        config.load(str(tmp_path / "family.py"))
    assert message in str(error.value).replace(str(tmp_path) + "/", "")


def test_a_file_s_dataclasses_may_have_postponed_annotations(tmp_path):
    (tmp_path / "sizes.py").write_text(
        "from __future__ import annotations\nimport dataclasses, typing\n\n@dataclasses.dataclass\nclass Sizes:\n"
        "    d_model: int = 8\n    next: Sizes | None = None\n\nassert typing.get_type_hints(Sizes)['d_model'] is int\n"
    )
    (tmp_path / "family.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom sizes import Sizes\n\n"
        "@dataclasses.dataclass\nclass Config:\n    model: Sizes\n\n"
        "def get_config():\n    return Config(Sizes(d_model=16))\n"
    )
    assert config.load(str(tmp_path / "family.py")).to_dict() == {"model": {"d_model": 16, "next": None}}
    assert not {"family", "sizes"} & set(sys.modules)


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

        data: Annotated[Pairs | Text, {"pairs": Pairs, "text": Text}] = Pairs()
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


def test_the_id_depends_on_resolved_values_only():
    written = {"model": {"d_model": 8}, "lr": 1e-3, "betas": [0.9, 0.95]}
    assert config.config_id(config.build(Run, written)) == config.config_id(Run(model=Model(d_model=8)))
    assert config.config_id(Run(model=Model(d_model=8), steps=11)) != config.config_id(Run(model=Model(d_model=8)))


def test_a_field_that_was_added_later_is_written_where_it_says_something():
    @dataclasses.dataclass(frozen=True)
    class LaterModel(Model):
        init_recipe: str = config.added_later("reference")

    @dataclasses.dataclass(frozen=True)
    class LaterRun(Run):
        model: LaterModel

    before, same = Run(Model(8)), LaterRun(LaterModel(8))
    assert (config.to_dict(same), config.config_id(same)) == (config.to_dict(before), config.config_id(before))
    other = LaterRun(LaterModel(8, init_recipe="torch"))
    assert config.to_dict(other)["model"] == config.to_dict(before)["model"] | {"init_recipe": "torch"}
    assert config.config_id(other) != config.config_id(before)
    assert [config.build(LaterRun, config.to_dict(run)) for run in (same, other)] == [same, other]


def test_to_dict_goes_through_json_and_back(file):
    run = config.build(Run, config.load(file))
    assert config.build(Run, json.loads(json.dumps(config.to_dict(run)))) == run


def test_a_workdir_keeps_its_config(tmp_path):
    run = Run(model=Model(d_model=8))
    config.check_same(run, tmp_path / "new")
    config.save(run, tmp_path / "new")
    config.check_same(run, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]


def test_a_workdir_of_another_config_is_refused_with_the_keys(tmp_path):
    config.save(Run(model=Model(d_model=8)), tmp_path)
    other = Run(model=Model(d_model=16), data=Text(path="a"), steps=20)
    with pytest.raises(UserError) as error:
        config.check_same(other, tmp_path)
    assert "data.kind is 'pairs' there and 'text' here, data.num_pairs is 4 there and absent here" in str(error.value)
    assert "and 2 more keys differ" in str(error.value)


def test_free_keys_may_differ(tmp_path):
    config.save(Run(model=Model(d_model=8)), tmp_path)
    other = Run(model=Model(d_model=16), steps=20)
    config.check_same(other, tmp_path, free=("model", "steps"))
    config.check_same(other, tmp_path, free=("*.d_model", "steps"))
    with pytest.raises(UserError, match=r"another config: steps is 10 there and 20 here; choose"):
        config.check_same(other, tmp_path, free=("model.d_model", "step"))


def test_a_garbled_workdir_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"config.json' is no config"):
        config.check_same(Run(model=Model(d_model=8)), tmp_path)


def rewritten(workdir, change):
    """Change the values of a workdir's config.json, as another version of the code would have written them."""
    values = json.loads((workdir / "config.json").read_text())
    change(values)
    (workdir / "config.json").write_text(json.dumps(values))


def test_a_key_that_is_newer_than_the_workdir_has_its_default_there(tmp_path):
    run = Run(model=Model(d_model=8), data=Pairs(num_pairs=4))
    config.save(run, tmp_path)
    rewritten(tmp_path, lambda values: (values.pop("lr"), values["data"].pop("num_pairs")))
    config.check_same(run, tmp_path)
    assert config.read(Run, tmp_path) == run
    with pytest.raises(UserError, match=r"another config: data.num_pairs is 4 there and 5 here, lr is 0.001 there"):
        config.check_same(dataclasses.replace(run, data=Pairs(num_pairs=5), lr=0.1), tmp_path)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("data", "pairs_num", "Unknown config key 'data.pairs_num': did you mean 'data.num_pairs'?"),
        ("model", "norm", "Config key 'model.norm' is 'old'; it is one of 'rms', 'layer'."),
    ],
)
def test_what_no_longer_exists_is_named(tmp_path, section, key, message):
    run = Run(model=Model(d_model=8))
    config.save(run, tmp_path)
    rewritten(tmp_path, lambda values: values[section].update({key: "old"}))
    with pytest.raises(UserError, match=r"config.json' does not fit this version of based_jax: ") as error:
        config.check_same(run, tmp_path)
    assert message in str(error.value)
