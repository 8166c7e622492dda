# %% [markdown]
# # Your own mixer, from one cell to a point on the frontier
#
# A mixer is one class: a `Config`, a pass over a whole sequence, and one over its next tokens with a state. It need
# not be in the package: layer lists, sweeps and pictures take the class where they take a name.

# %% tags=["parameters"]
overrides = {}  # config keys of the sweep that are to differ

# %%
import dataclasses
import io
import tempfile
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from IPython.display import Image

from based_jax import LM, LMConfig, UserError, contracts
from based_jax.newcomer import frontier
from based_jax.nn import layers
from based_jax.nn.describe import describe
from based_jax.nn.mixer import Mixer, check_sizes
from based_jax.ops import scan
from based_jax.pictures import figures

# %% [markdown]
# This one is linear attention whose keys are a softmax over K slots: a token writes its value where its key points,
# as much as it takes away there. `scan.over_tokens` runs one token's step over time and keeps documents apart.


# %%
@dataclasses.dataclass(frozen=True)
class SlotsConfig:
    num_slots: int = 64
    sharpness: float = 4.0

    def __post_init__(self):
        check_sizes(self, num_slots=1)
        if not 0 < self.sharpness <= 100:
            raise UserError(f"sharpness is {self.sharpness}; it is above 0 and at most 100.")


class Slots(Mixer):
    """S_t = (1 - k_t) S_(t-1) + k_t v_t^T and o_t = S_t^T q_t, with k and q softmaxes over K slots.

    Source: this notebook.
    """

    Config: ClassVar = SlotsConfig

    def __init__(self, d_model, config, init):
        self.config, self.d_model = config, d_model
        self.proj_q = layers.linear(d_model, config.num_slots, ("embed", "heads"), init)
        self.proj_k = layers.linear(d_model, config.num_slots, ("embed", "heads"), init)
        self.proj_v = layers.linear(d_model, d_model, ("embed", "heads"), init)
        self.out_proj = layers.linear(d_model, d_model, ("heads", "embed"), init.out)

    def __call__(self, x, segment_ids=None, positions=None):
        o, _ = self._mix(x, None, segment_ids)
        return self.out_proj(*layers.at(positions, o))

    def _initial_state(self, batch, max_len):
        return jnp.zeros((batch, self.config.num_slots, self.d_model), jnp.float32)

    def _prefill(self, x, state, segment_ids):
        o, state = self._mix(x, state, segment_ids)
        return self.out_proj(o), state

    def _step(self, x, state):
        o, state = self._write_and_read(self._qkv(x), state)
        return self.out_proj(o), state

    def _mix(self, x, state, segment_ids):
        empty = self._initial_state(x.shape[0], x.shape[1])
        return scan.over_tokens(self._write_and_read, self._qkv(x), empty, state, segment_ids)

    def _qkv(self, x):
        q, k, v = (f(x).astype(jnp.float32) for f in (self.proj_q, self.proj_k, self.proj_v))
        return *(jax.nn.softmax(self.config.sharpness * y, axis=-1) for y in (q, k)), v

    def _write_and_read(self, qkv, state):
        q, k, v = (y[..., None] for y in qkv)
        state = state + k * (jnp.swapaxes(v, -1, -2) - state)
        return (q * state).sum(axis=-2), state

    def state_size(self, seq_len):
        return self.config.num_slots * self.d_model

    def flops_per_token(self, seq_len):
        return 4 * self.d_model * (self.config.num_slots + self.d_model) + 6 * self.state_size(seq_len)


# %% [markdown]
# ## Does it keep the contract?
#
# Twenty checks, the same that the package's own mixers pass: causal, the same whole, in pieces and token by token,
# documents apart, exact sizes, bf16, lanes.

# %%
broken = contracts.check(Slots)
assert not broken

# %% [markdown]
# They find what is wrong. Here is a mixer whose step reads before it writes, which its pass does not:


# %%
class LateSlots(Slots):
    def _step(self, x, state):
        q, k, v = (y[..., None] for y in self._qkv(x))
        return self.out_proj((q * state).sum(axis=-2)), state + k * (jnp.swapaxes(v, -1, -2) - state)


try:
    contracts.CONTRACTS["prefill and steps"](contracts.Fitting(LateSlots))
except contracts.BrokenContractError as error:
    print(error)

# %% [markdown]
# ## In a model, and in the table of mixers

# %%
model = nnx.eval_shape(
    lambda: LM(LMConfig((("conv", {}), (Slots, {"num_slots": 16})), 64, vocab_size=256), rngs=nnx.Rngs(0))
)
print(model.config.layers, f"{model.state_size(64):,} elements of state")
for row in describe(64, 1024, [Slots, "taylor", "window"]):
    print(f"{row.mixer:8}{row.params or 0:8,} parameters{row.state_kib or 0:8} KiB of state  {row.does_not_fit or ''}")

# %% [markdown]
# The name in the layer list carries digits of the class's source: a mixer that was changed is another one, in the ids
# of rows too, and a sweep trains it anew.
#
# ## Its point among the others
#
# `frontier.place` trains the small sweep of `newcomer/small_sweep.py` (MQAR, 64 tokens, 8 pairs, two learning rates
# at a time) and draws it among the committed rows of the package's mixers. From a file the command is
# `python -m based_jax frontier my_mixer.py:Slots`.

# %%
found = frontier.place(Slots, [{"num_slots": 32}], out=Path(tempfile.mkdtemp()), overrides=overrides)
for point in found.points:
    print(f"{point.label}: accuracy {point.median:.3f} with {point.state_bytes(convolution=False):,} bytes of state")
picture = io.BytesIO()
figures.frontier_figure(found.rows, named=["Slots"]).savefig(picture, dpi=130)
Image(picture.getvalue())
