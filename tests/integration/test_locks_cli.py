"""``ws-celery locks``: who holds a lock, and freeing it by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from redis import Redis
from sqlalchemy import text

from ws_celery import inspection
from ws_celery.cli.locks import locks
from ws_celery.exceptions import LocksUnavailable, NotFound
from ws_celery.locks import Held, Holder
from ws_celery.locks.postgresql import number_of


@pytest.fixture(params=["redis", "database"])
def place(request, redis_url):
    return redis_url if request.param == "redis" else "database"


@pytest.fixture
def app(make_app, redis_url, place, postgres):
    return make_app(setup=postgres.includeme, broker=redis_url, ws_celery__locks=place)


@pytest.fixture
def run(app, monkeypatch):
    """Run a command; returns its exit code and its output."""

    def run(*arguments, answer=None):
        monkeypatch.setenv("COLUMNS", "160")
        context = SimpleNamespace(app=app.celery)
        result = CliRunner().invoke(locks, arguments, obj=context, input=answer)
        if isinstance(result.exception, Exception):
            raise result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def held(app):
    """A lock that is held for half a minute."""
    store = app.celery.locks.store
    key = f"import {{a}} {uuid.uuid4().hex}"
    held = Held(key, 30, task="import", id="an-id", store=store, on_loss=lambda *_: None)
    assert store.acquire(held) is None
    yield held
    if store.renew(held):
        held.end()


def test_list_shows_who_holds_a_lock(run, held, place):
    code, output = run("list")
    line = next(line for line in output.splitlines() if held.key in line)

    assert code == 0
    assert output.startswith("KEY")
    for word in ("import", "an-id", held.host, str(held.pid)):
        assert word in line
    assert line.endswith("while it runs" if place == "database" else " s")


def test_list_is_json_for_programs(run, held, place):
    _, output = run("list", "--json")
    (row,) = [row for row in json.loads(output) if row["key"] == held.key]

    assert (row["task"], row["id"], row["pid"]) == ("import", "an-id", held.pid)
    assert row["token"] == held.token
    assert 0 <= row["age"] < 30
    assert (row["time_left"] is None) == (place == "database")


def test_list_says_that_there_is_none(app, run, monkeypatch):
    monkeypatch.setattr(app.celery.locks.store, "holders", list)  # others test at the same time

    assert run("list") == (0, "No lock is held.\n")


def test_a_lock_is_freed_after_a_question(app, run, held):
    code, output = run("free", held.key, answer="y\n")

    assert code == 0
    holder = re.escape(f"is held by import[an-id] on {held.host}, process {held.pid}, for ")
    assert re.search(holder + r"\d\.\d s", output)
    assert output.endswith(f"which was held by import[an-id] on {held.host}, process {held.pid}.\n")
    assert app.celery.locks.store.holder_of(held.key) is None
    assert not held.store.renew(held)


def test_a_lock_is_kept_if_the_answer_is_no(run, held):
    code, output = run("free", held.key, answer="n\n")

    assert code == 1
    assert output.endswith("Aborted!\n")
    assert held.store.renew(held)


def test_what_was_freed_is_json_for_programs(run, held):
    code, output = run("free", held.key, "--yes", "--json")

    assert code == 0
    assert json.loads(output)["id"] == "an-id"


def test_a_lock_that_nobody_holds_cannot_be_freed(run):
    with pytest.raises(NotFound, match=r"No run holds the lock 'a \{key\}'"):
        run("free", "a {key}", "--yes")


def test_a_lock_that_has_gone_meanwhile_is_not_freed(app, held):
    holder = inspection.lock_holder(app.celery, held.key)
    held.end()

    with pytest.raises(NotFound, match="No run holds"):
        inspection.free_lock(app.registry, holder)


def test_a_holder_that_nobody_knows_is_shown_and_can_be_freed(app, run, place, postgres):
    key = uuid.uuid4().hex
    if place == "database":
        connection = postgres.engine.connect()
        connection.execute(text(f"SELECT pg_advisory_lock({number_of(key)})"))
    else:
        with Redis.from_url(place) as client:
            client.hset(f"ws_celery:lock:{key}", "who", "knows")
    try:
        assert inspection.lock_holder(app.celery, key) == Holder(key)
        code, output = run("free", key, answer="y\n")
    finally:
        if place == "database":
            connection.invalidate()
            connection.close()

    assert code == 0
    assert f"The lock '{key}' is held by an unknown holder" in output
    assert app.celery.locks.store.holder_of(key) is None


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (7.21, "7.2 s"), (90, "1 min")])
def test_times_are_short(seconds, text):
    from ws_celery.cli.locks import _duration

    assert _duration(seconds) == text
    assert _duration(3900) == "1 h 5 min"


def test_exit_codes_tell_what_is_wrong(site, tmp_path, redis_url):
    def ws_celery(*arguments, **options):
        return subprocess.run(
            [sys.executable, "-m", "ws_celery", "locks", *arguments, "--ini", site("", **options)],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    nobody = ws_celery("free", "nobody's key", "--yes", broker=redis_url)
    down = ws_celery("list", broker="redis://:secret@127.0.0.1:1/0")
    no_database = ws_celery("list", app="ws_celery.locks = database")

    assert nobody.returncode == 1
    assert nobody.stderr.startswith('Error: No run holds the lock "nobody\'s key".')
    assert (down.returncode, no_database.returncode) == (69, 69)
    assert down.stderr.startswith("Error: The one-instance locks are out of reach: Redis: ")
    assert "secret" not in down.stderr
    assert "no SQLAlchemy session as its attribute 'dbsession'" in no_database.stderr


def test_a_database_that_cannot_keep_locks_says_so(make_app, sqlite):
    app = make_app(setup=sqlite.includeme, ws_celery__locks="database")

    with pytest.raises(LocksUnavailable, match="the database is sqlite"):
        inspection.lock_holders(app.celery)
