"""GGUF files of small Llamas, written by the package `gguf`."""

import numpy as np

from based_jax.convert.gguf import ARCHITECTURE, FIELDS, LAYER_ARRAYS, OTHER_ARRAYS, TOKENIZER, TURNED


def byte_tokens():
    """Return the letters that stand for bytes in byte-level vocabularies."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def turned(x, heads):
    """Return rows of heads as the file has them: the two channels of each of rotary's pairs beside each other."""
    return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path, weights, fields, *, rope_theta=10000.0, quantised=(), **told):
    """Write a Llama of transformers' weights and fields; arrays whose name has a text of `quantised` in eight bits."""
    import gguf

    writer = gguf.GGUFWriter(path, told.pop("architecture", ARCHITECTURE))
    for name, key in FIELDS.items():
        add = writer.add_float32 if name == "rms_norm_eps" else writer.add_uint32
        add(f"{ARCHITECTURE}.{key}", fields[name])
    writer.add_float32(f"{ARCHITECTURE}.rope.freq_base", rope_theta)
    tokens = ["<|endoftext|>", *byte_tokens(), "th"]
    writer.add_string(f"{TOKENIZER}model", "gpt2")
    writer.add_string(f"{TOKENIZER}pre", told.pop("pre", "smollm"))
    writer.add_array(f"{TOKENIZER}tokens", tokens)
    writer.add_array(f"{TOKENIZER}token_type", [3] + [1] * (len(tokens) - 1))
    writer.add_array(f"{TOKENIZER}merges", ["t h"])
    writer.add_uint32(f"{TOKENIZER}eos_token_id", 0)
    adds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    for name, value in told.items():
        adds[type(value)](name.replace("__", "."), value)
    for name, array in weights.items():
        ours, array = _named(name, array.astype(np.float32), fields)
        kind = gguf.GGMLQuantizationType.Q8_0
        if any(part in name for part in quantised):
            writer.add_tensor(ours, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(name, array, fields):
    stem, _, end = name.rpartition(".")
    for ours, theirs in OTHER_ARRAYS.items():
        if stem == theirs:
            return f"{ours}.{end}", array
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    kind = next(ours for ours, theirs in LAYER_ARRAYS.items() if theirs == rest)
    return f"blk.{layer}.{kind}.{end}", turned(array, fields[TURNED[kind]]) if kind in TURNED else array
