"""The table of the documentation, made of the results of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.campaign import BACKLOG, Line
from tests.chaos.site import SYSTEMS

__all__ = ("Report",)

_NAMES = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}

_INTRODUCTION = """\
.. Written by ``make chaos``.

Measured on {database} by ``make chaos``, seed {seed}: {dispatches:,} dispatches with the outbox,
and {faults} faults. A cell tells how many effects were **lost / twice / phantoms**; in brackets,
how often the fault happened and how many dispatches were made meanwhile. An empty cell: the system
has no such step. After the last fault of a kind all effects of the outbox were there within
{slowest:.0f} seconds; the lease was {lease:.0f} seconds. {backlog}

.. list-table::
    :header-rows: 1

    * - Fault"""


class Report:
    """Results in a folder: a file for each system, and the table made of all that are there.

    :param folder: of the table ``matrix.rst``.
    :param database: on which the systems ran.
    """

    def __init__(self, folder: Path, database: str) -> None:
        self._folder = folder
        self._database = database

    def add(self, system: str, seed: int, lease: float, lines: Sequence[Line]) -> None:
        """Keep the results of a system, and write the table anew if the outbox has its own."""
        data = {"seed": seed, "lease": lease, "lines": [asdict(line) for line in lines]}
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file(system).write_text(json.dumps(data, indent=1) + "\n")
        self.write()

    def write(self) -> None:
        """Write the table of what is there."""
        results = {
            system: json.loads(self._file(system).read_text())
            for system in SYSTEMS
            if self._file(system).exists()
        }
        if "outbox" in results:
            text = "\n".join([self._introduction(results["outbox"]), *_table(results)])
            (self._folder / "matrix.rst").write_text(text + "\n")

    def _file(self, system: str) -> Path:
        return self._folder / f"{self._database}-{system}.json"

    def _introduction(self, result: dict[str, Any]) -> str:
        lines = result["lines"]
        (backlog,) = (line["converged"] for line in lines if line["fault"] == BACKLOG)
        return _INTRODUCTION.format(
            database=_NAMES[self._database],
            seed=result["seed"],
            lease=result["lease"],
            dispatches=sum(line["dispatches"] for line in lines),
            faults=sum(line["faults"] for line in lines),
            slowest=max(line["converged"] or 0 for line in lines),
            backlog=f"Of 1,000 tasks that waited when the\nbroker was emptied, the last one had "
            f"run {backlog:.0f} seconds after the broker's return."
            if backlog
            else "",
        )


def _table(results: dict[str, Any]) -> Iterator[str]:
    systems = [{line["fault"]: line for line in result["lines"]} for result in results.values()]
    for system in results:
        yield f"      - {SYSTEMS[system]}"
    for fault in dict.fromkeys(fault for lines in systems for fault in lines):
        yield f"    * - {fault}"
        for lines in systems:
            yield f"      - {_cell(lines.get(fault))}".rstrip()
    yield "    * - **all**"
    for lines in systems:
        yield f"      - **{_cell(_sum(list(lines.values())))}**"


def _cell(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    return (
        f"{line['lost']} / {line['duplicates']} / {line['phantoms']} "
        f"({line['faults']} x, {line['dispatches']:,} dispatches)"
    )


def _sum(lines: list[dict[str, Any]]) -> dict[str, int]:
    keys = ("lost", "duplicates", "phantoms", "faults", "dispatches")
    return {key: sum(line[key] for line in lines) for key in keys}
