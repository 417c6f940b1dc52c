"""What one part asks of another is what the other one has."""

from __future__ import annotations

import pytest
from zope.interface.verify import verifyClass, verifyObject

from ws_celery.interfaces import IDatabase, ILockStore, IOutbox, IScheduleStore
from ws_celery.locks.holding import MemoryStore


@pytest.mark.parametrize("name", ["outbox", "schedule"])
def test_what_has_a_table_keeps_its_promises(make_app, name):
    interface = {"outbox": IOutbox, "schedule": IScheduleStore}[name]
    app = make_app(ws_celery__outbox="true", ws_celery__beat="true")
    app.request()  # gives requests a session, of which the database is that of the table
    kept = getattr(app.celery, name)
    vars(kept)["engine"] = None  # verifyObject() looks at each attribute; there is no database

    assert verifyObject(interface, kept)
    assert interface.extends(IDatabase)


def test_each_store_of_locks_keeps_its_promises():
    postgresql = pytest.importorskip("ws_celery.locks.postgresql")
    redis = pytest.importorskip("ws_celery.locks.redis_store")

    for store in (MemoryStore, postgresql.PostgresqlStore, redis.RedisStore):
        assert verifyClass(ILockStore, store)
