import dataclasses
import json
from typing import Any, Literal

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
    data: Pairs | Text = Pairs()
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
        ({"model": {}}, "Config key 'model.d_model' is missing; it is int."),
        ({"model": 3}, "Config key 'model' is 3; it is a section of keys."),
        ({"model": {"d_model": 8.0}}, "Config key 'model.d_model' is 8.0; it is int."),
        ({"model": {"d_model": True}}, "Config key 'model.d_model' is True; it is int."),
        ({"model": {"d_model": 8, "norm": "l2"}}, "Config key 'model.norm' is 'l2'; it is one of 'rms', 'layer'."),
        ({"model": {"d_model": 8, "mlp_dim": "x"}}, "Config key 'model.mlp_dim' is 'x'; it is int or None."),
        ({"model": {"d_model": 8, "layers": [["conv"]]}}, "Config key 'model.layers[0]' is ['conv']; it is tuple["),
        ({"model": {"d_model": 8}, "lr": "fast"}, "Config key 'lr' is 'fast'; it is float."),
        ({"model": {"d_model": 8}, "lr": True}, "Config key 'lr' is True; it is float."),
        ({"model": {"d_model": 8}, "scan": 1}, "Config key 'scan' is 1; it is bool."),
        ({"model": {"d_model": 8}, "betas": [0.9]}, "Config key 'betas' is [0.9]; it is tuple[float, float]."),
        ({"model": {"d_model": 8}, "data": {"kind": "txt"}}, "Unknown data.kind 'txt': did you mean 'text'?"),
        ({"model": {"d_model": 8}, "data": {}}, "Config key 'data.kind' is missing; it is one of pairs, text."),
        ({"model": {"d_model": 8}, "data": {"kind": "text"}}, "Config key 'data.path' is missing; it is str."),
        ({"model": {"d_model": 8}, "eval_data": {"p": 1}}, "Unknown config key 'eval_data.p': did you mean"),
        ({"model": {"d_model": 0}}, "d_model is 0; it is at least 1."),
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


def test_the_id_depends_on_resolved_values_only():
    written = {"model": {"d_model": 8}, "lr": 1e-3, "betas": [0.9, 0.95]}
    assert config.config_id(config.build(Run, written)) == config.config_id(Run(model=Model(d_model=8)))
    assert config.config_id(Run(model=Model(d_model=8), steps=11)) != config.config_id(Run(model=Model(d_model=8)))


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
    with pytest.raises(UserError, match=r"another config: steps is 10 there and 20 here; choose"):
        config.check_same(other, tmp_path, free=("model.d_model", "step"))


def test_a_garbled_workdir_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"config.json' is no config"):
        config.check_same(Run(model=Model(d_model=8)), tmp_path)
