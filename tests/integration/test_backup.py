"""``backup``: dumps that can be restored, and only so many of them."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from sqlalchemy import make_url

from ws_celery.contrib import backup as module
from ws_celery.contrib.backup import BackupFailed, backup, libpq_variables, title_of
from ws_celery.exceptions import ConfigurationError

needs_pg_dump = pytest.mark.skipif(not shutil.which("pg_dump"), reason="pg_dump is not installed")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "backups"


@pytest.fixture
def run(make_app, target, monkeypatch):
    """Run the task with a database; returns its result."""

    def run(database=None, url=None, **settings):
        settings = {"ws_celery__backup__target": str(target), **settings}
        settings = {key.replace("__", "."): value for key, value in settings.items()}

        def include(config):
            config.add_settings({k: v for k, v in settings.items() if v is not None})
            if database is not None:
                database.includeme(config)
            config.include("ws_celery.contrib.backup")

        if url is not None:
            monkeypatch.setattr(module, "_database_url", lambda _: url)
        app = make_app(setup=include)
        return app.celery.tasks["backup"].apply(throw=True).get()

    return run


def test_a_dump_of_sqlite_is_a_database_that_others_may_not_read(sqlite, run):
    sqlite.execute("INSERT INTO notes (id, text) VALUES (1, 'kept')")
    result = run(sqlite)

    file = Path(result["file"])
    assert file.stat().st_size == result["bytes"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with sqlite3.connect(file) as copy:
        assert copy.execute("SELECT text FROM notes").fetchall() == [("kept",)]
    copy.close()


@needs_pg_dump
def test_a_dump_of_postgresql_has_its_tables(postgres, run):
    result = run(postgres)

    listed = subprocess.run(
        ["pg_restore", "--list", result["file"]], capture_output=True, text=True, check=True
    )
    assert "TABLE DATA public notes" in listed.stdout
    assert result["file"].endswith(".dump")


def test_only_so_many_dumps_are_kept_and_nothing_else_is_touched(sqlite, run, target):
    target.mkdir()
    (target / "test-of-mine.sqlite").touch()
    results = [run(sqlite, ws_celery__backup__keep="2") for _ in range(3)]

    names = [Path(each["file"]).name for each in results]
    assert sorted(each.name for each in target.iterdir()) == sorted(
        [*names[1:], "test-of-mine.sqlite"]
    )
    assert results[2]["removed"] == [names[0]]


def test_a_url_is_written_by_fsspec(sqlite, run):
    url = f"memory://backups-{os.getpid()}"
    results = [
        run(sqlite, ws_celery__backup__target=url, ws_celery__backup__keep="1") for _ in range(2)
    ]

    files = fsspec.filesystem("memory")
    kept = files.ls(f"backups-{os.getpid()}", detail=False)
    assert [Path(each).name for each in kept] == [Path(results[1]["file"]).name]
    assert results[1]["removed"] == [Path(results[0]["file"]).name]


def test_dumps_of_another_database_of_the_same_name_are_kept(sqlite, run, target, tmp_path):
    """Only one is kept of each; ``app.sqlite`` and ``app.db`` both are ``app`` without suffix."""
    others = [tmp_path / "a" / "test.sqlite", tmp_path / "b" / "test.db"]
    for path in others:
        path.parent.mkdir()
        path.touch()
    urls = [sqlite.engine.url.set(database=str(path)) for path in others]
    kept = [run(sqlite, url=url, ws_celery__backup__keep="1") for url in [*urls, *urls]]

    assert [each["removed"] for each in kept[:2]] == [[], []]
    assert {each.name for each in target.iterdir()} == {
        Path(each["file"]).name for each in kept[2:]
    }


def test_databases_of_postgresql_have_dumps_of_their_own():
    urls = [
        "postgresql+psycopg://me:one@one/shop.prod",
        "postgresql+psycopg://me:one@one/shop.test",
        "postgresql+psycopg://me:one@one/shop_test",
        "postgresql+psycopg://me:one@two/shop.prod",
        "postgresql+psycopg://me:one@one:5433/shop.prod",
        "postgresql+psycopg://me:one@/shop.prod?host=one&host=two",
    ]
    titles = [title_of(make_url(url)) for url in urls]

    assert len(set(titles)) == len(titles)
    assert titles[0].startswith("shop_prod-")
    assert title_of(make_url("postgresql+psycopg2://you:two@one/shop.prod")) == titles[0]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "asyncpg"])
def test_pg_dump_is_told_of_all_hosts(driver):
    url = make_url(f"postgresql+{driver}://me:p%40w@/shop?host=one:5432&host=two:5433")

    assert libpq_variables(url) == {
        "PGHOST": "one,two",
        "PGPORT": "5432,5433",
        "PGUSER": "me",
        "PGPASSWORD": "p@w",
        "PGDATABASE": "shop",
    }


def test_pg_dump_is_told_what_the_url_says_of_the_connection():
    query = "sslmode=verify-full&sslrootcert=/ca&sslcert=/c&sslkey=/k&service=s&options=-c%20a%3D1"
    url = make_url(f"postgresql+psycopg://one:5432/shop?{query}&keepalives=1")

    assert libpq_variables(url) == {
        "PGHOST": "one",
        "PGPORT": "5432",
        "PGDATABASE": "shop",
        "PGSSLMODE": "verify-full",
        "PGSSLROOTCERT": "/ca",
        "PGSSLCERT": "/c",
        "PGSSLKEY": "/k",
        "PGSERVICE": "s",
        "PGOPTIONS": "-c a=1",
    }
    url = make_url("postgresql+asyncpg://one/shop?ssl=require")
    assert libpq_variables(url)["PGSSLMODE"] == "require"


@needs_pg_dump
def test_a_dump_is_not_made_without_the_security_that_the_url_asks_for(postgres, run):
    url = postgres.engine.url.update_query_dict({"sslmode": "verify-full", "sslrootcert": "/no"})

    with pytest.raises(BackupFailed, match=r"pg_dump has failed: (?s:.*)(/no|SSL)"):
        run(postgres, url=url)


def test_a_url_of_a_folder_is_a_folder(sqlite, run, target):
    result = run(sqlite, ws_celery__backup__target=f"file://{target}")

    assert Path(result["file"]).parent == target
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(result["file"]).stat().st_mode) == 0o600


@pytest.mark.parametrize("step", ["put_file", "mv"])
def test_a_dump_that_does_not_arrive_leaves_nothing_behind(sqlite, run, monkeypatch, step):
    folder = f"backups-{os.getpid()}-{step}"
    settings = {"ws_celery__backup__target": f"memory://{folder}", "ws_celery__backup__keep": "1"}
    first = run(sqlite, **settings)
    files = fsspec.filesystem("memory")
    seen = []

    def broken(*arguments, **_):
        if step == "put_file":
            files.pipe_file(arguments[1], b"a part of it")
        seen.extend(Path(each).name for each in files.ls(folder, detail=False))
        raise OSError("the line is cut")

    monkeypatch.setattr(type(files), step, lambda _self, *arguments, **_: broken(*arguments))
    with pytest.raises(OSError, match="the line is cut"):
        run(sqlite, **settings)

    assert [name.endswith(".part") for name in sorted(seen)] == [False, True]
    kept = files.ls(folder, detail=False)
    assert [Path(each).name for each in kept] == [Path(first["file"]).name]


def test_what_a_crash_has_left_unfinished_does_not_count(sqlite, run, target):
    first = run(sqlite, ws_celery__backup__keep="2")
    (target / f"{Path(first['file']).name}.part").touch()

    assert run(sqlite, ws_celery__backup__keep="2")["removed"] == []


def test_a_dump_that_fails_deletes_nothing(sqlite, run, target, sqlite_url):
    first = run(sqlite, ws_celery__backup__keep="1")
    Path(sqlite.engine.url.database).write_text("no database at all, but a text of some length")

    with pytest.raises(BackupFailed, match="cannot be dumped"):
        run(sqlite, ws_celery__backup__keep="1")
    assert [str(each) for each in target.iterdir()] == [first["file"]]
    sqlite.engine.dispose()
    Path(sqlite.engine.url.database).unlink()
    sqlite.execute("CREATE TABLE notes (id INTEGER)")  # for the fixture to drop


@needs_pg_dump
def test_an_error_of_pg_dump_is_told(postgres, run):
    with pytest.raises(BackupFailed, match=r"pg_dump has failed: (?s:.*)none"):
        run(postgres, url=postgres.engine.url.set(database="none"))


def test_a_program_that_is_missing_is_told(postgres, run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(BackupFailed, match="no program pg_dump"):
        run(postgres)


def test_another_database_is_refused(mariadb, run):
    with pytest.raises(BackupFailed, match="mysql cannot be dumped"):
        run(mariadb)


def test_an_application_without_a_session_is_refused(run):
    with pytest.raises(BackupFailed, match="no session"):
        run()


def test_the_target_has_to_be_set(sqlite, run):
    with pytest.raises(ConfigurationError, match=r"ws_celery.backup.target is not set"):
        run(sqlite, ws_celery__backup__target=None)


def test_a_url_without_fsspec_names_what_to_install(sqlite, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)

    with pytest.raises(ConfigurationError, match="ws-celery\\[backup\\]"):
        run(sqlite, ws_celery__backup__target="s3://bucket/shop")


def test_the_task_is_what_a_schedule_calls(make_app):
    app = make_app(backup)

    assert "backup" in app.celery.tasks
