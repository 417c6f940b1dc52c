"""``ws-celery outbox``: what it shows of the outbox, and what it does with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import transaction
from click.testing import CliRunner

from ws_celery import inspection, task
from ws_celery.cli.outbox import outbox
from ws_celery.exceptions import NotFound, NotIncluded, TableError


@task(name="send_mail")
def send_mail(request, address, password=None):
    pass


@pytest.fixture
def app(make_outbox, database):
    return make_outbox(database, send_mail)


@pytest.fixture
def run(app, monkeypatch):
    """Run a command; returns its exit code and its output."""

    def run(*arguments, columns=120, answer=None):
        monkeypatch.setenv("COLUMNS", str(columns))
        context = SimpleNamespace(app=app.celery)
        result = CliRunner().invoke(outbox, arguments, obj=context, input=answer)
        if isinstance(result.exception, Exception):
            raise result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def dispatch(app):
    def dispatch(*args, **options):
        with transaction.manager:
            return send_mail.apply_async((app.request(), *args), **options)

    return dispatch


@pytest.fixture
def dead(app, dispatch):
    """Make a dead letter; returns its row."""

    def make(*args):
        task_id = dispatch(*args or ("somebody",)).id
        app.sent()
        (row,) = inspection.find_outbox_rows(app.registry, task_id)
        app.celery.outbox.settlement.make_dead_letter(
            row.id, "Traceback (most recent call last):\n  ...\nOSError: no mail"
        )
        return row

    return make


def test_create_makes_the_table_and_finds_it_there(app, run, database):
    app.celery.outbox.rows.table.drop(database.engine)

    assert run("create") == (0, "Created the table ws_celery_outbox.\n")
    assert run("create") == (0, "The table ws_celery_outbox is there already.\n")


def test_create_refuses_another_table_of_the_name(app, run, database):
    app.celery.outbox.rows.table.drop(database.engine)
    database.execute("CREATE TABLE ws_celery_outbox (id INTEGER PRIMARY KEY)")

    with pytest.raises(TableError, match="the column task_id is missing"):
        run("create")


def test_list_shows_dead_letters_unless_asked_for_others(run, dead, dispatch):
    row, waiting = dead(), dispatch("else")

    code, output = run("list", columns=200)
    assert code == 0
    assert str(row.id) in output
    assert "OSError: no mail" in output
    assert "1 shown; 1 dead letter and 1 waiting." in output
    assert "2 shown" in run("list", "--all")[1]
    assert str(row.id) not in run("list", "--waiting")[1]
    ((listed),) = json.loads(run("list", "--waiting", "--json")[1])
    assert listed["task_id"] == waiting.id


def test_list_fits_the_terminal_and_has_a_limit(run, dead):
    dead()
    dead()

    _, output = run("list", "--limit", "1", columns=119)
    assert max(map(len, output.splitlines())) <= 119
    assert "1 shown; 2 dead letters" in output


def test_show_hides_arguments_until_it_is_asked_and_secrets_always(app, run, dispatch):
    with transaction.manager:
        result = send_mail.delay(app.request(), "somebody@example.com", password="hunter2")  # noqa: S106

    assert "somebody" not in run("show", result.id)[1]
    _, output = run("show", result.id, "--arguments")
    assert "somebody@example.com" in output
    assert "hunter2" not in output
    (shown,) = json.loads(run("show", result.id, "--arguments", "--json")[1])
    assert shown["arguments"]["args"] == ["somebody@example.com"]


def test_show_has_the_traceback_the_attempts_and_the_times(run, dead):
    row = dead()

    code, output = run("show", str(row.id))

    assert code == 0
    for part in ("OSError: no mail", "deliveries", "died_at", "created_at", row.task_id):
        assert part in output


def test_what_is_not_there_says_so(run):
    with pytest.raises(NotFound, match="list --all"):
        run("show", "nothing")


def test_a_task_id_used_twice_shows_both_and_asks_for_one(run, dispatch):
    for address in ("one", "two"):
        dispatch(address, task_id="mine")

    assert run("show", "mine")[1].count("send_mail") == 2
    with pytest.raises(NotFound, match="Name one of them"):
        run("retry", "mine")


def test_retry_sends_a_dead_letter_as_if_it_were_new(app, run, dead):
    row = dead()

    assert run("retry", row.task_id) == (0, "Sent 1.\n")

    (message,) = app.sent()
    assert message.headers["ws_celery_outbox"] == str(row.id)
    (after,) = inspection.find_outbox_rows(app.registry, row.task_id)
    assert (after.is_dead, after.deliveries, after.error, after.died_at) == (False, 0, None, None)
    assert after.due_at


def test_retry_leaves_what_waits_for_a_far_eta_in_the_table(app, run, dispatch):
    task_id = dispatch("somebody", countdown=4000).id
    (before,) = inspection.find_outbox_rows(app.registry, task_id)

    assert run("retry", task_id) == (0, "Sent 1.\n")

    assert app.sent() == []
    (after,) = inspection.find_outbox_rows(app.registry, task_id)
    assert abs((after.due_at - before.due_at).total_seconds()) < 10
    assert after.due_at < after.eta


def test_retry_of_all_goes_on_after_a_broken_row(app, run, dead, database):
    broken, row = dead(), dead()
    outbox_table = app.celery.outbox.rows.table
    with app.celery.outbox.begin() as connection:
        of_row = outbox_table.update().where(outbox_table.c.id == broken.id)
        connection.execute(of_row.values(options="{not json"))

    code, output = run("retry", "--all-dead")

    assert code == 1
    assert f"The row {broken.id} of the outbox cannot be published" in output
    assert "discard it" in output
    assert "Sent 1." in output
    assert [message.id for message in app.sent()] == [row.task_id]
    assert "JSONDecodeError" in run("list", columns=200)[1]
    assert run("show", str(broken.id))[0] == 0


def test_retry_without_a_broker_leaves_the_row_to_the_relay(app, run, dead, monkeypatch):
    row = dead()
    app.celery.publisher.close()
    monkeypatch.setitem(app.celery.conf, "broker_write_url", "redis://127.0.0.1:1")

    run("retry", row.task_id)

    with app.celery.outbox.begin() as connection:
        assert app.celery.outbox.rows.seconds_until_due(connection) <= 0


def test_what_a_running_task_has_is_left_alone(make_outbox, postgres, monkeypatch):
    app = make_outbox(postgres, send_mail)
    with transaction.manager:
        result = send_mail.delay(app.request(), "somebody")
    (row,) = inspection.find_outbox_rows(app.registry, result.id)
    with app.celery.outbox.begin() as running:
        app.celery.outbox.rows.claim(running, row.id)

        assert inspection.discard_outbox_rows(app.registry, [row.id]) == 0
        assert inspection.retry_outbox_rows(app.registry, [row.id]).busy == [row.id]


def test_discard_asks_with_numbers(app, run, dead, dispatch):
    dead()
    dead()
    dispatch("else")

    code, output = run("discard", "--all-dead", answer="n\n")
    assert code == 1
    assert "Delete 2 of 2 dead letters and 1 waiting, for ever?" in output
    assert inspection.outbox_state(app.registry).dead == 2

    assert run("discard", "--all-dead", "--yes") == (0, "Discarded 2.\n")
    assert inspection.outbox_state(app.registry).dead == 0


@pytest.mark.parametrize("arguments", [["retry"], ["discard", "x", "--all-dead"]])
def test_rows_are_named_or_all_dead_are_meant(run, arguments):
    code, output = run(*arguments)

    assert code == 2
    assert "Name rows by their id, or give --all-dead." in output


def test_an_application_without_an_outbox_says_how_to_switch_it_on(make_app):
    with pytest.raises(NotIncluded, match=r"ws_celery.outbox = true"):
        inspection.outbox_rows(make_app().registry)


CODE = """
import sqlalchemy, transaction, zope.sqlalchemy
from sqlalchemy.orm import sessionmaker

def make_session(request):
    factory = sessionmaker(sqlalchemy.create_engine(request.registry.settings["sqlalchemy.url"]))
    session = factory()
    zope.sqlalchemy.register(session, transaction_manager=transaction.manager)
    return session

def includeme(config):
    config.add_request_method(make_session, "dbsession", reify=True)
"""


@pytest.fixture
def application(site, tmp_path):
    """Write an application whose database has this URL; returns its INI file."""

    def write(url, on="true"):
        module = f"checked_{tmp_path.name}".replace("-", "_")
        app = f"ws_celery.outbox = {on}\nsqlalchemy.url = {url}\npyramid.includes = {module}\n"
        return site("", code=CODE, app=app)

    return write


@pytest.fixture
def ws_celery(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "ws_celery", *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_exit_codes_tell_what_is_wrong(application, ws_celery, sqlite_url):
    off = ws_celery("outbox", "list", "--ini", application(sqlite_url, on="false"))
    ini = application(sqlite_url)
    missing = ws_celery("outbox", "list", "--ini", ini)
    created = ws_celery("outbox", "create", "--ini", ini)
    nothing = ws_celery("outbox", "show", "nothing", "--ini", ini)
    away = ws_celery(
        *("outbox", "list", "--ini"),
        application("postgresql+psycopg://postgres@127.0.0.1:1/test?connect_timeout=2"),
    )

    assert (off.returncode, missing.returncode, created.returncode) == (2, 2, 0)
    assert (nothing.returncode, away.returncode) == (1, 69)
    assert "This application has no outbox" in off.stderr
    assert "it does not exist. Create it with `ws-celery outbox create" in missing.stderr
    assert "There is no row nothing" in nothing.stderr
    assert "does not answer" in away.stderr
    for each in (off, missing, nothing, away):
        assert "Traceback" not in each.stderr


def test_check_reports_about_the_outbox(application, ws_celery, sqlite_url):
    ini = application(sqlite_url)
    before = ws_celery("check", "--ini", ini)
    ws_celery("outbox", "create", "--ini", ini)
    after = ws_celery("check", "--ini", ini)

    assert "ws-celery outbox create" in before.stdout
    assert before.returncode == 2
    assert "outbox create" not in after.stdout


def test_check_tells_of_dead_letters_and_of_a_clock_that_is_wrong(app, dead, monkeypatch):
    from ws_celery.checks import application as checked

    dead()
    monkeypatch.setattr(checked, "_CLOCKS", -1)

    findings = {finding.code: finding.text for finding in checked._outbox(app.celery)}

    assert "1 dead letters" in findings["dead-letters"]
    assert "time server (NTP)" in findings["clock"]
