"""The request of one task run, and the one on whose behalf a task is dispatched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

from celery.app.task import Context
from pyramid.interfaces import ILocaleNegotiator, IRequest, IRequestFactory, ITranslationDirectories
from pyramid.registry import Registry
from pyramid.request import Request, apply_request_extensions
from pyramid.threadlocal import RequestContext, get_current_request
from zope.interface import alsoProvides, implementer

from ws_celery.compat import finish_request
from ws_celery.converters import nearest
from ws_celery.exceptions import ConfigurationError, Fault, NotIncluded, OptionNotSendable
from ws_celery.interfaces import ICeleryApp, IRequestPropagator, ITaskRequest
from ws_celery.masking import logger_of
from ws_celery.settings import our_setting

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = (
    "HEADER",
    "JSON",
    "PROPAGATORS",
    "Args",
    "Kwargs",
    "Propagation",
    "Propagator",
    "calling",
    "calling_request",
    "description_of",
    "failed_run",
    "failing",
    "get_celery_app",
    "split_request",
    "task_request",
)

log = logger_of(__name__)

#: What URLs can begin with: a client may send anything as its Host header.
_URL = re.compile(r"https?://(\[[\da-f:.]+\]|[\w.-]+)(:\d{1,5})?(/[^?#]*)?", re.IGNORECASE)

#: Where the request of a script is, if nobody says otherwise; WebOb's default.
LOCALHOST = "http://localhost"

#: More characters than any request id has; it comes from outside.
_LONGEST_ID = 200

#: Of a whole number, besides its sign, in a header of AMQP.
_BITS = 63

_DEFAULT = "locale request_id"


#: A value that JSON can hold.
JSON: TypeAlias = Any

#: The arguments of a call, as a caller gives them.
Args: TypeAlias = Sequence[Any] | None
Kwargs: TypeAlias = Mapping[str, Any] | None


@implementer(IRequestPropagator)
@dataclass(frozen=True)
class Propagator:
    """Two functions that take one thing from request to request."""

    capture: Callable[[Request], JSON]
    restore: Callable[[Request, JSON], None]


def _or_nothing(capture: Callable[[Request], JSON]) -> Callable[[Request], JSON]:
    """Return a ``capture`` whose error stops no dispatch: nobody has asked for what travels so."""

    @wraps(capture)
    def capture_or_log(request: Request) -> JSON:
        try:
            return capture(request)
        except Exception:
            what = capture.__name__.lstrip("_")
            log.exception("The %s of the request cannot be told, and does not travel", what)
            return None

    return capture_or_log


@_or_nothing
def _locale(request: Request) -> str | None:
    # Asking for it is not free, and may read the body of an upload: only where it has a meaning.
    known = "locale_name" in vars(request)
    name = request.locale_name if known or _uses_locales(request) else None
    return name if isinstance(name, str) else None


def _uses_locales(request: Request) -> bool:
    if getattr(type(request), "locale_name", None) is not Request.locale_name:
        return True  # the application's own
    registry = getattr(request, "registry", None)
    return registry is not None and bool(
        registry.queryUtility(ILocaleNegotiator) or registry.queryUtility(ITranslationDirectories)
    )


def _set_locale(request: Request, value: JSON) -> None:
    request.locale_name = value


@_or_nothing
def _request_id(request: Request) -> str | None:
    value = getattr(request, "id", None)
    if not isinstance(value, (str, int, UUID)):
        environ = request.environ
        value = environ.get("HTTP_X_REQUEST_ID") or environ.get("REQUEST_ID")
    return None if value is None else str(value)[:_LONGEST_ID]


def _set_request_id(request: Request, value: JSON) -> None:
    value = request.environ["HTTP_X_REQUEST_ID"] = str(value)
    with suppress(AttributeError):  # a property of the application, which reads the header
        request.id = value


def _userid(request: Request) -> JSON:
    return request.authenticated_userid


def _set_userid(request: Request, value: JSON) -> None:
    # Where a security policy can read it; a task has no cookie.
    request.environ["REMOTE_USER"] = str(value)
    request.set_property(lambda _: value, "authenticated_userid")


#: Those that need no ``config.add_request_propagator()``.
PROPAGATORS: dict[str, Propagator] = {
    "locale": Propagator(_locale, _set_locale),
    "request_id": Propagator(_request_id, _set_request_id),
    "user": Propagator(_userid, _set_userid),
}


class Propagation:
    """Describes the requests of one application, and makes task requests like them.

    :param registry: has the settings, and the propagators of the application.
    :raises ConfigurationError: if a setting is wrong, or names a propagator that there is not.
    """

    def __init__(self, registry: Registry) -> None:
        settings = registry.settings or {}
        #: Where URLs begin for a task that no web request has dispatched.
        self.base_url: str = our_setting(settings, "ws_celery.base_url", LOCALHOST)
        #: Whether URLs begin there for all other tasks, too: a client chooses its Host header.
        self.pinned: bool = our_setting(settings, "ws_celery.base_url.pin", default=False)
        if self.pinned and "ws_celery.base_url" not in settings:
            raise ConfigurationError(_nothing_to_pin())
        names = our_setting(settings, "ws_celery.propagate", _DEFAULT)
        added = registry.getUtilitiesFor(IRequestPropagator)
        self._used = _choose(names, {**PROPAGATORS, **dict(added)})

    def describe(self, request: Request) -> dict[str, JSON]:
        """Return what tasks need to know of ``request``, as JSON values; it may be nothing.

        :raises OptionNotSendable: if a propagator captures what is no JSON.
        """
        description: dict[str, JSON] = {}
        # A script's request is nowhere, as one without a header: the worker knows better.
        if not self.pinned:
            url = request.application_url
            if url != LOCALHOST and _URL.fullmatch(url):
                description["url"] = url
        for name, propagator in self._used.items():
            value = propagator.capture(request)
            if value is not None:
                description[name] = _frozen(name, value)
        return description

    def url(self, description: Mapping[str, JSON]) -> str:
        """Return where the URLs of the task begin."""
        return self.base_url if self.pinned else description.get("url") or self.base_url

    def restore(self, request: Request, description: Mapping[str, JSON]) -> None:
        """Give the request of a task what this worker's ``ws_celery.propagate`` asks for."""
        for name, propagator in self._used.items():
            value = description.get(name)
            if value is not None:
                propagator.restore(request, value)


def _nothing_to_pin() -> Fault:
    return Fault(
        "there is no URL to pin",
        section="app",
        key="ws_celery.base_url.pin",
        value="true",
        expected="ws_celery.base_url beside it, such as https://shop.example.com",
    )


def _choose(names: Iterable[str], known: Mapping[str, Propagator]) -> dict[str, Propagator]:
    for name in names:
        if name not in known:
            raise _unknown(name, names, known)
    return {name: known[name] for name in names}


def _unknown(name: str, names: Iterable[str], known: Iterable[str]) -> ConfigurationError:
    *others, last = sorted(known)
    fault = Fault(
        f"names the unknown propagator {name!r}",
        section="app",
        key="ws_celery.propagate",
        value=" ".join(names),
        expected=f"{', '.join(others)} or {last}; config.add_request_propagator() adds others",
        nearest=nearest(name, known),
    )
    return ConfigurationError(fault)


def _frozen(name: str, value: JSON) -> JSON:
    """Return a copy of a value as it arrives: what is changed after the call does not travel."""
    if type(value) is str:
        return value
    try:
        return json.loads(json.dumps(value, allow_nan=False), parse_int=_whole)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionNotSendable.captured(name, error) from None


def _whole(digits: str) -> int:
    number = int(digits)
    if number.bit_length() > _BITS:
        raise ValueError(f"{digits} has more than {_BITS} bits, too many for RabbitMQ")
    return number


#: Name of the message header that describes the dispatching request.
HEADER = "ws_celery"

_explicit: ContextVar[Request | None] = ContextVar("ws_celery_explicit_request", default=None)

_failed: ContextVar[Context | None] = ContextVar("ws_celery_failed", default=None)


def split_request(
    args: Args, kwargs: Kwargs
) -> tuple[Request | None, tuple[Any, ...], dict[str, Any]]:
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


def calling(request: Request) -> AbstractContextManager[None]:
    """Make the calls inside on behalf of ``request``; ``None`` changes nothing."""
    return nullcontext() if request is None else _calling(request)


@contextmanager
def _calling(request: Request) -> Iterator[None]:
    token = _explicit.set(request)
    try:
        yield
    finally:
        _explicit.reset(token)


def calling_request() -> Request | None:
    """Return the request on whose behalf the code runs: the one passed, else Pyramid's current."""
    request = _explicit.get()
    return get_current_request() if request is None else request


def get_celery_app(source: object) -> PyramidCelery:
    """Return the Celery app of a Pyramid registry, or of the registry of a request.

    :param source: a registry, or anything that has one as its attribute ``registry``.
    :raises NotIncluded: if the application does not include ws_celery.
    """
    registry: Registry = getattr(source, "registry", source)
    app = registry.queryUtility(ICeleryApp)
    if app is None:
        raise NotIncluded
    return app


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


def description_of(context: Context) -> dict[str, JSON] | None:
    """Return what the message of a run says of the request that dispatched it, if it does.

    :param context: Celery's ``task.request``.
    """
    # An instrumentation that adds headers of its own inside of "headers" hides ours there.
    description: dict[str, JSON] | None = (context.headers or {}).get(HEADER)
    return description or getattr(context, HEADER, None)


@contextmanager
def task_request(
    registry: Registry, propagation: Propagation, description: Mapping[str, JSON]
) -> Iterator[Request]:
    """Make the request of one task run current, and clean up after it whatever happens.

    The application's own request factory makes it, its request methods and properties are there,
    and finished callbacks run at the end, before the threadlocals are popped. No root factory and
    no tween runs: a task has no URL of its own.

    :param registry: the application's registry.
    :param propagation: what gives it the things that travel.
    :param description: what :meth:`Propagation.describe` returned for the request that dispatched;
        may be empty.
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
                finish_request(request)
