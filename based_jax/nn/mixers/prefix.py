"""Prefix linear attention: the beginning of a sequence is read in no order, the rest causally (arXiv 2407.05483)."""

import dataclasses
from typing import Any, ClassVar, override

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from based_jax.dims import BD, BP, BPD, BTD, SegmentIds
from based_jax.nn import layers, multihead, projections
from based_jax.nn.cache import Cache
from based_jax.nn.mixer import Mixer, check_sizes
from based_jax.nn.mixers.taylor import PROJECTIONS, TaylorAttention, TaylorConfig
from based_jax.ops import segments, sequence, taylor, taylor_decode
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.linear_attention import encoder_state


@dataclasses.dataclass(frozen=True)
class PrefixConfig(TaylorConfig):
    """Those of Taylor attention, and the tokens of each row's first document that are read in no order."""

    enc_length: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, enc_length=0)


class PrefixLinearAttention(TaylorAttention):
    """Taylor attention that starts from the state which the prefix leaves under projections of its own.

    y_i = (sum_{j<=i} p(q_i, k_j) v_j + sum_{m<=M} p(q_i, ke_m) ve_m) / (the same sums without values), section 4.2:
    inside the prefix an output depends on later tokens of it. M = 0, the default, is causal. The prefix has to come
    in one prefill. Later documents of a packed row are read causally.

    Source: HazyResearch/prefix-linear-attention:based/models/mixers/prefix_linear_attention.py.
    """

    Config: ClassVar = PrefixConfig
    REFERENCE: ClassVar = {
        "prefix": {
            "out_proj/kernel": "out_proj.weight",
            **PROJECTIONS,
            "proj_k_enc/kernel": "proj_k_enc.weight",
            "proj_v_enc/kernel": "proj_v_enc.weight",
        }
    }

    def __init__(self, d_model: int, config: PrefixConfig, init: layers.Init):
        super().__init__(d_model, config, init)
        self.enc_length = config.enc_length
        features = config.num_heads * config.feature_dim
        self.proj_k_enc = layers.linear(d_model, features, ("embed", "heads"), init)
        self.proj_v_enc = layers.linear(d_model, d_model, ("embed", "heads"), init)

    @override
    def __call__(
        self,
        x: BTD,
        segment_ids: SegmentIds | None = None,
        positions: BP | None = None,
        *,
        encoder_mask: Shaped[Array, "B M"] | None = None,
    ) -> BPD:
        """Mix a whole sequence.

        Where `encoder_mask` (B, M) is 0, keys of the prefix become zero vectors before the feature map. As in the
        publication such a token still adds its value under the constant feature; `segment_ids` hide one wholly.
        """
        y, _ = self._mix(x, self._initial_state(*x.shape[:2]), segment_ids, encoder_mask)
        return layers.at(positions, y)[0]

    @property
    @override
    def prefix_length(self) -> int:
        """The tokens that are read in no order."""
        return self.enc_length

    @override
    def _initial_state(self, batch: int, max_len: int) -> Any:
        """Return the state and the tokens read before the first one."""
        return super()._initial_state(batch, max_len), jnp.zeros(batch, jnp.int32)

    @override
    def _prefill(self, x: BTD, state: Any, segment_ids: SegmentIds | None) -> tuple[BTD, Any]:
        """Mix tokens, those of the prefix at once, and return the state after them."""
        return self._mix(x, state, segment_ids, None)

    @override
    def _step(self, x: BD, state: Any) -> tuple[BD | projections.Projected, Any]:
        """Mix one token behind the prefix and return the state after it."""
        before, length = state
        y, after = super()._step(x, before)
        return y, (after, length + 1)

    @override
    def step_whole(self, r: BD, y: Pieces | None, norm: Any, cache: Cache) -> tuple[BD, Pieces, Cache]:
        before, length = cache.state
        r, pieces, cache = super().step_whole(r, y, norm, cache._replace(state=before))
        return r, pieces, cache._replace(state=(cache.state, length + 1))

    @override
    def _try_tokens(self, x: BTD, state: Any) -> tuple[BTD, Any]:
        """Read tokens, which may be of the prefix, as any state does that is not taken back."""
        return Mixer._try_tokens(self, x, state)

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: those of Taylor attention, and the prefix's projections and state as if all were it."""
        weights = self.d_model * (self.config.num_heads * self.config.feature_dim + self.d_model)
        return super().flops_per_token(seq_len) + 2 * weights + 2 * self.published_state_size(seq_len)

    def _mix(self, x, state, segment_ids, encoder_mask):
        before, length = state
        sums = taylor_decode.total(before)
        numbers = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else sequence.numbered(segment_ids)
        places, length = sequence.positions(segment_ids, length, x.shape[1])
        q, k, v = self.qkv(x)
        if self.enc_length:
            encoded = self.proj_k_enc(x), self.proj_v_enc(x)
            k_enc, v_enc = (multihead.split_heads(y, self.config.num_heads) for y in encoded)
            if encoder_mask is not None:
                shown = jnp.pad(encoder_mask, [(0, 0), (0, x.shape[1] - encoder_mask.shape[1])], constant_values=1)
                k, k_enc = (key * shown[:, :, None, None].astype(key.dtype) for key in (k, k_enc))
            prefix = (places < self.enc_length) & (numbers == 1)
            sums = sums + encoder_state(taylor.taylor_features(k_enc), v_enc, prefix)
            # what goes on with a later document has no prefix
            length = jnp.where(segments.last_id(numbers) > 1, jnp.maximum(length, self.enc_length), length)
        o, sums = taylor.taylor_attention(q, k, v, state=sums, segment_ids=segment_ids, impl=self.config.impl)
        return self.out_proj(multihead.merge_heads(o)), (taylor_decode.holding(sums, before), length)
