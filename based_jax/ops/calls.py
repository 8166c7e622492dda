"""What each family's implementations take: one call, read by name, the same for every backend.

Those of what decodes stand in `ops/decode_calls.py`.

A table's `compute`, `supports` and `slower` take a call alone. `state` is that of each row's first document, None for
the empty one; `segment_ids` number the packed documents (see `ops/segments.py`), None for one document a row.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Int

from based_jax.dims import BD, BHEV, BHKV, BT, BTD, BTHK, BTHV, BWD, WD

Channels = Float[Array, "D"]

HK = Float[Array, "H K"]
Decay = Float[Array, "B T H #K"]
BTH = Float[Array, "B T H"]

BTHM = Float[Array, "B T H M"]
BHKM = Float[Array, "B H K M"]
BHMV = Float[Array, "B H M V"]

Past = Float[Array, "B _ D"]
Joint = Float[Array, "B T joint"]
JointBias = Float[Array, "joint"]
TD = Float[Array, "T D"]

BTHP = Float[Array, "B T H P"]
BHPN2 = Float[Array, "B H P N 2"]
HN = Complex[Array, "H N"]

BTN = Float[Array, "B T N"]
BDN = Float[Array, "B D N"]
DN = Float[Array, "D N"]

BTGN = Float[Array, "B T G N"]
BHNP = Float[Array, "B H N P"]

LOG_OF_NOTHING = -1e38
"""The logarithm of an empty sum."""

Rows = Float[Array, "*B D"]
Table = Float[Array, "V D"]
Labels = Int[Array, "*B"]
Losses = Float[Array, "*B"]
Correct = Bool[Array, "*B"]

Documents = Any
"""The caller's `SegmentIds` or None; `dispatch` hands implementations numbers (B, T) of these documents."""


class AttentionCall(NamedTuple):
    """Softmax attention: q, k (B, T, H, K), v (B, T, H, V); a query sees `window` keys, T are all up to its own.

    `head_dim` is K less the zeros that queries and keys end in, None where they end in none. A query sees the first
    `sinks` tokens of its document besides (`ops/softmax_sinks.py`).
    """

    q: BTHK
    k: BTHK
    v: BTHV
    window: int
    segment_ids: Documents = None
    head_dim: int | None = None
    sinks: int = 0

    @property
    def root(self) -> float:
        """What scores are divided by."""
        return math.sqrt(self.head_dim or self.q.shape[3])


class LinearAttentionCall(NamedTuple):
    """Normalised attention by features: q, k (B, T, H, K), v (B, T, H, V), state (B, H, E, V+1).

    q and k are the features themselves, E = K, or what an operation's own map expands to E of them.
    """

    q: BTHK
    k: BTHK
    v: BTHV
    state: BHEV | None = None
    segment_ids: Documents = None

    @property
    def tokens(self) -> "LinearAttentionCall":
        """The arrays over time alone."""
        return _only(self, "q", "k", "v")


class MatrixStateCall(NamedTuple):
    """A matrix state that decays: q, k (B, T, H, K), v (B, T, H, V), log_decay (B, T, H, K or 1), state (B, H, K, V).

    What an operation has beyond it: gated linear attention a bonus (H, K) or none, the delta rule its rate beta
    (B, T, H), the diagonal plus low rank form a and b (B, T, H, K).
    """

    q: BTHK
    k: BTHK
    v: BTHV
    log_decay: Decay
    bonus: HK | None = None
    beta: BTH | None = None
    a: BTHK | None = None
    b: BTHK | None = None
    scale: float = 1.0
    state: BHKV | None = None
    segment_ids: Documents = None

    @property
    def tokens(self) -> "MatrixStateCall":
        """The arrays over time alone."""
        return _only(self, "q", "k", "v", "log_decay", "beta", "a", "b")


class SlotState(NamedTuple):
    """Keys (B, H, K, M) and values (B, H, M, V) of M slots, fp32."""

    keys: BHKM
    values: BHMV


class SlotAttentionCall(NamedTuple):
    """Attention through M slots: q, k (B, T, H, K), v (B, T, H, V), s and log_decay (B, T, H, M)."""

    q: BTHK
    k: BTHK
    v: BTHV
    s: BTHM
    log_decay: BTHM
    scale: float = 1.0
    state: SlotState | None = None
    segment_ids: Documents = None

    @property
    def tokens(self) -> "SlotAttentionCall":
        """The arrays over time alone."""
        return _only(self, "q", "k", "v", "s", "log_decay")

    @property
    def keyed_tokens(self) -> "SlotAttentionCall":
        """Those arrays but the values: what is written into the slots' keys and reads them."""
        return _only(self, "q", "k", "s", "log_decay")


class ShortConvCall(NamedTuple):
    """A convolution of x (B, T, D) with kernel (W, D); bias (D), SiLU of the sum or not, state (B, reach, D)."""

    x: BTD
    kernel: WD
    bias: Channels | None = None
    state: Past | None = None
    segment_ids: Documents = None
    silu: bool = False
    dilation: int = 1


class PositionsCall(NamedTuple):
    """The place of each token in its document; state (B,), how many tokens each row's first document has had."""

    segment_ids: BT
    state: Int[Array, "B"] | None = None


class TokenShiftCall(NamedTuple):
    """The token before each one of x (B, T, D); state (B, D)."""

    x: BTD
    state: BD | None = None
    segment_ids: Documents = None


class GatedConvCall(NamedTuple):
    """A convolution of one half of x (B, T, 2 D), gated by the other: kernel (W, D), bias (2 D), state (B, W, D)."""

    x: Joint
    kernel: WD
    bias: JointBias | None = None
    state: BWD | None = None
    segment_ids: Documents = None


class LongConvCall(NamedTuple):
    """A convolution of u (B, T, D) with a kernel (T, D), whose row l is the tap of lag l."""

    u: BTD
    kernel: TD
    segment_ids: Documents = None


class DiagonalSSMCall(NamedTuple):
    """A state space a head: u (B, T, H, P), complex log_a, b, c (H, N), state (B, H, P, N, 2)."""

    u: BTHP
    log_a: HN
    b: HN
    c: HN
    state: BHPN2 | None = None
    segment_ids: Documents = None


class SelectiveScanCall(NamedTuple):
    """A scan with a token's own step, input and output: u, dt (B, T, D), A (D, N), B, C (B, T, N), state (B, D, N).

    With a bias (D) dt are raw: the steps are softplus(dt + bias).
    """

    u: BTD
    dt: BTD
    A: DN
    B: BTN
    C: BTN
    state: BDN | None = None
    segment_ids: Documents = None
    bias: Channels | None = None

    @property
    def tokens(self) -> "SelectiveScanCall":
        """The arrays over time alone."""
        return _only(self, "u", "dt", "B", "C")


class SSDCall(NamedTuple):
    """A scan with one rate a head: x (B, T, H, P), dt (B, T, H), A (H), B, C (B, T, G, N), state (B, H, N, P)."""

    x: BTHP
    dt: BTH
    A: Float[Array, "H"]
    B: BTGN
    C: BTGN
    state: BHNP | None = None
    segment_ids: Documents = None


class WkvState(NamedTuple):
    """RWKV-4's numerator and denominator over e^max, and max, each (B, D) fp32."""

    num: BD
    den: BD
    max: BD

    @classmethod
    def empty(cls, batch: int, channels: int) -> "WkvState":
        """Return the state before the first token."""
        num, den = (jnp.zeros((batch, channels), jnp.float32) for _ in range(2))  # buffers of their own, to be donated
        return cls(num, den, jnp.full((batch, channels), LOG_OF_NOTHING, jnp.float32))

    def then(self, log_decay: Array, later: "WkvState") -> "WkvState":
        """Return the state of these tokens and later ones, over which they decay by so much."""
        decayed = jnp.maximum(self.max + log_decay, LOG_OF_NOTHING)
        top = jnp.maximum(decayed, later.max)
        old, new = jnp.exp(decayed - top), jnp.exp(later.max - top)
        return WkvState(old * self.num + new * later.num, old * self.den + new * later.den, top)


class Wkv4Call(NamedTuple):
    """RWKV-4's average of v by k, both (B, T, D); log_decay and bonus of each channel, (D)."""

    k: BTD
    v: BTD
    log_decay: Channels
    bonus: Channels
    state: WkvState | None = None
    segment_ids: Documents = None

    @property
    def tokens(self) -> "Wkv4Call":
        """The arrays over time alone."""
        return _only(self, "k", "v")


class NormCall(NamedTuple):
    """An addition of y to the stream r, both (..., D), and the sum's norm, a layer norm where there is a bias (D)."""

    r: Rows
    y: Rows | None
    scale: Channels
    bias: Channels | None
    eps: float
    dtype: jnp.dtype


class GatedNormCall(NamedTuple):
    """(y + skip u) silu(z), with y, u and z (..., D) and skip (D); where there is a scale (D), its RMS norm."""

    y: Rows
    u: Rows
    z: Rows
    skip: Channels
    scale: Channels | None = None
    eps: float = 0.0


class CrossEntropyCall(NamedTuple):
    """Losses of hidden rows (N, D) through a table (V, D); labels (N), as in `based_jax/labels.py`."""

    hidden: Rows
    table: Table
    labels: Labels


def _only[Call: Any](call: Call, *names: str) -> Call:
    """Return the call with these fields alone; the others are None, which trees leave out."""
    return call._replace(**{name: None for name in call._fields if name not in names})
