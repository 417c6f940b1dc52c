"""Tasks that write rows of ``notes``, the table of the databases of tests."""

from __future__ import annotations

from typing import Any

import transaction
import zope.sqlalchemy
from sqlalchemy import text

from ws_celery import task

__all__ = ("dispatch", "follow", "insert", "write")


def insert(request: Any, number: int) -> None:
    """Write a row in the transaction of a request."""
    session = request.dbsession
    session.execute(
        text("INSERT INTO notes (id, text) VALUES (:id, :text)"),
        {"id": number, "text": f"note {number}"},
    )
    zope.sqlalchemy.mark_changed(session, request.tm)


@task(name="write")
def write(request: Any, number: int) -> int:
    """Write a row."""
    insert(request, number)
    return number


@task(name="follow")
def follow(request: Any, before: Any, number: int) -> Any:
    """Write a row after another task, and pass its result on."""
    insert(request, number)
    return before


def dispatch(app: Any, task: Any, *args: Any, **options: Any) -> Any:
    """Dispatch a task in a transaction of its own, which commits."""
    with transaction.manager:
        return task.apply_async((app.request(), *args), **options)
