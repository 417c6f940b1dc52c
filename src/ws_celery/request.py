"""The request of one task run, and what travels in message headers to make it.

The header :data:`HEADER` carries a small JSON mapping:

``url``
    ``request.application_url`` of the request that dispatched the task: scheme, host, port and
    script name, so that ``request.route_url`` in the task gives the link that the user can open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pyramid.interfaces import IRequest, IRequestFactory
from pyramid.registry import Registry
from pyramid.request import Request, apply_request_extensions
from pyramid.threadlocal import RequestContext, get_current_request
from zope.interface import alsoProvides

from ws_celery.interfaces import ITaskRequest

__all__ = ("HEADER", "calling", "calling_request", "describe", "split_request", "task_request")

#: Name of the message header that describes the dispatching request.
HEADER = "ws_celery"

_explicit: ContextVar[Any] = ContextVar("ws_celery_explicit_request", default=None)


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


@contextmanager
def calling(request: Any) -> Iterator[None]:
    """Make the calls inside on behalf of ``request``; ``None`` changes nothing."""
    if request is None:
        yield
        return
    token = _explicit.set(request)
    try:
        yield
    finally:
        _explicit.reset(token)


def calling_request() -> Any:
    """Return the request on whose behalf the code runs: the one passed, else Pyramid's current."""
    request = _explicit.get()
    return get_current_request() if request is None else request


def describe(request: Any) -> dict[str, Any]:
    """Return what the task's request needs to know of ``request``, as JSON values."""
    return {"url": request.application_url}


@contextmanager
def task_request(registry: Registry, description: Mapping[str, Any]) -> Iterator[Any]:
    """Make the request of one task run current, and clean up after it whatever happens.

    The application's own request factory makes it, its request methods and properties are there,
    and finished callbacks run at the end, before the threadlocals are popped. No root factory and
    no tween runs: a task has no URL of its own.

    :param registry: the application's registry.
    :param description: what :func:`describe` told of the dispatching request; may be empty, then
        URLs begin with ``http://localhost``.
    """
    factory = registry.queryUtility(IRequestFactory, default=Request)
    request = factory.blank("/", base_url=description.get("url"))
    request.registry = registry
    alsoProvides(request, ITaskRequest)
    with RequestContext(request):
        try:
            apply_request_extensions(request)
            yield request
        finally:
            if request.finished_callbacks:
                request._process_finished_callbacks()
