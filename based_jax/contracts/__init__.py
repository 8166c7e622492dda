"""The contract of a sequence mixer as checks that anything which is called a mixer can be held to.

    from based_jax import contracts

    contracts.check(MyMixer)                    # a line for each contract, kept or broken, and why
    contracts.CONTRACTS["causal"](contracts.Fitting(MyMixer))     # one of them, as a test

The suite of this package holds each of `MIXERS` to the same.
"""

import dataclasses
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from based_jax.contracts import declarations, sequences
from based_jax.contracts.fitting import D_MODEL, BrokenContractError, Fitting
from based_jax.errors import UserError
from based_jax.nn.mixers import kind_of, mixer_class
from based_jax.nn.own_mixer import short

CONTRACTS: dict[str, Callable[[Fitting], None]] = {
    "finite outputs": sequences.gives_finite_outputs,
    "causal": sequences.is_causal,
    "outputs at some positions": sequences.gives_outputs_at_positions,
    "prefill and steps": sequences.continues_a_prefill,
    "prefill in pieces": sequences.prefills_in_pieces,
    "many steps": sequences.goes_on_for_long,
    "documents and padding": sequences.keeps_documents_apart,
    "documents after tokens without one": sequences.goes_on_with_a_document,
    "saved states": lambda fitting: _in_a_file(sequences.saves_its_state, fitting),
    "no room": sequences.refuses_what_has_no_room,
    "impossible caches": sequences.refuses_impossible_caches,
    "ids of a model": sequences.reads_ids_of_a_model,
    "state size": declarations.tells_its_state_size,
    "FLOPs": declarations.tells_its_flops,
    "bf16": declarations.works_in_bf16,
    "64-bit types": declarations.keeps_its_types,
    "axes of parameters": declarations.names_its_axes,
    "names of parameters": declarations.names_its_parameters,
    "impossible options": declarations.refuses_impossible_options,
    "lanes": declarations.trains_in_lanes,
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one contract: `broken` is a sentence on what the mixer does instead, "" where it is kept."""

    contract: str
    broken: str = ""

    def __str__(self) -> str:
        return f"{'broken' if self.broken else 'kept':8}{self.contract}{': ' * bool(self.broken)}{self.broken}"


def outcomes(mixer: str | type, options: Mapping[str, Any] | None = None) -> Iterator[Outcome]:
    """Hold a mixer, by name or class, to each contract and yield what comes of it; any other error breaks one too.

    Args:
      mixer: its name, or its class.
      options: of its Config, where the defaults do not fit a width of 16.

    Raises:
      UserError: the class is no complete mixer, or cannot be built at that width.
    """
    _check_built(mixer, options)
    for name, contract in CONTRACTS.items():
        fitting = Fitting(mixer, options)
        try:
            contract(fitting)
        except BrokenContractError as error:
            yield Outcome(name, str(error))
        except Exception as error:  # a mixer of somebody's may fail at anything
            yield Outcome(name, _told(error, fitting.kind))
        else:
            yield Outcome(name)


def _check_built(mixer: str | type, options: Mapping[str, Any] | None) -> None:
    try:
        Fitting(mixer, options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{short(kind_of(mixer))} cannot be built at width {D_MODEL}: {_told(error, mixer)}."
        ) from error


def _told(error: Exception, mixer: str | type) -> str:
    """Return what an error says, and the innermost place of it in the mixer's file."""
    said = " ".join(str(error).split()).rstrip(".")
    file = getattr(sys.modules.get(mixer_class(kind_of(mixer)).__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{type(error).__name__}: {said:.300}" + (f" ({Path(str(file)).name}:{lines[-1]})" if lines else "")


def check(
    mixer: str | type, options: Mapping[str, Any] | None = None, report: Callable[[str], None] = print
) -> list[Outcome]:
    """Report each outcome when it is there, and return those of broken contracts; see `outcomes`."""
    broken = []
    for outcome in outcomes(mixer, options):
        report(str(outcome))
        broken += [outcome] if outcome.broken else []
    return broken


def _in_a_file(contract: Callable[[Fitting, Path], None], fitting: Fitting) -> None:
    with tempfile.TemporaryDirectory() as folder:
        contract(fitting, Path(folder) / "state.safetensors")


__all__ = ["CONTRACTS", "BrokenContractError", "Fitting", "Outcome", "check", "outcomes"]
