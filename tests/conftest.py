"""Fixtures of all tests: Pyramid applications made anew for each test, and real services."""

from __future__ import annotations

import json
import logging
import os
import textwrap
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import transaction
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from kombu.exceptions import OperationalError
from pyramid.config import Configurator, global_registries
from pyramid.request import Request, apply_request_extensions
from pyramid.threadlocal import manager as threadlocals
from tests.services import (  # noqa: F401 - fixtures
    broker_url,
    embedded_broker,
    mariadb_url,
    postgres_url,
    rabbitmq_url,
    redis_url,
    sqlite_url,
    start_broker,
)
from tests.sites import found, site  # noqa: F401 - fixtures
from webtest import TestApp

from ws_celery import get_celery_app
from ws_celery.app import PyramidCelery
from ws_celery.applications import INI_VARIABLE
from ws_celery.settings import INI_VARIABLES

#: Tests whose child processes are measured: together they run what only such processes run.
MEASURED = {
    "test_commands",
    "test_consumer",
    "test_development",
    "test_forks",
    "test_healthy",
    "test_logging",
    "test_processes",
}


# A busy machine is no failure.
hypothesis_settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("tests")


@dataclass(frozen=True)
class Message:
    """What a queue held: one task as a worker would receive it."""

    task: str
    id: str
    args: list[Any]
    kwargs: dict[str, Any]
    headers: dict[str, Any]
    embed: dict[str, Any]


@dataclass
class Application:
    """A Pyramid application of one test, and its Celery app."""

    config: Configurator
    celery: PyramidCelery
    web: TestApp = field(repr=False)

    @property
    def registry(self) -> Any:
        return self.celery.registry

    def request(self, **environ: Any) -> Request:
        """Return a request as the router would make it, without a transaction."""
        request = Request.blank("/", environ=environ)
        request.registry = self.registry
        apply_request_extensions(request)
        return request

    def sent(self, queue: str | None = None) -> list[Message]:
        """Take what has been sent to the broker off its queue."""
        queue = queue or self.celery.conf.task_default_queue
        with self.celery.connection_for_read() as connection:
            channel = connection.default_channel
            self.celery.amqp.queues[queue](channel).declare()
            return list(_messages(channel, queue))

    def names(self) -> list[str]:
        """Take what has been sent off the queue; return the names of the tasks."""
        return [message.task for message in self.sent()]


def _messages(channel: Any, queue: str) -> Iterator[Message]:
    while True:
        try:
            message = channel.basic_get(queue, no_ack=True)
        except Empty:
            return
        if message is None:
            return
        args, kwargs, embed = json.loads(message.body)
        headers = message.headers
        yield Message(headers["task"], headers["id"], args, kwargs, headers, embed)


@pytest.fixture
def write_ini(tmp_path: Path) -> Callable[[str], str]:
    """Write an INI file of the test's own; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / f"{uuid.uuid4().hex}.ini"
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


@pytest.fixture(scope="module", autouse=True)
def _few_child_processes_are_measured(request: pytest.FixtureRequest) -> Iterator[None]:
    # Coverage makes a child need half as much time again, and imports a good deal into it.
    with pytest.MonkeyPatch.context() as patch:
        if Path(request.path).stem not in MEASURED:
            for variable in [name for name in os.environ if name.startswith("COVERAGE_PROCESS_")]:
                patch.delenv(variable)
        yield


@pytest.fixture
def make_config(write_ini: Callable[[str], str]) -> Callable[..., Configurator]:
    """Make a Configurator that includes ws_celery; nothing is committed.

    Messages go to a queue of the application's own, kept in memory unless a broker is given.
    """

    def make(
        broker: str = "memory://",
        celery: str = "",
        include: tuple[str, ...] = ("pyramid_tm",),
        **settings: Any,
    ) -> Configurator:
        ini = write_ini(
            f"[celery]\nbroker_url = {broker}\n"
            f"task_default_queue = test-{uuid.uuid4().hex}\n{textwrap.dedent(celery)}"
        )
        # A busy machine may take longer than the two seconds of the default.
        settings = {"ws_celery__publish_timeout": "20", **settings}
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        config = Configurator(settings={"ws_celery.config_uri": ini, **settings})
        for name in (*include, "ws_celery"):
            config.include(name)
        return config

    return make


@pytest.fixture
def make_app(
    make_config: Callable[..., Configurator],
) -> Iterator[Callable[..., Application]]:
    """Make a Pyramid application with these tasks, and end it with the test."""
    stack = ExitStack()

    def make(*tasks: Any, setup: Any = None, **options: Any) -> Application:
        config = make_config(**options)
        for task in tasks:
            config.add_celery_task(task)
        if setup:
            setup(config)
        wsgi_app = config.make_wsgi_app()
        celery = stack.enter_context(closing(get_celery_app(config.registry)))
        stack.callback(_delete_queue, celery)
        stack.callback(celery.publisher.spool.end, 0)  # a test does not wait for its broker
        return Application(config, celery, TestApp(wsgi_app))

    yield make
    stack.close()


def _delete_queue(app: PyramidCelery) -> None:
    # KeyError: the memory's has no such exchange before something was sent.
    with app.connection_for_write() as connection, suppress(OperationalError, KeyError):
        connection.ensure_connection(max_retries=1, interval_start=0)  # unless it is stopped
        connection.default_channel.queue_delete(app.conf.task_default_queue)
        connection.default_channel.exchange_delete(app.conf.task_default_exchange)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    registries = list(global_registries)
    depth = len(threadlocals.stack)
    filters = {handler: handler.filters[:] for handler in logging.getLogger().handlers}
    for variable in (INI_VARIABLE, INI_VARIABLES):  # by which a command tells its children
        os.environ.pop(variable, None)
    yield
    for handler, before in filters.items():  # those of pytest, which commands take for the user's
        handler.filters[:] = before
    transaction.abort()
    for registry in list(global_registries):
        if registry not in registries:
            global_registries.remove(registry)
    assert len(threadlocals.stack) == depth, "a request is still current"
