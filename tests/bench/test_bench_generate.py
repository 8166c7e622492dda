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
from based_jax.bench.generate_programs import Programs, Subject
from based_jax.bench.generate_size import Effort, Size
from based_jax.bench.peers import Peer
from based_jax.generate.blocks import decode
from based_jax.generate.prefill import chunks
from based_jax.generate.requests import Request
from based_jax.generate.rows import Rows, begun
from based_jax.nn.cache import TokenCache
from based_jax.nn.lm_config import LMConfig, with_options

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
    words = ["--batch", "2", "--context", "16", "64", "--tokens=3", "--blocks=2", "--compiled=none"]
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
    subject = Subject(config(BASED * 3, scan_layers=True))
    taylor, window = 2 * (8 + 1) * 15 * 4, 2 * 16 * 8 * 2
    ids_and_lengths = 2 * 3 * 4
    moved = decode_state.moved_bytes(subject.caches(5, 99))
    assert moved == 5 * 3 * (2 * taylor + window * (1 + 1 / 8) + ids_and_lengths)
    late = Subject(config((("taylor", {"num_heads": 2, "feature_dim": 4, "flush": 16}),)))
    recent = 2 * 16 * (4 + 8) * 2
    assert decode_state.moved_bytes(late.caches(1, 99)) == taylor * (1 + 1 / 16) + recent * (1 / 2 + 1 / 16) + 2 * 4
    kernels, norms = 3 * (16 * 2 * 2 * 4 + 2 * 16 * 16 + 4 * 16 * 16) + 64 * 16, 3 * 2 * 16 + 16
    assert subject.weight_bytes == 2 * kernels + 4 * norms
    attention = Subject(config((("attention", {"num_heads": 2}),), tie_embeddings=False, dtype="float32"))
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


def test_programs_decode_and_read_as_generation_does():
    """A block decodes what follows its context each time that it runs."""
    subject, context, tokens = Subject(config((("attention", {"num_heads": 2}),), dtype="float32")), 5, 3
    prompts = np.random.default_rng().integers(64, size=(2, context + 1), dtype=np.int32)
    requests = [Request(prompt, max_new_tokens=tokens) for prompt in prompts]
    programs, room = Programs(subject), context + tokens
    [chunk] = chunks(prompts[:, :-1], 8)
    block, read = programs.add_block(2, room, tokens), programs.add_chunk(room, chunk)
    programs.compile()
    params = subject.decoder.params
    caches = programs[read].step(subject.decoder.init_cache(2, room), (params, chunk))
    rows, once = programs[block].step(Rows.of(caches, requests), (params, jnp.int32(context)))
    _, again = programs[block].step(dataclasses.replace(rows, token=prompts[:, -1]), (params, jnp.int32(context)))
    _, expected = decode(subject.decoder, begun(subject.decoder, requests, room), tokens)
    assert once.tokens.tolist() == again.tokens.tolist() == expected.tokens.tolist()


def test_what_does_not_fit_is_told_without_compiling_it(monkeypatch):
    small = devices.Device("tiny", hbm_bytes=1e6, copy_bytes_per_second=1e9)
    monkeypatch.setattr(devices, "find", lambda kind: small)
    [row] = generate.measure(config((("attention", {"num_heads": 2}),)), [Size(32, 1000)], QUICK)
    assert "more than the device's memory" in row["error"] and "tokens_per_second" not in row
    assert row["roofline_tokens_per_second"] == pytest.approx(32e9 / (row["weight_bytes"] + 32 * 64 * 1002), rel=1e-3)
    assert generate_size.lines(row)[0] == f"(32,1000) on cpu: {row['error']}"


def test_layers_of_a_mixer_get_options():
    options = ["taylor.flush=32", "taylor.state_dtype=bfloat16"]
    (_, taylor), (_, window) = with_options(config(BASED), options).layers
    assert taylor == BASED[0][1] | {"flush": 32, "state_dtype": "bfloat16"} and window == BASED[1][1]


def test_each_of_several_is_told_what_it_measures(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("subprocess.run", lambda call: calls.append(call) or types.SimpleNamespace(returncode=0))
    words = ["--batch", "1", "8", "--context", "32", "--no-prefill", "--config.model.d_model=8", "--option=conv.x=1"]
    assert main(["bench", "generate", "--config", "a.py", "b.py:1b", "--peer=hf:llama_1b", *words]) == 0
    assert [call[5] for call in calls] == ["--config=a.py", "--config=b.py:1b", "--peer=hf:llama_1b"]
    sizes = ["--sizes", "1x32", "8x32", "--option=conv.x=1", "--tokens=32", "--blocks=5", "--no-prefill"]
    assert calls[1][3:5] == ["bench", "generate"] and calls[1][6:] == [*sizes, "--config.model.d_model=8"]


def test_a_peer_s_row_has_the_fields_of_ours(monkeypatch):
    monkeypatch.setitem(generate_peers.PEERS, "hf:mine", Peer((), (), "mine", lambda size: f"model of {size}"))
    monkeypatch.setattr(torch_generation, "decoded", lambda subject, size, effort: {"seen": subject, "error": "slow"})
    monkeypatch.setattr(torch_generation, "read", lambda subject, count, length: {"prefill_rows": count})
    rows = [*generate_peers.measure("hf:mine", [Size(2, 50), Size(9000, 50)], QUICK._replace(prefill=True))]
    assert [(row["batch"], row["context"], row["prefill_rows"]) for row in rows] == [(2, 50, 1310), (9000, 50, 1310)]
    assert rows[0]["seen"] == "model of mine" and "jax" in rows[0]["versions"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There is nothing to time"),
        (["--peer=hf:nothing"], "'hf:nothing'"),
        (["--batch=0"], "batch is 0"),
        (["--tokens=0"], "tokens is 0"),
        (["--sizes", "128"], "'128' is no size"),
        (["--option=flush=0"], "'flush=0' is no option"),
        (["--option=taylor.flush=0"], "flush is 0"),
        (["--option=window.window=0"], "Unknown mixer 'window'"),
    ],
)
def test_what_cannot_be_timed_is_one_sentence(words, message, tiny, capsys):
    configs = [f"--config={tiny}"] if any("=0" in word for word in words) else []
    assert main(["bench", "generate", *configs, *words]) == 2
    assert message in capsys.readouterr().err
