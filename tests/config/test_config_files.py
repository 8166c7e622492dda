"""Config files: what they may hold, import and choose."""

import sys

import pytest
from helpers.configs import FILE, Model, Pairs, Run, Text

from based_jax import config
from based_jax.errors import UserError


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
