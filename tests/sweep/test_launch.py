"""A sweep is the same on this machine, on Ray and on SLURM; the command line says what is wrong in one sentence."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from based_jax.__main__ import main
from based_jax.store import Store
from based_jax.sweep import launch
from based_jax.sweep.lane_training import Outcome
from based_jax.sweep.rows import lane_line
from based_jax.sweep.schedule import SweepOptions
from based_jax.sweep.trial import load_sweep, make_trial
from tests.helpers.processes import free_port

SWEEP = """
from based_jax.sweep import Sweep, param, product
SEGMENT = {"num_examples": 40, "seq_len": 16, "num_kv_pairs": 2}
BASE = {
    "model": {"layers": (("base_conv", {}),), "d_model": 8, "vocab_size": 40, "mlp": "none", "dtype": "float32"},
    "data": {"kind": "mqar", "preset": "tiny", "vocab_size": 40, "train": (SEGMENT,), "test": (SEGMENT,)},
    "batch_size": 20,
    "optim": {"schedule": "constant"},
}
VARIANTS = {"wide": [16], "both": [8, 12]}
def get_sweep(variant="both"):
    return Sweep(BASE, product(param("model.d_model", VARIANTS[variant]), param("seed", [0, 1])))
"""


BASE = {
    "model": {"layers": (("base_conv", {}),), "d_model": 8, "vocab_size": 40},
    "data": {"kind": "mqar", "preset": "tiny", "vocab_size": 40},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP)
    return str(path)


def test_the_command_runs_lists_and_draws(file, tmp_path, capsys):
    store, out = str(tmp_path / "store"), tmp_path / "pictures"
    assert main(["sweep", "list", file, f"--store={store}"]) == 0
    assert "4 of 4 points have no row" in capsys.readouterr().out
    assert main(["sweep", "run", file, f"--store={store}", "--part=1/2"]) == 0
    assert main(["sweep", "list", file, f"--store={store}"]) == 0
    assert "2 of 4 points have no row" in capsys.readouterr().out
    assert main(["sweep", "run", file, f"--store={store}", "--lanes=1"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^\[2/2, \d+ s\] base_conv, D \d+, taps 3, seed=\d: 0\.\d{3}, finished after 1 epochs, ", said, re.M
    )
    rows = Store(store).rows()
    assert len(rows) == 4 and {row["sweep"] for row in rows} == {"sweep"}
    assert all(row["command"].startswith("python -m based_jax") for row in rows)
    assert main(["sweep", "plot", f"--store={store}", f"--out={out}"]) == 0
    assert {path.name for path in out.iterdir()} == {f"frontier.{x}" for x in ("png", "svg", "pdf", "html")}
    assert main(["sweep", "plot", f"--store={store}", f"--out={out}", "--picture=ablation"]) == 0
    assert capsys.readouterr().out.endswith(f"{out / 'ablation.svg'}, {out / 'ablation.pdf'}.\n")
    assert (out / "ablation.svg").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--part=2/2"], "--part is '2/2'; it is i/n with 0 <= i < n"),
        (["--part=1"], "--part is '1'"),
        (["--lanes=0"], "--lanes is 0; it is at least 1"),
        (["--launcher=slum"], "Unknown launcher 'slum': did you mean 'slurm'"),
    ],
)
def test_wrong_options_are_one_sentence(words, said, file, tmp_path, capsys):
    assert main(["sweep", "run", file, f"--store={tmp_path / 'store'}", *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "store").exists()


def test_wrong_files_are_one_sentence(file, tmp_path, capsys):
    assert main(["sweep", "run", f"{file}:wid", "--store=x"]) == 2
    assert "'wid': did you mean 'wide'" in capsys.readouterr().err
    (tmp_path / "other.py").write_text("def get_sweep():\n    return 3\n")
    assert main(["sweep", "run", str(tmp_path / "other.py"), "--store=x"]) == 2
    assert "get_sweep returns a Sweep" in capsys.readouterr().err
    assert main(["sweep", "plot", f"--store={tmp_path}", "--out=x"]) == 2
    assert "There are no rows in" in capsys.readouterr().err
    assert main(["sweep", "plot", f"--store={tmp_path}", "--out=x", "--picture=figure2"]) == 2
    assert "Unknown picture 'figure2': did you mean 'figure3'" in capsys.readouterr().err


def test_slurm_gets_an_array_job_whose_tasks_are_the_parts(file, tmp_path, monkeypatch):
    got = tmp_path / "job.sh"
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\ncat > {got}\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    assert launch.on_slurm(f"{file}:both", "store", SweepOptions(), tasks=2, script=None) == 0
    text = got.read_text()
    assert "#SBATCH --array=0-1" in text and "#SBATCH --requeue" in text
    # What a task of the array would do, with a stand-in for Python.
    shown = text.splitlines()[-1].replace(shlex.quote(sys.executable), "echo")
    said = subprocess.check_output(["sh", "-c", shown], env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"}, text=True)
    assert said.split()[:4] == ["-m", "based_jax", "sweep", "run"] and said.split()[-1] == "--part=1/2"


def test_a_job_that_sbatch_refuses_is_one_sentence(file, tmp_path, monkeypatch, capsys):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["sweep", "run", file, f"--store={tmp_path / 'store'}", "--launcher=slurm"]) == 2
    assert capsys.readouterr().err == "Error: sbatch refuses the job: sbatch: error: invalid partition.\n"


def test_slurm_writes_a_script_where_there_is_no_sbatch(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["sweep", "run", file, f"--store={tmp_path / 'store'}", "--launcher=slurm", "--tasks=3"]
    assert main(words) == 2 and "needs sbatch on the PATH" in capsys.readouterr().err
    assert main([*words, f"--script={tmp_path / 'job.sh'}"]) == 0
    assert "--array=0-2" in (tmp_path / "job.sh").read_text()


def in_two_processes(file, store):
    """Run the command in a process without threads, which can be forked."""
    words = ["sweep", "run", file, f"--store={store}", "--processes=2"]
    return subprocess.run([sys.executable, "-m", "based_jax", *words], capture_output=True, text=True, timeout=100)


def test_the_end_of_a_pool_is_no_exception_in_its_processes():
    code = """
import signal
from based_jax.sweep.launch import forked_pool
signal.signal(signal.SIGTERM, signal.default_int_handler)
with forked_pool(2) as pool:
    print(pool.apply(signal.getsignal, [signal.SIGTERM]) == signal.SIG_DFL)
for _ in range(100):
    forked_pool(2).terminate()  # before its processes are ready for it
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=100) == "True\n"


def test_a_line_tells_stacks_apart_and_names_what_the_point_sets():
    def told(point):
        trial = make_trial(BASE, point)
        return lane_line(point, trial, Outcome("finished", [0.5], seconds=2.0))

    stacks = [(("base_conv", {}), ("retnet", {"num_heads": 2})), (("retnet", {"num_heads": 1}),) * 2]
    assert [told({"model.layers": stack}) for stack in stacks] == [
        "base_conv + retnet, D 8, 2 heads: 0.500, finished after 1 epochs, 2.0 s",
        "retnet x2, D 8: 0.500, finished after 1 epochs, 2.0 s",
    ]
    assert told({"optim.lr": 0.1, "seed": 3}).startswith("base_conv, D 8, taps 3, optim.lr=0.1, seed=3: 0.500")


def test_two_processes_share_a_sweep(file, tmp_path):
    said = in_two_processes(file, tmp_path / "store")
    assert said.returncode == 0, said.stderr
    store = Store(tmp_path / "store")
    assert store.ids() == {trial.id for _, trial in load_sweep(file).trials()}
    assert sorted(re.findall(r"\[(\d)/4", said.stdout)) == list("1234")


def test_no_more_processes_and_workers_than_groups(file, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(launch, "_run_in_processes", lambda store, calls: called.extend(calls))
    monkeypatch.setattr(launch, "checked_apart", lambda *_: None)
    monkeypatch.setattr(launch.LaneEngine, "prepare", lambda *_: None)
    options = SweepOptions(workers=10**23)
    launch.in_processes(file, str(tmp_path / "store"), options, processes=10**23)
    engine_options = {call[4].workers for call in called}
    assert (len(called), engine_options) == (2, {2})


FAILING = """
import sys, time
from based_jax.__main__ import main
from based_jax.sweep import lane_engine
def fail(*_, **__):
    time.sleep(0.5)  # for the other process to have some as well
    raise MemoryError("no room")
lane_engine.lane_training.train_lanes = fail
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_fails_is_told_after_the_others_have_ended(file, tmp_path):
    Path(file).write_text(SWEEP.replace("[8, 12]", "[8, 12, 16, 20, 24, 28]"))
    words = ["sweep", "run", file, f"--store={tmp_path / 'store'}", "--processes=2"]
    said = subprocess.run([sys.executable, "-c", FAILING, *words], capture_output=True, text=True, timeout=100)
    assert said.returncode == 1 and said.stderr.startswith("Error: 2 of 2 processes have failed: ")
    assert "groups failed: base_conv, D " in said.stderr and said.stderr.endswith("MemoryError: no room\n")
    assert said.stdout.count("FAILED") == 6 and not (tmp_path / "store" / "claims").exists()


@pytest.mark.parametrize("names, found", [("0,1", ["0", "1"]), ("", [])])
def test_gpus_that_a_process_may_use(names, found, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert launch.visible_gpus() == found


def test_processes_share_the_memory_of_their_gpu_unless_told_otherwise(monkeypatch):
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.delenv(name, raising=False)
    places = ["0", "1", "0", "1", "0"]
    shares = {gpu: launch.environment_of(gpu, places) for gpu in ("0", "1")}
    assert all(found["CUDA_VISIBLE_DEVICES"] == gpu for gpu, found in shares.items())
    assert sum(float(shares[gpu][name]) for gpu in places if gpu == "0") == pytest.approx(0.88, abs=0.01)
    assert float(shares["1"][name]) == 0.44
    monkeypatch.setenv(name, "0.2")
    assert launch.environment_of("0", places)[name] == "0.2"
    assert launch.environment_of(None, [None, None]) == {}


@pytest.mark.long
def test_two_ray_tasks_share_a_sweep(file, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: the extra 'ray'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert launch.on_ray(file, str(tmp_path / "store"), SweepOptions(), tasks=2) == 4
    finally:
        ray.shutdown()
    store = Store(tmp_path / "store")
    assert store.ids() == {trial.id for _, trial in load_sweep(file).trials()}
    assert len(list((tmp_path / "store").glob("*.jsonl"))) == 2  # each wrote its own file


KILLED = """
import os, signal, sys
from based_jax.__main__ import main
from based_jax.sweep import lane_engine
if sys.argv[-1] == "--process-id=1":
    lane_engine.lane_training.train_lanes = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_process_of_several_that_is_killed_leaves_its_points_to_the_others(file, tmp_path):
    store, port = Store(tmp_path / "store"), free_port()
    words = ["sweep", "run", file, f"--store={store.path}", f"--coordinator=localhost:{port}", "--num-processes=2"]
    command = [sys.executable, "-c", KILLED, *words]
    zero, one = (subprocess.Popen([*command, f"--process-id={i}"], stderr=subprocess.PIPE, text=True) for i in range(2))
    try:
        assert one.wait(100) == -signal.SIGKILL
        said = zero.communicate(timeout=100)[1]
    finally:
        zero.kill()
    assert (zero.returncode, said) == (0, "Process 1 of 2 is gone; this one goes on, with what that had begun too.\n")
    assert store.ids() == {trial.id for _, trial in load_sweep(file).trials()}
