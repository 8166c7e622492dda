"""Language models of GGUF files, the layout of llama.cpp: weights that are quantised, and their tokenizer.

The package `gguf` (extra `linearize`) reads the file and turns blocks of few bits into numbers. Source of the layout:
ggml-org/llama.cpp:convert_hf_to_gguf.py, `LlamaModel`, which moves the rows of queries and keys so that channels that
rotary turns together stand beside each other; here they are moved back.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Float
from tokenizers import decoders, models, pre_tokenizers

from based_jax import config as configs
from based_jax.convert.folders import Fields
from based_jax.convert.hf import save_hf
from based_jax.convert.llama import FAMILIES
from based_jax.convert.reference import lm_from_reference
from based_jax.convert.tokenizers import TOKENIZER_FILE
from based_jax.data.tokenizer_file import FileTokenizer
from based_jax.errors import UserError, unknown
from based_jax.folders import local_path, reason
from based_jax.nn.lm import LM
from based_jax.nn.lm_config import LMConfig

FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
}
"""The key of a Llama's config.json -> that of the file, behind its architecture's name."""
ARCHITECTURE, GGUF_SUFFIX = "llama", ".gguf"
ROPE_BASE, ROPE_DIMENSIONS = "rope.freq_base", "rope.dimension_count"
HEAD_WIDTHS = "attention.key_length", "attention.value_length"
UNREAD = {
    "rope.scaling.type": ("none",),
    "rope.scale_linear": (1.0,),
    "attention.sliding_window": (0,),
    "tokenizer.ggml.add_bos_token": (False,),
}
"""Keys of what no file was at hand to try: the values that they may have if they are there."""
LAYER_ARRAYS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_ARRAYS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
TURNED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""Arrays whose rows are moved, by how many heads they have."""
PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
"""How a text is cut before its pairs are merged, by the file's name for it."""
TOKENIZER = "tokenizer.ggml."
CONTROL_TOKEN, USER_TOKEN = 3, 4
"""Of a file's types of tokens, those that no text spells."""


class GgufModel(NamedTuple):
    """What a file holds.

    Attributes:
      config: of a model that computes in fp32, unless another dtype was asked for.
      weights: fp32, under transformers' names.
      tokenizer: of the `tokenizers` library.
      end_of_text: the id that ends a text.
    """

    config: LMConfig
    weights: dict[str, np.ndarray]
    tokenizer: tokenizers.Tokenizer
    end_of_text: int

    def model(self) -> LM:
        """Return the language model."""
        return lm_from_reference(self.weights, self.config)

    def text_tokenizer(self) -> FileTokenizer:
        """Return the tokenizer as data and evaluations read texts."""
        with self.tokenizer_file() as path:
            return FileTokenizer(path, end_of_text=self.end_of_text)

    @contextlib.contextmanager
    def tokenizer_file(self) -> Iterator[Path]:
        """Return a tokenizer.json, which lasts as long as the context."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / TOKENIZER_FILE
            self.tokenizer.save(str(path))
            yield path

    def save(self, folder: str | os.PathLike) -> str:
        """Write the folder that `load_hf` and transformers read, and return its layout's name; errors as `save_hf`."""
        with self.tokenizer_file() as path:
            return save_hf(self.model(), folder, tokenizer=str(path))


def read_gguf(path: str | os.PathLike, *, dtype: str = "float32", scan_layers: bool = True) -> GgufModel:
    """Return the Llama of a GGUF file with its tokenizer, whatever its weights are quantised to.

    Args:
      path: the file.
      dtype: what the model computes in.
      scan_layers: as in `LMConfig`.

    Raises:
      UserError: the package `gguf` is missing, the file is missing or damaged, or holds another kind of model.
    """
    file = local_path(path, "GGUF file")
    reader = _reader(file)
    told = {name: field.contents() for name, field in reader.fields.items()}
    try:
        fields = _fields(told)
        weights = {name: array for tensor in reader.tensors for name, array in [_array(tensor, fields)]}
        tokenizer = _tokenizer(told)
        end_of_text = int(told[f"{TOKENIZER}eos_token_id"])
    except KeyError as error:
        raise UserError(f"'{file}' lacks {error} of a Llama.") from None
    fields["attention_bias"] = any(name.endswith("q_proj.bias") for name in weights)
    fields["tie_word_embeddings"] = "lm_head.weight" not in weights
    values = FAMILIES["llama"].values(fields, weights)
    config = configs.build(LMConfig, values | {"dtype": dtype, "scan_layers": scan_layers})
    return GgufModel(config, weights, tokenizer, end_of_text)


def _reader(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"'{file}' is no file.")
    try:
        import gguf
    except ImportError:
        raise UserError("Reading GGUF needs the package gguf: pip install -e '.[linearize]'.") from None
    try:
        return gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"'{file}' cannot be read as GGUF: {reason(error)}.") from None


def _fields(told: Fields) -> Fields:
    """Return the fields of the Llama's config.json."""
    architecture = told["general.architecture"]
    if architecture != ARCHITECTURE:
        raise unknown("architecture of a GGUF file", str(architecture), [ARCHITECTURE])
    own = {name.removeprefix(f"{ARCHITECTURE}."): value for name, value in told.items()}
    for name, allowed in UNREAD.items():
        if name in own and own[name] not in allowed:
            raise UserError(f"The file's {name} is {own[name]}; only {allowed[0]} is read.")
    fields = {name: own[key] for name, key in FIELDS.items()}
    head_dim = _head_dim(own, fields["hidden_size"] // fields["num_attention_heads"])
    share = own.get(ROPE_DIMENSIONS, head_dim) / head_dim
    return fields | {"head_dim": head_dim, "rope_theta": own[ROPE_BASE], "partial_rotary_factor": share}


def _head_dim(own: Fields, default: int) -> int:
    widths = {own.get(name, default) for name in HEAD_WIDTHS}
    if len(widths) > 1:
        raise UserError(
            f"The file's heads have keys and values of {' and '.join(map(str, sorted(widths)))}; one is read."
        )
    return widths.pop()


def _array(tensor: Any, fields: Fields) -> tuple[str, np.ndarray]:
    """Return a tensor's name in transformers and its values in fp32."""
    from gguf import quants

    values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    stem, _, end = tensor.name.rpartition(".")
    if stem in OTHER_ARRAYS:
        return f"{OTHER_ARRAYS[stem]}.{end}", values
    _, _, rest = stem.partition(".")
    layer, _, kind = rest.partition(".")
    if not stem.startswith("blk.") or kind not in LAYER_ARRAYS:
        raise UserError(f"The file has '{tensor.name}', which a Llama has no place for.")
    if kind in TURNED:
        values = _moved_back(values, fields[TURNED[kind]])
    return f"model.layers.{layer}.{LAYER_ARRAYS[kind]}.{end}", values


def _moved_back(x: Float[np.ndarray, "rows _"], heads: int) -> np.ndarray:
    """Return rows of heads with the first halves of rotary's pairs before the second ones."""
    pairs = x.reshape(heads, len(x) // heads // 2, 2, *x.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(x.shape)


def _tokenizer(told: Fields) -> tokenizers.Tokenizer:
    """Return the byte-level tokenizer that the file describes."""
    kind, cut = told[f"{TOKENIZER}model"], told[f"{TOKENIZER}pre"]
    if kind != "gpt2":
        raise unknown("tokenizer of a GGUF file", str(kind), ["gpt2"])
    if cut not in PRE_TOKENIZERS:
        raise unknown("pre-tokenizer of a GGUF file", str(cut), PRE_TOKENIZERS)
    tokens, types = told[f"{TOKENIZER}tokens"], told[f"{TOKENIZER}token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in told[f"{TOKENIZER}merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS[cut](), decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL_TOKEN, USER_TOKEN)]
    tokenizer.add_special_tokens(special)
    return tokenizer
