"""``python -m tests.chaos.locks``: processes that hold a one-instance lock are killed, at random.

Every turn counts a number further that would lose a turn if two were taken at once, and only with a
token that is greater than the last one.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from celery import Celery
from pyramid.paster import get_app
from sqlalchemy.orm import Session
from tests.chaos.fleet import Fleet
from tests.chaos.turns import KEY, Base, Counter, Turn

from ws_celery import get_celery_app

__all__ = ("Outcome", "Turns", "take_turns")

_INI = """\
[app:main]
use = call:tests.chaos.turns:main
pyramid.includes = pyramid_tm ws_celery
tm.manager_hook = pyramid_tm.explicit_manager
sqlalchemy.url = {database}
ws_celery.config_uri = %(__file__)s
ws_celery.locks = {locks}

[celery]
broker_url = {broker}
task_default_queue = {queue}
imports = tests.chaos.turns
task_ignore_result = true
worker_prefetch_multiplier = 1

[celery:broker_transport_options]
visibility_timeout = 30
unacked_restore_interval = 1
unacked_restore_throttle = 1
unacked_mutex_expire = 5
"""


@dataclass
class Outcome:
    """What a run has come to."""

    turns: int
    value: int
    together: int
    stale: int
    kills: int
    #: Seconds from each kill of a holder until somebody else had the lock.
    freed: list[float] = field(repr=False)

    def __str__(self) -> str:
        slowest = max(self.freed, default=0.0)
        return (
            f"{self.turns} turns, counted {self.value}; {self.together} beside another, "
            f"{self.stale} with an old token; {self.kills} kills, {len(self.freed)} of a holder, "
            f"after which the next one had the lock within {slowest:.1f} s"
        )


class Turns:
    """Workers that take turns.

    :param fleet: the workers.
    :param pool: ``prefork``, whose children are killed, or another one, whose workers are.
    """

    def __init__(self, ini: Path, fleet: Fleet, database: str, pool: str) -> None:
        self.fleet = fleet
        self.counter = uuid.uuid4().hex
        self._pool = pool
        self._store = get_celery_app(get_app(str(ini)).registry).locks.store
        self._engine = sa.create_engine(database)
        Base.metadata.create_all(self._engine)
        with Session(self._engine) as session, session.begin():
            session.add(Counter(name=self.counter))
        self.kills = 0
        self.freed: list[float] = []

    def outcome(self) -> Outcome:
        """Return what has been committed."""
        with Session(self._engine.execution_options(isolation_level="REPEATABLE READ")) as session:
            turns = session.scalars(sa.select(Turn).where(Turn.counter == self.counter)).all()
            value = session.get_one(Counter, self.counter).value
        together = sum(not turn.alone for turn in turns)
        stale = sum(not turn.fresh for turn in turns)
        return Outcome(len(turns), value, together, stale, self.kills, self.freed)

    def done(self) -> int:
        """Return how many of the attempts have had their turn."""
        wanted = sa.select(sa.func.count(Turn.number.distinct())).where(
            Turn.counter == self.counter
        )
        with self._engine.connect() as connection:
            return connection.execute(wanted).scalar_one()

    def holder(self) -> Any:
        """Return who has the lock."""
        return self._store.holder_of(KEY.format(counter=self.counter))

    def kill_holder(self) -> None:
        """Kill a process that has the lock, and measure how long nobody gets it."""
        holder = self.holder()
        if holder is None or not holder.pid:
            return
        with suppress(psutil.NoSuchProcess):
            psutil.Process(holder.pid).kill()
            self.kills += 1
        begun = time.monotonic()
        if not self._is_held_by(holder):
            return  # its turn was over before it was hit
        if self.fleet.wait_until(lambda: not self._is_held_by(holder), 60):
            self.freed.append(time.monotonic() - begun)

    def _is_held_by(self, holder: Any) -> bool:
        now = self.holder()
        return now is not None and now.token == holder.token

    def kill_any(self) -> None:
        """Kill one of the processes that run tasks."""
        name = random.choice(list(self.fleet.programs))
        children = self.fleet.children(name)
        if self._pool != "prefork":
            self.fleet.kill(name)
        elif children:
            random.choice(children).kill()
        self.kills += 1

    def close(self) -> None:
        """Stop the workers, and delete what is theirs."""
        self.fleet.stop_all()
        with Session(self._engine) as session, session.begin():
            for table in (Turn.counter, Counter.name):
                session.execute(sa.delete(table.class_).where(table == self.counter))
        self._store.close()
        self._engine.dispose()


@contextmanager
def open_turns(
    broker: str, database: str, *, locks: str, pool: str, workers: int, concurrency: int
) -> Iterator[tuple[Turns, Any]]:
    """Start the workers; hands out what they are, and what sends an attempt."""
    with tempfile.TemporaryDirectory() as name:
        folder, queue = Path(name), f"turns-{uuid.uuid4().hex}"
        ini = folder / "turns.ini"
        ini.write_text(_INI.format(broker=broker, database=database, locks=locks, queue=queue))
        options = (
            *("worker", "--ini", str(ini), "--pool", pool, "--concurrency", str(concurrency)),
            *("--without-mingle", "--without-gossip", "--without-heartbeat", "--loglevel=warning"),
        )
        programs = {
            f"worker{number}": ("-m", "ws_celery", *options, "-n", f"{queue}-{number}@%h")
            for number in range(workers)
        }
        turns = Turns(ini, Fleet(programs, folder, {}), database, pool)
        try:
            for program in programs:
                turns.fleet.start(program)
            with Celery(broker=broker, set_as_current=False) as sender:
                yield (
                    turns,
                    lambda number, seconds: sender.send_task(
                        "turn", (turns.counter, number, seconds), queue=queue, ignore_result=True
                    ),
                )
                with sender.connection_for_write() as connection:
                    connection.default_channel.queue_delete(queue)
        finally:
            turns.close()


def take_turns(turns: Turns, send: Any, attempts: int, every: float, seconds: float) -> Outcome:
    """Let attempts be made, and kill until all have had their turn.

    :param every: seconds between two kills, on average.
    :param seconds: how long a turn takes.
    """
    for number in range(attempts):
        send(number, seconds)
    turns.fleet.wait_until(lambda: turns.done() > 0, 120)
    deadline = time.monotonic() + 60 + attempts * (seconds + 1)
    while turns.done() < attempts and time.monotonic() < deadline:
        turns.fleet.wait(random.uniform(0, 2 * every))
        random.choice((turns.kill_holder, turns.kill_any))()
    return turns.outcome()


def main() -> None:
    """Let workers take turns, kill them, and tell what came of it."""
    parser = argparse.ArgumentParser("tests.chaos.locks", description=__doc__)
    parser.add_argument("--attempts", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=4)
    pools = ("prefork", "threads", "gevent", "solo")
    parser.add_argument("--pool", default="prefork", choices=pools)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two kills")
    parser.add_argument("--locks", default="auto", help="ws_celery.locks")
    parser.add_argument("--redis", default="redis://127.0.0.1:6379/8")
    parser.add_argument("--database", default="postgresql+psycopg://postgres@127.0.0.1:5432/test")
    options = parser.parse_args()
    begun = time.monotonic()
    site = open_turns(
        options.redis,
        options.database,
        locks=options.locks,
        pool=options.pool,
        workers=options.workers,
        concurrency=options.concurrency,
    )
    with site as (turns, send):
        outcome = take_turns(turns, send, options.attempts, options.every, 0.03)
    print(f"{options.pool}, {options.locks}: {outcome}; {time.monotonic() - begun:.0f} s")
    wrong = outcome.together or outcome.stale or outcome.turns != outcome.value
    raise SystemExit(bool(wrong or max(outcome.freed, default=0) > 10))


if __name__ == "__main__":
    main()
