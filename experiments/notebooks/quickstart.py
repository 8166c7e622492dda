# %% [markdown]
# # Quickstart: a layer list, trained until it recalls
#
# A model is a list of layers. This one puts Based's Taylor attention above a gated convolution, and learns
# multi-query associative recall (MQAR): a sequence holds key-value pairs, then asks for some of the values again.

# %% tags=["parameters"]
steps = 350
eval_every = 25
test_examples = 640

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from based_jax import LM, LMConfig, load_config, load_run, train

# %%
layers = (("conv", {"expand": 2}), ("taylor", {"num_heads": 1, "feature_dim": 8}))
model = nnx.eval_shape(lambda: LM(LMConfig(layers=layers, d_model=64, vocab_size=256), rngs=nnx.Rngs(0)))
print(f"{model.num_params():,} parameters; a sequence of any length is kept in {4 * model.state_size(64):,} bytes")

# %% [markdown]
# `configs/mqar_tiny.py` has the task and the recipe; whatever is to differ is a dotted key.

# %%
test = {"seq_len": 64, "num_kv_pairs": 8, "num_examples": test_examples}
overrides = {"model.layers": layers, "data.test": (test,), "optim.warmup_steps": steps // 10}
config = load_config("../../configs/mqar_tiny.py:taylor_8", overrides | {"steps": steps, "eval_every": eval_every})
workdir = Path(tempfile.mkdtemp())
results = train(config, workdir)
results

# %% [markdown]
# Recall comes late and at once: the loss stays where guessing is until the model has found out what to compare.

# %%
rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
evaluations = [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
figure, axes = plt.subplots(figsize=(4.5, 2.4), dpi=90, layout="constrained")
axes.plot(*zip(*evaluations, strict=True), ".-")
axes.set(xlabel="step", ylabel="accuracy of recall", ylim=(-0.03, 1.03))
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# The checkpoint is a model again. Of one test sequence: what it is asked for, what is right, and what it says.

# %%
_, step, trained = load_run(workdir)
source = config.data.open(batch_size=1)
batch = next(iter(source.eval_batches(source.eval_names[0])))
said = np.asarray(nnx.jit(trained)(batch["inputs"]))[0].argmax(-1)
asked = np.flatnonzero(batch["labels"][0] >= 0)
for place in asked[:8]:
    key, value = batch["inputs"][0, place], batch["labels"][0, place]
    print(f"key {key:3}   value {value:3}   said after {step} steps: {said[place]:3}")

# %% [markdown]
# Another mixer is another list: `("window", {"num_heads": 1, "window": 23})` has the bytes of this one, and recalls
# what stands in the last 23 tokens. `frontier.ipynb` shows what each mixer recalls with how many bytes.
