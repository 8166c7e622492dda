"""Linear attention with one of the feature maps that Based was compared with (arXiv 2402.18668, figure 3)."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax.config import added_later
from based_jax.dims import BD, BHEV, BP, BPD, BTD, SegmentIds
from based_jax.errors import UserError, unknown
from based_jax.nn import layers, multihead, projections
from based_jax.nn.feature_maps import COSFORMER_HORIZON, FEATURE_MAPS, MAP_OPTIONS
from based_jax.nn.mixer import Mixer, check_sizes
from based_jax.nn.mixers.taylor import PROJECTIONS
from based_jax.ops import linear_attention, sequence
from based_jax.ops.linear_attention import IMPLEMENTATIONS

LinearState = tuple[BHEV, Int[Array, "B"]]


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """Heads, the query/key width K, and the map of `nn/feature_maps.py`; the Taylor map is mixer `taylor`.

    `horizon` is that of "cosformer": a number of tokens, or None as in zoology, the length of the sequence at hand.
    `stored_directions` is whether those of "performer" stand among the parameters, which training leaves as they are.
    """

    num_heads: int = 16
    feature_dim: int = 16
    feature_map: str = "elu"
    impl: str = "auto"
    horizon: int | None = added_later(COSFORMER_HORIZON)
    stored_directions: bool = added_later(False)

    def __post_init__(self):
        check_sizes(self, num_heads=1, feature_dim=1)
        if self.horizon is not None and self.horizon < 1:
            raise UserError(f"horizon is {self.horizon}; it is at least 1, or None for the length at hand.")
        if self.feature_map not in FEATURE_MAPS:
            raise unknown("feature map", self.feature_map, FEATURE_MAPS)


class LinearAttention(Mixer):
    """phi(q)^T sum_j phi(k_j) v_j over phi(q)^T sum_j phi(k_j); the state is these sums and the tokens read.

    Source: HazyResearch/zoology:zoology/mixers/based.py, `Based`; arXiv 2006.16236, equation 9.
    """

    Config: ClassVar = LinearConfig
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    REFERENCE: ClassVar = {
        "zoology": {
            "out_proj/kernel": "proj_o.weight",
            **PROJECTIONS,
            "feature_map/proj_1/kernel": "feature_map.proj_1.weight",
            "feature_map/proj_2/kernel": "feature_map.proj_2.weight",
            "feature_map/directions": "feature_map.random_feats",
        }
    }

    REFERENCE_OPTIONS: ClassVar = {"zoology": {"horizon": None, "stored_directions": True}}

    def __init__(self, d_model: int, config: LinearConfig, init: layers.Init):
        self.config, self.d_model = config, d_model
        self.value_dim = multihead.head_dim(d_model, config.num_heads)
        features = config.num_heads * config.feature_dim
        self.proj_q = layers.linear(d_model, features, ("embed", "heads"), init)
        self.proj_k = layers.linear(d_model, features, ("embed", "heads"), init)
        self.proj_v = layers.linear(d_model, d_model, ("embed", "heads"), init)
        self.out_proj = layers.linear(d_model, d_model, ("heads", "embed"), init.out)
        options = {name: getattr(config, name) for name in MAP_OPTIONS.get(config.feature_map, ())}
        make_map = FEATURE_MAPS[config.feature_map]
        self.feature_map = make_map(config.num_heads, config.feature_dim, **options, rngs=init.rngs)

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        q, k, v, _ = self._project(x, jnp.zeros(1, jnp.int32), segment_ids)
        o, _ = linear_attention.linear_attention(q, k, v, segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, o))

    @override
    def _initial_state(self, batch: int, max_len: int) -> LinearState:
        if self.config.feature_map == "cosformer" and self.config.horizon is None:
            raise UserError("horizon is None, the length at hand, which decoding cannot know; make it a number.")
        E = self.feature_map.expanded_dim
        sums = linear_attention.initial_state(batch, self.config.num_heads, E, self.value_dim)
        return sums, jnp.zeros(batch, jnp.int32)

    @override
    def _prefill(self, x: BTD, state: LinearState, segment_ids: SegmentIds | None) -> tuple[BTD, LinearState]:
        sums, length = state
        q, k, v, length = self._project(x, length, segment_ids)
        o, sums = linear_attention.linear_attention(q, k, v, state=sums, segment_ids=segment_ids, impl=self.config.impl)
        return self._out(o), (sums, length)

    @override
    def _step(self, x: BD, state: LinearState) -> tuple[BD | projections.Projected, LinearState]:
        sums, length = state
        q, k, v = self._heads(x)
        q, k = self.feature_map(q, k, length)
        o, sums = linear_attention.linear_attention_step(q, k, v, sums)
        return self._out(o), (sums, length + 1)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return H (V+1) E elements, E of the feature map; equal to the cache's."""
        return self.config.num_heads * (self.value_dim + 1) * self.feature_map.expanded_dim

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, learned maps, and writing and reading the state once."""
        projections = 2 * self.d_model * (2 * self.config.num_heads * self.config.feature_dim + 2 * self.d_model)
        learned = 4 * self.config.num_heads * self.config.feature_dim**2
        return projections + learned + 4 * self.state_size(seq_len)

    def _heads(self, x):
        projected = (project(x) for project in (self.proj_q, self.proj_k, self.proj_v))
        return tuple(multihead.split_heads(y, self.config.num_heads) for y in projected)

    def _project(self, x, length, segment_ids):
        """Return the features of queries and keys, the values, and the tokens that the last document has had."""
        places, length = sequence.positions(segment_ids, length, x.shape[1])
        q, k, v = self._heads(x)
        return *self.feature_map(q, k, places), v, length

    def _out(self, o):
        return projections.into_stream(self.out_proj, multihead.merge_heads(o))
