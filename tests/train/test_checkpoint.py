import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from based_jax import optim, parallel
from based_jax.errors import UserError
from based_jax.train import checkpoint
from based_jax.train.checkpoint import CheckpointConfig, Checkpoints


class Model(nnx.Module):
    def __init__(self, d, rngs):
        self.embed = nnx.Embed(16, d, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(d, d, rngs=rngs) for _ in range(2)])


def init(seed, d=8):
    params = nnx.state(Model(d, nnx.Rngs(seed)), nnx.Param)
    opt = optim.optimizer(optim.OptimConfig(warmup_steps=0), 10).init(params)
    half = jnp.linspace(0, 1, 7, dtype=jnp.bfloat16)
    rest = {"step": jnp.int32(seed), "key": jax.random.key(seed), "half": half, "flag": jnp.array([True, False])}
    return {"params": params, "opt": opt, **rest}


def abstract(d=8):
    return jax.eval_shape(lambda: init(0, d))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (keys, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, keys
        assert np.asarray(checkpoint._data(x)).tobytes() == np.asarray(checkpoint._data(y)).tobytes(), keys


def saved(directory, *steps, **config):
    with Checkpoints(directory, CheckpointConfig(**config)) as checkpoints:
        for step in steps:
            checkpoints.save(step, init(step))
    return directory


def steps_in(directory):
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit())


def data_file(directory, step):
    files = [file for file in (directory / str(step)).rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def test_round_trip_is_bitwise(tmp_path):
    saved(tmp_path, 3, 7)
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore(abstract())
        assert step == 7
        assert_same(state, init(7))
        assert_same(checkpoints.restore(abstract(), step=3)[1], init(3))


@pytest.mark.parametrize("least, is_cut", [(checkpoint.LEAST_SLICE_BYTES, False), (64, True)])
def test_devices_with_the_same_array_share_in_writing_a_large_one(tmp_path, monkeypatch, least, is_cut):
    """Each cuts its part out; of a small one none does, for which JAX would compile a program by shape and place."""
    cuts, cut = [], jax.lax.slice_in_dim
    monkeypatch.setattr(checkpoint, "LEAST_SLICE_BYTES", least)
    monkeypatch.setattr(jax.lax, "slice_in_dim", lambda x, **place: cuts.append(place) or cut(x, **place))
    everywhere = NamedSharding(parallel.make_mesh({"data": 2}, jax.devices()[:2]), P())
    state = {"large": jax.device_put(np.arange(2 * 19, dtype=np.float32).reshape(2, 19), everywhere)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, wait=True)
        found = checkpoints.restore({"large": jax.ShapeDtypeStruct((2, 19), np.float32, sharding=everywhere)})[1]
    assert_same(found, state)
    assert len(cuts) == 2 * is_cut


def test_the_saved_arrays_may_be_donated_at_once(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jnp.arange(1_000_000, dtype=jnp.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        overwrite(x).block_until_ready()
        restored = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}) if checkpoints.latest() else None
    assert restored is not None
    np.testing.assert_array_equal(restored[1]["x"], np.arange(1_000_000, dtype=np.float32))


def test_a_part_of_the_state_can_be_restored(tmp_path):
    saved(tmp_path, 4)
    with Checkpoints(tmp_path) as checkpoints:
        _, state = checkpoints.restore({"params": abstract()["params"]})
    assert_same(state, {"params": init(4)["params"]})


def test_restoring_onto_another_sharding(tmp_path):
    code = """
        import sys, jax, numpy as np
        import jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from based_jax.train.checkpoint import Checkpoints

        jax.config.update("jax_num_cpu_devices", 4)
        mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
        sharded, whole = NamedSharding(mesh, P("fsdp")), jax.sharding.SingleDeviceSharding(jax.devices()[1])
        x = jax.random.normal(jax.random.key(0), (8, 3))
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(0, {"x": x})
            checkpoints.save(1, {"x": jax.device_put(x, sharded)}, wait=True)
            for step, sharding in ((0, sharded), (1, whole)):
                target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
                _, state = checkpoints.restore(target, step)
                assert state["x"].sharding == sharding, state["x"].sharding
                np.testing.assert_array_equal(state["x"], x)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with Checkpoints(tmp_path) as checkpoints:
        mesh = jax.sharding.Mesh(jax.devices()[:1], ("fsdp",))
        where = NamedSharding(mesh, P("fsdp"))
        _, state = checkpoints.restore({"x": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=where)})
    assert state["x"].sharding == where


def delete(file):
    file.unlink()


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_one_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [delete, truncate, flip_one_bit])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, caplog, capfd):
    saved(tmp_path, 10, 20)
    damage(data_file(tmp_path, 20))
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore(abstract())
    assert step == 10
    assert_same(state, init(10))
    gc.collect()  # tasks that nobody asks for their error tell it when they go
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "Traceback" not in capfd.readouterr().err
    assert f"Checkpoint '{tmp_path}/20' is corrupt: " in warnings[0]
    assert "\n" not in warnings[0]


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt"])
def test_lost_metadata_is_corruption_too(tmp_path, name):
    saved(tmp_path, 10, 20)
    (tmp_path / "20" / name).unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 10
        assert checkpoints.latest() == 10


def test_a_corrupt_checkpoint_neither_blocks_its_step_nor_displaces_a_good_one(tmp_path):
    saved(tmp_path, 10, 20)
    truncate(data_file(tmp_path, 20))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract())
        checkpoints.save(15, init(15), wait=True)
        assert steps_in(tmp_path) == [10, 15]
        checkpoints.save(20, init(20), wait=True)
        assert_same(checkpoints.restore(abstract())[1], init(20))


def test_no_good_checkpoint_names_the_directory(tmp_path):
    saved(tmp_path, 10)
    delete(data_file(tmp_path, 10))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=rf"'{tmp_path}' has no good checkpoint \(corrupt: \[10\]\)"):
            checkpoints.restore(abstract())
        with pytest.raises(UserError, match=rf"'{tmp_path}' has no checkpoint of step 5; it has none"):
            checkpoints.restore(abstract(), step=5)
    assert steps_in(tmp_path) == [10]


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="has no good checkpoint"):
            checkpoints.restore(abstract())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: abstract(d=4) | {"opt": s["opt"]}, "embed/embedding' is float32[16, 8] there and float32[16, 4]"),
        (lambda s: s | {"extra": s["step"]}, "'extra' is absent there and int32[] here"),
        (lambda s: {"params": s["params"]["embed"]}, "embed/embedding' is float32[16, 8] there and absent here"),
        (lambda s: s | {"half": jax.ShapeDtypeStruct((7,), jnp.float32)}, "'half' is bfloat16[7] there and float32[7]"),
        (lambda s: s | {"key": s["step"]}, "'key' is uint32[2] there and int32[] here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_kept(tmp_path, change, message):
    saved(tmp_path, 10, 20)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(change(abstract()))
    assert message in str(error.value)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 20


def test_keep_policy(tmp_path):
    saved(tmp_path, *range(0, 90, 10), keep=2, keep_every=40)
    assert steps_in(tmp_path) == [0, 40, 70, 80]


@pytest.mark.parametrize(("every", "steps"), [(3, [3, 6, 9]), (None, [])])
def test_due(tmp_path, every, steps):
    with Checkpoints(tmp_path, CheckpointConfig(every=every)) as checkpoints:
        assert [step for step in range(1, 10) if checkpoints.due(step)] == steps


def test_saving_the_restored_step_again_writes_nothing(tmp_path):
    saved(tmp_path, 10)
    before = data_file(tmp_path, 10).stat().st_mtime_ns
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore(abstract())
        checkpoints.save(step, state, wait=True)
    assert data_file(tmp_path, 10).stat().st_mtime_ns == before


SAVE_FOREVER = """
    import sys, jax.numpy as jnp
    from based_jax.train.checkpoint import Checkpoints

    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, {"x": jnp.zeros(3)}, wait=True)
    checkpoints.save(2, {"x": jnp.arange(20_000_000)})
    print("saving", flush=True)
    checkpoints.wait()
"""


def test_a_killed_save_leaves_the_one_before(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "saving\n"
        process.send_signal(signal.SIGKILL)
    names = sorted(os.listdir(tmp_path))
    assert len(names) == 2
    assert names != ["1", "2"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        assert checkpoints.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})[0] == 1
        checkpoints.save(2, {"x": jnp.ones(3)}, wait=True)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


FILL_THE_DISK = """
    import resource, signal, sys
    import jax, jax.numpy as jnp
    from based_jax.errors import UserError
    from based_jax.train.checkpoint import CheckpointConfig, Checkpoints

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Checkpoints(sys.argv[1], CheckpointConfig(keep=1)) as checkpoints:
            checkpoints.save(1, {"x": jnp.zeros(3)}, wait=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            checkpoints.save(2, {"x": jax.random.normal(jax.random.key(0), (100_000,))})
            checkpoints.save(3, {"x": jnp.zeros(3)})
    except UserError as error:
        print(error)
        sys.exit(2)
"""


def test_a_save_that_the_disk_refuses_keeps_the_last_good_one(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FILL_THE_DISK), tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2, run.stderr
    assert run.stdout == f"Cannot save step 2 in '{tmp_path}': File too large; the last good checkpoint is step 1.\n"
    assert run.stderr == ""
    assert steps_in(tmp_path) == [1]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})[0] == 1


@pytest.mark.parametrize(
    "full",
    [
        OSError(28, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']"),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, full):
    def fail(*args, **kwargs):
        raise full

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, init(1), wait=True)
        monkeypatch.setattr(checkpoints._orbax, "save_async", fail)
        with pytest.raises(UserError, match=r"Cannot save step 2 in '.*': No space left on device; .* is step 1\."):
            checkpoints.save(2, init(2))


def test_a_folder_that_was_removed_is_one_sentence_and_is_not_made_anew(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, init(1), wait=True)
        shutil.rmtree(folder)
        with pytest.raises(UserError, match=r"Cannot save step 2 in '.*': No such file or directory; there is no good"):
            checkpoints.save(2, init(2))
    assert not folder.exists()


def test_files_that_were_removed_while_they_were_written_are_one_sentence(tmp_path, monkeypatch):
    def fail():
        raise ValueError(f"No ArrayMetadata found in the checkpoint directory: {tmp_path}/1.")

    with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(checkpoints._orbax, "wait", fail)
        with pytest.raises(
            UserError, match=r"^Cannot save the last step in '.*': No ArrayMetadata .*; there is no good"
        ):
            checkpoints.wait()


def test_a_save_that_has_failed_is_not_told_by_each_of_its_arrays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    checkpoint._hush_libraries.cache_clear()
    Checkpoints(tmp_path).close()
    for message in ("Event loop is closed", "Signal 15 ignored due to race condition", "another"):
        FailsAtItsEnd().message = message
    told = capsys.readouterr().err
    assert "RuntimeError: another" in told and "Event loop" not in told and "Signal" not in told


class FailsAtItsEnd:
    message = ""

    def __del__(self):
        raise RuntimeError(self.message)


def test_a_bug_while_saving_is_no_user_error(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a bug")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._orbax, "save_async", fail)
        with pytest.raises(ValueError, match="a bug") as error:
            checkpoints.save(2, init(2))
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize("field", ["every", "keep", "keep_every"])
def test_config_values_are_checked(field):
    with pytest.raises(UserError, match=f"{field} is 0; it is at least 1"):
        CheckpointConfig(**{field: 0})


def test_training_continues_bitwise(tmp_path):
    tx = optim.optimizer(optim.OptimConfig(warmup_steps=2), 6)

    @jax.jit
    def step(state):
        key, sub = jax.random.split(state["key"])
        grads = jax.tree.map(lambda x: jax.random.normal(sub, x.shape), state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return state | {"params": params, "opt": opt, "key": key, "step": state["step"] + 1}

    state = init(0)
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(3):
            state = step(state)
        checkpoints.save(3, state)
        for _ in range(3):
            state = step(state)
    with Checkpoints(tmp_path) as checkpoints:
        _, resumed = checkpoints.restore(abstract())
    for _ in range(3):
        resumed = step(resumed)
    assert_same(resumed, state)
