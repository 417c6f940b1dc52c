"""``python -m benchmarks.beat``: what a beat with many entries costs: its start, and its ticks."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil
import sqlalchemy as sa

from benchmarks.services import Services
from benchmarks.workers import ini_file, process
from ws_celery.beat.store import schedule_table

__all__ = ("beat",)


def beat(
    services: Services, *, entries: int = 10_000, period: int = 100, seconds: float = 30
) -> tuple[float, float, float]:
    """Return the seconds of a start, the share of a core, and how many tasks a second were sent.

    :param entries: how many there are in the database, evenly spread over their period.
    :param period: of each entry, in seconds.
    :param seconds: how long it is measured.
    """
    engine = sa.create_engine(services.database)
    with tempfile.TemporaryDirectory() as name, services.queue() as queue, services.outbox() as box:
        table = schedule_table(f"{box}_schedule")
        table.create(engine)
        try:
            _fill(engine, table, entries, period)
            settings = ("ws_celery.beat = true", f"ws_celery.beat.table = {table.name}")
            ini = ini_file(services, queue, Path(name), box, *settings)
            return _measure(ini, Path(name, "health"), engine, table, seconds)
        finally:
            table.drop(engine)
            engine.dispose()


def _fill(engine: sa.Engine, table: sa.Table, entries: int, period: int) -> None:
    fields = json.dumps({"task": "noop", "type": "integer", "schedule": period, "args": [1]})
    statement = f"""
        INSERT INTO {table.name} (name, origin, fields, last_run_at, seen_at, version, changed_at)
        SELECT 'e' || n, 'database', :fields, now() - :period * interval '1 s' * n / :entries,
            now(), 1, now() FROM generate_series(1, :entries) AS n"""  # noqa: S608 - our own names
    with engine.begin() as connection:
        values = {"fields": fields, "period": period, "entries": entries}
        connection.execute(sa.text(statement), values)


def _measure(
    ini: Path, health: Path, engine: sa.Engine, table: sa.Table, seconds: float
) -> tuple[float, float, float]:
    begun = time.monotonic()
    arguments = ["-m", "ws_celery", "beat", "--ini", str(ini), "--health-file", str(health)]
    with process(arguments):
        while not health.exists():
            time.sleep(0.02)
        started = time.monotonic() - begun
        running = _process_of(str(ini))
        time.sleep(5)  # what is due at the start
        sent = sa.text(f"SELECT count(*) FROM {table.name} WHERE last_run_at > :since")  # noqa: S608 - our own name
        with engine.connect() as connection:
            since = connection.scalar(sa.text("SELECT now()"))
        before, begun = running.cpu_times(), time.monotonic()
        time.sleep(seconds)
        after, passed = running.cpu_times(), time.monotonic() - begun
        with engine.connect() as connection:
            count = connection.scalar(sent, {"since": since})
    used = after.user + after.system - before.user - before.system
    return started, used / passed, count / passed


def _process_of(argument: str) -> psutil.Process:
    for each in psutil.process_iter(["cmdline"]):
        if argument in (each.info["cmdline"] or ()):
            return each
    raise LookupError(argument)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser("python -m benchmarks.beat", description=__doc__)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--redis", default="redis://127.0.0.1:6379/9")
    parser.add_argument("--database", default="postgresql+psycopg://postgres@127.0.0.1:5432/test")
    options = parser.parse_args()
    services = Services(options.redis, options.database)
    started, share, rate = beat(services, entries=options.entries)
    print(  # noqa: T201 - a program
        f"{options.entries} entries: started in {started:.1f} s, {rate:.0f} tasks a second, "
        f"{share:.1%} of a core"
    )


if __name__ == "__main__":
    main()
