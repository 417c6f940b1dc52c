"""What it is compared with: an ordinary Celery app; run as a program, its worker."""

from __future__ import annotations

import sys
from time import monotonic

from celery import Celery
from redis import Redis
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from benchmarks.site import Note

__all__ = ("plain_celery",)


def plain_celery(
    broker: str, queue: str, result_backend: str | None = None, database: str | None = None
) -> Celery:
    """Return a Celery app with the tasks of the application, as one writes them without us."""
    app = Celery("plain", broker=broker, backend=result_backend, set_as_current=False)
    app.conf.update(task_default_queue=queue, task_ignore_result=result_backend is None)
    sessions = sessionmaker(create_engine(database)) if database else None

    @app.task(name="noop", shared=False)
    def noop(number: int) -> None:
        """Do nothing."""

    @app.task(name="add_note", shared=False)
    def add_note(number: int) -> None:
        with sessions() as session:
            session.add(Note(text=f"number {number}"))
            session.commit()

    @app.task(name="mark", shared=False)
    def mark(url: str, key: str) -> None:
        with Redis.from_url(url) as client:
            client.rpush(key, monotonic())

    return app


if __name__ == "__main__":
    broker, queue, database, *arguments = sys.argv[1:]
    plain_celery(broker, queue, database=database).worker_main(["worker", *arguments])
