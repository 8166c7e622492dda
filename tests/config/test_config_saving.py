"""A config as a folder of a run keeps it: its id, and what may differ from it."""

import dataclasses
import json

import pytest
from helpers.configs import Model, Pairs, Run, Text

from based_jax import config
from based_jax.errors import UserError


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
