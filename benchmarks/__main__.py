"""``python -m benchmarks``: measure, and show or write what was measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from benchmarks import dispatch, locks, outboxes, relays, workers
from benchmarks.harness import measure
from benchmarks.report import surroundings, table, write
from benchmarks.services import Services

__all__ = ("main",)

_PARTS = (dispatch, workers, locks, outboxes, relays)

CASES = {case.name: case for part in _PARTS for case in part.CASES}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the chosen cases, and print the table; write it if asked to."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"there is no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    services = Services(options.redis, options.database)
    measurements = []
    for name in options.cases or CASES:
        begin = monotonic()
        measurement = measure(CASES[name], services, options.rounds)
        spent = monotonic() - begin
        low, high = measurement.spread
        line = f"{name}: {measurement.ratio:.2f} ({low:.2f} to {high:.2f}), {spent:.0f} s"
        print(line, file=sys.stderr)  # noqa: T201 - a program
        measurements.append(measurement)
    footing = surroundings(services)
    if options.write:
        write(options.write, measurements, footing)
    print(table(measurements, footing))  # noqa: T201 - a program


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description="Measure ws_celery side by side with plain Celery."
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(CASES)}; all if not given")
    add("--rounds", type=int, help="how often each side is measured; each case has its own number")
    add("--write", type=Path, metavar="DIRECTORY", help="write table and drawing there")
    add("--redis", default="redis://127.0.0.1:6379/9", help="URL of the broker (%(default)s)")
    add(
        "--database",
        default="postgresql+psycopg://postgres@127.0.0.1:5432/test",
        help="URL of the database (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    main()
