"""The application that is measured: Pyramid, pyramid_tm, a session of SQLAlchemy, one table."""

from __future__ import annotations

from time import monotonic
from typing import Any

import zope.sqlalchemy
from celery import Task
from pyramid.config import Configurator
from pyramid.response import Response
from redis import Redis
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from ws_celery import RequestAwareTask, TransactionalTask, task

__all__ = ("DISPATCH", "TASKS", "Base", "Note", "add_note", "locked", "main", "mark", "noop")

#: Where the environ of a request has the function that dispatches.
DISPATCH = "benchmarks.dispatch"


class Base(DeclarativeBase):
    """What all tables have."""


class Note(Base):
    """What a transaction inserts."""

    __tablename__ = "ws_celery_benchmark"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@task(name="noop", base=RequestAwareTask)
def noop(request: Any, number: int) -> None:
    """Do nothing."""


@task(name="locked", base=RequestAwareTask, one_instance="{number}")
def locked(request: Any, number: int) -> None:
    """Do nothing, once at a time."""


@task(name="add_note")
def add_note(request: Any, number: int) -> None:
    """Insert one row."""
    request.dbsession.add(Note(text=f"number {number}"))


@task(name="mark", base=Task)
def mark(url: str, key: str) -> None:
    """Note the time where the benchmark waits for it."""
    with Redis.from_url(url) as client:
        client.rpush(key, monotonic())


@task(name="marking", base=TransactionalTask)
def marking(request: Any, url: str, key: str) -> None:
    """Note the time, as a task of the application."""
    with Redis.from_url(url) as client:
        client.rpush(key, monotonic())


#: The tasks by name.
TASKS = {each.name: each for each in (noop, add_note, mark, marking)}


def main(_global_config: Any, **settings: Any) -> Any:
    """Make the WSGI application; ``pyramid.includes`` says whether it has ws_celery."""
    config = Configurator(settings=settings)
    engine = config.registry["engine"] = create_engine(settings["sqlalchemy.url"])
    sessions = sessionmaker(engine)

    def dbsession(request: Any) -> Session:
        session = sessions()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    config.add_request_method(dbsession, reify=True)
    config.add_route("note", "/")
    config.add_view(_view, route_name="note")
    if "ws_celery" in settings["pyramid.includes"]:
        config.scan("benchmarks.site")
    return config.make_wsgi_app()


def _view(request: Any) -> Response:
    request.dbsession.add(Note(text="a note"))
    request.environ[DISPATCH]()
    return Response("done")
