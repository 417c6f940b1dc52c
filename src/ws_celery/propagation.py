"""What of a request travels to the tasks that it dispatches, and how it arrives there.

A *propagator* has a name and two functions: ``capture(request)`` returns a JSON value, or ``None``
for nothing; ``restore(request, value)`` gives it to the request of the task. The setting
``ws_celery.propagate`` names those that are used, in the program that dispatches and in the worker.

All that travels is one JSON mapping, the message header ``ws_celery``: ``url``, and the values of
the propagators by their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any
from uuid import UUID

from pyramid.interfaces import ILocaleNegotiator, ITranslationDirectories
from pyramid.registry import Registry
from pyramid.request import Request
from zope.interface import implementer

from ws_celery.converters import nearest
from ws_celery.exceptions import ConfigurationError, Fault, ValueNotPropagated
from ws_celery.interfaces import IRequestPropagator
from ws_celery.masking import logger_of
from ws_celery.settings import our_setting

__all__ = ("PROPAGATORS", "Propagation", "Propagator")

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


@implementer(IRequestPropagator)
@dataclass(frozen=True)
class Propagator:
    """Two functions that take one thing from request to request."""

    capture: Callable[[Any], Any]
    restore: Callable[[Any, Any], None]


def _or_nothing(capture: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a ``capture`` whose error stops no dispatch: nobody has asked for what travels so."""

    @wraps(capture)
    def capture_or_log(request: Any) -> Any:
        try:
            return capture(request)
        except Exception:
            what = capture.__name__.lstrip("_")
            log.exception("The %s of the request cannot be told, and does not travel", what)
            return None

    return capture_or_log


@_or_nothing
def _locale(request: Any) -> Any:
    # Asking for it is not free, and may read the body of an upload: only where it has a meaning.
    known = "locale_name" in vars(request)
    name = request.locale_name if known or _uses_locales(request) else None
    return name if isinstance(name, str) else None


def _uses_locales(request: Any) -> bool:
    if getattr(type(request), "locale_name", None) is not Request.locale_name:
        return True  # the application's own
    registry = getattr(request, "registry", None)
    return registry is not None and any(
        registry.queryUtility(each) for each in (ILocaleNegotiator, ITranslationDirectories)
    )


def _set_locale(request: Any, value: Any) -> None:
    request.locale_name = value


@_or_nothing
def _request_id(request: Any) -> str | None:
    value = getattr(request, "id", None)
    if not isinstance(value, (str, int, UUID)):
        environ = request.environ
        value = environ.get("HTTP_X_REQUEST_ID") or environ.get("REQUEST_ID")
    return None if value is None else str(value)[:_LONGEST_ID]


def _set_request_id(request: Any, value: Any) -> None:
    value = request.environ["HTTP_X_REQUEST_ID"] = str(value)
    with suppress(AttributeError):  # a property of the application, which reads the header
        request.id = value


def _userid(request: Any) -> Any:
    return request.authenticated_userid


def _set_userid(request: Any, value: Any) -> None:
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
        self._used = _choose(names, {**PROPAGATORS, **dict(_registered(registry))})

    def describe(self, request: Any) -> dict[str, Any]:
        """Return what tasks need to know of ``request``, as JSON values; it may be nothing.

        :raises ValueNotPropagated: if a propagator captures what is no JSON.
        """
        description: dict[str, Any] = {}
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

    def url(self, description: Mapping[str, Any]) -> str:
        """Return where the URLs of the task begin."""
        return self.base_url if self.pinned else description.get("url") or self.base_url

    def restore(self, request: Any, description: Mapping[str, Any]) -> None:
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


def _registered(registry: Registry) -> Iterable[tuple[str, Any]]:
    found: Iterable[tuple[str, Any]] = registry.getUtilitiesFor(IRequestPropagator)
    return found


def _choose(names: Iterable[str], known: Mapping[str, Any]) -> dict[str, Any]:
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


def _frozen(name: str, value: Any) -> Any:
    """Return a copy of a value as it arrives: what is changed after the call does not travel."""
    if type(value) is str:
        return value
    try:
        return json.loads(json.dumps(value, allow_nan=False), parse_int=_whole)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueNotPropagated(name, error) from None


def _whole(digits: str) -> int:
    number = int(digits)
    if number.bit_length() > _BITS:
        raise ValueError(f"{digits} has more than {_BITS} bits, too many for RabbitMQ")
    return number
