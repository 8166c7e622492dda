import jax
import pytest
from flax import nnx

from based_jax.__main__ import main
from based_jax.errors import UserError
from based_jax.nn.describe import describe
from based_jax.nn.mixers import MIXERS, make_mixer


def test_each_mixer_has_a_row_that_its_arrays_confirm():
    rows = {row.mixer: row for row in describe(256, 64)}
    assert list(rows) == list(MIXERS) and not any(row.does_not_fit for row in rows.values())
    mixer = make_mixer("taylor", 256, rngs=nnx.Rngs(0))
    params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    assert rows["taylor"].params == params == 4 * 256**2
    assert rows["taylor"].state_kib == pytest.approx(16 * 153 * 17 * 4 / 1024, abs=0.05)
    assert rows["taylor"].decode_mb_per_token == pytest.approx((2 * params + 2 * 16 * 153 * 17 * 4) / 1e6, abs=0.01)
    assert rows["attention"].state_kib == pytest.approx(2 * 256 * 64 * 2 / 1024, abs=0.1)
    assert rows["mamba"].train_mflops_per_token == pytest.approx(3e-6 * make_mixer_flops("mamba"), abs=0.01)


def make_mixer_flops(kind):
    return nnx.eval_shape(lambda: make_mixer(kind, 256, rngs=nnx.Rngs(0))).flops_per_token(64)


def test_the_command_prints_the_table_with_why_a_mixer_does_not_fit(capsys):
    assert main(["describe", "--d-model=100", "--seq-len=16"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines()[1 : len(MIXERS) + 1]}
    assert list(rows) == list(MIXERS)
    assert rows["hgrn2"].split()[1:5] == ["-"] * 4
    assert rows["hgrn2"].endswith("does not fit: expand_ratio 128 does not divide d_model 100.")
    assert "-" not in rows["conv"].split()


@pytest.mark.parametrize(("d_model", "seq_len"), [(0, 8), (-1, 8), (8, 0), (2**21, 8), (8, 2**31)])
def test_impossible_sizes_are_named(d_model, seq_len):
    with pytest.raises(UserError, match=r"(d_model|seq_len) is -?\d+; it is between 1 and \d+."):
        describe(d_model, seq_len)
