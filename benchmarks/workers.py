"""How many tasks a worker runs in a second, against those of a worker of Celery's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from redis import Redis

from benchmarks.harness import Case, Sides
from benchmarks.plain import plain_celery
from benchmarks.services import ROOT, Services

__all__ = (
    "CASES", "IDLE", "PATIENCE", "ini_file", "our_worker", "plain_worker", "process", "run",
    "working",
)  # fmt: skip

#: Tasks in one measurement.
TASKS = 1000

#: Seconds until a worker must have begun, or ended a measurement.
PATIENCE = 120

#: Seconds between two looks of a relay that has nothing to do.
IDLE = 0.05

#: Both workers: one child process, and no talk to other workers meanwhile.
OPTIONS = ("--concurrency=1", "--loglevel=warning", "--without-gossip", "--without-mingle")

INI = """
[app:main]
use = call:benchmarks.site:main
pyramid.includes = pyramid_tm ws_celery
tm.manager_hook = pyramid_tm.explicit_manager
sqlalchemy.url = {database}
ws_celery.config_uri = %(__file__)s
{outbox}

[celery]
broker_url = {broker}
task_default_queue = {queue}
task_ignore_result = true
"""


@contextmanager
def working(task: str, services: Services, *, count: int = TASKS) -> Iterator[Sides]:
    """Open the sides: two workers that are started already, and wait.

    :param task: name of the task that is run.
    :param count: how many times in one measurement.
    """
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(services.table())
        directory = Path(enter(tempfile.TemporaryDirectory()))
        ours, plain = enter(services.queue()), enter(services.queue())
        enter(process(our_worker(services, ours, directory)))
        enter(process(plain_worker(services, plain)))
        sides = (enter(_runs(services, queue, task, count)) for queue in (ours, plain))
        yield Sides(*sides)


@contextmanager
def _runs(services: Services, queue: str, task: str, count: int) -> Iterator[partial[float]]:
    """Yield what lets the worker of ``queue`` run the tasks, and returns the seconds.

    The messages are made once: the worker gets a copy of all of them at one moment. The first and
    the last of them is a task that tells the time, so that nothing is added to those between.
    """
    marks = f"{queue}-marks"
    with ExitStack() as stack:
        store = stack.enter_context(services.queue())
        app = stack.enter_context(plain_celery(services.redis, store))
        client = stack.enter_context(Redis.from_url(services.redis, socket_timeout=None))
        mark = app.tasks["mark"].s(services.redis, marks)
        mark.apply_async()
        for number in range(count):
            app.tasks[task].delay(number)
        mark.apply_async()
        stack.callback(services.empty, marks)
        yield partial(run, client, store, queue)


def run(client: Redis, store: str, queue: str) -> float:
    """Let the worker of ``queue`` run the messages of ``store``; return the seconds."""
    client.copy(store, queue)
    times = []
    for _ in range(2):
        told = client.blpop([f"{queue}-marks"], timeout=PATIENCE)
        if told is None:
            raise TimeoutError(f"the worker of {queue} does not run its tasks")
        times.append(float(told[1]))
    return times[1] - times[0]


def our_worker(
    services: Services, queue: str, directory: Path, outbox: str | None = None
) -> list[str]:
    """Return the arguments of a worker of the application.

    :param outbox: the table of its outbox, if it has one.
    """
    ini = ini_file(services, queue, directory, outbox, f"ws_celery.outbox.poll = {IDLE}")
    return ["-m", "ws_celery", "worker", "--ini", str(ini), *_options()]


def plain_worker(services: Services, queue: str) -> list[str]:
    """Return the arguments of a worker of Celery's own."""
    return ["-m", "benchmarks.plain", services.redis, queue, services.database, *_options()]


def _options() -> tuple[str, ...]:
    return (*OPTIONS, f"--hostname={uuid.uuid4().hex}@%h")


def ini_file(
    services: Services, queue: str, directory: Path, outbox: str | None, *more: str
) -> Path:
    """Write the INI of the application; see :func:`our_worker`.

    :param more: lines of its settings, if it has an outbox.
    """
    lines = ("ws_celery.outbox = true", f"ws_celery.outbox.table = {outbox}", *more)
    ini = directory / f"{queue}.ini"
    ini.write_text(
        INI.format(
            database=services.database,
            broker=services.redis,
            queue=queue,
            outbox="\n".join(lines) if outbox else "",
        )
    )
    return ini


@contextmanager
def process(arguments: Sequence[str], **environment: str) -> Iterator[None]:
    """Run a program of Python until the end of the block.

    :param environment: what it finds in its environment beside the usual.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _case(name: str, title: str, task: str) -> Case:
    return Case(name, title, 0.92, partial(working, task), rounds=9, work=TASKS)


CASES = (
    _case("worker", "worker: RequestAwareTask, no-op", "noop"),
    _case("worker-insert", "worker: TransactionalTask, one insert", "add_note"),
)
