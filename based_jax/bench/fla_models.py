"""Training steps of flash-linear-attention's models in PyTorch: bf16 by autocast, fp32 parameters, fused AdamW."""

import time
from typing import Any

from based_jax.bench.torch_timing import median_seconds
from based_jax.bench.train_size import Size

VOCAB_SIZE = 50_304
CLASSES = {
    "transformer": ("TransformerConfig", "TransformerForCausalLM"),
    "gated_deltanet": ("GatedDeltaNetConfig", "GatedDeltaNetForCausalLM"),
    "kda": ("KDAConfig", "KDAForCausalLM"),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM"),
    "rwkv7": ("RWKV7Config", "RWKV7ForCausalLM"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gated_deltanet": {"num_heads": 16, "head_dim": 128, "expand_v": 1.0, "num_hidden_layers": 24}
}
"""Beside the library's defaults, which are its 1.3B shapes."""


def measure(name: str, size: Size) -> dict[str, Any]:
    """Return how long a step of a model takes, and what it needs."""
    import torch
    from fla import models

    config_class, model_class = (getattr(models, x) for x in CLASSES[name])
    config = config_class(vocab_size=VOCAB_SIZE, use_cache=False, **OPTIONS.get(name, {}))
    model = model_class(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids = torch.randint(VOCAB_SIZE, (size.rows, size.seq_len), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - begin
    seconds = median_seconds(step, size.steps)
    return {
        "milliseconds": round(1e3 * seconds, 3),
        "remat": "none",
        "vocab_size": VOCAB_SIZE,
        "parameters": sum(x.numel() for x in model.parameters()),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "compile_seconds": round(compile_seconds, 2),
    }
