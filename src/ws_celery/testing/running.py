"""Running a captured message as a worker would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transaction
from pyramid.interfaces import IRequestFactory
from pyramid.registry import Registry
from pyramid.request import Request

from ws_celery.app import PyramidCelery
from ws_celery.dispatch import Publication
from ws_celery.eager import perform, received

__all__ = ("attribute", "run_as_worker")


def run_as_worker(app: PyramidCelery, publication: Publication, environ: dict[str, Any]) -> Any:
    """Take a message through decoding, a run of its own, and what Celery does after it.

    :param environ: what the requests of tasks find in their environ.
    :return: what the task returns.
    :raises Exception: what the task raises, and the ways in which Celery ends a run.
    """
    request = received(app, publication)
    with _request_environ(app.registry, environ):
        result = perform(app, request)
    for shared in environ.values():
        # A session that the test has lent is not committed by the run; a commit would flush it.
        if hasattr(shared, "flush"):
            shared.flush()
    return result


@contextmanager
def _request_environ(registry: Registry, environ: dict[str, Any]) -> Iterator[None]:
    """Let the requests of tasks begin with ``environ``, and with a manager of their own."""
    if not environ:
        yield
        return
    registered = registry.queryUtility(IRequestFactory)
    registry.registerUtility(_Factory(registered or Request, environ), IRequestFactory)
    try:
        yield
    finally:
        registry.unregisterUtility(provided=IRequestFactory)
        if registered is not None:
            registry.registerUtility(registered, IRequestFactory)


class _Factory:
    """The application's request factory, with more in the environ."""

    def __init__(self, factory: Any, environ: dict[str, Any]) -> None:
        self._factory = factory
        self._environ = {key: value for key, value in environ.items() if key != "tm.active"}

    def blank(self, path: str, **options: Any) -> Any:
        manager = transaction.TransactionManager(explicit=True)
        environ = {**self._environ, "tm.manager": manager}
        return self._factory.blank(path, environ=environ, **options)


@contextmanager
def attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of the instance for a while, over what its class has."""
    before = dict(vars(target))
    setattr(target, name, value)
    try:
        yield
    finally:
        if name in before:
            setattr(target, name, before[name])
        else:
            delattr(target, name)
