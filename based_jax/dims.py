"""The glossary of dimension letters, and the array types built on them.

B batch · T time (queries) · S time (keys) · D model · H heads · K query/key feature dim · V value head dim ·
E expanded features · C chunk · N state dim of an SSM · F MLP hidden · W window · L layers · R vmapped runs.

A name carries a shape suffix (`q_BTHK`) where the rank or the order of dimensions changes, and nowhere else.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Integer, Key

BT = Integer[Array, "B T"]
BD = Float[Array, "B D"]
BTD = Float[Array, "B T D"]
BP = Int[Array, "B P"]  # distinct positions of each sequence
BPD = Float[Array, "B _ D"]  # at P positions, or at all T of them
BTHK = Float[Array, "B T H K"]
BTHV = Float[Array, "B T H V"]
BSHK = Float[Array, "B S H K"]
BSHV = Float[Array, "B S H V"]
BTGK = Float[Array, "B T G K"]  # G of the H heads have keys and values of their own
BTGV = Float[Array, "B T G V"]
BSGK = Float[Array, "B S G K"]
BSGV = Float[Array, "B S G V"]
BHK = Float[Array, "B H K"]
BHV = Float[Array, "B H V"]
BHKV = Float[Array, "B H K V"]
BHEV = Float[Array, "B H E _"]  # the last axis is V+1: values, then the normaliser
BWD = Float[Array, "B W D"]
WD = Float[Array, "W D"]
BS_mask = Bool[Array, "B S"]
Tokens = Integer[Array, "B"]
DropoutKey = Key[Array, ""]


class Unbroken(NamedTuple):
    """Ids of rows without padding between two tokens of a document, or between a state and the tokens that it is of.

    Attributes:
      ids: of the tokens (B, T), 0 for padding.
    """

    ids: BT


SegmentIds = BT | Unbroken
