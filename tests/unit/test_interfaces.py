"""What we provide is what the interfaces ask for."""

from __future__ import annotations

import pytest
import transaction
from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager, ISynchronizer
from zope.interface.verify import verifyClass, verifyObject

from ws_celery import events, interfaces, task
from ws_celery.app import PyramidCelery
from ws_celery.locks.holding import MemoryStore
from ws_celery.transactions import DispatchDataManager


@task(name="add")
def add(request, x):
    return x


@pytest.fixture
def told():
    """All events of an application, by class."""
    return {}


@pytest.fixture
def app(make_app, told):
    def keep(event):
        told[type(event).__name__] = event

    def setup(config):
        config.add_subscriber(keep, interfaces.ICeleryEvent)

        config.configure_celery(worker_concurrency=2)

    return make_app(add, setup=setup)


def test_what_configure_celery_leaves_is_a_source(app):
    source = app.registry.getUtility(interfaces.ICelerySource)

    assert verifyObject(interfaces.ICelerySource, source)
    assert source.overrides == {"worker_concurrency": 2}


def test_a_celery_app_is_one(app):
    verifyClass(interfaces.ICeleryApp, PyramidCelery, tentative=True)

    assert verifyObject(interfaces.ICeleryApp, app.celery)


def test_what_joins_a_transaction_is_a_savepoint_data_manager(app):
    with transaction.manager:
        data_manager = DispatchDataManager(app.celery, transaction.get())

        assert verifyClass(ISavepointDataManager, DispatchDataManager, tentative=True)
        assert verifyObject(ISavepointDataManager, data_manager)
        assert verifyObject(IDataManagerSavepoint, data_manager.savepoint())


def test_what_watches_a_manager_is_a_synchronizer(app):
    synchronizer = app.celery.transactions.watch(transaction.manager, begun=False)

    assert verifyObject(ISynchronizer, synchronizer)


def test_events_of_a_call_and_a_run_are_what_their_interfaces_say(app, told):
    with transaction.manager:
        add.delay(1)
    app.celery.tasks["add"].apply((1,))

    for name in ("BeforeDispatch", "TasksPublished", "TaskFinished"):
        assert verifyObject(getattr(interfaces, f"I{name}"), told[name])
        assert verifyObject(interfaces.ICeleryEvent, told[name])


def test_the_other_events_are_what_their_interfaces_say(app):
    failed = events.PublishFailed(app.celery, (), ValueError("gone"))

    assert verifyObject(interfaces.IPublishFailed, failed)
    assert verifyObject(interfaces.IWorkerProcessInit, events.WorkerProcessInit(app.celery))


@pytest.mark.parametrize(
    "event", ["BeforeDispatch", "TasksPublished", "PublishFailed", "TaskFinished"]
)
def test_each_class_of_events_implements_its_interface(event):
    interface = getattr(interfaces, f"I{event}")

    assert interface.implementedBy(getattr(events, event))
    assert interface.extends(interfaces.ICeleryEvent)


@pytest.mark.parametrize("name", ["outbox", "schedule"])
def test_what_has_a_table_keeps_its_promises(make_app, name):
    interface = {"outbox": interfaces.IOutbox, "schedule": interfaces.IScheduleStore}[name]
    kept = getattr(make_app(ws_celery__outbox="true", ws_celery__beat="true").celery, name)
    vars(kept)["engine"] = None  # verifyObject() looks at each attribute; there is no database

    assert verifyObject(interface, kept)
    assert interface.extends(interfaces.IDatabase)


def test_each_store_of_locks_keeps_its_promises():
    postgresql = pytest.importorskip("ws_celery.locks.postgresql")
    redis = pytest.importorskip("ws_celery.locks.redis_store")

    for store in (MemoryStore, postgresql.PostgresqlStore, redis.RedisStore):
        assert verifyClass(interfaces.ILockStore, store)
