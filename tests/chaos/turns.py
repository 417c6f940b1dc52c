"""Tasks that have to take turns, and a database that knows whether they did."""

from __future__ import annotations

import os
import time
from typing import Any

import sqlalchemy as sa
import zope.sqlalchemy
from pyramid.config import Configurator
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from ws_celery import TransactionalTask, one_instance, task

__all__ = ("KEY", "Base", "Counter", "Turn", "main")

KEY = "turns of {counter}"


class Base(DeclarativeBase):
    """The tables of the application."""


class Counter(Base):
    """A number that is read, and written a little later: two at once would lose one of theirs."""

    __tablename__ = "lock_counter"

    name: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    value: Mapped[int] = mapped_column(default=0)
    token: Mapped[int] = mapped_column(sa.BigInteger, default=0)


class Turn(Base):
    """One turn that has committed."""

    __tablename__ = "lock_turn"

    id: Mapped[int] = mapped_column(primary_key=True)
    counter: Mapped[str] = mapped_column(sa.String(64))
    number: Mapped[int]
    token: Mapped[int] = mapped_column(sa.BigInteger)
    pid: Mapped[int]
    alone: Mapped[bool] = mapped_column(comment="whether no other turn held the row's own lock")
    fresh: Mapped[bool] = mapped_column(comment="whether its token was greater than the last one")


def main(_global_config: Any, **settings: str) -> Any:
    """Make the WSGI application."""
    config = Configurator(settings=settings)
    factory = sessionmaker(sa.create_engine(settings["sqlalchemy.url"]))

    def dbsession(request: Any) -> Session:
        session = factory()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    config.add_request_method(dbsession, reify=True)
    config.scan("tests.chaos.turns")
    return config.make_wsgi_app()


@task(name="turn", base=TransactionalTask, acks_late=True, reject_on_worker_lost=True)
@one_instance(KEY, wait=3600)
def turn(request: Any, counter: str, number: int, seconds: float) -> None:
    """Count one further, slowly."""
    session, token = request.dbsession, request.one_instance.token
    mine = sa.func.pg_try_advisory_xact_lock(sa.func.hashtext(counter))
    alone = session.scalar(sa.select(mine))
    value = session.scalar(sa.select(Counter.value).where(Counter.name == counter))
    time.sleep(seconds)
    counted = session.execute(
        sa.update(Counter)
        .where(Counter.name == counter, Counter.token < token)
        .values(value=value + 1, token=token)
    )
    session.add(
        Turn(
            counter=counter,
            number=number,
            token=token,
            pid=os.getpid(),
            alone=alone,
            fresh=counted.rowcount == 1,
        )
    )
