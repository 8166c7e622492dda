"""A new mixer's way to its point: the contracts, a small sweep, a picture and a page among the package's mixers."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from based_jax import contracts
from based_jax.errors import UserError
from based_jax.newcomer.small_sweep import committed_rows, sweep_of
from based_jax.nn.mixers import kind_of
from based_jax.nn.own_mixer import short
from based_jax.pictures import figures, page
from based_jax.pictures.configurations import Configuration, configurations
from based_jax.store import Store
from based_jax.sweep.launch import run_sweep
from based_jax.sweep.schedule import SweepOptions

ROWS_FOLDER = "rows"
TITLE = "Recall against bytes of state: {name} among others"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a mixer stands.

    Attributes:
      points: its configurations, as pictures have them.
      rows: its own and those of the package's mixers.
      pictures: the files that were drawn, the page last.
    """

    points: list[Configuration]
    rows: list[dict[str, Any]]
    pictures: list[Path]


def check_contracts(
    mixer: str | type, options: Mapping[str, Any] | None = None, report: Callable[[str], None] = print
) -> None:
    """Hold a mixer to each contract, and report what comes of it.

    Raises:
      UserError: some are broken.
    """
    broken = contracts.check(mixer, options, report)
    if broken:
        number, total = len(broken), len(contracts.CONTRACTS)
        names = ", ".join(f"'{outcome.contract}'" for outcome in broken)
        raise UserError(f"{short(kind_of(mixer))} breaks {number} of {total} contracts, {names}; nothing was trained.")


def place(
    mixer: str | type,
    several: Iterable[Mapping[str, Any]] = ({},),
    *,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = print,
    command: str = "",
) -> Place:
    """Train the small sweep of a mixer, and draw its points among those of the package's mixers.

    Args:
      mixer: its name, or its class.
      several: options of its Config, a point for each.
      out: folder of rows, picture and page; points that have rows there are not trained again.
      overrides: config keys of all its points that differ from the sweep's, for a look in less time.
      report: takes each line of progress.
      command: what the rows name as theirs.

    Raises:
      UserError: a point is impossible, or the folder cannot be written.
    """
    sweep, store = sweep_of(mixer, several, overrides), Store(out / ROWS_FOLDER)
    run_sweep(sweep, store, "newcomer", SweepOptions(command=command), report)
    wanted = {trial.id for _, trial in sweep.trials()}
    own = [row for row in store.rows() if row["id"] in wanted]
    rows, name = [*committed_rows(), *own], short(kind_of(mixer))
    drawn = figures.frontier(rows, out / "frontier", named=[name])
    drawn.append(page.write(rows, out / "frontier.html", title=TITLE.format(name=name)))
    return Place(configurations(own), rows, drawn)
