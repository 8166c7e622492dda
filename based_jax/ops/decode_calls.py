"""What implementations take while a model decodes: calls, as those of `ops/calls.py`, of few tokens behind a state."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from based_jax.dims import BD, BHK, BHKV, BHV, BSGK, BSGV, BTGK, BTGV, BTHK, BTHV, BWD, WD
from based_jax.ops.calls import BDN, DN, HK, Channels, Documents, JointBias, Past

BH = Float[Array, "B H"]
BHE = Float[Array, "B H E"]
BHWK = Float[Array, "B H W K"]
BHWV = Float[Array, "B H W V"]
BN = Float[Array, "B N"]


class AttentionStepCall(NamedTuple):
    """Softmax attention of a token: q (B, H, K) over the first `length` (B,) of keys and values (B, S, G, .).

    Each of the G keys and values, a divisor of H, serves as many queries. `head_dim` as of `AttentionCall`.
    """

    q: BHK
    k: BSGK
    v: BSGV
    length: Int[Array, "B"]
    head_dim: int | None = None

    @property
    def root(self) -> float:
        """What scores are divided by."""
        return math.sqrt(self.head_dim or self.q.shape[2])


class RingStepCall(NamedTuple):
    """Heads of a token (B, H + 2 G, K), a ring (B, S, G, K) of keys and of values, tokens before, and angles."""

    heads: Float[Array, "B joint K"]
    k: BSGK
    v: BSGV
    length: Int[Array, "B"]
    angles: Float[Array, "B half"]


class AttentionPrefillCall(NamedTuple):
    """Softmax attention of T tokens, q (B, T, H, K), k, v (B, T, G, .), that go on after `length` (B,) cached ones.

    These are the first of keys and values (B, S, G, .), of each row's first document. Groups and `head_dim` as of
    `AttentionStepCall`.
    """

    q: BTHK
    k: BTGK
    v: BTGV
    past_k: BSGK
    past_v: BSGV
    length: Int[Array, "B"]
    segment_ids: Documents = None
    head_dim: int | None = None

    @property
    def root(self) -> float:
        """What scores are divided by."""
        return math.sqrt(self.head_dim or self.q.shape[3])


class AttentionTrialCall(NamedTuple):
    """Softmax attention of T tokens on trial, q (B, T, H, K), k, v (B, T, G, .), behind `length` (B,) others.

    The last of these are in keys and values (B, S, G, .), a ring if there may be more of them than S. Groups and
    `head_dim` as of `AttentionStepCall`.
    """

    q: BTHK
    k: BTGK
    v: BTGV
    past_k: BSGK
    past_v: BSGV
    length: Int[Array, "B"]
    is_ring: bool
    head_dim: int | None = None

    @property
    def root(self) -> float:
        """What scores are divided by."""
        return math.sqrt(self.head_dim or self.q.shape[3])


class TaylorSums(NamedTuple):
    """Sums over tokens of phi(k) [v, 1]^T, where a state is kept between steps.

    Attributes:
      values: (B, H, E, V), in the dtype of the state's format.
      scales: (B, H, E) fp32, what the rows of `values` are multiplied by; None where they are the values themselves.
      normaliser: (B, H, E) fp32.
    """

    values: Shaped[Array, "B H E V"]
    scales: BHE | None
    normaliser: BHE


class RecentTokens(NamedTuple):
    """Keys (B, H, W, K) and values (B, H, W, V) of tokens that no sum holds yet: the first `length` (B) of each row."""

    k: BHWK
    v: BHWV
    length: Int[Array, "B"]


class TaylorState(NamedTuple):
    """The past of Taylor attention while it decodes: sums, and tokens behind them, None where each is added at once."""

    sums: TaylorSums
    recent: RecentTokens | None = None


class TaylorDecodeCall(NamedTuple):
    """A few tokens of Taylor attention behind a state: q, k (B, T, H, K), v (B, T, H, V).

    The state's parts stand by themselves: its sums, its recent keys and values (k, v), and the length of those.
    """

    q: BTHK
    k: BTHK
    v: BTHV
    sums: TaylorSums
    tokens: tuple[BHWK, BHWV] | None
    length: Int[Array, "B"] | None


class MatrixStepCall(NamedTuple):
    """One token of a `MatrixStateCall`, whose arrays lack time: q (B, H, K) to log_decay (B, H, K or 1)."""

    q: BHK
    k: BHK
    v: BHV
    log_decay: Float[Array, "B H #K"]
    state: BHKV
    bonus: HK | None = None
    beta: BH | None = None
    a: BHK | None = None
    b: BHK | None = None
    scale: float = 1.0


class UnitDeltaStepCall(NamedTuple):
    """One token of a delta rule, its queries, keys and values behind each other in `joint` (B, H (2 K + V))."""

    joint: Float[Array, "B joint"]
    log_decay: Float[Array, "B H #K"]
    beta: BH
    state: BHKV
    scale: float


class ShortConvStepCall(NamedTuple):
    """One token of a `ShortConvCall`: the first D channels of x (B, D or more)."""

    x: Float[Array, "B wide"]
    kernel: WD
    state: Past
    bias: Channels | None = None
    silu: bool = False
    dilation: int = 1


class GatedConvStepCall(NamedTuple):
    """One token x (B, 2 D) of a `GatedConvCall`."""

    x: Float[Array, "B joint"]
    kernel: WD
    state: BWD
    bias: JointBias | None = None


class SelectiveScanStepCall(NamedTuple):
    """One token of a `SelectiveScanCall`: u, dt (B, D), B, C (B, N)."""

    u: BD
    dt: BD
    A: DN
    B: BN
    C: BN
    state: BDN
    bias: Channels | None = None


class GatedScanStepCall(NamedTuple):
    """One token of Mamba: u and raw steps (B, D), B and C last in `selected`, z last in `joint`, bias and skip (D,)."""

    u: BD
    raw: BD
    A: DN
    selected: Float[Array, "B behind"]
    joint: Float[Array, "B joint"]
    state: BDN
    bias: Channels
    skip: Channels


class FewTokensCall(NamedTuple):
    """A product of few tokens (M, D) and a matrix (D, E)."""

    x: Float[Array, "M D"]
    kernel: Float[Array, "D E"]


class FewTokensProductsCall(NamedTuple):
    """The products of few tokens (M, D) and each of several matrices (D, E), whose E may differ."""

    x: Float[Array, "M D"]
    kernels: tuple[Float[Array, "D _"], ...]


class FewTokensNormCall(NamedTuple):
    """An addition of x @ kernel + bias, (M, D) and (D, E), to the stream r (M, E), and the sum's RMS norm."""

    r: Float[Array, "M E"]
    x: Float[Array, "M D"]
    kernel: Float[Array, "D E"]
    bias: Float[Array, "E"] | None
    scale: Float[Array, "E"]
    eps: float


class Pieces(NamedTuple):
    """What is to be added to a residual stream of B tokens, in pieces (P, B, D) that add up to it.

    Attributes:
      marks: zeros that the kernel which reads them counts in, from the kernel that made them.
    """

    sums: Float[Array, "P B D"]
    marks: Int[Array, "_"] | None = None

    def value(self) -> BD:
        """Return it."""
        return jnp.sum(self.sums, axis=0)


class TokenMLPCall(NamedTuple):
    """A residual addition, the RMS norm, and a gated MLP (D, 2F), (F, D) of tokens (B, D)."""

    r: BD
    y: Pieces | None
    scale: Channels
    first: Float[Array, "D joint"]
    second: Float[Array, "F D"]
    eps: float


class TokenProductsCall(NamedTuple):
    """A residual addition, the RMS norm, and products with matrices (D, E), whose E may differ, of tokens (B, D)."""

    r: BD
    y: Pieces | None
    scale: Channels
    kernels: tuple[Float[Array, "D _"], ...]
    eps: float


class TokenConvCall(NamedTuple):
    """The same with a gated short convolution between the two matrices, both with biases."""

    r: BD
    y: Pieces | None
    scale: Channels
    first: Float[Array, "D joint"]
    bias: JointBias
    kernel: Float[Array, "W F"]
    state: Float[Array, "B W F"]
    second: Float[Array, "F D"]
    last_bias: Channels
    eps: float
