"""Based's global mixer: Taylor linear attention (arXiv 2402.18668, section 4.1)."""

import dataclasses
from typing import Any, ClassVar, override

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from based_jax.config import added_later
from based_jax.dims import BD, BP, BPD, BTD, SegmentIds
from based_jax.errors import UserError
from based_jax.nn import layers, multihead, projections
from based_jax.nn.cache import Cache
from based_jax.nn.mixer import Mixer, check_sizes
from based_jax.ops import taylor, taylor_decode
from based_jax.ops.decode_calls import Pieces, TaylorState
from based_jax.ops.dispatch import beside

PROJECTIONS = {f"proj_{name}/kernel": f"proj_{name}.weight" for name in "qkv"}


@dataclasses.dataclass(frozen=True)
class TaylorConfig:
    """Heads, the query/key width K that the Taylor features expand, and the implementation of the operation.

    While decoding the state is written every `flush` tokens, in `state_dtype`, of `ops/taylor_decode.py`.
    """

    num_heads: int = 16
    feature_dim: int = 16
    impl: str = "auto"
    flush: int = added_later(1)
    state_dtype: str = added_later(taylor_decode.EXACT_FORMAT)

    def __post_init__(self):
        check_sizes(self, num_heads=1)
        if not 1 <= self.feature_dim <= 32:
            raise UserError(f"feature_dim is {self.feature_dim}; Taylor attention takes 1 to 32.")
        taylor_decode.check_form(self.flush, self.state_dtype)


class TaylorAttention(Mixer):
    """Queries and keys of K components a head, values of D/H; the state is (H, E, V+1) a sequence, and recent tokens.

    Source: HazyResearch/based:based/models/mixers/linear_attention.py, `LinearAttention`.
    """

    Config: ClassVar = TaylorConfig
    IMPLEMENTATIONS: ClassVar = taylor.IMPLEMENTATIONS
    REFERENCE: ClassVar = {
        "based": {"out_proj/kernel": "out_proj.weight", **PROJECTIONS},
        "zoology": {"out_proj/kernel": "proj_o.weight", **PROJECTIONS},
    }

    def __init__(self, d_model: int, config: TaylorConfig, init: layers.Init):
        self.config, self.d_model = config, d_model
        self.value_dim = multihead.head_dim(d_model, config.num_heads)
        features = config.num_heads * config.feature_dim
        self.proj_q = layers.linear(d_model, features, ("embed", "heads"), init)
        self.proj_k = layers.linear(d_model, features, ("embed", "heads"), init)
        self.proj_v = layers.linear(d_model, d_model, ("embed", "heads"), init)
        self.out_proj = layers.linear(d_model, d_model, ("heads", "embed"), init.out)

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        o, _ = taylor.taylor_attention(*self.qkv(x), segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, o))

    @override
    def _initial_state(self, batch: int, max_len: int) -> Any:
        heads, feature_dim = self.config.num_heads, self.config.feature_dim
        form = {"flush": self.config.flush, "state_dtype": self.config.state_dtype, "dtype": self.proj_k.dtype}
        return taylor_decode.initial_state(batch, heads, feature_dim, self.value_dim, **form)

    @override
    def _prefill(self, x: BTD, state: TaylorState, segment_ids: SegmentIds | None) -> tuple[BTD, TaylorState]:
        options = {"state": taylor_decode.total(state), "segment_ids": segment_ids, "impl": self.config.impl}
        o, sums = taylor.taylor_attention(*self.qkv(x), **options)
        return self._out(o), taylor_decode.holding(sums, state)

    @override
    def _step(self, x: BD, state: Any) -> tuple[BD | projections.Projected, Any]:
        o, state = self._read_token(self.qkv(x[:, None]), state)
        return self._out(o), state

    @override
    def step_whole(self, r: BD, y: Pieces | None, norm: Any, cache: Cache) -> tuple[BD, Pieces, Cache]:
        r, products = projections.several_of_norm(self._projections, norm, r, y)
        o, state = self._read_token(self._heads([z[:, None] for z in products]), cache.state)
        pieces = projections.in_pieces(self.out_proj, multihead.merge_heads(o), None if y is None else y.marks)
        return r, pieces, cache._replace(state=state)

    def _read_token(self, qkv, state: Any):
        """Return what a token of each row reads (B, H, V), and the state after it."""
        (q, k, v), impl = qkv, beside(self.config.impl, taylor_decode.IMPLEMENTATIONS)
        o, state = taylor_decode.taylor_attention_decode(q, k, v, state, impl=impl)
        return o[:, 0], state

    @override
    def _try_tokens(self, x: BTD, state: TaylorState) -> tuple[BTD, Any]:
        """Write tokens among the recent ones, if these have the room, where none of them counts yet."""
        if x.shape[1] > self.config.flush:
            return super()._try_tokens(x, state)
        (q, k, v), impl = self.qkv(x), beside(self.config.impl, taylor_decode.IMPLEMENTATIONS)
        o, state = taylor_decode.taylor_attention_decode(q, k, v, state, impl=impl)
        return self._out(o), taylor_decode.rewound(state, jnp.full(x.shape[0], x.shape[1]))

    @override
    def _keep(self, tokens: Any, counts: Int[Array, "B"]) -> Any:
        if not isinstance(tokens, TaylorState):
            return super()._keep(tokens, counts)
        return taylor_decode.rewound(tokens, -counts)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return H (V+1) E elements, E = 1 + K + K(K+1)/2, and those of recent tokens; equal to the cache's."""
        form = self.config.flush, self.config.state_dtype
        return self.config.num_heads * taylor_decode.state_elements(self.config.feature_dim, self.value_dim, *form)

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return the elements of the sums."""
        return self.config.num_heads * (self.value_dim + 1) * taylor.expanded_dim(self.config.feature_dim)

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, and writing and reading the state once (chunked forms do more)."""
        projections = 2 * self.d_model * (2 * self.config.num_heads * self.config.feature_dim + 2 * self.d_model)
        return projections + 4 * self.published_state_size(seq_len)

    @property
    def _projections(self) -> tuple[nnx.Linear, ...]:
        return self.proj_q, self.proj_k, self.proj_v

    def qkv(self, x):
        """Return queries and keys (B, T, H, K), and values (B, T, H, D/H)."""
        return self._heads(projections.several(self._projections, x))

    def _heads(self, products):
        return tuple(multihead.split_heads(y, self.config.num_heads) for y in products)

    def _out(self, o):
        return projections.into_stream(self.out_proj, multihead.merge_heads(o))
