"""A config like those of runs, small and with every kind of value."""

import dataclasses
from typing import Annotated, Any, Literal

from based_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    d_model: int
    layers: tuple[tuple[Any, dict[str, Any]], ...] = ()
    norm: Literal["rms", "layer"] = "rms"
    mlp_dim: int | None = None

    def __post_init__(self):
        if self.d_model < 1:
            raise UserError(f"d_model is {self.d_model}; it is at least 1.")


@dataclasses.dataclass(frozen=True)
class Pairs:
    kind: Literal["pairs"] = "pairs"
    num_pairs: int = 4


PAIRS = Pairs()


@dataclasses.dataclass(frozen=True)
class Text:
    path: str
    kind: Literal["text"] = "text"


@dataclasses.dataclass(frozen=True)
class Run:
    model: Model
    data: Annotated[Pairs | Text, {"pairs": Pairs, "text": Text}] = PAIRS
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    scan: bool = False
    eval_data: Text | None = None
    steps: int = 10


FILE = """
import ml_collections

VARIANTS = {"small": 8, "large": 16}


def get_config(variant="small"):
    model = {"d_model": VARIANTS[variant], "layers": [("conv", {}), ("taylor", {"feature_dim": 4})]}
    return ml_collections.ConfigDict({"model": model, "data": {"kind": "pairs"}})
"""
