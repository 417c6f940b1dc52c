"""The same application as users of plain Celery write it: commit first, then ``apply_async``.

Tasks are acknowledged late and delivered again when their worker is lost, which is the most that
Celery offers against losses. ``CHAOS_INI`` names the settings.
"""

from __future__ import annotations

import os
from configparser import ConfigParser
from typing import Any

import sqlalchemy as sa
from celery import Celery, chain, group
from celery.signals import worker_process_init
from kombu.message import Message
from sqlalchemy.orm import Session
from tests.chaos.crashpoints import reach, wrap
from tests.chaos.models import Effect, new_dispatch
from tests.chaos.web import arguments, run

__all__ = ("app",)

_settings = ConfigParser(interpolation=None)
_settings.read(os.environ["CHAOS_INI"])
_options = _settings["celery:broker_transport_options"]

engine = sa.create_engine(_settings["app:main"]["sqlalchemy.url"], pool_pre_ping=True)
app = Celery("plain", broker=_settings["celery"]["broker_url"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options={key: float(value) for key, value in _options.items()},
    task_acks_late=True,
    task_ignore_result=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
)
wrap(Message, "ack", "acknowledge.begun")


@worker_process_init.connect
def _use_connections_of_its_own(**_: Any) -> None:
    engine.dispose(close=False)


@app.task(name="effect")
def effect(dispatch_id: str, step: int) -> None:
    """Have an effect."""
    with Session(engine) as session:
        session.add(Effect(dispatch_id=dispatch_id, step=step))
        session.flush()
        reach("run.middle")
        reach("commit.begun")
        session.commit()
    reach("commit.done")


@app.task(name="effect_at_second_try", bind=True)
def effect_at_second_try(self: Any, dispatch_id: str, step: int) -> None:
    """Have an effect, but ask for a retry at first."""
    if not self.request.retries:
        raise self.retry(countdown=0)
    effect.run(dispatch_id, step)


@app.task(name="prepare")
def prepare() -> None:
    """Have no effect."""


def dispatch(kind: str) -> None:
    """Commit a dispatch, and send its messages."""
    row = new_dispatch(kind)
    key = row.id
    with Session(engine) as session:
        session.add(row)
        if kind == "abort":
            raise InterruptedError("this transaction aborts")
        session.commit()
    reach("dispatch.committed")
    if kind == "chain":
        chain(effect.si(key, step) for step in range(3)).apply_async(retry=False)
    elif kind == "aware":
        with_callback = effect.si(key, 0).set(link=effect.si(key, 1))
        rest = group(effect.si(key, step) for step in (2, 3))
        chain(prepare.si(), with_callback, rest).apply_async(retry=False)
    elif kind == "group":
        group(effect.si(key, step) for step in range(3)).apply_async(retry=False)
    elif kind == "retry":
        effect_at_second_try.apply_async((key, 0))
    else:
        countdown = {"countdown": 1, "later": 4}.get(kind)
        effect.apply_async((key, 0), countdown=countdown)
    reach("publish.done")


if __name__ == "__main__":
    run(dispatch, arguments())
