"""Results: listed from Celery's database backend, and by id from any."""

from __future__ import annotations

import json
import pickle
import sys
import threading
import uuid
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
import transaction
from celery import chain, group, states
from click.testing import CliRunner
from tests.waiting import SOON, wait_for

from ws_celery import inspection, task
from ws_celery.cli.results import result, results
from ws_celery.cli.tasks import call
from ws_celery.exceptions import (
    NotFound,
    NotRunYet,
    NotSupported,
    Skipped,
    Unavailable,
)
from ws_celery.locks import Held, rule_of


@task(name="send_mail")
def send_mail(request, address, password=None):
    pass


ran = []


@task(name="double")
def double(request, x):
    ran.append(x)
    return 2 * x


@task(name="locked", one_instance="a key")
def locked(request):
    pass


@pytest.fixture
def store():
    """Store a result, as a worker does."""

    def store(app, task_id, result=None, state=states.SUCCESS, name="send_mail", **more):
        call = {"args": ["a@b.c", "hunter2"], "kwargs": {}, "retries": 1, "hostname": "w@h"}
        request = SimpleNamespace(
            **{"task": name, "delivery_info": {"routing_key": "q"}, **call},
            chord=None,
            children=[],
            stamped_headers=[],
        )
        app.celery.backend.store_result(task_id, result, state, request=request, **more)

    return store


@pytest.fixture
def make(make_app):
    def make(url, extended="true", more=""):
        celery = f"result_backend = db+{url}\nresult_extended = {extended}\n{more}"
        return make_app(send_mail, locked, celery=celery)

    return make


@pytest.fixture(params=["postgres_url", "sqlite_url", "mariadb_url"])
def app(request, make):
    app = make(request.getfixturevalue(request.param))
    yield app
    session = app.celery.backend.ResultSession()
    session.query(app.celery.backend.task_cls).delete()
    session.commit()
    session.close()


@pytest.fixture
def run(monkeypatch):
    def run(app, *arguments, answer=None, columns=160):
        monkeypatch.setenv("COLUMNS", str(columns))
        context = SimpleNamespace(app=app.celery)
        result = CliRunner().invoke(results, arguments, obj=context, input=answer)
        if isinstance(result.exception, Exception):
            raise result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def skip():
    """Let another run hold the lock of a run."""

    def skip(app, task_id):
        celery = app.celery
        store, run = celery.locks.store, celery.tasks["locked"]
        other = Held("a key", 60, task="other", id="another", store=store, on_loss=print)
        assert store.acquire(other) is None
        run.push_request(id=task_id, args=(), kwargs={})
        try:
            with pytest.raises(Skipped), celery.locks.hold(run, rule_of(run), (), {}):
                pass
        finally:
            run.pop_request()
            other.end()
        return other

    return skip


def ids(found):
    return [each.id for each in found]


def test_results_are_listed_by_state_task_and_time(app, store):
    store(app, "one", {"sent": 1})
    store(app, "two", OSError("no mail"), states.FAILURE, traceback="Traceback ...")
    store(app, "three", name="other")
    now = datetime.now(timezone.utc)
    hour = timedelta(hours=1)

    assert set(ids(inspection.stored_results(app.registry))) == {"one", "two", "three"}
    assert len(inspection.stored_results(app.registry, limit=2)) == 2
    assert ids(inspection.stored_results(app.registry, state="failure")) == ["two"]
    assert ids(inspection.stored_results(app.registry, task="other")) == ["three"]
    assert len(inspection.stored_results(app.registry, between=(now - hour, now + hour))) == 3
    assert inspection.stored_results(app.registry, between=(now + hour, None)) == []
    assert inspection.stored_results(app.registry, between=(None, now - hour)) == []


def test_a_result_has_what_the_run_was_and_no_secret(app, store):
    store(app, "one", {"token": "t0p", "sent": 1})

    (listed,) = inspection.stored_results(app.registry)
    shown = inspection.result_of(app.registry, "one")

    assert listed == shown
    assert (shown.task, shown.state, shown.worker, shown.queue) == (
        "send_mail",
        "SUCCESS",
        "w@h",
        "q",
    )
    assert (shown.retries, shown.result) == (1, {"token": "********", "sent": 1})
    assert shown.arguments == {"args": ["a@b.c", "********"], "kwargs": {}}
    assert abs(shown.done - datetime.now(timezone.utc)) < timedelta(minutes=5)
    assert json.dumps(shown.as_dict())


def test_what_has_not_ended_is_listed_last(app, store):
    store(app, "runs", state=states.STARTED)
    store(app, "one")

    assert ids(inspection.stored_results(app.registry)) == ["one", "runs"]
    assert ids(inspection.stored_results(app.registry, limit=1)) == ["one"]


def test_a_skipped_run_has_ended_at_some_time(app, skip):
    skip(app, "one")
    now = datetime.now(timezone.utc)
    minutes = timedelta(minutes=5)

    (shown,) = inspection.stored_results(app.registry, between=(now - minutes, now + minutes))
    assert (shown.id, shown.state) == ("one", "SKIPPED")

    backend = app.celery.backend
    backend.expires = timedelta(days=-2)  # all of today is older
    backend.cleanup()
    assert inspection.stored_results(app.registry) == []


def test_whose_lock_has_skipped_a_run_is_no_secret(app, skip, run):
    other = skip(app, "one")

    shown = json.loads(run(app, "show", "one", "--json")[1])["result"]

    assert shown["key"] == shown["holder"]["key"] == "a key"
    assert shown["holder"]["token"] == other.token
    assert "********" not in run(app, "show", "one")[1]


def test_the_secrets_of_a_state_of_the_same_name_are_masked(app, store):
    store(app, "one", {"reason": "no mail", "key": "hunter2"}, "SKIPPED")

    assert inspection.result_of(app.registry, "one").result["key"] == "********"


@pytest.fixture(params=["", "America/New_York", "<+05>-05", "Europe/Berlin"])
def zone_of_server(request, monkeypatch):
    """PostgreSQL puts what it is given into the zone of the session."""
    if request.param:
        monkeypatch.setenv("PGTZ", request.param)


@pytest.mark.parametrize("url", ["postgres_url", "sqlite_url", "mariadb_url"])
@pytest.mark.parametrize("zone", ["timezone = America/New_York", "enable_utc = false"])
def test_times_are_right_where_the_application_has_a_zone(
    request, url, zone, zone_of_server, make, store
):
    app = make(request.getfixturevalue(url), more=zone)
    before = datetime.now(timezone.utc).replace(microsecond=0)
    store(app, task_id := str(uuid.uuid4()))
    after = datetime.now(timezone.utc)
    minute = timedelta(minutes=1)

    def found(since, until):
        listed = inspection.stored_results(app.registry, between=(since, until))
        return [each for each in listed if each.id == task_id]

    shown = inspection.result_of(app.registry, task_id)
    between = found(before - minute, after.replace(tzinfo=None) + minute)
    later, earlier = found(after + minute, None), found(None, before - minute)
    inspection.forget_results(app.registry, task_id)
    app.celery.backend.ResultSession().get_bind().dispose()

    assert before <= shown.done <= after
    assert between == [shown]
    assert (later, earlier) == ([], [])


def test_an_error_is_shown_with_its_traceback(app, store, run):
    error = OSError("postgresql://shop:hunter2@db/x")
    store(app, "one", error, states.FAILURE, traceback="Traceback:\n  ...\nOSError")

    output = run(app, "show", "one")[1]

    assert "Traceback:" in output
    assert "OSError: postgresql://shop:********@db/x" in output
    assert "hunter2" not in output + run(app)[1]


def test_the_command_of_celery_raises_what_the_task_has_raised(make, sqlite_url, store):
    """Though it looks like an error of the backend."""
    app = make(sqlite_url)
    store(app, "one", OSError("no mail"), states.FAILURE, traceback="Traceback ...")
    store(app, "two", 5)
    said = []
    context = SimpleNamespace(app=app.celery, echo=said.append)

    failed = CliRunner().invoke(result, ["one"], obj=context)
    CliRunner().invoke(result, ["one", "--traceback"], obj=context)
    CliRunner().invoke(result, ["two"], obj=context)

    assert repr(failed.exception) == "OSError('no mail')"
    assert said == ["Traceback ...", 5]


@pytest.mark.timeout(30)
def test_the_command_of_celery_says_that_a_run_was_skipped(make, sqlite_url, skip, store):
    app = make(sqlite_url)
    skip(app, "one")
    store(app, "two", "mine", "SKIPPED")
    context = SimpleNamespace(app=app.celery)

    ended = CliRunner().invoke(result, ["one"], obj=context)
    own = CliRunner().invoke(result, ["two"], obj=context)

    assert (ended.exit_code, own.exit_code) == (1, 1)
    assert "The task one did not run: the lock 'a key' is held by other[another]" in ended.output
    assert "The task two did not run: mine." in own.output


def test_the_command_of_celery_waits_until_the_run_has_ended(make, sqlite_url, store, monkeypatch):
    app = make(sqlite_url)
    store(app, "one", state=states.STARTED)
    module = sys.modules["ws_celery.cli.results"]  # the package's attribute is the command
    monkeypatch.setattr(module, "sleep", lambda _: store(app, "one", 5))
    said = []
    context = SimpleNamespace(app=app.celery, echo=said.append)

    CliRunner().invoke(result, ["one"], obj=context)

    assert said == [5]


def test_a_forgotten_result_is_gone(app, store, run):
    store(app, "one")
    store(app, "two")

    assert run(app, "forget", "one", "two", answer="n\n")[0] == 1
    assert run(app, "forget", "one", "--yes") == (0, "Deleted 1 result.\n")

    assert ids(inspection.stored_results(app.registry)) == ["two"]
    with pytest.raises(NotFound, match="the task one"):
        inspection.result_of(app.registry, "one")
    with pytest.raises(NotFound, match="no result"):
        inspection.forget_results(app.registry, "one")


def test_the_command_lists_results(app, store, run):
    store(app, "one", "sent " * 100)

    output = run(app, "--state", "SUCCESS", "--since", "2h", columns=100)[1]
    assert "one" in output
    assert "1 shown." in output
    assert max(map(len, output.splitlines())) <= 100
    ((listed),) = json.loads(run(app, "--json")[1])
    assert listed["id"] == "one"
    assert json.loads(run(app, "show", "one", "--json")[1]) == listed
    assert run(app, "--until", "2001-01-01") == (0, "0 shown.\n")
    code, output = run(app, "--since", "yesterday")
    assert code == 2
    assert "write 2035-01-31T12:00 (UTC), 30m, 2h or 7d" in output


def test_what_cannot_be_read_is_shown_as_such(make, sqlite_url, store):
    app = make(sqlite_url)
    store(app, "one", {"sent": 1})
    session = app.celery.backend.ResultSession()
    session.query(app.celery.backend.task_cls).update({"result": b"{", "args": b"\x80"})
    session.commit()
    session.close()

    (found,) = inspection.stored_results(app.registry)

    assert "cannot be read" in found.result


def test_without_extended_results_there_are_no_tasks_to_ask_for(make, sqlite_url, store):
    app = make(sqlite_url, extended="false")
    store(app, "one")

    (found,) = inspection.stored_results(app.registry)
    assert (found.task, found.arguments) == (None, None)
    with pytest.raises(NotSupported, match="result_extended = true"):
        inspection.stored_results(app.registry, task="send_mail")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (results, []),
        (results, ["show", "x"]),
        (result, ["x"]),
        (call, ["send_mail", '--args=["a"]']),
    ],
)
def test_a_database_that_is_down_is_a_sentence_and_nothing_else(make, caplog, command, arguments):
    app = make("postgresql+psycopg://shop:hunter2@127.0.0.1:1/x")

    error = CliRunner().invoke(command, arguments, obj=SimpleNamespace(app=app.celery)).exception

    assert isinstance(error, Unavailable)
    assert "does not answer" in str(error)
    assert "hunter2" not in str(error)
    assert not caplog.records  # Celery logs each time that it tries again


@pytest.fixture
def on_redis(make_app, redis_url):
    return make_app(send_mail, celery=f"result_backend = {redis_url}\nresult_extended = true")


def test_redis_finds_results_by_id_only(on_redis, store):
    store(on_redis, "inspected", {"sent": 1})

    found = inspection.result_of(on_redis.registry, "inspected")
    assert (found.task, found.result) == ("send_mail", {"sent": 1})
    assert found.done
    with pytest.raises(NotSupported, match=r"\(Redis\) finds a result by the id"):
        inspection.stored_results(on_redis.registry)
    inspection.forget_results(on_redis.registry, "inspected")
    with pytest.raises(NotFound, match="no result"):
        inspection.result_of(on_redis.registry, "inspected")


def test_an_application_without_a_result_backend_says_so(make_app):
    app = make_app(send_mail)

    with pytest.raises(NotFound, match="no result"):
        inspection.result_of(app.registry, "one")
    context = SimpleNamespace(app=app.celery)
    assert isinstance(CliRunner().invoke(result, ["one"], obj=context).exception, NotFound)
    with pytest.raises(NotSupported, match=r"\(none\)"):
        inspection.stored_results(app.registry)


# Waiting


@pytest.fixture(params=["redis_url", "rabbitmq_url", "sqlite_url"])
def waiting(request, make_app):
    """An application whose result backend is Redis, rpc:// or a database."""
    url = request.getfixturevalue(request.param)
    backend = {"redis_url": url, "rabbitmq_url": "rpc://", "sqlite_url": f"db+{url}"}
    broker = url if request.param == "rabbitmq_url" else "memory://"
    return make_app(
        double, locked, broker=broker, celery=f"result_backend = {backend[request.param]}"
    )


@pytest.mark.parametrize(
    "dispatch",
    [
        lambda: double.delay(1),
        lambda: group(double.s(number) for number in range(3)).delay(),
        lambda: chain(double.s(1), double.s()).delay(),
    ],
    ids=["task", "group", "chain"],
)
def test_nobody_waits_for_a_message_that_his_own_transaction_holds(waiting, dispatch):
    with transaction.manager:
        result = dispatch()
        with pytest.raises(NotRunYet, match="when the transaction that is open commits"):
            result.get(timeout=SOON)


def test_a_result_that_comes_before_anybody_waits_for_it_is_kept(waiting, start_worker):
    """rpc:// declares its queue at the call, where a deferred one is only recorded."""
    ran.clear()
    with transaction.manager:
        results = [double.delay(number) for number in (1, 2, 3)]
    start_worker(waiting)
    wait_for(lambda: sorted(ran) == [1, 2, 3], "the runs")

    assert [result.get(timeout=SOON) for result in results] == [2, 4, 6]


@pytest.mark.timeout(30)
def test_nobody_waits_for_a_run_that_was_skipped(app, skip):
    skip(app, "one")

    with pytest.raises(NotRunYet, match=r"It was skipped: the lock 'a key' is held by .* Call it"):
        app.celery.AsyncResult("one").get()


@pytest.mark.timeout(30)
def test_nobody_waits_for_a_run_that_was_skipped_on_redis(make_app, redis_url, skip):
    app = make_app(send_mail, locked, celery=f"result_backend = {redis_url}")
    skip(app, "skipped before")
    with pytest.raises(NotRunYet, match="It was skipped"):
        app.celery.AsyncResult("skipped before").get()
    with pytest.raises(NotRunYet, match="It was skipped"):
        app.celery.ResultSet([app.celery.AsyncResult("skipped before")]).get()
    waits = threading.Event()
    thread = threading.Thread(target=lambda: waits.wait(SOON) and skip(app, "skipped later"))
    thread.start()

    with pytest.raises(NotRunYet, match=r"skipped later has not run\. It was skipped"):
        app.celery.AsyncResult("skipped later").get(on_interval=waits.set)
    thread.join()
    for each in ("skipped before", "skipped later"):
        app.celery.backend.forget(each)


def test_that_a_task_has_not_run_can_be_told_in_another_process():
    error = NotRunYet("one", NotRunYet.DEFERRED)

    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own
    assert "immediately" in str(error)
