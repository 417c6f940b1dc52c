"""An application whose tasks write down that they have run; its one view is what a test says."""

from __future__ import annotations

import os
import threading

import sqlalchemy as sa
import transaction
import zope.sqlalchemy
from celery.exceptions import Ignore, Reject
from pyramid.config import Configurator
from pyramid.threadlocal import get_current_request
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from transaction.interfaces import TransientError

from ws_celery import RequestAwareTask, task


class Base(DeclarativeBase):
    """Base of the mapped classes."""


class Note(Base):
    __tablename__ = "promised_notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str]
    text: Mapped[str]


def main(_global_config, **settings):
    config = Configurator(settings=settings)
    config.registry["engine"] = engine = sa.create_engine(settings["sqlalchemy.url"])
    Base.metadata.create_all(engine)
    sessions = sessionmaker(engine)

    def dbsession(request) -> Session:
        session = sessions()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    config.add_request_method(dbsession, reify=True)
    config.add_route("home", "/")
    config.add_route("excluded", "/excluded")
    for route in ("home", "excluded"):
        config.add_view(lambda request: request.registry["view"](request), route_name=route)
    config.scan()
    return config.make_wsgi_app()


def wants_transaction(request) -> bool:
    return request.path != "/excluded"


@task(name="note")
def note(request, label, text="ran"):
    """Write a note; returns its text."""
    request.dbsession.add(Note(label=label, text=str(text)))
    return text


@task(name="header", bind=True)
def header(self, request, label, name):
    """Note what the message has as a header."""
    return note(request, label, self.request.get(name) or self.request.headers[name])


@task(name="notes")
def notes(request, label):
    """Return what all tasks that came before have noted under a label, in order."""
    query = sa.select(Note.text).where(Note.label == label).order_by(Note.id)
    return list(request.dbsession.scalars(query))


@task(name="note_all")
def note_all(request, results, label):
    """Note what the tasks of a chord have returned."""
    return note(request, label, sorted(results))


@task(name="try_again", bind=True)
def try_again(self, request, label):
    note(request, label, f"try {self.request.retries}")
    if not self.request.retries:
        raise self.retry(countdown=0)
    return self.request.retries


@task(name="fail_once", bind=True, autoretry_for=(LookupError,), default_retry_delay=0)
def fail_once(self, request, label):
    note(request, label, f"try {self.request.retries}")
    if not self.request.retries:
        raise LookupError("not yet")
    return self.request.retries


@task(name="collide")
def collide(request, label):
    """Write a note that the database refuses, which only the commit finds out."""
    note(request, label)
    request.dbsession.flush()
    used = request.dbsession.scalar(sa.select(sa.func.max(Note.id)))
    request.dbsession.expunge_all()
    request.dbsession.add(Note(id=used, label=label, text="collided"))


@task(name="replaced", bind=True)
def replaced(self, request, label):
    return self.replace(note.s(label, "replacement"))


@task(name="note_and_end")
def note_and_end(request, label, how):
    """Write a note, dispatch another one, and end in this way."""
    note(request, label, "written")
    note.delay(request, label, "dispatched")
    raise ENDS[how]()


# What the pools are asked


@task(name="end", bind=True, max_retries=1, default_retry_delay=0)
def end(self, request, how):
    """Use the database, and end in one of the ways in which a task can end."""
    request.dbsession.execute(sa.text("SELECT 1"))
    first = self.request.id not in _begun
    _begun.add(self.request.id)
    if how == "give up" or (how == "retry" and first):
        self.retry(exc=LookupError("not yet"))
    if how == "conflict" and first:
        raise TransientError
    if how in ENDS:
        raise ENDS[how]()


ENDS = {"fail": LookupError, "ignore": Ignore, "reject": Reject}
_begun: set[str] = set()


@task(name="look", bind=True)
def look(self, request, number, others):
    """Meet the other tasks that run at the same time; return what this run sees as its own."""
    before = _environment(request)
    request.dbsession.add(Note(label="look", text=str(number)))
    request.dbsession.flush()
    # While it sleeps, as long as the others have not come, they run: in threads or greenlets.
    for _ in range(1000):
        if others <= 1 or _running(request, others):
            break
        threading.Event().wait(0.01)
    return {
        "number": number,
        "id": self.request.id,
        "same": before == _environment(request),
        "current": get_current_request() is request,
        "host": request.domain,
        "process": os.getpid(),
    }


_present: set[int] = set()


def _running(request, others) -> bool:
    _present.add(id(request))
    return len(_present) >= others


def _environment(request):
    txn = request.tm.get()
    return id(get_current_request()), id(request.tm), id(txn), id(transaction.manager.manager)


@task(name="checked_out", base=RequestAwareTask)
def checked_out(request):
    """Return how many connections of the pool are in use, and this process."""
    return [request.registry["engine"].pool.checkedout(), os.getpid()]
