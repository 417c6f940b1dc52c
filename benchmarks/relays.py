"""How many rows that are due a relay sends in a second, against that of django-celery-outbox."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, sleep

from redis import Redis
from sqlalchemy import Engine, create_engine, text

from benchmarks.dispatch import settings_of, site
from benchmarks.harness import Case, Sides
from benchmarks.services import ROOT, Services
from benchmarks.site import noop
from benchmarks.workers import IDLE, ini_file, process

__all__ = ("CASES", "draining")

#: Rows in one measurement.
ROWS = 50_000

#: Seconds until all of them must have been sent.
PATIENCE = 600


@contextmanager
def draining(services: Services, *, rows: int = ROWS) -> Iterator[Sides]:
    """Open the sides: two relays that run, idle, and get all their rows by one commit."""
    with ExitStack() as stack:
        stack.enter_context(services.table())
        engine = create_engine(services.database)
        stack.callback(engine.dispose)
        sides = (relay(services, engine, rows) for relay in (_our_relay, _relay_of_django))
        yield Sides(*map(stack.enter_context, sides))


@contextmanager
def _our_relay(services: Services, engine: Engine, rows: int) -> Iterator[Callable[[], float]]:
    with ExitStack() as stack:
        enter = stack.enter_context
        table, queue = enter(services.outbox()), enter(services.queue())
        request = enter(site(services, settings_of(services.redis, queue), table))

        def dispatch() -> None:
            stack.callback(services.empty, noop.app.outbox.relay.canary.name)
            noop.delay_many((number,) for number in range(rows))

        request(dispatch)
        # As what was dispatched a moment ago, while the broker was down.
        due = {"created_at": "now()", "due_at": "now()"}
        supply = _Supply(services, engine, queue, table, due, "due_at <= now()")
        enter(supply.kept())
        directory = Path(enter(tempfile.TemporaryDirectory()))
        poll = f"ws_celery.outbox.poll = {IDLE}"
        ini = ini_file(services, queue, directory, table, poll)
        enter(process(["-m", "ws_celery", "relay", "--ini", str(ini)]))
        supply.drain(1)  # when it has begun
        yield partial(supply.drain, rows)


@contextmanager
def _relay_of_django(
    services: Services, engine: Engine, rows: int
) -> Iterator[Callable[[], float]]:
    with ExitStack() as stack:
        enter = stack.enter_context
        schema, queue = enter(services.schema()), enter(services.queue())
        environment = {
            "BENCHMARK_BROKER": services.redis,
            "BENCHMARK_QUEUE": queue,
            "BENCHMARK_DATABASE": services.database,
            "BENCHMARK_SCHEMA": schema,
            "DJANGO_SETTINGS_MODULE": "benchmarks.django_site",
        }
        fill = f"from benchmarks.django_site import fill; fill({rows})"
        everything = {**os.environ, **environment}
        subprocess.run([sys.executable, "-c", fill], check=True, cwd=ROOT, env=everything)
        table = f"{schema}.celery_outbox"  # a row that was sent is deleted
        supply = _Supply(services, engine, queue, table, {}, "true")
        enter(supply.kept())
        relay = ["-m", "django", "celery_outbox_relay", "--idle-time", str(IDLE)]
        enter(process(relay, **environment))
        supply.drain(1)  # when it has begun
        yield partial(supply.drain, rows)


@dataclass(frozen=True)
class _Supply:
    """The rows of one relay, to be sent again and again.

    :param queue: where they are sent to.
    :param fresh: expressions for those columns that a delivery, or time, changes.
    :param waits: tells of a row that the relay is not done with it.
    """

    services: Services
    engine: Engine
    queue: str
    table: str
    fresh: dict[str, str]
    waits: str

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Move the rows into a copy of the table."""
        copy = f"{self.table}_copy"
        self._execute(f"CREATE TABLE {copy} AS TABLE {self.table}", f"TRUNCATE {self.table}")
        try:
            yield
        finally:
            self._execute(f"DROP TABLE {copy}")

    def drain(self, rows: int) -> float:
        """Let rows be there at once; return the seconds until the relay is done with them."""
        table, copy = self.table, f"{self.table}_copy"
        self.services.empty(self.queue)
        fresh = [f"UPDATE {copy} SET {name} = {value}" for name, value in self.fresh.items()]  # noqa: S608
        insert = f"INSERT INTO {table} SELECT * FROM {copy} LIMIT {rows}"  # noqa: S608
        self._execute(*fresh, f"TRUNCATE {table}", insert, f"ANALYZE {table}")
        begin = monotonic()
        with Redis.from_url(self.services.redis) as client:
            while client.llen(self.queue) < rows or self._waiting():
                if monotonic() - begin > PATIENCE:
                    raise TimeoutError(f"the relay does not send all of {rows} rows")
                sleep(0.005)
        return monotonic() - begin

    def _waiting(self) -> bool:
        statement = f"SELECT FROM {self.table} WHERE {self.waits} LIMIT 1"
        with self.engine.connect() as connection:
            return connection.execute(text(statement)).rowcount > 0

    def _execute(self, *statements: str) -> None:
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))


CASES = (
    Case(
        "outbox-relay", "relay: 50,000 rows that are due, against django-celery-outbox's", 5.0,
        draining, rounds=2, work=ROWS, rate=10_000, warm=False,
    ),
)  # fmt: skip
