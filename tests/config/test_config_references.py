"""Values that follow others in a config file, and overrides of them."""

import pytest
from helpers.configs import Model, Run, Text

from based_jax import config
from based_jax.errors import UserError

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
