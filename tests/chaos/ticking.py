"""The application whose beats are put to the test: its task writes which tick it is run for."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
import zope.sqlalchemy
from pyramid.config import Configurator
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from ws_celery import task

__all__ = ("Base", "Run", "main")


class Base(DeclarativeBase):
    """The table of the application."""


class Run(Base):
    """One run; nothing keeps a tick from being there twice."""

    __tablename__ = "run"

    id: Mapped[int] = mapped_column(primary_key=True)
    entry: Mapped[str] = mapped_column(sa.String(64))
    tick: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))


def main(_global_config: Any, **settings: str) -> Any:
    """Make the WSGI application."""
    config = Configurator(settings=settings)
    factory = sessionmaker(sa.create_engine(settings["sqlalchemy.url"], pool_pre_ping=True))

    def dbsession(request: Any) -> Session:
        session = factory()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    config.add_request_method(dbsession, reify=True)
    config.scan("tests.chaos.ticking")
    return config.make_wsgi_app()


@task(name="tick", bind=True)
def tick(self: Any, request: Any) -> None:
    """Write the entry and the tick that the message names."""
    headers = self.request.headers
    at = datetime.fromisoformat(headers["ws_celery_tick"])
    request.dbsession.add(Run(entry=headers["ws_celery_entry"], tick=at))
