"""Tasks in a config: chosen by kind, completed from a preset, opened as a source."""

import dataclasses

import numpy as np
import pytest

from based_jax import config
from based_jax.data.in_context_ngram import InContextNgramConfig
from based_jax.data.segments import LengthSegment
from based_jax.errors import UserError
from based_jax.train.run import TrainConfig
from based_jax.train.tasks import SYNTHETIC_TASKS as KINDS
from based_jax.train.tasks import TASKS, DnaTask, TextTask

MODEL = {"layers": [["attention", {}]], "d_model": 16, "vocab_size": 16}


def build(**data):
    return config.build(TrainConfig, {"model": MODEL | {"vocab_size": 8192}, "data": data}).data


def test_every_task_has_a_kind_of_its_own():
    assert all(task.kind == kind for kind, task in TASKS.items())
    assert set(TASKS.items()) == {*KINDS.items(), ("text", TextTask), ("dna", DnaTask)}
    assert sorted(KINDS) == [
        "compositional_mqar",
        "compression",
        "forgetting_mqar",
        "in_context_ngram",
        "induction_heads",
        "memorization",
        "mqar",
        "needle",
        "selective_copying",
        "state_tracking",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_and_a_preset_make_a_source(kind):
    task = build(kind=kind, preset="tiny", shuffle=True)
    assert task == KINDS[kind](preset="tiny", shuffle=True)
    assert task.resolved == KINDS[kind].presets["tiny"] and task.num_tokens == task.resolved.vocab_size
    source = task.open(8)
    for step in (0, 5):
        batch, again = source.batch(step), task.open(8).batch(step)
        assert batch["inputs"].shape == batch["labels"].shape and len(batch["inputs"]) == 8
        assert all(np.array_equal(batch[key], again[key]) for key in batch)
    for name in source.eval_names:
        assert len(list(source.eval_batches(name)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_preset_exists_and_any_value_of_a_task_can_be_replaced(kind):
    task = KINDS[kind]()
    train = [{"num_examples": 3, **{k: v for k, v in vars(task.resolved.test[0]).items() if k != "num_examples"}}]
    changed = build(kind=kind, seed=7, train=train).resolved
    assert changed.seed == 7 and changed.test == task.resolved.test
    assert [segment.num_examples for segment in changed.train] == [3]
    assert changed.train[0].name == changed.test[0].name


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_survives_the_config_file(kind):
    run = config.build(TrainConfig, {"model": MODEL | {"vocab_size": 64}, "data": {"kind": kind, "preset": "tiny"}})
    assert config.build(TrainConfig, config.to_dict(run)) == run


def test_fields_of_one_kind_reach_its_preset():
    task = build(kind="in_context_ngram", order=3, concentration=0.5, test=[{"num_examples": 4, "seq_len": 40}])
    preset = KINDS["in_context_ngram"].presets["default"]
    assert task.resolved == InContextNgramConfig(
        train=preset.train, test=(LengthSegment(4, 40),), vocab_size=8, order=3, concentration=0.5
    )
    assert build(kind="state_tracking", group="parity").num_tokens == 2
    assert build(kind="compression", alphabet=3).num_tokens == 3 + 1 + 31


def test_every_value_of_a_preset_s_class_is_a_key():
    task = build(kind="mqar", preset="tiny", power_a=0.5)
    assert task.resolved == dataclasses.replace(KINDS["mqar"].presets["tiny"], power_a=0.5)
    for kind, task in KINDS.items():
        values = {field.name for field in dataclasses.fields(task.presets["tiny"])}
        assert {field.name for field in dataclasses.fields(task)} == {"kind", "preset", "shuffle"} | values, kind


def test_a_task_is_resolved_once():
    task = build(kind="mqar", preset="tiny", seed=3)
    assert task.resolved is task.resolved
    assert task == build(kind="mqar", preset="tiny", seed=3)


def test_an_unknown_kind_lists_all():
    with pytest.raises(UserError) as error:
        build(kind="xyz")
    assert str(error.value) == f"Unknown data.kind 'xyz': Allowed: {', '.join(sorted(TASKS))}."


@pytest.mark.parametrize(
    "data, message",
    [
        ({"kind": "needel"}, "Unknown data.kind 'needel': did you mean 'needle'"),
        ({"preset": "tiny"}, "Config key 'data.kind' is missing; it is one of compositional_mqar, compression"),
        ({"kind": "needle", "preset": "tinny"}, "Unknown needle preset 'tinny': did you mean 'tiny'"),
        ({"kind": "mqar", "preset": "figure3"}, "Unknown mqar preset 'figure3': did you mean 'figure2'"),
        ({"kind": "needle", "group": "s5"}, "Unknown config key 'data.group'"),
        ({"kind": "state_tracking", "group": "s6"}, "Unknown group 's6'"),
        ({"kind": "induction_heads", "seed": -1}, "seed -1"),
        ({"kind": "memorization", "vocab_size": 8193}, "the data has ids up to 8192"),
    ],
)
def test_bad_values_are_named(data, message):
    with pytest.raises(UserError, match=message):
        build(**data)


def test_mqar_keeps_its_default_preset():
    assert TASKS["mqar"]().resolved == KINDS["mqar"].presets["figure2"]
