# %% [markdown]
# # From a checkpoint to text, in constant memory
#
# A run's Orbax checkpoint becomes a decoder, which reads prompts in chunks and draws tokens as they come. What it keeps
# of a text has the same size after ten tokens and after a million; a cache of keys and values grows.

# %% tags=["parameters"]
steps = 100
new_tokens = 120
smaller = {}  # config keys of a model that is quicker still

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from based_jax import LM, LMConfig, load_config, load_run, train
from based_jax.data.tokenizer import get_tokenizer
from based_jax.generate import Decoder, Request, Sampling, State, state_after, stream

# %% [markdown]
# `configs/text_tiny.py` learns the shipped English prose byte by byte, here for a few steps: it begins to spell.

# %%
overrides = {"steps": steps, "optim.warmup_steps": steps // 5, "log_every": max(1, steps // 2)}
config = load_config("../../configs/text_tiny.py", overrides | smaller)
workdir = Path(tempfile.mkdtemp())
train(config, workdir)["perplexity"]

# %%
print(*sorted(str(path.relative_to(workdir)) for path in workdir.glob("checkpoints/*/*")), sep="\n")
_, step, model = load_run(workdir)
decoder, tokenizer = Decoder.of(model), get_tokenizer("bytes")

# %% [markdown]
# ## A stream of tokens
#
# Requests share a batch; each has its own length, temperature and seed, and draws the same alone as in any company.

# %%
prompts = ["It was a ", "The "]
requests = [
    Request(tokenizer.encode(text), max_new_tokens=new_tokens, sampling=Sampling(0.6, top_k=40), seed=7)
    for text in prompts
]
written = {}
for event in stream(decoder, requests):
    written.setdefault(event.id, []).extend(event.tokens)
for text, ids in zip(prompts, written.values(), strict=True):
    print(repr(text + tokenizer.decode(ids)))

# %% [markdown]
# ## The state is a value
#
# What the model keeps of a text can be saved, and gone on from as often as one likes.

# %%
file = workdir / "opening.safetensors"
state_after(decoder, tokenizer.encode("It was a bright cold day and ")).save(file)
state = State.load(file)
print(f"{state.length} tokens in {file.stat().st_size:,} bytes")
for seed in (1, 2):
    request = Request(tokenizer.encode("the "), new_tokens // 3, sampling=Sampling(0.6), seed=seed, state=state)
    print(repr(tokenizer.decode([token for event in stream(decoder, [request]) for token in event.tokens])))

# %% [markdown]
# ## Bytes of state against a cache of keys and values
#
# The same width and depth with attention in each layer. Caches are built, not computed by a formula.


# %%
def kept_bytes(config, length):
    """Return the bytes that decoding keeps of one sequence of that length."""
    shapes = jax.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)).init_cache(1, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


attention = LMConfig(3 * (("attention", {"num_heads": 4}),), config.model.d_model, 257, dtype="float32")
lengths = 2 ** np.arange(6, 17, 2)
figure, axes = plt.subplots(figsize=(4.5, 2.6), dpi=90, layout="constrained")
for name, of in {"Based (this model)": config.model, "attention": attention}.items():
    sizes = [kept_bytes(of, int(length)) for length in lengths]
    print(f"{name:20}", *(f"{size / 1024:,.0f} KiB" for size in sizes))
    axes.plot(lengths, np.asarray(sizes) / 2**20, ".-", label=name)
axes.set(xscale="log", yscale="log", xlabel="tokens read", ylabel="MiB kept of a sequence")
axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=7)
axes.legend(fontsize=8)
axes.grid(alpha=0.3)
plt.show()
