"""Runs whose tokens lie over devices, from the command's config to the last evaluation."""

import jax
import numpy as np
import pytest
from helpers.hlo import Program

from based_jax import parallel
from based_jax.aot.compiling import memory_of
from based_jax.train.compile import train_program
from based_jax.train.loop import train
from tests.helpers.tiny_runs import losses, make_config, rows

LAYERS = [["conv", {}], ["taylor", {"num_heads": 2, "feature_dim": 4}], ["window", {"num_heads": 2, "window": 12}]]
SCHEDULE = {"schedule": "constant", "lr": 1e-2, "warmup_steps": 0}


@pytest.mark.long
def test_a_run_has_the_losses_and_evaluations_of_devices_that_hold_whole_rows(tmp_path):
    """One that is stopped and goes on, too."""
    options = {"model": {"layers": LAYERS}, "optim": SCHEDULE, "eval_every": 4}
    whole = train(make_config(**options), tmp_path / "whole")
    options["mesh"] = {"sequence": 2}
    train(make_config(**options, steps=4), tmp_path / "cut")
    assert train(make_config(**options), tmp_path / "cut") == pytest.approx(whole, rel=1e-4)
    expected = dict(losses(tmp_path / "whole"))
    assert dict(losses(tmp_path / "cut")) == pytest.approx(expected, rel=1e-4) and len(expected) == 8
    for at in (4, 8):
        found = [
            next(r["eval/loss"] for r in rows(tmp_path / name) if r["step"] == at and "eval/loss" in r)
            for name in ("cut", "whole")
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.long
def test_an_evaluation_of_other_lengths_holds_its_rows_whole(tmp_path):
    test = [{"num_examples": 8, "seq_len": length, "num_kv_pairs": 2} for length in (16, 18)]
    options = {"model": {"layers": LAYERS}, "data": {"test": test}, "optim": SCHEDULE, "steps": 2}
    whole = train(make_config(**options), tmp_path / "whole")
    cut = train(make_config(**options, mesh={"data": 2, "sequence": 4}), tmp_path / "cut")
    assert cut == pytest.approx(whole, rel=1e-4)


@pytest.mark.long
def test_memory_falls_with_the_devices_over_which_a_row_lies():
    """Of 1,048,576 tokens, and what devices exchange is no multiple of them."""
    config, row = make_config(model={"layers": LAYERS}, batch_size=1), np.zeros((1, 2**20), np.int32)
    temporaries = []
    for devices in (2, 4, 8):
        mesh = parallel.make_mesh({"sequence": devices}, jax.devices()[:devices])
        batch = dict.fromkeys(("inputs", "labels", "segment_ids"), row)
        compiled = train_program(config, mesh).lower_step(batch).compile()
        temporaries.append(memory_of(compiled).temporaries)
        exchanged = Program(compiled.as_text()).exchanged((1, 1, 1, devices), parallel.AXES.index("sequence"))
        assert max(np.prod(found.shape) for found in exchanged) < 2**12
    assert np.divide(temporaries[:-1], temporaries[1:]) == pytest.approx(2, rel=0.05)
