"""The request of one task run, and the one on whose behalf a task is dispatched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from celery.app.task import Context
from pyramid.interfaces import IRequest, IRequestFactory
from pyramid.registry import Registry
from pyramid.request import Request, apply_request_extensions
from pyramid.threadlocal import RequestContext, get_current_request
from zope.interface import alsoProvides

from ws_celery.interfaces import ITaskRequest
from ws_celery.propagation import Propagation

__all__ = (
    "HEADER",
    "calling",
    "calling_request",
    "description_of",
    "failed_run",
    "failing",
    "split_request",
    "task_request",
)

#: Name of the message header that describes the dispatching request.
HEADER = "ws_celery"

_explicit: ContextVar[Any] = ContextVar("ws_celery_explicit_request", default=None)

_failed: ContextVar[Context | None] = ContextVar("ws_celery_failed", default=None)


def split_request(
    args: Any, kwargs: Mapping[str, Any] | None
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Take a request off the arguments of a call, wherever the caller put it.

    :param args: positional arguments; the request may be the first.
    :param kwargs: keyword arguments; the request may be called ``request``.
    :return: the request or ``None``, and the arguments that travel in the message.
    """
    args, kwargs = tuple(args or ()), dict(kwargs or {})
    request = None
    if args and IRequest.providedBy(args[0]):
        request, args = args[0], args[1:]
    elif IRequest.providedBy(kwargs.get("request")):
        request = kwargs.pop("request")
    return request, args, kwargs


def calling(request: Any) -> AbstractContextManager[None]:
    """Make the calls inside on behalf of ``request``; ``None`` changes nothing."""
    return nullcontext() if request is None else _calling(request)


@contextmanager
def _calling(request: Any) -> Iterator[None]:
    token = _explicit.set(request)
    try:
        yield
    finally:
        _explicit.reset(token)


def calling_request() -> Any:
    """Return the request on whose behalf the code runs: the one passed, else Pyramid's current."""
    request = _explicit.get()
    return get_current_request() if request is None else request


@contextmanager
def failing(context: Context | None) -> Iterator[None]:
    """Say that Celery calls the callbacks of a run that has failed; ``None``: one is called."""
    token = _failed.set(context)
    try:
        yield
    finally:
        _failed.reset(token)


def failed_run() -> Context | None:
    """Return Celery's context of the run whose callbacks for errors it calls, or ``None``."""
    return _failed.get()


def description_of(context: Any) -> dict[str, Any] | None:
    """Return what the message of a run tells of the request that dispatched it, if it does.

    :param context: Celery's ``task.request``.
    """
    # An instrumentation that adds headers of its own inside of "headers" hides ours there.
    description: dict[str, Any] | None = (context.headers or {}).get(HEADER)
    return description or getattr(context, HEADER, None)


@contextmanager
def task_request(
    registry: Registry, propagation: Propagation, description: Mapping[str, Any]
) -> Iterator[Any]:
    """Make the request of one task run current, and clean up after it whatever happens.

    The application's own request factory makes it, its request methods and properties are there,
    and finished callbacks run at the end, before the threadlocals are popped. No root factory and
    no tween runs: a task has no URL of its own.

    :param registry: the application's registry.
    :param propagation: what gives it the things that travel.
    :param description: what :meth:`Propagation.describe` told of the dispatching request; may be
        empty.
    """
    factory = registry.queryUtility(IRequestFactory, default=Request)
    request = factory.blank("/", base_url=propagation.url(description))
    request.registry = registry
    alsoProvides(request, ITaskRequest)
    with RequestContext(request):
        try:
            apply_request_extensions(request)
            propagation.restore(request, description)
            yield request
        finally:
            if request.finished_callbacks:
                request._process_finished_callbacks()
