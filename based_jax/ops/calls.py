"""What each family's implementations take: one call, read by name, the same for every backend.

A table's `compute`, `supports` and `slower` take a call alone. `state` is that of each row's first document, None for
the empty one; `segment_ids` are those of packed documents (see `ops/segments.py`), None for one document a row.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from based_jax.dims import BHEV, BHKV, BT, BTHK, BTHV

HK = Float[Array, "H K"]
Decay = Float[Array, "B T H #K"]
Rate = Float[Array, "B T H"]

BTHM = Float[Array, "B T H M"]
BHKM = Float[Array, "B H K M"]
BHMV = Float[Array, "B H M V"]

BTHP = Float[Array, "B T H P"]
BTH = Float[Array, "B T H"]
BTGN = Float[Array, "B T G N"]
BHNP = Float[Array, "B H N P"]


class LinearAttentionCall(NamedTuple):
    """Normalised attention by features: q, k (B, T, H, K), v (B, T, H, V), state (B, H, E, V+1).

    q and k are the features themselves, E = K, or what an operation's own map expands to E of them.
    """

    q: BTHK
    k: BTHK
    v: BTHV
    state: BHEV | None = None
    segment_ids: BT | None = None

    @property
    def tokens(self) -> Any:
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
    beta: Rate | None = None
    a: BTHK | None = None
    b: BTHK | None = None
    scale: float = 1.0
    state: BHKV | None = None
    segment_ids: BT | None = None

    @property
    def tokens(self) -> Any:
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
    segment_ids: BT | None = None

    @property
    def tokens(self) -> Any:
        """The arrays over time alone."""
        return _only(self, "q", "k", "v", "s", "log_decay")


class SSDCall(NamedTuple):
    """A scan with one rate a head: x (B, T, H, P), dt (B, T, H), A (H), B, C (B, T, G, N), state (B, H, N, P)."""

    x: BTHP
    dt: BTH
    A: Float[Array, "H"]
    B: BTGN
    C: BTGN
    state: BHNP | None = None
    segment_ids: BT | None = None


def _only(call: Any, *names: str) -> Any:
    """Return the call with these fields alone; the others are None, which trees leave out."""
    return call._replace(**{name: None for name in call._fields if name not in names})
