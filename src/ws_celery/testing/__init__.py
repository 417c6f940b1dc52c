"""The test kit: see what would be sent, run it as a worker would, without broker and worker.

``pytest_plugins = ["ws_celery.testing"]`` in ``conftest.py`` gives the fixtures :func:`capture` and
:func:`perform`. Nothing else imports this module, so that pytest is needed for tests only.

While a :class:`Capture` is open nothing leaves the process: what is deferred stays with its
transaction, what is sent at once or by a commit is kept here, and results are kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import celery.contrib.testing.tasks  # noqa: F401 - the fixture celery_worker asks for its task
import pytest
from pyramid.registry import Registry
from pyramid.threadlocal import get_current_registry

from ws_celery.app import PyramidCelery
from ws_celery.applications import loaded_celery_app
from ws_celery.declaration import TaskProxy
from ws_celery.interfaces import ICeleryApp
from ws_celery.request import calling_request
from ws_celery.testing.captured import CapturedTask
from ws_celery.testing.capturing import Capture

__all__ = ("Capture", "CapturedTask", "capture", "celery_environ", "perform")


def capture(source: Any = None, environ: Mapping[str, Any] | None = None) -> Capture:
    """Begin to keep what an application would send; nothing leaves until it is closed.

    What the current transaction has recorded already is there, too.

    :param source: a transaction manager, a request, a registry or what has one (a Pyramid
        application). It says which application is meant, if more than one is loaded, and which
        transaction.
    :param environ: what the requests of the tasks find in their environ, such as the
        ``extra_environ`` of a ``TestApp``: so they share the database session of the test. Its
        ``tm.manager`` is replaced, because each run has a transaction of its own.
    :raises NoCurrentApplication: if none or more than one application is loaded.
    """
    app = _celery_app(source)
    captured = Capture(app, environ)
    captured.look_at(source)
    for registry in _registries(source):
        if registry.queryUtility(ICeleryApp) is None:
            # The registry of a dummy configuration: its tasks are those of the application.
            registry.registerUtility(app, ICeleryApp)
            captured.until_closed(registry.unregisterUtility, app, ICeleryApp)
    return captured


def perform(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one task as a worker would: decoded from a message, own request, own transaction.

    What it sends in turn is captured if a capture is open, and dropped otherwise.

    :param task: a task, or a signature of one.
    :param args: its arguments, without a request.
    :return: what the task returns.
    :raises Exception: what the task raises, ``Retry``, ``Ignore`` and ``Reject`` too.
    """
    with capture(_owner(task)) as captured:
        return captured.perform(task, *args, **kwargs)


def _owner(task: Any) -> Registry | None:
    # What @task has left belongs to whichever application is current.
    return None if isinstance(task, TaskProxy) else task.app.registry


def _registries(source: Any) -> list[Registry]:
    candidates = (source, calling_request())
    registries = [getattr(candidate, "registry", candidate) for candidate in candidates]
    return [
        registry
        for registry in (*registries, get_current_registry())
        if hasattr(registry, "queryUtility")
    ]


def _celery_app(source: Any) -> PyramidCelery:
    apps = [registry.queryUtility(ICeleryApp) for registry in _registries(source)]
    return next(filter(None, apps), None) or loaded_celery_app("capture()")


# Fixtures of pytest


@pytest.fixture
def celery_environ() -> dict[str, Any]:
    """What the requests of tasks find in their environ: nothing.

    Override it to share the database session of a test whose transaction is never committed.
    """
    return {}


@pytest.fixture(name="capture")
def _capture(celery_environ: dict[str, Any]) -> Iterator[Callable[..., Capture]]:
    """Begin a :func:`capture` that ends with the test; a second one is the same."""
    captures: dict[PyramidCelery, Capture] = {}
    with ExitStack() as stack:

        def begin(source: Any = None) -> Capture:
            app = _celery_app(source)
            if app not in captures:
                captures[app] = stack.enter_context(capture(source, celery_environ))
            captures[app].look_at(source)
            return captures[app]

        yield begin


@pytest.fixture(name="perform")
def _perform(celery_environ: dict[str, Any]) -> Callable[..., Any]:
    """Run a task as :func:`perform` does, its request with the environ of ``celery_environ``."""

    def run(task: Any, *args: Any, **kwargs: Any) -> Any:
        with capture(_owner(task), celery_environ) as captured:
            return captured.perform(task, *args, **kwargs)

    return run
