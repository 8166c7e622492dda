"""A run that goes on otherwise than it began, and one that begins where another ended."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from based_jax import config as configs
from based_jax import parallel
from based_jax.config.keys import key_names
from based_jax.convert import save_hf
from based_jax.convert.hf import resolved
from based_jax.errors import UserError
from based_jax.nn.lm import LM
from based_jax.optim import path_of
from based_jax.train import continuation
from based_jax.train.compile import train_program
from based_jax.train.init_from import InitFrom, read_parameters
from based_jax.train.loop import DivergedError, train
from based_jax.train.run import TrainConfig, build_config, load_config, load_run
from tests.helpers.tiny_runs import VALUES, losses, make_config, rows, saved_steps


def test_a_finished_run_goes_on_with_more_steps_and_another_rate(whole, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    config = make_config(steps=10, optim={"lr": 2e-2})
    train(config, workdir)
    out = capsys.readouterr().out
    assert "changed: optim.lr is 0.02, and was 0.01; updates from here on are made by it\n" in out
    assert "changed: steps is 10, and was 8; " in out
    assert "continuing from step 8\n" in out
    assert [step for step, _ in losses(workdir)] == list(range(1, 11))
    assert losses(workdir)[:8] == losses(whole)
    assert saved_steps(workdir) == [8, 10]
    assert json.loads((workdir / "config.json").read_text())["optim"]["lr"] == 2e-2


CHANGES = {
    "log_every": 2,
    "eval_every": 3,
    "steps": 9,
    "microbatches": 2,
    "mesh": {"tensor": 2},
    "checkpoint": {"every_minutes": 1.0},
    "optim": {"lr": 1.0, "schedule": "constant", "clip_norm": None},
    "max_skipped_steps": 3,
    "init_from": "elsewhere",
    "model": {"remat": "auto"},
}


@pytest.mark.parametrize("key", CHANGES)
def test_each_change_is_a_line(tmp_path, key):
    configs.save(make_config(), tmp_path)
    lines = continuation.changes(make_config(**{key: CHANGES[key]}), tmp_path)
    assert lines and all(line.startswith(f"changed: {key}") and "; " in line for line in lines)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"batch_size": 16}, {"data": {"shuffle": False}}])
def test_what_makes_another_run_is_refused(tmp_path, changes):
    configs.save(make_config(), tmp_path)
    with pytest.raises(UserError, match="belongs to another config"):
        continuation.changes(make_config(**changes), tmp_path)


@pytest.mark.parametrize("optim", [{"name": "muon"}, {"moment_dtype": "bfloat16"}])
def test_an_optimizer_whose_state_is_another_is_refused_once_there_is_one(whole, tmp_path, optim):
    [key] = optim
    configs.save(make_config(), tmp_path)
    assert continuation.changes(make_config(optim=optim), tmp_path)
    with pytest.raises(UserError, match=rf"^optim\.{key} is .*, of which '.*' has a state; keep it, or begin another"):
        continuation.changes(make_config(optim=optim), whole)


def test_a_run_keeps_the_batch_that_its_rows_per_device_came_to(tmp_path):
    config, meshes = make_config(rows_per_device=2), [parallel.make_mesh(sizes) for sizes in ({}, {"tensor": 2})]
    begun, lines = continuation.sized(config, meshes[0], tmp_path)
    assert (begun.batch_size, lines) == (16, [])
    configs.save(begun, tmp_path)
    assert "rows_per_device" not in json.loads((tmp_path / "config.json").read_text())
    assert continuation.sized(config, meshes[0], tmp_path) == (begun, [])
    again, lines = continuation.sized(config, meshes[1], tmp_path)
    assert (again, continuation.changes(again, tmp_path)) == (begun, [])
    assert lines == ["kept: batch_size is 16, with which the run began, rather than 8"]


def test_every_key_that_may_change_exists():
    names = {name.replace("NAME", "*") for name in key_names(TrainConfig)}
    assert continuation.MAY_CHANGE.keys() <= names


def test_the_parts_of_a_mixture_may_move_and_keep_their_weights(tmp_path):
    def mixed(path, weight):
        parts = {"a": {"path": path, "weight": weight}, "b": {"path": "b"}}
        data = {"kind": "text", "tokenizer": "bytes", "mixture": parts}
        return configs.build(TrainConfig, VALUES | {"model": VALUES["model"] | {"vocab_size": 257}, "data": data})

    configs.save(mixed("a", 2.0), tmp_path)
    (line,) = continuation.changes(mixed("moved", 2.0), tmp_path)
    assert line == "changed: data.mixture.a.path is 'moved', and was 'a'; the text is the same (`data_record`)"
    with pytest.raises(UserError, match=r"another config: data\.mixture\.a\.weight is 2\.0 there and 3\.0 here"):
        continuation.changes(mixed("a", 3.0), tmp_path)


EXPLODING = {"optim": {"lr": 1e30, "warmup_steps": 6, "warmup_lr": 1e-3}, "checkpoint": {"every": 1}}


def test_steps_that_are_not_finite_are_skipped_and_a_diverged_run_goes_on_with_another_rate(tmp_path, capsys):
    with pytest.raises(DivergedError, match=r"loss of step 5 is nan .* the last good checkpoint is step 2\."):
        train(make_config(**EXPLODING, max_skipped_steps=2), tmp_path)
    skipped = [line for line in capsys.readouterr().out.splitlines() if " is skipped: its loss is nan" in line]
    assert [line.split()[1] for line in skipped] == ["3", "4"]
    assert skipped[1].endswith("(2 of at most 2 in a row)")
    assert [row["skipped_steps"] for row in rows(tmp_path)[:4]] == [0, 0, 1, 2]
    shutil.rmtree(tmp_path / "checkpoints" / "2")  # its loss was finite, and the update after it was not
    train(make_config(steps=4), tmp_path)
    assert [step for step, loss in losses(tmp_path) if loss is not None] == [1, 2, 3, 4]
    assert "rows after step 1, of which no checkpoint is left: " in capsys.readouterr().out


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """Return an attention model, its config and the folder of its released layout."""
    changes = {"layers": [["attention", {"num_heads": 2}]] * 2, "scan_layers": True}
    config = make_config(model=changes).model
    model = LM(config, rngs=nnx.Rngs(3))
    folder = tmp_path_factory.mktemp("released") / "hf"
    save_hf(model, folder)
    return config, model, folder


def by_path(params):
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}


def program_of(**changes):
    config = make_config(**changes)
    return train_program(config, parallel.make_mesh(config.mesh))


def assert_taken(taken, model, names=None):
    expected = by_path(nnx.state(model, nnx.Param))
    assert taken.keys() == (expected.keys() if names is None else set(names))
    for name, leaf in taken.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.parametrize(("folder", "step"), [("", 8), ("checkpoints", 8), ("checkpoints/4", 4)])
def test_a_run_begins_with_the_parameters_of_a_run_or_a_checkpoint(whole, folder, step):
    program = program_of()
    taken, line = read_parameters(InitFrom(str(whole / folder)), program.config.model, program.abstract_state.params)
    model = load_run(whole, step)[2]
    assert_taken(taken, model)
    assert line == (
        f"init_from: {model.num_params():,} parameters, {len(taken)} of {len(taken)} arrays, are those of"
        f" '{whole / 'checkpoints' / str(step)}'"
    )


def test_a_run_begins_with_released_weights(attention):
    config, model, folder = attention
    program = program_of(model={"layers": config.layers, "scan_layers": True}, mesh={"fsdp": 2})
    taken, _ = read_parameters(InitFrom(str(folder)), config, program.abstract_state.params)
    assert_taken(taken, model)
    wanted = by_path(program.abstract_state.params)
    assert all(leaf.sharding == wanted[name].sharding for name, leaf in taken.items())


def test_a_model_is_that_of_a_folder(attention):
    """And its parameters are what a run begins with, unless the config says otherwise."""
    config, _, folder = attention
    values = {key: value for key, value in VALUES.items() if key != "model"} | {"model": str(folder)}
    found = load_config(values)
    assert found.init_from == InitFrom(str(folder)) and found.model.dtype == "bfloat16"
    assert resolved(dataclasses.replace(found.model, dtype=config.dtype)) == resolved(config)
    assert load_config(values | {"init_from": None}).init_from is None
    with pytest.raises(UserError, match=r"none/config.json' cannot be read"):
        load_config(values | {"model": str(folder / "none")})


def test_a_run_goes_on_when_the_folder_that_it_began_with_is_gone(attention, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(attention[2], folder)
    values = {key: value for key, value in VALUES.items() if key != "model"} | {"model": str(folder)}
    begun = build_config(values)
    configs.save(begun, tmp_path / "run")
    shutil.rmtree(folder)
    assert build_config(values, tmp_path / "run") == begun
    for workdir in (None, tmp_path):
        with pytest.raises(UserError, match=r"weights/config.json' cannot be read"):
            build_config(values, workdir)


def test_patterns_choose_and_the_others_are_named(whole):
    program = program_of(model={"d_model": 16, "layers": [["conv", {}], ["conv", {}]]})
    source = InitFrom(str(whole), include=("embed/*", "*norm*"), exclude=("stacks/*",))
    taken, line = read_parameters(source, program.config.model, program.abstract_state.params)
    assert_taken(taken, load_run(whole)[2], taken)
    assert "embed/embedding" in taken and not any(name.startswith("stacks") for name in taken)
    assert "drawn from the seed: 'stacks/0" in line


def test_repeats_of_a_scanned_stack_are_checked(whole):
    program = program_of(model={"layers": [["conv", {}]] * 3, "scan_layers": True})
    with pytest.raises(UserError, match=r"conv_kernel' is float32\[3, 32\] in '.*' and float32\[3, 3, 32\] here"):
        read_parameters(InitFrom(str(whole)), program.config.model, program.abstract_state.params)


def test_training_begins_with_them_and_says_so(whole, tmp_path, capsys):
    config = make_config(init_from=str(whole), steps=1, optim={"schedule": "constant", "lr": 0.0})
    results = train(config, tmp_path)
    evaluated = next(row for row in rows(whole) if "eval/loss" in row)
    assert results["loss"] == pytest.approx(evaluated["eval/loss"])
    assert "init_from: " in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["init_from"]["path"] == str(whole)
