"""Running a captured message as a worker would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transaction
from billiard.einfo import ExceptionInfo
from celery.app.trace import build_tracer
from celery.worker.request import Request as WorkerRequest
from kombu import Message
from kombu.serialization import dumps, loads, prepare_accept_content
from pyramid.interfaces import IRequestFactory
from pyramid.registry import Registry
from pyramid.request import Request
from pyramid.threadlocal import manager as threadlocals

from ws_celery.app import PyramidCelery
from ws_celery.dispatch import Publication
from ws_celery.exceptions import TaskNotRegistered

__all__ = ("attribute", "run_as_worker")


def run_as_worker(app: PyramidCelery, publication: Publication, environ: dict[str, Any]) -> Any:
    """Take a message through decoding, a run of its own, and what Celery does after it.

    :param environ: what the requests of tasks find in their environ.
    :return: what the task returns.
    :raises Exception: what the task raises, and the ways in which Celery ends a run.
    """
    request = _received(app, publication)
    task = app.tasks[request.type]
    with _as_in_a_process_of_its_own(app.registry), _request_environ(app.registry, environ):
        trace = build_tracer(task.name, task, app=app)
        result, ended, _, _ = trace(
            request.id, request.args, request.kwargs, request=request.request_dict
        )
    if ended is not None:
        raise ended.retval
    if isinstance(result, ExceptionInfo):  # not the function, but what follows it has failed
        raise result.exception
    for shared in environ.values():
        # A session that the test has lent is not committed by the run; a commit would flush it.
        if hasattr(shared, "flush"):
            shared.flush()
    return result


def _received(app: PyramidCelery, publication: Publication) -> WorkerRequest:
    """Take a message through all that it goes through between two processes."""
    if publication.task_name not in app.tasks:
        raise TaskNotRegistered(str(publication.task_name), "drain()")
    options = publication.options
    content_type, encoding, headers = dumps(options["headers"], serializer="json")
    message = Message(
        body=publication.payload,
        content_type=options["content_type"],
        content_encoding=options["content_encoding"],
        headers=loads(headers, content_type, encoding, accept={content_type}),
        properties={key: options.get(key) for key in ("correlation_id", "reply_to", "priority")},
        delivery_info={key: options.get(key) for key in ("exchange", "routing_key")},
        accept=prepare_accept_content(app.conf.accept_content),
    )
    request = WorkerRequest(message, app=app)
    _, _, embed = message.payload
    request.request_dict.update({**(embed or {}), "is_eager": False})
    return request


@contextmanager
def _as_in_a_process_of_its_own(registry: Registry) -> Iterator[None]:
    # No request of the test is current, and a run that cleans up the manager of its thread does not
    # abort the test's transaction.
    threadlocals.push({"request": None, "registry": registry})
    try:
        with attribute(transaction.manager, "manager", transaction.TransactionManager()):
            yield
    finally:
        threadlocals.pop()


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
