"""The application that README shows, made of its code blocks."""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from queue import Empty
from types import ModuleType
from typing import Any

import pytest
from pyramid.config import Configurator, global_registries
from pyramid.interfaces import IRequestExtensions
from pyramid.request import Request, apply_request_extensions
from pyramid.router import Router
from pyramid.threadlocal import RequestContext
from sybil import Document
from sybil.parsers.rest import CodeBlockParser
from transaction import TransactionManager
from webtest import TestApp

from ws_celery import get_celery_app
from ws_celery.applications import load_registry
from ws_celery.testing import Capture, capture

README = Path(__file__).parents[2] / "README.rst"


def shown_files(page: Path) -> dict[str, str]:
    """Return the files that a page shows: blocks whose first line is a comment with a path."""
    parsers = [CodeBlockParser(language, lambda _: None) for language in ("python", "ini")]
    texts = [str(example.parsed) for example in Document.parse(str(page), *parsers)]
    named = [(re.match(r"# (\S+\.(?:py|ini))\n", text), text) for text in texts]
    return {name[1]: text for name, text in named if name}


@pytest.fixture
def shown_site(tmp_path: Path) -> Callable[..., Path]:
    """Write the application of README into a folder; returns its INI file."""

    def write(changes: dict[str, str]) -> Path:
        for name, text in shown_files(README).items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        ini = tmp_path / "development.ini"
        text = ini.read_text()
        for old, new in changes.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        ini.write_text(text)
        return ini

    return write


@pytest.fixture
def shown_registry(
    shown_site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """The application of README in this process, its messages in memory."""
    ini = shown_site(
        {
            "broker_url = embedded://%(here)s/var": "broker_url = memory://\n"
            f"task_default_queue = test-{uuid.uuid4().hex}",
            "result_backend = embedded://%(here)s/var": "result_backend = cache+memory://",
        }
    )
    monkeypatch.syspath_prepend(ini.parent)
    others = take_modules("myapp")  # of another application, which other tests run
    registry = load_registry(str(ini))
    yield registry
    for loaded in list(global_registries):  # an example may load the application once more
        shown_request(loaded).dbsession.get_bind().dispose()
        get_celery_app(loaded).close()
        global_registries.remove(loaded)
    take_modules("myapp")
    sys.modules.update(others)


def take_modules(package: str) -> dict[str, ModuleType]:
    """Take a package and what is in it out of those that are imported."""
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


def shown_request(registry: Any) -> Request:
    """Return a request of the application, without a transaction."""
    request = Request.blank("/", POST={})
    request.registry = registry
    apply_request_extensions(request)
    return request


@pytest.fixture
def site_request(shown_registry: Any) -> Iterator[Request]:
    """The current request of the application of README, which has two deliveries."""
    from myapp.models import Delivery

    request = shown_request(shown_registry)
    with request.tm:
        request.dbsession.add_all([Delivery(address="here"), Delivery(address="there")])
    with RequestContext(request):
        yield request


@pytest.fixture
def check(shown_registry: Any) -> Callable[[Callable[..., None]], None]:
    """Run a test that a page shows, with the fixtures of Pylons' cookiecutter."""
    app = Router(shown_registry)
    config = Configurator(registry=shown_registry, autocommit=True)
    own = shown_registry.getUtility(IRequestExtensions).descriptors["dbsession"].wrapped

    def dbsession(request: Any) -> Any:
        return request.environ.get("app.dbsession") or own(request)

    config.add_request_method(dbsession, reify=True)

    def run(test: Callable[..., None]) -> None:
        tm = TransactionManager(explicit=True)
        tm.begin()
        tm.doom()
        managed = {"tm.active": True, "tm.manager": tm}
        request = Request.blank("/", environ=managed)
        request.registry = shown_registry
        apply_request_extensions(request)
        environ = {**managed, "app.dbsession": request.dbsession}
        with ExitStack() as stack:
            stack.callback(tm.abort)
            fixtures = {
                "app": app,
                "app_request": stack.enter_context(RequestContext(request)),
                "capture": lambda source: stack.enter_context(capture(source, environ)),
                "dbsession": request.dbsession,
                "perform": stack.enter_context(Capture(get_celery_app(app), environ)).perform,
                "testapp": TestApp(app, extra_environ=environ),
                "tm": tm,
            }
            test(**{name: fixtures[name] for name in signature(test).parameters})

    return run


@pytest.fixture
def sent(shown_registry: Any) -> Callable[[], list[str]]:
    """Take what has been sent off the queue; returns the names of the tasks."""
    app = get_celery_app(shown_registry)

    def names() -> Iterator[str]:
        with app.connection_for_read() as connection:
            queue = connection.SimpleQueue(app.amqp.queues[app.conf.task_default_queue])
            while True:
                try:
                    message = queue.get_nowait()
                except Empty:
                    return
                message.ack()
                yield message.headers["task"]

    return lambda: list(names())
