"""Generation in PyTorch: blocks of tokens captured as CUDA graphs, so that no host is waited for, in bf16.

Torch and the libraries are imported where a model is made: nothing else needs them, and most machines lack them.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from based_jax.bench.generate_size import PREFILLS, UNTIMED_PREFILLS, Effort, Size, roofline
from based_jax.bench.torch_timing import median_seconds

VOCAB_SIZE = 50_304
FEW_TOKENS = 64
"""That a model reads whose state has one size: a context of any length leaves a state like theirs."""
LLAMAS = {
    "360m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
}
GATED_DELTANETS: dict[str, dict[str, Any]] = {
    "360m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18, "num_heads": 4, "head_dim": 256},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 16, "head_dim": 128, "expand_v": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model of random weights.

    Attributes:
      model: of a library.
      new_cache: `(model, size, room) -> cache` as after a context, with room for more tokens.
      restart: `(cache, context)`: makes a cache as it was before a block, where the block has changed it in place.
      reads_once: whether what a token leaves in the state is never written again.
    """

    model: Any
    new_cache: Callable[[Any, Size, int], Any]
    restart: Callable[[Any, int], None]
    reads_once: bool


def llama(size: str) -> Subject:
    """Return Llama in transformers, with a static cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, tie_word_embeddings=True, max_position_embeddings=1 << 17, **LLAMAS[size]
    )
    return Subject(_on_device(LlamaForCausalLM, config), _static_cache, _rewind, reads_once=True)


def gated_deltanet(size: str) -> Subject:
    """Return Gated DeltaNet in flash-linear-attention."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    config = GatedDeltaNetConfig(vocab_size=VOCAB_SIZE, tie_word_embeddings=True, **GATED_DELTANETS[size])
    return Subject(_on_device(GatedDeltaNetForCausalLM, config), _read_cache, lambda *_: None, reads_once=False)


def _on_device(model_class: Any, config: Any) -> Any:
    import torch

    with torch.device(device()):
        return model_class(config).to(torch.bfloat16).eval()


def device() -> str:
    """Return where models are."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _static_cache(model: Any, size: Size, room: int) -> Any:
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(config=config, max_cache_len=size.context + room)
    heads = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache.early_initialization(size.batch, *heads, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.uniform_(0.01, 0.1)
        layer.values.uniform_(0.01, 0.1)
    return cache


def _rewind(cache: Any, context: int) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(context)


def _read_cache(model: Any, size: Size, room: int) -> Any:
    return _read(model, size.batch, min(size.context, FEW_TOKENS)).past_key_values


def _read(model: Any, count: int, length: int, **options: Any) -> Any:
    import torch

    ids = torch.randint(VOCAB_SIZE, (count, length), device=model.device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **options)


def decoded(subject: Subject, size: Size, effort: Effort) -> dict[str, Any]:
    """Return how fast a model decodes, and what it needs."""
    return _fitting(lambda: _decoding(subject, size, effort), "error")


def read(subject: Subject, count: int, length: int) -> dict[str, Any]:
    """Return how fast a model reads so many prompts of a length together."""
    return _fitting(lambda: _prefilling(subject, count, length), "prefill_error")


def _decoding(subject: Subject, size: Size, effort: Effort) -> dict[str, Any]:
    import torch

    torch.cuda.reset_peak_memory_stats()
    state: dict[str, Any] = {}

    def new_block() -> Callable[[], Any]:
        cache = subject.new_cache(subject.model, size, effort.tokens)
        state.update(_bytes(subject, cache, size, effort.tokens))
        return block(subject, cache, size, effort.tokens)

    begin = time.perf_counter()
    replay, is_graph = _captured(new_block)
    torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - begin
    seconds = median_seconds(replay, effort.blocks) / effort.tokens
    return {
        **state,
        "tokens": effort.tokens,
        "blocks": effort.blocks,
        "milliseconds": round(1e3 * seconds, 4),
        "tokens_per_second": size.batch / seconds,
        "compile_seconds": round(compile_seconds, 2),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "cuda_graph": is_graph,
        "breakdown": None,
    }


def block(subject: Subject, cache: Any, size: Size, tokens: int) -> Callable[[], Any]:
    """Return a call that decodes so many tokens of each sequence after its context, and returns the last ones."""
    import torch

    first = torch.zeros((size.batch, 1), dtype=torch.long, device=subject.model.device)

    def run() -> Any:
        subject.restart(cache, size.context)
        ids = first
        for _ in range(tokens):
            out = subject.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
        return ids

    return run


def _captured(new_block: Callable[[], Callable[[], Any]]) -> tuple[Callable[[], Any], bool]:
    """Return a block as a CUDA graph, and whether it is one: what waits for the device cannot be captured."""
    import torch

    run, stream = new_block(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"Without a CUDA graph, since it cannot be captured: {str(error).splitlines()[0]}", flush=True)
        return new_block(), False
    return graph.replay, True


def _prefilling(subject: Subject, count: int, length: int) -> dict[str, Any]:
    def read() -> None:
        _read(subject.model, count, length)

    begin = time.perf_counter()
    read()
    compile_seconds = time.perf_counter() - begin
    seconds = median_seconds(read, PREFILLS, UNTIMED_PREFILLS)
    return {
        "prefill_rows": count,
        "prefill_milliseconds": round(1e3 * seconds, 3),
        "prefill_tokens_per_second": count * length / seconds,
        "prefill_compile_seconds": round(compile_seconds, 2),
    }


def _bytes(subject: Subject, cache: Any, size: Size, tokens: int) -> dict[str, Any]:
    """Return the bytes of weights and of a sequence's state, and the speed at which they allow to decode."""
    import torch

    weights = sum(x.nbytes for x in subject.model.parameters())
    held = sum(x.nbytes for layer in cache.layers for x in _tensors(vars(layer))) / size.batch
    a_token = held / (size.context + tokens) if subject.reads_once else 0.0
    state = held - tokens * a_token
    moved = state + a_token * (tokens / 2 + 1) if subject.reads_once else 2 * state
    return {
        "state_bytes": round(state),
        "weight_bytes": weights,
        "roofline_tokens_per_second": roofline(weights + size.batch * moved, size.batch, torch.cuda.get_device_name()),
    }


def _tensors(x: Any) -> Iterator[Any]:
    """Yield the tensors of containers that have more than a number."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, x))
    elif getattr(x, "ndim", 0):
        yield x


def _fitting(call: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """Return what a call does, or under `name` why it cannot: for want of memory, or because a library refuses."""
    import torch

    try:
        with torch.inference_mode():
            return call()
    except RuntimeError as error:
        torch.cuda.empty_cache()
        return {name: str(error).splitlines()[0]}
