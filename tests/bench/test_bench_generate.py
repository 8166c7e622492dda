"""`bench generate` of small models on a CPU."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from based_jax import devices
from based_jax.__main__ import main
from based_jax.bench import decode_state, generate, generate_peers, generate_size, torch_generation
from based_jax.bench.generate_size import Effort, Size
from based_jax.bench.peers import Peer
from based_jax.generate.requests import Request
from based_jax.generate.rows import begun, decode
from based_jax.nn.cache import TokenCache
from based_jax.nn.lm_config import LMConfig

QUICK = Effort(tokens=3, blocks=2, profiled=False, prefill=False)
BASED = (("taylor", {"num_heads": 2, "feature_dim": 4}), ("window", {"num_heads": 2, "window": 8}))


def config(layers, **options):
    return LMConfig(layers=layers, d_model=16, vocab_size=64, mlp="none", **options)


@pytest.fixture
def tiny(tmp_path):
    """A config file of a Taylor layer."""
    path = tmp_path / "tiny.py"
    model = {"layers": BASED[:1], "d_model": 16, "vocab_size": 257, "mlp": "none"}
    data = {"kind": "text", "tokenizer": "bytes", "seq_len": 32}
    body = f"return ConfigDict({{'model': {model}, 'data': {data}, 'steps': 10, 'batch_size': 4}})"
    path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    {body}\n")
    return path


def test_a_row_says_how_fast_a_model_decodes_and_reads(tiny, tmp_path, capsys):
    """Of a state that does not grow, contexts share a program."""
    out = tmp_path / "deep" / "rows.jsonl"
    words = ["--batch", "2", "--context", "64", "16", "--tokens=3", "--blocks=2", "--compiled=none"]
    assert main(["bench", "generate", f"--config={tiny}", *words, f"--out={out}"]) == 0
    short, long = map(json.loads, out.read_text().splitlines())
    assert [(row["batch"], row["context"], row["prefill_rows"]) for row in (short, long)] == [(2, 16, 2), (2, 64, 2)]
    assert short["tokens_per_second"] == pytest.approx(2e3 / short["milliseconds"], rel=2e-2)
    assert short["prefill_tokens_per_second"] == pytest.approx(32e3 / short["prefill_milliseconds"], rel=2e-2)
    assert short["state_bytes"] == long["state_bytes"] == 4 * (2 * 9 * 15 + 1)  # fp32, and a document's id
    assert short["compile_seconds"] == long["compile_seconds"] > 0 and not short["compiled_before"]
    assert short["config"] == str(tiny) and short["roofline_tokens_per_second"] is None
    assert short["device"] == "cpu" and short["command"].startswith("python -m based_jax")
    assert "(2,16) on cpu: " in capsys.readouterr().out


def test_the_least_bytes_of_a_token():
    """Of a token's state Taylor's is read and written, and of a window the keys are read and one of them is written."""
    subject = generate.Subject(config(BASED * 3, scan_layers=True))
    taylor, window = 2 * (8 + 1) * 15 * 4, 2 * 16 * 8 * 2
    assert decode_state.moved_bytes(subject.caches(5, 99)) == 5 * 3 * (2 * (taylor + 4) + window * (1 + 1 / 8) + 2 * 4)
    kernels, norms = 3 * (16 * 2 * 2 * 4 + 2 * 16 * 16 + 4 * 16 * 16) + 64 * 16, 3 * 2 * 16 + 16
    assert subject.weight_bytes == 2 * kernels + 4 * norms
    attention = generate.Subject(config((("attention", {"num_heads": 2}),), tie_embeddings=False, dtype="float32"))
    assert decode_state.array_bytes(attention.caches(1, 50)) == 2 * 16 * 50 * 4 + 2 * 4
    assert attention.weight_bytes == 4 * (4 * 16 * 16 + 2 * 16 + 64 * 16)


def test_the_roofline_is_the_rate_of_a_copy():
    assert generate_size.roofline(4.3e9, 128, "NVIDIA H200") == pytest.approx(128_000)
    assert generate_size.roofline(4.3e9, 128, "cpu") is None


def test_a_cache_nobody_has_read_is_as_full_as_it_says():
    shapes = jax.eval_shape(lambda: TokenCache.empty(jnp.zeros((2, 8, 3), jnp.bfloat16)))
    cache = decode_state.at_length((decode_state.random_state(shapes, jax.random.key(0)), 7), 5)[0]
    assert cache.visible().sum(axis=1).tolist() == [5, 5] and cache.tokens.dtype == jnp.bfloat16
    assert jnp.all(cache.tokens > 0) and jnp.unique(cache.tokens[0]).size > 8


def test_a_timed_block_decodes_what_follows_its_context_each_time():
    subject = generate.Subject(config((("attention", {"num_heads": 2}),), dtype="float32"))
    size, prompts = Size(2, 5), np.random.default_rng().integers(64, size=(2, 6), dtype=np.int32)
    requests = [Request(prompt, max_new_tokens=3) for prompt in prompts]
    program = generate.compiled_blocks(subject, [size], 3)[0][size]
    inputs, room = (subject.decoder.params, jnp.int32(size.context)), size.context + 3
    rows, once = program.step(begun(subject.decoder, requests, room), inputs)
    _, again = program.step(dataclasses.replace(rows, token=prompts[:, -1]), inputs)
    _, expected = decode(subject.decoder, begun(subject.decoder, requests, room), 3)
    assert once.tokens.tolist() == again.tokens.tolist() == expected.tokens.tolist()


def test_what_does_not_fit_is_told_without_compiling_it(monkeypatch):
    small = devices.Device("tiny", hbm_bytes=1e6, copy_bytes_per_second=1e9)
    monkeypatch.setattr(devices, "find", lambda kind: small)
    [row] = generate.measure(config((("attention", {"num_heads": 2}),)), [Size(32, 1000)], QUICK)
    assert "more than the device's memory" in row["error"] and "tokens_per_second" not in row
    assert row["roofline_tokens_per_second"] == pytest.approx(32e9 / (row["weight_bytes"] + 32 * 64 * 1002), rel=1e-3)
    assert generate_size.lines(row)[0] == f"(32,1000) on cpu: {row['error']}"


def test_each_of_several_is_told_what_it_measures(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("subprocess.run", lambda call: calls.append(call) or types.SimpleNamespace(returncode=0))
    words = ["--batch", "1", "8", "--context", "32", "--no-prefill", "--config.model.d_model=8"]
    assert main(["bench", "generate", "--config", "a.py", "b.py:1b", "--peer=hf:llama_1b", *words]) == 0
    assert [call[5] for call in calls] == ["--config=a.py", "--config=b.py:1b", "--peer=hf:llama_1b"]
    sizes = ["--batch", "1", "8", "--context", "32", "--tokens=32", "--blocks=5", "--no-prefill"]
    assert calls[1][3:5] == ["bench", "generate"] and calls[1][6:] == [*sizes, "--config.model.d_model=8"]


def test_a_peer_s_row_has_the_fields_of_ours(monkeypatch):
    monkeypatch.setitem(generate_peers.PEERS, "hf:mine", Peer((), (), "mine", lambda size: f"model of {size}"))
    monkeypatch.setattr(torch_generation, "measure", lambda subject, size, effort: {"seen": subject, "error": "slow"})
    [row] = generate_peers.measure("hf:mine", [Size(2, 50)], QUICK)
    assert (row["batch"], row["context"], row["seen"]) == (2, 50, "model of mine") and "jax" in row["versions"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There is nothing to time"),
        (["--peer=hf:nothing"], "'hf:nothing'"),
        (["--batch=0"], "batch is 0"),
        (["--tokens=0"], "tokens is 0"),
    ],
)
def test_what_cannot_be_timed_is_one_sentence(words, message, tiny, capsys):
    configs = [f"--config={tiny}"] if any("=0" in word for word in words) else []
    assert main(["bench", "generate", *configs, *words]) == 2
    assert message in capsys.readouterr().err
