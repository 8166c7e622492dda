# %% [markdown]
# # Look inside: where layers read from, and what they keep
#
# A small model of a convolution, Taylor attention and a window learns MQAR; then its attention maps are made whole,
# which training and decoding never do.

# %% tags=["parameters"]
steps = 350
test_examples = 640

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from based_jax import inside, load_config, load_run, train

# %%
layers = (
    ("conv", {"expand": 2}),
    ("taylor", {"num_heads": 1, "feature_dim": 16}),
    ("window", {"num_heads": 2, "window": 8}),
)
test = {"seq_len": 64, "num_kv_pairs": 8, "num_examples": test_examples}
overrides = {"model.layers": layers, "data.test": (test,), "steps": steps, "optim.warmup_steps": steps // 10}
config = load_config("../../configs/mqar_tiny.py:taylor_8", overrides)
workdir = Path(tempfile.mkdtemp())
train(config, workdir)["accuracy"]

# %%
_, _, model = load_run(workdir)
source = config.data.open(batch_size=64)
batches = [(source.eval_names[0], batch) for batch in source.eval_batches(source.eval_names[0])]
ids = batches[0][1]["inputs"][:16]

# %% [markdown]
# ## Attention maps
#
# A Taylor layer weighs key s by 1 + s + s²/2 of the score; beside it the softmax of the same scores, which it stands
# for. The window sees 8 keys. Rows are queries, columns keys; the first 16 tokens are pairs, then come the questions.

# %%
blocks, inputs = inside.blocks_of(model), inside.mixer_inputs(model, ids)
maps = {layer.kind: layer.weights for layer in inside.attention_maps(model, ids)}
softmax = inside.softmax_weights(blocks[1].mixer, inputs[1])
figure, panels = plt.subplots(1, 3, figsize=(7.2, 2.6), dpi=90, layout="constrained")
drawn = {"Taylor, head 0": maps["taylor"], "softmax of its scores": softmax, "window, head 0": maps["window"]}
for axes, (title, weights) in zip(panels, drawn.items(), strict=True):
    axes.imshow(np.sqrt(weights[0, 0]), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("key")
panels[0].set_ylabel("query")
plt.show()

# %% [markdown]
# ## In numbers
#
# The effective range is the mean distance from a query to what it reads; e to the entropy is about how many keys that
# is. The error of the feature map is the share of a query's weight that lies elsewhere in the softmax of its scores.

# %%
table = [
    {"layer": kind, "head": head, "effective range": distance, "keys read": keys}
    for kind, weights in {**maps, "softmax of taylor": softmax}.items()
    for head, (distance, keys) in enumerate(
        zip(
            np.asarray(inside.effective_range(weights), float),
            np.asarray(np.exp(inside.entropy(weights)), float),
            strict=True,
        )
    )
]
print(
    "error of the feature map, by head:",
    np.round(np.asarray(inside.total_variation(maps["taylor"], softmax), float), 3),
)
pd.DataFrame(table).round(2)

# %% [markdown]
# ## What states grow to
#
# The Taylor state is a sum over all tokens, and its norm grows; a convolution and a window keep a few tokens and stop.

# %%
norms = np.asarray(inside.state_norms(model, ids)).mean(axis=0)
figure, axes = plt.subplots(figsize=(4.5, 2.4), dpi=90, layout="constrained")
for layer, (kind, _) in enumerate(config.model.layers):
    axes.plot(np.arange(1, len(norms) + 1), norms[:, layer], label=kind)
axes.set(xlabel="tokens read", ylabel="norm of the state", yscale="log")
axes.legend(fontsize=8, loc=(0.72, 0.4))
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What each layer is worth
#
# The model without one of its layers, tested again: the dearest stands first.

# %%
pd.DataFrame(inside.removal_costs(model, batches)).round(3)
