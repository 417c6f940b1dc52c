"""The Pyramid application that is put to the test; its INI file says whether with the outbox."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
import zope.sqlalchemy
from celery import chain, group
from pyramid.config import Configurator
from pyramid.response import Response
from pyramid.view import view_config
from sqlalchemy.orm import Session, sessionmaker
from tests.chaos.crashpoints import reach, wire
from tests.chaos.models import Effect, new_dispatch

from ws_celery import RequestAwareTask, TransactionalTask, task

__all__ = ("main",)


def main(_global_config: Any, **settings: str) -> Any:
    """Make the WSGI application."""
    wire()
    config = Configurator(settings=settings)
    engine = sa.create_engine(settings["sqlalchemy.url"], pool_pre_ping=True)
    factory = sessionmaker(engine)

    def dbsession(request: Any) -> Session:
        session = factory()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    config.add_request_method(dbsession, reify=True)
    config.add_route("dispatch", "/dispatch")
    config.scan("tests.chaos.application")
    return config.make_wsgi_app()


@task(name="effect", base=TransactionalTask)
def effect(request: Any, dispatch_id: str, step: int) -> None:
    """Have an effect."""
    request.dbsession.add(Effect(dispatch_id=dispatch_id, step=step))
    request.dbsession.flush()
    reach("run.middle")


@task(name="effect_at_second_try", base=TransactionalTask, bind=True)
def effect_at_second_try(self: Any, request: Any, dispatch_id: str, step: int) -> None:
    """Have an effect, but ask for a retry at first."""
    effect.run(request, dispatch_id, step)
    if not self.request.retries:
        raise self.retry(countdown=0)


@task(name="prepare", base=RequestAwareTask, acks_late=True, reject_on_worker_lost=True)
def prepare(request: Any) -> None:
    """Have no effect, and no transaction."""


@view_config(route_name="dispatch")
def dispatch(request: Any) -> Response:
    """Dispatch what the parameter ``kind`` says, and commit the fact with it."""
    row = new_dispatch(request.params["kind"])
    kind, key = row.kind, row.id
    request.dbsession.add(row)
    if kind == "chain":
        chain(effect.si(key, step) for step in range(3)).apply_async()
    elif kind == "aware":
        with_callback = effect.si(key, 0).set(link=effect.si(key, 1))
        rest = group(effect.si(key, step) for step in (2, 3))
        chain(prepare.si(), with_callback, rest).apply_async()
    elif kind == "group":
        group(effect.si(key, step) for step in range(3)).apply_async()
    elif kind == "retry":
        effect_at_second_try.delay(key, 0)
    else:
        # The last one is far enough for the outbox to leave it to the relay.
        lease = float(request.registry.settings["ws_celery.outbox.lease"])
        countdown = {"countdown": lease / 2, "later": lease + 1}.get(kind)
        effect.apply_async((key, 0), countdown=countdown)
    if kind == "abort":
        request.dbsession.flush()
        raise InterruptedError("this transaction aborts")
    return Response(key)
