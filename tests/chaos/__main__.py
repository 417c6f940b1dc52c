"""``python -m tests.chaos``: run the crash matrix."""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

from tests.chaos.campaign import Campaign, Line, failures
from tests.chaos.report import Report
from tests.chaos.site import SYSTEMS, open_site

_FOLDER = Path(__file__).parents[2] / "docs" / "guarantees"


def main() -> None:
    """Run each system, write the table, and end with 1 if the outbox has broken its promise."""
    options = _options()
    print(f"seed {options.seed}: repeat the run with --seed {options.seed}")
    report = Report(options.folder, options.database)
    broken = False
    for system in options.systems:
        lines, rows = _run(system, options)
        report.add(system, options.seed, options.lease, lines)
        wrong = failures(lines, rows)
        print(f"{SYSTEMS[system]}: {wrong or 'nothing lost, nothing twice, no phantom'}")
        broken |= system == "outbox" and bool(wrong)
    sys.exit(int(broken))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--dispatches", type=int, default=10_000, help="of the outbox, at least")
    parser.add_argument("--faults", type=int, default=200, help="of the outbox, at least")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--database", choices=("postgresql", "sqlite"), default="postgresql")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--only", default="", help="part of the names of the faults to inject")
    parser.add_argument("--lease", type=float, default=3.0, help="of the outbox, in seconds")
    parser.add_argument("--rate", type=float, default=40.0, help="dispatches per second")
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="where the table goes")
    return parser.parse_args()


def _run(system: str, options: argparse.Namespace) -> tuple[list[Line], list[Any]]:
    # The others are there to be compared: a smaller number tells enough.
    part = 1 if system == "outbox" else 4
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} s  {text}", flush=True)

    settings = {"lease": options.lease, "rate": options.rate, "seed": options.seed}
    with open_site(system, options.database, **settings) as site:
        campaign = Campaign(
            site,
            options.database,
            dispatches=options.dispatches // part,
            faults=options.faults // part,
            seed=options.seed,
            say=say,
            only=options.only,
        )
        return campaign.run(), campaign.rows()


if __name__ == "__main__":
    main()
