"""The outbox's table: migrations, other versions of it, and databases that do not play along."""

from __future__ import annotations

import textwrap

import pytest
import transaction
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, inspect, text
from tests.waiting import SOON, wait_for

from ws_celery import task
from ws_celery.exceptions import ConfigurationError, TableError
from ws_celery.outbox import outbox_table, store


@task(name="write")
def write(request, number):
    request.dbsession.execute(
        text("INSERT INTO notes (id, text) VALUES (:id, :text)"), {"id": number, "text": "written"}
    )


@task(name="fail")
def fail(request, length):
    raise LookupError("é" * length + " at last")


@pytest.fixture
def app(make_outbox, database):
    return make_outbox(database, write, fail)


def dispatch(app, number=1):
    with transaction.manager:
        return write.delay(app.request(), number)


# Alembic

ENV = """
from alembic import context
from sqlalchemy import MetaData

from ws_celery.outbox import outbox_table

application = MetaData()
target_metadata = [application, outbox_table().metadata]

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=target_metadata)
with context.begin_transaction():
    context.run_migrations()
"""


@pytest.fixture
def migrations(tmp_path):
    """Folder of an application's migrations, as ``alembic init`` makes it, with our env.py."""
    folder = tmp_path / "migrations"
    config = Config(tmp_path / "alembic.ini")
    config.set_main_option("script_location", str(folder))
    command.init(config, str(folder))
    (folder / "env.py").write_text(textwrap.dedent(ENV))
    return config


def test_alembic_creates_the_table_and_finds_no_difference(
    make_app, migrations, database, make_outbox, rows_of
):
    database.execute("DROP TABLE notes")  # not of the metadata
    with database.engine.begin() as connection:
        migrations.attributes["connection"] = connection
        command.revision(migrations, "outbox", autogenerate=True)
        command.upgrade(migrations, "head")
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        metadata = outbox_table().metadata
        differences = [
            difference
            for difference in compare_metadata(context, metadata)
            if "alembic_version" not in str(difference)
        ]
        assert differences == []
    database.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text VARCHAR(50) NOT NULL)")

    app = make_outbox(database, write)  # which finds it right
    dispatch(app)
    assert len(rows_of(app)) == 1
    database.execute("DROP TABLE alembic_version")


# Other versions

CHANGES = [
    pytest.param("ALTER TABLE ws_celery_outbox DROP COLUMN lease", "lease is missing", id="less"),
    pytest.param(
        "ALTER TABLE ws_celery_outbox ADD COLUMN tenant INTEGER NOT NULL DEFAULT 7",
        "tenant is unknown",
        id="more",
    ),
    pytest.param(
        "ALTER TABLE ws_celery_outbox RENAME COLUMN eta TO not_before", "eta is missing", id="other"
    ),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_table_of_another_version_is_refused_with_the_remedy(app, database, change, said):
    database.execute(change)

    with pytest.raises(TableError, match=f"the column {said}.*migration of Alembic"):
        app.celery.outbox.create_table()
    with pytest.raises(TableError, match=said):
        app.celery.outbox.check_table()


def test_a_column_of_another_type_is_told(make_outbox, postgres):
    app = make_outbox(postgres, write)
    postgres.execute("ALTER TABLE ws_celery_outbox ALTER COLUMN lease TYPE TEXT")

    with pytest.raises(TableError, match="the column lease is TEXT"):
        app.celery.outbox.check_table()


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE ws_celery_outbox DROP COLUMN lease",
        "ALTER TABLE ws_celery_outbox RENAME COLUMN eta TO not_before",
        "DROP TABLE ws_celery_outbox",
    ],
)
def test_the_first_use_tells_a_table_that_is_not_right(app, database, change):
    database.execute(change)

    with pytest.raises(TableError, match="ws-celery outbox create"):
        dispatch(app)

    transaction.abort()
    assert app.sent() == []


def test_a_run_tells_that_the_table_is_missing(app, database, start_worker):
    result = dispatch(app)
    database.execute("DROP TABLE ws_celery_outbox")
    start_worker(app)

    with pytest.raises(Exception, match="ws-celery outbox create"):
        result.get(SOON)
    assert database.notes() == []


def test_an_error_of_the_application_is_not_blamed_on_the_table(app):
    request = app.request()
    transaction.begin()
    write.delay(request, 1)
    request.dbsession.execute(text("INSERT INTO notes (id, text) VALUES (1, 'one')"))

    with pytest.raises(Exception, match=r"(?i)unique"):
        request.dbsession.execute(text("INSERT INTO notes (id, text) VALUES (1, 'one')"))


# Databases

EVERY = pytest.mark.parametrize("database", ["postgres", "sqlite", "mariadb"], indirect=True)


@EVERY
@pytest.mark.parametrize("length", [60_000, 3_000_000])
def test_a_traceback_of_any_length_makes_a_dead_letter(app, start_worker, rows_of, length):
    with transaction.manager:
        result = fail.delay(app.request(), length)
    start_worker(app)

    with pytest.raises(LookupError):
        result.get(SOON)
    row = wait_for(lambda: next((row for row in rows_of(app) if row.died_at), None))
    assert row.error.startswith("Traceback")
    assert row.error.endswith("éé at last\n")
    assert 60_000 < len(row.error) < 210_000


@EVERY
def test_headers_of_any_length_are_kept(app, rows_of):
    with transaction.manager:
        write.apply_async((app.request(), 1), headers={"note": "é" * 100_000})

    (row,) = rows_of(app)
    headers = app.celery.outbox.publication_of(row).options["headers"]
    assert headers["note"] == app.sent()[0].headers["note"] == "é" * 100_000


@pytest.mark.parametrize("column", ["options", "error"])
def test_a_column_of_mariadb_that_ends_at_64_kb_is_told(make_outbox, mariadb, column):
    app = make_outbox(mariadb, write)
    mariadb.execute("ALTER TABLE ws_celery_outbox MODIFY options TEXT NOT NULL, MODIFY error TEXT")
    with pytest.raises(TableError, match=f"the column {column} is TEXT, .* not LONGTEXT"):
        app.celery.outbox.check_table()

    mariadb.execute(
        "ALTER TABLE ws_celery_outbox MODIFY options LONGTEXT NOT NULL, MODIFY error LONGTEXT"
    )
    assert app.celery.outbox.create_table() is False


def test_a_read_only_transaction_is_told_at_the_dispatch(make_outbox, postgres):
    app = make_outbox(postgres, write)
    request = app.request()
    transaction.begin()
    request.dbsession.execute(text("SET TRANSACTION READ ONLY"))
    write.delay(request, 1)

    with pytest.raises(TableError, match="primary server"):
        transaction.commit()

    transaction.abort()
    assert app.sent() == []


def test_a_read_only_database_keeps_its_rows(make_outbox, sqlite, start_worker, caplog):
    app = make_outbox(sqlite, write)
    first = dispatch(app)
    with sqlite.engine.connect() as connection:
        connection.execute(text("PRAGMA query_only = on"))
        connection.commit()
    with pytest.raises(TableError, match="the database is read-only"):
        dispatch(app, 2)
    transaction.abort()
    sqlite.engine.dispose()
    start_worker(app)

    first.get(SOON)
    assert sqlite.notes() == ["written"]


def test_mysql_is_refused_with_the_reason(make_outbox, mariadb, monkeypatch):
    """No server of it is at hand: one of MariaDB is taken for it."""
    app = make_outbox(mariadb, write)
    monkeypatch.setattr(mariadb.engine.dialect, "is_mariadb", False)

    for refused in (app.celery.outbox.check_table, app.celery.outbox.create_table):
        with pytest.raises(ConfigurationError, match=r"MySQL.*Use MariaDB 10\.6"):
            refused()


# Clocks


def test_a_clock_that_jumps_back_does_not_hold_a_message_back(app, monkeypatch):
    request = app.request()
    with transaction.manager:
        write.apply_async((request, 1), countdown=1)
        # After the row was written: what was decided then is not decided again.
        transaction.get().addBeforeCommitHook(
            monkeypatch.setattr, (store, "_seconds_until", lambda _: 3600.0)
        )

    assert len(app.sent()) == 1


def test_rows_of_before_the_database_s_clock_jumped_back_are_run_and_others_go_on(
    app, database, start_worker, rows_of
):
    first = dispatch(app, 1)
    table = app.celery.outbox.rows.table
    with app.celery.outbox.begin() as connection:
        (row,) = connection.execute(app.celery.outbox.rows.select())
        later = {name: getattr(row, name).replace(year=2099) for name in ("created_at", "due_at")}
        connection.execute(table.update().values(**later))
    second = dispatch(app, 2)
    start_worker(app)

    first.get(SOON)
    second.get(SOON)
    assert database.notes() == ["written", "written"]
    assert rows_of(app) == []


def test_the_name_of_the_table_may_have_a_schema(make_outbox, postgres, rows_of):
    postgres.execute("CREATE SCHEMA tasks")
    app = make_outbox(postgres, write, ws_celery__outbox__table="tasks.waiting")
    dispatch(app)

    assert len(rows_of(app)) == 1
    assert inspect(postgres.engine).get_table_names(schema="tasks") == ["waiting"]
    assert isinstance(outbox_table("tasks.waiting").metadata, MetaData)
    app.celery.outbox.rows.table.drop(postgres.engine)
    postgres.execute("DROP SCHEMA tasks")


def test_messages_without_headers_are_refused_with_an_outbox_at_the_start(make_config, sqlite):
    """Their rows could not be told apart: none was written, and nobody was told."""
    protocol = "task_protocol = 1"
    config = make_config(celery=protocol, ws_celery__outbox="true")
    sqlite.includeme(config)
    with pytest.raises(ConfigurationError) as error:
        config.make_wsgi_app()

    (fault,) = error.value.faults
    assert (fault.section, fault.key, fault.line) == ("celery", "task_protocol", 4)
    assert "Leave task_protocol out, or switch ws_celery.outbox off." in str(fault)
    assert make_config(celery=protocol).make_wsgi_app()
