"""``python -m tests.chaos.beats``: beats that are killed, and lose their database and broker."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from tests.chaos.fleet import Fleet
from tests.chaos.services import Broker, Postgres
from tests.chaos.ticking import Base

from ws_celery.beat.store import schedule_table
from ws_celery.outbox import outbox_table

_FOLDER = Path(__file__).parents[2] / "docs" / "guarantees"

#: Entries of the schedule; each ticks every second.
ENTRIES = 5
#: For how many seconds a service is gone.
_OUTAGE = 10

_INI = """\
[app:main]
use = call:tests.chaos.ticking:main
pyramid.includes = pyramid_tm ws_celery
sqlalchemy.url = {database}
ws_celery.config_uri = %(__file__)s
ws_celery.outbox = true
ws_celery.outbox.lease = 2
ws_celery.beat = true

[celery]
broker_url = {broker}
imports = tests.chaos.ticking
"""
_ENTRY = "\n[celerybeat:e{number}]\ntask = tick\ntype = integer\nschedule = 1\n"

#: Who claims what is written down by the database itself, by its own clock.
_JOURNAL = """
CREATE TABLE claim (
    entry varchar(64), tick timestamptz, at timestamptz DEFAULT clock_timestamp());
CREATE FUNCTION note_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO claim (entry, tick) VALUES (NEW.name, NEW.last_run_at); RETURN NULL; END $$;
CREATE TRIGGER note_claim AFTER UPDATE OF task_id ON ws_celery_schedule
    FOR EACH ROW WHEN (OLD.task_id IS DISTINCT FROM NEW.task_id)
    EXECUTE FUNCTION note_claim();
"""
_TWICE = "SELECT count(*) FROM (SELECT FROM run GROUP BY entry, tick HAVING count(*) > 1) AS twice"
_NEVER = "SELECT count(*) FROM claim LEFT JOIN run USING (entry, tick) WHERE run.id IS NULL"
_SKIPPED = """
SELECT coalesce(sum(extract(epoch FROM tick - before) - 1), 0)::int FROM (
    SELECT at, tick, lag(tick) OVER (PARTITION BY entry ORDER BY tick) AS before FROM claim
) AS ticks WHERE at >= :since
"""
#: From the last claim before to now, so that a beat that does not come back is a gap, too.
_GAP = """
SELECT max(extract(epoch FROM at - before)) FROM (
    SELECT at, lag(at) OVER (PARTITION BY entry ORDER BY at) AS before FROM (
        SELECT entry, at FROM claim
        UNION ALL SELECT DISTINCT entry, clock_timestamp() FROM claim) AS claimed
) AS claims WHERE at >= :since
"""


@dataclass(frozen=True)
class Line:
    """What one fault has done.

    :param fault: what it was.
    :param ticks: how many ticks were claimed during it and after it.
    :param twice: how many ran more than once.
    :param never: how many were claimed and have not run.
    :param skipped: how many were not claimed.
    :param gap: the longest time, in seconds, between two claims of one entry.
    :param outage: for how many seconds nobody could claim.
    """

    fault: str
    ticks: int
    twice: int
    never: int
    skipped: int
    gap: float
    outage: float = 0

    @property
    def is_broken(self) -> bool:
        """Whether a promise was broken."""
        longest = self.outage + 2
        allowed = ENTRIES * longest if self.outage else 0
        lost = self.skipped > allowed or self.gap > longest
        return bool(self.twice or self.never or lost)


class Beats:
    """Three beats and a worker, with a database and a broker of their own.

    :param folder: for their files.
    """

    def __init__(self, folder: Path) -> None:
        self.database, self.broker = Postgres(folder / "database"), Broker(folder / "broker")
        self.database.start()
        self.broker.start()
        for metadata in (Base.metadata, schedule_table().metadata, outbox_table().metadata):
            metadata.create_all(self.database.engine)
        with self.database.engine.begin() as connection:
            connection.exec_driver_sql(_JOURNAL)
        ini = folder / "beats.ini"
        text = _INI.format(database=self.database.url, broker=self.broker.url)
        ini.write_text(text + "".join(_ENTRY.format(number=n) for n in range(ENTRIES)))
        beat = ["-m", "ws_celery", "beat", "--ini", str(ini), "--loglevel=info"]
        worker = ["-m", "ws_celery", "worker", "--ini", str(ini), "--concurrency=1"]
        self._healthy = {name: folder / f"{name}.health" for name in ("beat1", "beat2", "beat3")}
        beats = {n: [*beat, "--health-file", str(file)] for n, file in self._healthy.items()}
        programs = {"worker": worker, **beats}
        self.fleet = Fleet(programs, folder, {})

    def start(self) -> None:
        """Start everything, and wait until all entries tick."""
        for name in self.fleet.programs:
            self.fleet.start(name)
        began = "SELECT count(DISTINCT entry) FROM claim"
        self.fleet.wait_until(lambda: self.ask(began) == ENTRIES, 60)
        self.fleet.wait(5)

    def kill_one(self, draw: random.Random) -> bool:
        """Kill a beat that ticks, unless it is the only one; return whether one was killed."""
        up = [name for name, file in self._healthy.items() if file.exists()]
        if len(up) < 2:
            return False  # the machine is too slow to start one within the time
        name = draw.choice(up)
        self.fleet.kill(name)
        self._healthy[name].unlink()
        return True

    def stop(self) -> None:
        """Stop everything."""
        self.fleet.stop_all()
        self.broker.kill()
        self.database.stop()

    def ask(self, statement: str, **values: Any) -> Any:
        """Return the value that a statement asks the database for."""
        with self.database.engine.connect() as connection:
            return connection.scalar(sa.text(statement), values)

    def suffer(self, fault: str, during: Callable[[], None]) -> Line:
        """Let a fault happen, and count."""
        since = self.ask("SELECT clock_timestamp()")
        during()
        self.fleet.wait(5)
        self.fleet.wait_until(lambda: self.ask(_NEVER) == 0, 60)
        ticks = self.ask("SELECT count(*) FROM claim WHERE at >= :since", since=since)
        skipped, gap = self.ask(_SKIPPED, since=since), self.ask(_GAP, since=since)
        return Line(fault, ticks, self.ask(_TWICE), self.ask(_NEVER), skipped, float(gap))


def main() -> None:
    """Make the faults happen, write the table, and end with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="tests.chaos.beats", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long beats are killed")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="where the table goes")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="ws_celery-", ignore_cleanup_errors=True) as folder:
        beats = Beats(Path(folder))
        try:
            beats.start()
            lines = list(_run(beats, options))
        finally:
            beats.stop()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "beats.rst").write_text(_table(lines))
    sys.exit(any(line.is_broken for line in lines))


def _run(beats: Beats, options: argparse.Namespace) -> Any:
    draw = random.Random(options.seed)

    kills: list[bool] = []

    def kill() -> None:
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            kills.append(beats.kill_one(draw))
            beats.fleet.wait(2)

    def without(service: Any) -> None:
        service.proxy.cut()
        beats.fleet.wait(_OUTAGE)
        service.proxy.mend()

    for fault, during, outage in (
        ("one of three beats killed, every 2 s if two are up", kill, 0),
        (f"database gone for {_OUTAGE} s", lambda: without(beats.database), _OUTAGE),
        (f"broker gone for {_OUTAGE} s", lambda: without(beats.broker), 0),
    ):
        line = replace(beats.suffer(fault, during), outage=outage)
        if during is kill:
            line = replace(line, fault=f"{fault}: {sum(kills)} times in {options.seconds:g} s")
        print(line, flush=True)
        yield line


def _table(lines: list[Line]) -> str:
    rows = [
        ("Fault", "Ticks", "Run twice", "Claimed, not run", "Skipped", "Longest gap"),
        *(
            (each.fault, each.ticks, each.twice, each.never, each.skipped, f"{each.gap:.1f} s")
            for each in lines
        ),
    ]
    text = ".. list-table::\n    :header-rows: 1\n\n"
    for row in rows:
        first, *rest = row
        text += f"    * - {first}\n" + "".join(f"      - {value}\n" for value in rest)
    return text


if __name__ == "__main__":
    main()
