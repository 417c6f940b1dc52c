"""What the lock of ``@one_instance`` adds to a run, against what it may add."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pyramid.config import global_registries
from pyramid.paster import get_app

from benchmarks.harness import Case, Sides, stopwatch
from benchmarks.services import Services
from benchmarks.workers import ini_file
from ws_celery import get_celery_app

__all__ = ("CASES",)

#: Runs in one measurement.
RUNS = 500

#: Seconds that a lock in Redis may add to a run.
MAY_ADD = 0.0005


@contextmanager
def locking(services: Services) -> Iterator[Sides]:
    """Open the sides: what a lock adds to a run in this process, and what it may add."""
    with tempfile.TemporaryDirectory() as name, services.queue() as queue:
        ini = ini_file(services, queue, Path(name), None)
        registry = get_app(str(ini)).registry
        with closing(get_celery_app(registry)) as app:

            def seconds(task: str) -> float:
                run = app.tasks[task].apply
                with stopwatch() as seconds:
                    for number in range(RUNS):
                        run((number,))
                return seconds()

            yield Sides(lambda: (seconds("locked") - seconds("noop")) / RUNS, lambda: MAY_ADD)
        global_registries.remove(registry)


CASES = (Case("lock", "a run: what one_instance adds, against 0.5 ms", 1.0, locking, rounds=9),)
