"""Chains that begin without a transaction: what follows such a run is kept, and comes once."""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import datetime, timedelta, timezone

import pytest
import transaction
import zope.sqlalchemy
from celery import chain, group
from celery.exceptions import Ignore, Retry
from pyramid.threadlocal import RequestContext
from sqlalchemy import text, update
from sqlalchemy.exc import OperationalError
from tests.notes import dispatch, follow, write
from tests.waiting import SOON

from ws_celery import RequestAwareTask, task
from ws_celery.exceptions import Abandoned
from ws_celery.testing.captured import run_as_worker


@task(name="prepare", base=RequestAwareTask)
def prepare(request, number):
    return number


@task(name="prepare_in_vain")
def prepare_in_vain(request, number):
    request.tm.doom()
    return number


@task(name="note")
def note(request, number):
    """Write a row as often as it is run."""
    session = request.dbsession
    identifier = session.scalar(text("SELECT coalesce(max(id), 0) + 1 FROM notes"))
    session.execute(
        text("INSERT INTO notes (id, text) VALUES (:id, :text)"),
        {"id": identifier, "text": f"note {number}"},
    )
    zope.sqlalchemy.mark_changed(session, request.tm)


@task(name="handing_over", bind=True, base=RequestAwareTask)
def handing_over(self, request, number):
    self.replace(write.s(number))


@task(name="handing_over_and_trying_again", bind=True, base=RequestAwareTask)
def handing_over_and_trying_again(self, request):
    """Hand over inside of a try that catches everything."""
    try:
        self.replace(note.si(1))
    except Exception:  # noqa: BLE001 - as careless functions do
        self.retry(countdown=0)


@task(name="trying_again", bind=True, base=RequestAwareTask)
def trying_again(self, request):
    if not self.request.retries:
        with suppress(Retry):
            self.retry(countdown=0)


TASKS = (
    *(prepare, prepare_in_vain, note, handing_over, handing_over_and_trying_again),
    *(trying_again, write, follow),
)


@pytest.fixture
def app(make_outbox, database):
    return make_outbox(database, *TASKS)


def call(app, canvas):
    """Dispatch a canvas, which begins with one task; return the message of its row."""
    with RequestContext(app.request()), transaction.manager:
        canvas.apply_async()
    ((_, message),) = messages(app)
    app.sent()
    return message


def messages(app):
    """Return the messages of all rows by task, as their run gets them."""
    outbox = app.celery.outbox
    with outbox.begin() as connection:
        rows = connection.execute(outbox.rows.select()).all()
    found = [(row.task, outbox.publication_of(row)) for row in rows]
    for _, message in found:
        message.options["headers"]["ws_celery_outbox"] = str(message.row_id)
    return sorted(found, key=lambda each: each[0])


def perform(app, message):
    return run_as_worker(app.celery, message, {})


def send_again(app):
    """Let the relay publish all that is unfinished."""
    app.celery.outbox.execute(app.celery.outbox.rows.make_all_due, app.celery.outbox.lease)
    app.celery.outbox.relay.turn()


# What follows


@pytest.mark.parametrize("first", [prepare, prepare_in_vain], ids=["begun by none", "doomed"])
def test_the_next_of_a_chain_has_a_row(app, first):
    message = call(app, chain(first.s(1), follow.s(2)))

    perform(app, message)

    ((name, following),) = messages(app)
    (sent,) = app.sent()
    assert name == sent.task == "follow"
    assert sent.headers["ws_celery_outbox"] == str(following.row_id)


def test_a_second_delivery_of_the_first_has_no_second_chain(app, database):
    message = call(app, chain(prepare.si(1), note.si(2)))
    perform(app, message)

    with pytest.raises(Abandoned, match="has run"):
        perform(app, message)

    for _, following in messages(app):
        perform(app, following)
    assert database.notes() == ["note 2"]
    assert len(app.sent()) == 1
    assert messages(app) == []


def test_a_lost_message_of_the_second_is_sent_again(app, database, start_worker, rows_of):
    perform(app, call(app, chain(prepare.s(1), note.si(2), note.si(3))))
    assert [lost.task for lost in app.sent()] == ["note"]

    send_again(app)
    start_worker(app)

    finish(app, 8, 9)
    assert sorted(database.notes()) == ["note 2", "note 3", "note 8", "note 9"]
    assert rows_of(app) == []


def test_callbacks_and_a_group_have_rows(app, database):
    rest = group(note.si(2), note.si(3))
    message = call(app, chain(prepare.si(1).set(link=[note.si(4), note.si(5)]), rest))
    perform(app, message)
    with pytest.raises(Abandoned, match="has run"):
        perform(app, message)

    assert len(messages(app)) == len(app.sent()) == 4
    for _, following in messages(app):
        perform(app, following)
    assert sorted(database.notes()) == [f"note {number}" for number in (2, 3, 4, 5)]


def test_the_header_of_a_chord_has_rows(app, database, start_worker, rows_of):
    canvas = chain(prepare.s(1), group(note.si(2), note.si(3)), note.si(4))
    perform(app, call(app, canvas))
    assert [name for name, _ in messages(app)] == ["note", "note"]
    assert len(app.sent()) == 2  # lost

    send_again(app)
    start_worker(app)

    finish(app, 8, 9)
    assert sorted(database.notes()) == [f"note {number}" for number in (2, 3, 4, 8, 9)]
    assert rows_of(app) == []


def finish(app, *numbers):
    """Wait until the only worker has done what it had to do, and what followed from that."""
    for number in numbers:
        dispatch(app, note, number).get(SOON)


def test_of_two_runs_at_a_time_one_goes_on(make_outbox, postgres):
    barrier = threading.Barrier(2, timeout=SOON)

    @task(name="meeting", base=RequestAwareTask)
    def meeting(request):
        barrier.wait()

    app = make_outbox(postgres, meeting, *TASKS)
    message = call(app, chain(meeting.si(), note.si(1)))
    outcomes = []

    def run():
        try:
            outcomes.append(perform(app, message))
        except Ignore as error:
            outcomes.append(error.reason)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)

    assert sorted(outcomes, key=str) == [None, "duplicate"]
    assert [name for name, _ in messages(app)] == ["note"]
    assert len(app.sent()) == 1


def test_the_result_of_the_first_knows_what_follows(app, start_worker):
    result = dispatch(app, prepare, 1, link=write.s())
    start_worker(app)

    assert result.get(SOON) == 1
    assert [child.get(SOON) for child in result.children] == [1]


def test_what_takes_the_place_of_a_run_has_a_row(app, database):
    message = call(app, chain(handing_over.s(1), follow.s(2)))

    for error in (Ignore, Abandoned):
        with pytest.raises(error):
            perform(app, message)

    ((name, following),) = messages(app)
    assert name == "write"
    assert len(app.sent()) == 1
    perform(app, following)
    perform(app, messages(app)[0][1])
    assert database.notes() == ["note 1", "note 2"]


def test_a_run_that_goes_on_after_its_retry_leaves_it_the_row(app):
    message = call(app, chain(trying_again.si(), note.si(1)))

    perform(app, message)

    (_, following), (name, retry) = messages(app)
    assert (name, retry.options["headers"]["retries"]) == ("trying_again", 1)
    assert following.row_id is not None
    assert len(app.sent()) == 2


def test_a_run_that_is_retried_after_it_has_handed_over_leaves_that_the_row(app):
    message = call(app, handing_over_and_trying_again.si())

    with pytest.raises(Retry):
        perform(app, message)

    (name, retry), (following, _) = messages(app)
    assert (name, following) == ("handing_over_and_trying_again", "note")
    assert retry.options["headers"]["retries"] == 1
    assert len(app.sent()) == 2


# The database


def test_a_run_whose_database_is_away_at_its_end_is_sent_again(app, monkeypatch):
    message = call(app, chain(prepare.s(1), follow.s(2)))

    def fail(*_):
        raise OperationalError("INSERT", {}, ConnectionError())

    with monkeypatch.context() as patch:
        patch.setattr(app.celery.outbox.rows, "insert", fail)
        with pytest.raises(Abandoned, match="has lost its database"):
            perform(app, message)

    assert [name for name, _ in messages(app)] == ["prepare"]
    assert app.sent() == []
    perform(app, message)
    assert [name for name, _ in messages(app)] == ["follow"]


def test_what_cannot_be_written_is_a_failure_and_a_dead_letter(app, rows_of, monkeypatch):
    message = call(app, chain(prepare.s(1), follow.s(2)))
    monkeypatch.setattr(app.celery.outbox.rows, "insert", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        perform(app, message)

    (row,) = rows_of(app)
    assert "ZeroDivisionError" in row.error
    assert app.sent() == []


# Before the run


def note_runs(app, monkeypatch):
    """Return a list that grows with each run of ``prepare``."""
    runs = []
    monkeypatch.setattr(app.celery.tasks["prepare"], "run", lambda _, number: runs.append(number))
    return runs


@pytest.mark.parametrize("end", ["make_dead_letter", "delete"])
def test_a_dead_letter_or_what_was_given_up_is_not_run(app, rows_of, monkeypatch, end):
    message = call(app, prepare.s(1))
    given = {"make_dead_letter": ("enough",), "delete": ()}[end]
    getattr(app.celery.outbox.settlement, end)(message.row_id, *given)
    left = rows_of(app)
    runs = note_runs(app, monkeypatch)

    with pytest.raises(Abandoned, match="has run"):
        perform(app, message)

    assert runs == []
    assert rows_of(app) == left


def test_a_copy_that_comes_after_the_end_is_not_run(app, start_worker, monkeypatch):
    runs = note_runs(app, monkeypatch)
    message = call(app, prepare.s(1))
    app.celery.publisher.publish([message, message])
    start_worker(app)

    finish(app, 8)
    assert runs == [1]


def test_a_run_that_has_begun_in_time_does_not_expire(app, monkeypatch):
    columns = app.celery.outbox.rows.table.c
    message = call(app, chain(prepare.s(1).set(expires=3600), note.si(2)))

    def expire_and_turn(_, number):
        past = datetime.now(timezone.utc) - timedelta(seconds=1)
        expire = update(columns.id.table).values(due_at=past)
        with app.celery.outbox.begin() as connection:
            connection.execute(expire)
            connection.execute(expire.where(columns.expires.is_not(None)).values(expires=past))
        app.celery.outbox.relay.turn()

    app.celery.outbox.relay.turn()
    monkeypatch.setattr(app.celery.tasks["prepare"], "run", expire_and_turn)
    perform(app, message)

    assert [name for name, _ in messages(app)] == ["note"]


def test_a_run_does_not_need_the_database_to_begin(app, monkeypatch, caplog):
    message = call(app, prepare.s(1))
    runs = note_runs(app, monkeypatch)

    def fail(*_):
        raise OperationalError("SELECT", {}, ConnectionError())

    monkeypatch.setattr(app.celery.outbox.rows, "is_there", fail)
    perform(app, message)

    assert runs == [1]
    assert "is run without a look at its row" in caplog.text
    assert messages(app) == []
