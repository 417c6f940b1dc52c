"""What the outbox costs: in a request, in a worker, and when it holds a million rows."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from redis import Redis
from sqlalchemy import create_engine, func, insert, literal, select, text

from benchmarks.dispatch import dispatching, settings_of, site
from benchmarks.harness import Case, Sides
from benchmarks.plain import plain_celery
from benchmarks.services import Services
from benchmarks.site import TASKS as SITE_TASKS
from benchmarks.workers import PATIENCE, our_worker, plain_worker, process, run
from ws_celery.outbox import outbox_table
from ws_celery.outbox.tables import seconds_from_now

__all__ = ("CASES", "latency", "sweeping", "waiting", "working_with_rows")

#: Tasks in one measurement of a worker.
TASKS = 500

#: Rows that wait for a far eta.
ROWS = 1_000_000


@contextmanager
def working_with_rows(services: Services, *, count: int = TASKS) -> Iterator[Sides]:
    """Open the sides: a worker whose messages have rows, and one whose messages have none."""
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(services.table())
        table = enter(services.outbox())
        directory = Path(enter(tempfile.TemporaryDirectory()))
        sides = []
        for name in (table, None):
            queue = enter(services.queue())
            enter(process(our_worker(services, queue, directory, name)))
            sides.append(enter(_runs(services, queue, name, count)))
        yield Sides(*sides)


@contextmanager
def _runs(services: Services, queue: str, table: str | None, count: int) -> Iterator[Any]:
    """Yield what lets the worker of ``queue`` run the tasks, and returns the seconds."""
    with ExitStack() as stack:
        enter = stack.enter_context
        store = enter(services.queue())
        request = enter(site(services, settings_of(services.redis, store), table))
        app = enter(plain_celery(services.redis, store))
        client = enter(Redis.from_url(services.redis, socket_timeout=None))
        mark = app.tasks["mark"].s(services.redis, f"{queue}-marks")
        stack.callback(services.empty, f"{queue}-marks")
        mark.apply_async()
        request(lambda: [SITE_TASKS["add_note"].delay(number) for number in range(count)])
        mark.apply_async()
        if table is None:
            yield partial(run, client, store, queue)
            return
        engine = create_engine(services.database)
        stack.callback(engine.dispose)
        copy = f"{table}_copy"
        with engine.begin() as connection:
            connection.execute(text(f"CREATE TABLE {copy} AS SELECT * FROM {table}"))  # noqa: S608
        stack.callback(_execute, engine, f"DROP TABLE {copy}")

        def with_rows() -> float:
            _execute(engine, f"DELETE FROM {table}")  # noqa: S608
            _execute(engine, f"INSERT INTO {table} SELECT * FROM {copy}")  # noqa: S608
            return run(client, store, queue)

        yield with_rows


def _execute(engine: Any, statement: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))


@contextmanager
def latency(services: Services) -> Iterator[Sides]:
    """Open the sides: the time from the dispatch in a request to the beginning of the run."""
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(services.table())
        table = enter(services.outbox())
        directory = Path(enter(tempfile.TemporaryDirectory()))
        queue, plain_queue = enter(services.queue()), enter(services.queue())
        enter(process(our_worker(services, queue, directory, table)))
        enter(process(plain_worker(services, plain_queue)))
        ours = enter(site(services, settings_of(services.redis, queue), table))
        without_us = enter(site(services))
        plain = enter(plain_celery(services.redis, plain_queue)).tasks["mark"]
        client = enter(Redis.from_url(services.redis, socket_timeout=None))
        marks = f"{queue}-marks"
        stack.callback(services.empty, marks)

        def begun() -> float:
            told = client.blpop([marks], timeout=PATIENCE)
            if told is None:
                raise TimeoutError("the worker does not run its task")
            return float(told[1])

        def our_side() -> float:
            dispatched = monotonic()
            ours(lambda: SITE_TASKS["marking"].delay(services.redis, marks))
            return begun() - dispatched

        def plain_side() -> float:
            dispatched = monotonic()
            without_us(lambda: None)
            plain.apply_async((services.redis, marks))
            return begun() - dispatched

        yield Sides(our_side, plain_side)


@contextmanager
def waiting(services: Services, *, rows: int = ROWS) -> Iterator[Sides]:
    """Open the sides: a request that dispatches one task, with many rows waiting and with none."""
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(services.table())
        sides = []
        for count in (rows, 0):
            table, queue = enter(services.outbox()), enter(services.queue())
            _fill(services, table, count)
            request = enter(site(services, settings_of(services.redis, queue), table))
            sides.append(partial(_dispatch_one, request))
        yield Sides(*sides)


def _dispatch_one(request: Any) -> float:
    begin = monotonic()
    request(lambda: SITE_TASKS["noop"].delay(1))
    return monotonic() - begin


@contextmanager
def sweeping(services: Services, *, rows: int = ROWS) -> Iterator[Sides]:
    """Open the sides: claim one row and look for due ones, with many rows waiting and with none."""
    with ExitStack() as stack:
        enter = stack.enter_context
        engine = create_engine(services.database)
        stack.callback(engine.dispose)
        sides = []
        for count in (rows, 0):
            table = enter(services.outbox())
            _fill(services, table, count)
            sides.append(partial(_claim_and_sweep, engine, table))
        yield Sides(*sides)


def _claim_and_sweep(engine: Any, name: str) -> float:
    from ws_celery.outbox.rows import Rows

    rows = Rows(outbox_table(name))
    row = {
        "id": uuid.uuid4(), "task_id": "one", "task": "one", "queue": "one", "body": b"",
        "options": "{}", "eta": None, "expires": None, "lease": 300.0, "due": 300.0,
    }  # fmt: skip
    begin = monotonic()
    for _ in range(20):
        with engine.begin() as connection:
            rows.insert(connection, [row])
        with engine.begin() as connection:
            rows.claim(connection, row["id"])
        with engine.begin() as connection:
            rows.lease_due(connection, 100)
    return monotonic() - begin


def _fill(services: Services, name: str, count: int) -> None:
    """Have rows that wait for an eta of next week."""
    table = outbox_table(name)
    far = seconds_from_now(literal(7 * 86400.0))
    values = {
        "id": func.gen_random_uuid(), "task_id": literal("far"), "task": literal("far"),
        "queue": literal("far"), "body": literal(b"[[], {}, {}]"), "options": literal("{}"),
        "created_at": far, "eta": far, "due_at": far, "lease": literal(300.0),
        "deliveries": literal(0),
    }  # fmt: skip
    engine = create_engine(services.database)
    numbers = func.generate_series(1, count).table_valued("number")
    with engine.begin() as connection:
        rows = select(*values.values()).select_from(numbers)
        connection.execute(insert(table).from_select(list(values), rows))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"VACUUM ANALYZE {name}"))
    engine.dispose()


def _request(name: str, title: str, goal: float, rounds: int, count: int, **options: Any) -> Case:
    return Case(name, title, goal, partial(dispatching, count, outbox=True, **options), rounds)


CASES = (
    _request("outbox-k1", "outbox: 1 task", 1.4, 300, 1),
    _request("outbox-k10", "outbox: 10 tasks", 0.85, 150, 10),
    _request("outbox-k100", "outbox: 100 tasks", 0.65, 60, 100),
    _request("outbox-k100-bulk", "outbox: 100 tasks by delay_many", 0.28, 100, 100, bulk=True),
    Case(
        "outbox-worker", "worker: TransactionalTask with its row, against without", 0.85,
        working_with_rows, rounds=9, work=TASKS,
    ),
    Case("outbox-latency", "outbox: dispatch to start of the run", 1.15, latency, 200),
    Case("outbox-waiting", "outbox: 1 task, a million rows waiting", 1.2, waiting, 200),
    Case("outbox-sweep", "outbox: claim and sweep, a million rows waiting", 1.2, sweeping, 30),
)  # fmt: skip
