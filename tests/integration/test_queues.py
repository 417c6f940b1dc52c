"""Queues: their true lengths, looking into them, emptying and deleting them; with real brokers."""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timedelta, timezone

import pytest
import redis
import transaction
from celery.worker import state
from kombu import Producer

from ws_celery import inspection, task
from ws_celery.cli.queues import purge, queues
from ws_celery.exceptions import BrokerUnavailable, NotFound, NotSupported, TableError

# kombu's models use what SQLAlchemy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*``noload`` loader strategy:DeprecationWarning")


@task(name="send_mail")
def send_mail(request, address, password=None, **more):
    pass


@pytest.fixture(params=["redis", "prefixed", "rabbitmq", "sql", "files"])
def broker(request, tmp_path):
    """URL of a broker, and what the [celery] section says of it."""
    kind = request.param
    if kind == "rabbitmq":
        return request.getfixturevalue("rabbitmq_url"), ""
    if kind == "sql":
        return f"sqla+sqlite:///{tmp_path}/broker.sqlite", ""
    if kind == "files":
        folders = [f'"{name}": "{tmp_path}"' for name in ("data_folder_in", "data_folder_out")]
        folders.append(f'"control_folder": "{tmp_path}/control"')
        return "filesystem://", f"broker_transport_options = {{{', '.join(folders)}}}"
    options = '{"global_keyprefix": "shop."}' if kind == "prefixed" else '{"sep": ":"}'
    return request.getfixturevalue("redis_url"), f"broker_transport_options = {options}"


@pytest.fixture
def app(make_app, broker):
    url, celery = broker
    return make_app(send_mail, broker=url, celery=celery)


@pytest.fixture
def on_redis(make_app, redis_url):
    def make(**options):
        return make_app(send_mail, broker=redis_url, **options)

    return make


def name_of(app):
    return app.celery.conf.task_default_queue


def state_of(app):
    return inspection.queue_state(app.registry, name_of(app))


def put(app, body, queue=None, **options):
    """Put a message that is not Celery's into a queue."""
    with app.celery.connection_for_write() as connection:
        producer = Producer(connection.default_channel)
        producer.publish(body, routing_key=queue or name_of(app), **options)


def test_a_queue_tells_how_many_messages_wait(app):
    for number in range(3):
        send_mail.delay(app.request(), f"{number}@example.com")

    (found,) = (each for each in inspection.queue_states(app.registry) if each.is_used)

    assert (found.name, found.exists, found.waiting) == (name_of(app), True, 3)
    assert json.dumps(found.as_dict())


def test_an_empty_queue_of_the_application_is_shown_and_another_name_is_refused(app):
    assert [each.waiting for each in inspection.queue_states(app.registry)] == [0]

    for action in (inspection.queue_state, inspection.peek_queue, inspection.purge_queue):
        with pytest.raises(NotFound, match="no queue 'else'"):
            action(app.registry, "else")
    assert "else" not in [each.name for each in inspection.queue_states(app.registry)]


def test_purging_throws_away_what_waits(app):
    for number in range(3):
        send_mail.delay(app.request(), number)

    steps = []
    purged = inspection.purge_queue(app.registry, name_of(app), steps.append)

    assert purged == inspection.Purged(messages=3, rows=0)
    assert steps == [3]
    assert state_of(app).waiting == 0


def test_a_deleted_queue_of_another_application_is_gone(app, make_app, broker):
    other = make_app(send_mail, broker=broker[0], celery=broker[1])
    send_mail.delay(app.request(), "somebody")
    name = name_of(app)

    assert inspection.queue_state(other.registry, name).is_used is False
    assert inspection.delete_queue(other.registry, name).messages == 1
    with pytest.raises(NotFound, match="no queue"):
        inspection.queue_state(other.registry, name)


def test_peeking_shows_the_next_messages_and_leaves_them(app, broker):
    if broker[0].startswith("amqp"):
        pytest.skip("RabbitMQ cannot show messages")
    eta = datetime(2035, 1, 1, tzinfo=timezone.utc)
    first = send_mail.apply_async((app.request(), "a@b.c", "hunter2"), {"token": "t0p"}, eta=eta)
    send_mail.delay(app.request(), "second")

    (message,) = inspection.peek_queue(app.registry, name_of(app), 1).messages

    assert (message.id, message.task, message.eta) == (first.id, "send_mail", eta)
    assert (message.retries, message.problem) == (0, None)
    assert "@" in message.origin
    assert message.arguments["args"] == ["a@b.c", "********"]
    assert message.arguments["kwargs"] == {"token": "********"}
    assert json.dumps(message.as_dict())
    both = inspection.peek_queue(app.registry, name_of(app)).messages
    assert [each.arguments["args"][0] for each in both] == ["a@b.c", "second"]
    assert state_of(app).waiting == 2
    assert [sent.id for sent in app.sent()] == [message.id, both[1].id]


def test_rabbitmq_says_that_it_cannot_show_messages(make_app, rabbitmq_url):
    app = make_app(send_mail, broker=rabbitmq_url)
    send_mail.delay(app.request(), "somebody")

    with pytest.raises(NotSupported, match="changes the order"):
        inspection.peek_queue(app.registry, name_of(app))


def test_rabbitmq_tells_what_is_not_declared_yet(make_app, rabbitmq_url, run):
    app = make_app(send_mail, broker=rabbitmq_url)

    assert not state_of(app).exists
    assert inspection.purge_queue(app.registry, name_of(app)).messages == 0
    assert inspection.delete_queue(app.registry, name_of(app)).messages == 0
    assert "not declared yet" in run(app, queues)[1]


def test_rabbitmq_tells_consumers_but_not_what_they_have_in_hand(make_app, rabbitmq_url, run):
    app = make_app(send_mail, broker=rabbitmq_url)
    send_mail.delay(app.request(), "somebody")
    with app.celery.connection_for_read() as connection:
        channel = connection.default_channel
        with app.celery.amqp.TaskConsumer(channel):
            found = state_of(app)
            output = run(app, queues)[1]

    assert (found.consumers, found.unacked) == (1, None)
    assert "does not tell how many messages workers have in hand" in output


def test_redis_counts_messages_of_all_priorities(on_redis, run):
    app = on_redis(celery='broker_transport_options = {"priority_steps": [0, 3, 6, 9], "sep": "#"}')
    for priority in (0, 3, 3, 9, 8):
        send_mail.apply_async((app.request(), priority), priority=priority)

    found = state_of(app)
    assert found.waiting == 5
    assert found.priorities == {0: 1, 3: 2, 6: 1, 9: 1}
    assert "by priority 0: 1, 3: 2, 6: 1, 9: 1" in run(app, queues)[1]
    found = inspection.peek_queue(app.registry, name_of(app), 4).messages
    assert [message.priority for message in found] == [0, 3, 3, 8]
    assert inspection.purge_queue(app.registry, name_of(app)).messages == 5


@pytest.mark.parametrize("celery", ["", 'broker_transport_options = {"global_keyprefix": "shop."}'])
def test_redis_counts_what_workers_have_in_hand_by_queue(on_redis, celery):
    app, other = on_redis(celery=celery), on_redis(celery=celery)
    send_mail.delay(app.request(), "one")
    send_mail.delay(app.request(), "two")
    send_mail.delay(other.request(), "three")
    with app.celery.connection_for_read() as connection:
        message = connection.default_channel.basic_get(name_of(app))

        assert (state_of(app).waiting, state_of(app).unacked) == (1, 1)
        assert state_of(other).unacked == 0
        message.ack()
    assert state_of(app).unacked == 0


def test_redis_does_not_count_by_queue_what_would_take_long(on_redis, monkeypatch):
    from ws_celery.inspection import brokers

    app = on_redis()
    send_mail.delay(app.request(), "one")
    monkeypatch.setattr(brokers, "_UNACKED", 0)
    with app.celery.connection_for_read() as connection:
        connection.default_channel.basic_get(name_of(app))

        assert state_of(app).unacked is None


def test_a_queue_with_a_million_messages_answers_at_once(make_app, embedded_broker):
    url = embedded_broker.url(0)  # of nobody else: a server counts its commands for all together
    app = make_app(send_mail, broker=url)
    with redis.Redis.from_url(
        url.replace("redis+socket", "unix").replace("virtual_host", "db")
    ) as client:
        for _ in range(100):
            client.lpush(name_of(app), *["{}"] * 10_000)
        client.config_resetstat()

        assert state_of(app).waiting == 1_000_000

        # Nothing but the length and the last message is asked for.
        read = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
        client.delete(name_of(app))
    assert not read & {"lrange", "keys", "scan", "sort"}


def test_a_message_that_is_not_celerys_is_shown_as_such(on_redis, redis_url, run):
    app = on_redis()
    put(app, {"hello": "world"})
    put(app, b"\x80", content_type="application/x-python-serialize", content_encoding="binary")
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(name_of(app), "no JSON at all", '["a list"]', '{"headers": 1}')

    found = inspection.peek_queue(app.registry, name_of(app)).messages

    assert [message.task for message in found] == [None] * 5
    assert "no message of Celery" in found[0].problem
    assert "x-python-serialize" in found[1].problem
    assert all("no message of Celery" in message.problem for message in found[2:])
    assert run(app, queues, "peek", name_of(app))[0] == 0
    assert inspection.purge_queue(app.registry, name_of(app)).messages == 5


def test_a_message_of_the_first_protocol_is_read(on_redis):
    app = on_redis(celery="task_protocol = 1")
    result = send_mail.delay(app.request(), "somebody")

    (message,) = inspection.peek_queue(app.registry, name_of(app)).messages

    assert (message.id, message.task) == (result.id, "send_mail")
    assert message.arguments["args"] == ["somebody"]


def test_a_message_whose_body_is_no_call_says_so(on_redis):
    app = on_redis()
    put(app, 7, headers={"task": "send_mail", "id": "x", "eta": "soon"})
    put(
        app,
        b"{",
        headers={"task": "send_mail"},
        content_type="application/json",
        content_encoding="utf-8",
    )

    first, second = inspection.peek_queue(app.registry, name_of(app)).messages

    assert (first.id, first.eta, first.problem) == ("x", None, "its body holds no arguments")
    assert "its arguments cannot be read" in second.problem


def test_arguments_are_masked_by_name_and_position(on_redis):
    app = on_redis(ws_celery__mask_arguments="address, iban")
    send_mail.delay(app.request(), "a@b.c", customer={"iban": "DE1", "city": ["Bonn"]})

    (message,) = inspection.peek_queue(app.registry, name_of(app)).messages

    assert message.arguments["args"] == ["********"]
    assert message.arguments["kwargs"] == {"customer": {"iban": "********", "city": ["Bonn"]}}


def test_all_arguments_can_be_masked(on_redis):
    app = on_redis(ws_celery__mask_arguments="all")
    send_mail.delay(app.request(), "a@b.c", 7, more=True)

    (message,) = inspection.peek_queue(app.registry, name_of(app)).messages

    assert message.arguments == {"args": ["********"] * 2, "kwargs": {"more": "********"}}


def test_queues_that_tasks_are_routed_to_are_shown(on_redis):
    slow = f"slow-{uuid.uuid4().hex}"
    app = on_redis(celery=f"[celeryroute:send_mail]\nqueue = {slow}")

    assert slow in [each.name for each in inspection.queue_states(app.registry)]


# The outbox


@pytest.fixture
def dispatch():
    def dispatch(app, *args, **options):
        with transaction.manager:
            return send_mail.apply_async((app.request(), *args), **options)

    return dispatch


def test_purging_settles_the_rows_of_what_was_purged(make_outbox, database, dispatch, rows_of):
    app = make_outbox(database, send_mail)
    for number in range(3):
        dispatch(app, number)
    later = dispatch(app, "later", countdown=100_000)

    assert inspection.purge_queue(app.registry, name_of(app)) == inspection.Purged(3, 3)

    assert [row.task_id for row in rows_of(app)] == [later.id]


def test_purge_of_celery_settles_rows_too(make_outbox, database, dispatch, rows_of):
    app = make_outbox(database, send_mail)
    dispatch(app, "somebody")
    dispatch(app, "else", priority=9)

    assert app.celery.control.purge() == 2  # ws-celery worker --purge

    assert rows_of(app) == []


def test_nothing_is_purged_without_the_outboxs_table(make_outbox, sqlite, dispatch):
    app = make_outbox(sqlite, send_mail)
    dispatch(app, "somebody")
    app.celery.outbox.rows.table.drop(sqlite.engine)

    with pytest.raises(TableError, match="does not exist"):
        inspection.purge_queue(app.registry, name_of(app))

    assert len(app.sent()) == 1


def test_a_revoked_task_lets_go_of_its_row_at_once(make_outbox, database, dispatch, rows_of):
    app = make_outbox(database, send_mail)
    first, second, third = (dispatch(app, number, countdown=100_000) for number in range(3))

    first.revoke()
    app.celery.control.revoke([second.id])

    assert [row.task_id for row in rows_of(app)] == [third.id]


def test_a_task_that_a_worker_refuses_as_revoked_lets_go_of_its_row(
    make_outbox, sqlite, dispatch, start_worker, rows_of
):
    app = make_outbox(sqlite, send_mail)
    task_id = uuid.uuid4().hex
    state.revoked.add(task_id)
    dispatch(app, "somebody", task_id=task_id)
    start_worker(app)

    deadline = datetime.now(timezone.utc) + timedelta(seconds=60)
    while rows_of(app) and datetime.now(timezone.utc) < deadline:
        pass

    assert rows_of(app) == []
    assert app.celery.AsyncResult(task_id).state == "REVOKED"


@pytest.fixture
def on_rabbitmq(make_app, rabbitmq_url, sqlite):
    """An application with an outbox, whose broker is RabbitMQ."""
    app = make_app(send_mail, setup=sqlite.includeme, broker=rabbitmq_url, ws_celery__outbox="true")
    app.celery.outbox.create_table()
    return app


def test_rabbitmq_shows_what_the_outbox_knows(on_rabbitmq, dispatch, run, rows_of):
    app = on_rabbitmq
    result = dispatch(app, "somebody", password="hunter2")  # noqa: S106

    peeked = inspection.peek_queue(app.registry, name_of(app))

    assert peeked.source == "outbox"
    assert [(each.id, each.arguments["args"]) for each in peeked.messages] == [
        (result.id, ["somebody"])
    ]
    output = run(app, queues, "peek", name_of(app))[1]
    assert "These are the unfinished dispatches" in output
    assert "hunter2" not in output
    assert inspection.purge_queue(app.registry, name_of(app)) == inspection.Purged(1, 1)
    assert rows_of(app) == []


def test_a_row_that_is_broken_is_shown(on_rabbitmq, dispatch):
    app = on_rabbitmq
    dispatch(app, "somebody")
    dispatch(app, "else")
    outbox_table = app.celery.outbox.rows.table
    with app.celery.outbox.begin() as connection:
        first = connection.execute(app.celery.outbox.rows.select()).first()
        by_id = outbox_table.update()
        connection.execute(by_id.where(outbox_table.c.id == first.id).values(options="{"))
        connection.execute(by_id.where(outbox_table.c.id != first.id).values(body=b"{"))

    broken, unreadable = inspection.peek_queue(app.registry, name_of(app)).messages

    assert "JSONDecodeError" in broken.problem
    assert "its arguments cannot be read" in unreadable.problem


def test_the_outbox_tells_how_old_the_oldest_message_is(make_outbox, database, dispatch, run):
    app = make_outbox(database, send_mail)
    assert state_of(app).oldest is None
    dispatch(app, "oldest")
    dispatch(app, "younger", priority=9)
    send_mail.delay(app.request(), "without a row")
    outbox = app.celery.outbox
    since = datetime.now(timezone.utc) - timedelta(hours=2)
    with outbox.begin() as connection:
        row = connection.execute(outbox.rows.select()).first()
        of_row = outbox.rows.table.update().where(outbox.rows.table.c.id == row.id)
        connection.execute(of_row.values(created_at=since))

    assert abs(state_of(app).oldest - since) < timedelta(seconds=1)
    assert "2:00:" in run(app, queues)[1]


# The command line


def test_the_commands_ask_with_numbers(app, run):
    for number in range(2):
        send_mail.delay(app.request(), number)
    name = name_of(app)

    code, output = run(app, queues, "purge", name, answer="n\n")
    assert code == 1
    assert f"Throw away 2 messages of the queue {name}, for ever?" in output
    assert state_of(app).waiting == 2

    assert run(app, queues, "purge", name, "--yes") == (0, "Threw away 2 messages.\n")
    send_mail.delay(app.request(), "somebody")
    code, output = run(app, queues, "drop", name, answer="y\n")
    assert f"Delete the queue {name} with 1 message, for ever?" in output
    assert f"Threw away 1 message.\nDeleted the queue {name}." in output


def test_the_question_counts_what_workers_have_and_who_takes(on_redis, run):
    app = on_redis()
    send_mail.delay(app.request(), "one")
    with app.celery.connection_for_read() as connection:
        connection.default_channel.basic_get(name_of(app))

        output = run(app, queues, "purge", name_of(app), answer="n\n")[1]

    assert "0 messages (1 more in the hands of workers)" in output


def test_many_messages_show_progress(make_outbox, sqlite, run, redis_url, dispatch):
    app = make_outbox(sqlite, send_mail)
    dispatch(app, "somebody")
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(name_of(app), *["{}"] * 6000)

    code, output = run(app, queues, "purge", name_of(app), "--yes")

    assert code == 0
    assert name_of(app) in output  # the bar's label; where there is no terminal, no more
    assert "Threw away 6001 messages and 1 row of the outbox." in output


def test_queues_are_listed_as_a_table_and_as_json(on_redis, run):
    app = on_redis()
    send_mail.delay(app.request(), "somebody")

    output = run(app, queues, columns=100)[1]
    assert f"{name_of(app)}  1" in output
    assert max(map(len, output.splitlines())) <= 100
    ((listed),) = json.loads(run(app, queues, "--json")[1])
    assert (listed["name"], listed["waiting"], listed["unacked"]) == (name_of(app), 1, 0)


def test_messages_are_shown_as_a_table_and_as_json(on_redis, run):
    app = on_redis()
    result = send_mail.apply_async((app.request(), "a@b.c"), {"password": "x"}, countdown=3600)

    output = run(app, queues, "peek", name_of(app))[1]
    for part in (result.id, "send_mail", '("a@b.c", password="********")', "1 shown."):
        assert part in output
    shown = json.loads(run(app, queues, "peek", name_of(app), "--json")[1])
    assert shown["source"] == "broker"
    assert shown["messages"][0]["id"] == result.id
    app.sent()
    assert run(app, queues, "peek", name_of(app)) == (0, "0 shown.\n")


def test_purge_of_all_queues_asks_with_numbers_and_settles_rows(
    make_outbox, sqlite, dispatch, run, rows_of
):
    app = make_outbox(sqlite, send_mail)
    dispatch(app, "somebody")
    name = name_of(app)

    assert run(app, purge, "-X", name, "-f")[1].startswith("Threw away 0 messages")
    code, output = run(app, purge, answer="n\n")
    assert (code, len(rows_of(app))) == (1, 1)
    assert f"Throw away 1 message of {name}, for ever?" in output
    code, output = run(app, purge, "-Q", name, "-f")
    assert output == "Threw away 1 message and 1 row of the outbox.\n"
    assert rows_of(app) == []


def test_a_broker_that_is_down_is_a_sentence(make_app, redis_url, monkeypatch):
    app = make_app(send_mail, broker=redis_url)
    monkeypatch.setitem(app.celery.conf, "broker_write_url", "redis://:hunter2@127.0.0.1:1")

    with pytest.raises(BrokerUnavailable, match="The broker does not answer") as caught:
        inspection.queue_states(app.registry)
    assert "hunter2" not in str(caught.value)


def test_messages_that_are_not_kombus_are_purged_from_files_with_the_outbox(
    make_app, sqlite, tmp_path
):
    app = make_app(
        send_mail,
        setup=sqlite.includeme,
        broker="filesystem://",
        ws_celery__outbox="true",
        celery=f"""\
        broker_transport_options =
            {{"data_folder_in": "{tmp_path}", "data_folder_out": "{tmp_path}",
              "control_folder": "{tmp_path}/control"}}
        """,
    )
    app.celery.outbox.create_table()
    (tmp_path / f"1_x.{name_of(app)}.msg").write_text("{}")

    assert state_of(app).oldest
    assert inspection.purge_queue(app.registry, name_of(app)).messages == 1
    assert state_of(app).waiting == 0
