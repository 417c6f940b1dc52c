"""Fixtures of tests with real services: a worker in a thread, a database behind requests."""

from __future__ import annotations

import gc
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import transaction
import zope.sqlalchemy
from celery import _state
from celery.app.trace import reset_worker_optimizations, setup_worker_optimizations
from celery.worker import WorkController, state
from click.testing import CliRunner
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session, sessionmaker
from tests.waiting import SOON


@pytest.fixture(scope="session", autouse=True)
def _a_collection_looks_at_what_tests_make() -> None:
    # Modules are most of the objects, and each collection would take a tenth of a second for them.
    _collect_sockets()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
    _collect_sockets()


@pytest.fixture(autouse=True)
def _sockets_end_with_their_test() -> Iterator[None]:
    yield
    _collect_sockets()


def _collect_sockets() -> None:
    # Celery leaves those of result backends to the garbage collector, which warns of each.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def start_worker() -> Iterator[Callable[[Any], None]]:
    """Start a real worker of an application, in a thread of this process, until the test ends."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(_worker(app.celery))


@contextmanager
def _worker(app: Any) -> Iterator[None]:
    # The consumer waits that long in one call to the broker, also when it is to stop.
    app.conf.broker_transport_options = {
        "polling_interval": 0.1,
        **app.conf.broker_transport_options,
    }
    ready = threading.Event()
    worker = WorkController(
        app=app,
        hostname=f"{uuid.uuid4().hex}@localhost",
        pool="solo",
        concurrency=1,
        ready_callback=lambda _consumer: ready.set(),
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    setup_worker_optimizations(app, worker.hostname)  # as the command line does
    thread = threading.Thread(target=worker.start, name="worker")
    thread.start()
    try:
        assert ready.wait(SOON), "the worker is not ready"
        _state._set_task_join_will_block(False)  # the test waits for results in this process
        yield
    finally:
        state.should_stop = 0
        thread.join(SOON)
        state.should_stop = None
        reset_worker_optimizations(app)
        _state._set_task_join_will_block(False)
        _state.default_app = _state._tls.current_app = None
        assert not thread.is_alive(), "the worker does not stop"


class Database:
    """A database with one table, ``notes``, and an application's way to use it."""

    def __init__(self, url: str) -> None:
        self.engine: Engine = create_engine(url)
        self.sessions = sessionmaker(self.engine)
        self.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text VARCHAR(50) NOT NULL)")

    def execute(self, statement: str, **parameters: Any) -> Any:
        """Execute and commit a statement, on a connection of its own."""
        with self.engine.begin() as connection:
            result = connection.execute(text(statement), parameters)
            return result.scalars().all() if result.returns_rows else None

    def notes(self) -> list[str]:
        """Return what has been committed."""
        return self.execute("SELECT text FROM notes ORDER BY id")

    def includeme(self, config: Any) -> None:
        """Give requests a ``dbsession`` that obeys ``request.tm``."""
        config.add_request_method(self.session, "dbsession", reify=True)

    def session(self, request: Any) -> Session:
        session = self.sessions()
        manager = getattr(request, "tm", transaction.manager)
        zope.sqlalchemy.register(session, transaction_manager=manager)
        return session

    def close(self) -> None:
        self.execute("DROP TABLE notes")
        self.engine.dispose()


@contextmanager
def _opened(url: str) -> Iterator[Database]:
    database = Database(url)
    yield database
    transaction.abort()
    database.close()


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Database]:
    """A PostgreSQL database with an empty table."""
    with _opened(postgres_url) as database:
        yield database


@pytest.fixture
def postgres_results(postgres_url: str) -> Iterator[str]:
    """The URL of a result backend in PostgreSQL, whose results end with the test."""
    yield f"db+{postgres_url}"
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS celery_taskmeta, celery_tasksetmeta"))
    engine.dispose()


@pytest.fixture
def mariadb(mariadb_url: str) -> Iterator[Database]:
    """A MariaDB database with an empty table."""
    with _opened(mariadb_url) as database:
        yield database


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Database]:
    """An SQLite database with an empty table."""
    with _opened(sqlite_url) as database:
        yield database


@pytest.fixture(params=["postgres", "sqlite"])
def database(request: pytest.FixtureRequest) -> Database:
    """A database with an empty table: once PostgreSQL, once SQLite."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def make_outbox(make_app: Any, redis_url: str) -> Iterator[Callable[..., Any]]:
    """Make an application that keeps its dispatches in the outbox of a database."""
    with ExitStack() as stack:

        def make(database: Database, *tasks: Any, setup: Any = None, **settings: Any) -> Any:
            def include(config: Any) -> None:
                database.includeme(config)
                if setup is not None:
                    setup(config)

            celery = f"result_backend = {redis_url}\n" + settings.pop("celery", "")
            settings = {"ws_celery__outbox": "true", **settings}
            app = make_app(*tasks, setup=include, broker=redis_url, celery=celery, **settings)
            outbox = app.celery.outbox
            outbox.create_table()
            stack.callback(database.engine.dispose)  # last: the drop connects again
            stack.callback(outbox.rows.table.drop, database.engine, checkfirst=True)
            stack.callback(outbox.engine.dispose)
            stack.callback(transaction.abort)
            return app

        yield make


@pytest.fixture
def make_schedule(make_app: Any, redis_url: str) -> Iterator[Callable[..., Any]]:
    """Make an application that keeps its schedule in a database, with an outbox if it wants one."""
    with ExitStack() as stack:

        def make(database: Database, *tasks: Any, setup: Any = None, **settings: Any) -> Any:
            def include(config: Any) -> None:
                database.includeme(config)
                if setup is not None:
                    setup(config)

            settings = {"ws_celery__beat": "true", "broker": redis_url, **settings}
            app = make_app(*tasks, setup=include, **settings)
            stack.callback(database.engine.dispose)  # last: the drop connects again
            for store in filter(None, (app.celery.schedule, app.celery.outbox)):
                store.table.drop(database.engine, checkfirst=True)
                store.create_table()
                stack.callback(store.table.drop, database.engine, checkfirst=True)
                stack.callback(store.engine.dispose)
            stack.callback(transaction.abort)
            return app

        yield make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Run a command of an application; returns its exit code and its output."""

    def run(
        app: Any, command: Any, *arguments: str, answer: str | None = None, columns: int = 160
    ) -> tuple[int, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        context = SimpleNamespace(app=app.celery)
        result = CliRunner().invoke(command, arguments, obj=context, input=answer)
        if isinstance(result.exception, Exception):
            raise result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def rows_of() -> Callable[[Any], Any]:
    """Read what the outbox of an application holds."""

    def read(app: Any) -> Any:
        with app.celery.outbox.begin() as connection:
            return connection.execute(app.celery.outbox.rows.select()).all()

    return read
