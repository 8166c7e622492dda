"""Write tests/parity/hf_*_b.npz: tiny random models of transformers with the options that their publications have.

Weights are drawn wide, biases and norms too, so that nothing hides in a tolerance. It needs torch and transformers,
which the suite does not: `python tests/helpers/transformers_arrays.py`, made with torch 2.11.0 and transformers 5.17.0.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "parity"
SIZES = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention"]
MODELS = {
    "hf_llama_b": (
        "Llama",
        SIZES
        | HEADS
        | {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3},
        },
    ),
    "hf_mistral_b": ("Mistral", SIZES | HEADS | {"sliding_window": 5, "head_dim": 8, "rms_norm_eps": 1e-5}),
    "hf_qwen2_b": (
        "Qwen2",
        SIZES
        | HEADS
        | {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "hf_qwen3_b": (
        "Qwen3",
        SIZES
        | HEADS
        | {
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": LAYER_TYPES,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "hf_mamba_b": (
        "Mamba",
        SIZES | {"state_size": 4, "time_step_rank": 3, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3},
    ),
    "hf_rwkv_b": (
        "Rwkv",
        SIZES | {"attention_hidden_size": 16, "intermediate_size": 40, "context_length": 32, "rescale_every": 0},
    ),
}
ROWS, LENGTH = 2, 20


def fill(model, generator):
    """Draw all parameters anew, matrices N(0, 1/fan_in) and the rest about what they were."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.copy_(draw / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.3 * draw)


def arrays_of(kind, fields):
    """Return the arrays of one model: config.json, weights, ids, logits, loss, gradients."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(**fields)
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    fill(model, generator)
    ids = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=generator)
    logits = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    source = f"transformers=={transformers.__version__}: {kind}ForCausalLM, eager attention"
    written = json.loads(config.to_json_string(use_diff=True)) | {"model_type": config.model_type}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {
        "meta": json.dumps({"source": source, "config": written}),
        "in.ids": ids.numpy(),
        "out.logits": logits.detach().numpy(),
        "out.loss": loss.detach().numpy(),
        **{f"w.{name}": w.numpy() for name, w in model.state_dict().items() if name not in tied},
        **{f"grad.{name}": w.grad.numpy() for name, w in model.named_parameters()},
    }


if __name__ == "__main__":
    for name, (kind, fields) in MODELS.items():
        np.savez(FOLDER / f"{name}.npz", **arrays_of(kind, fields))
