"""The Celery app of a Pyramid registry, and the one seam through which every message passes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.app.backends import by_url
from celery.app.task import Context
from celery.app.utils import Settings, bugreport
from celery.backends.base import Backend
from celery.result import AsyncResult
from celery.utils.dispatch import Signal
from celery.utils.text import pretty
from kombu import Connection, Producer
from kombu.exceptions import EncodeError
from pyramid.registry import Registry
from pyramid.request import Request
from zope.interface import implementer

from ws_celery.applications import INI_VARIABLE, answer_celery, current_celery_app
from ws_celery.compat import wrap_errbacks
from ws_celery.eager import EagerWorker, MemoryBackend
from ws_celery.events import BeforeDispatch, has_subscriber
from ws_celery.exceptions import ConfigurationError
from ws_celery.interfaces import ICeleryApp
from ws_celery.logs import set_up_logging
from ws_celery.masking import logger_of, masked_text
from ws_celery.publishing import Publisher
from ws_celery.recording import (
    ROW_HEADER,
    Publication,
    RecordingProducer,
    blame_argument,
    not_while_recording,
    refuse_misread,
)
from ws_celery.request import (
    HEADER,
    Args,
    Kwargs,
    Propagation,
    calling_request,
    description_of,
    failing,
    get_celery_app,
)
from ws_celery.results import end_waits
from ws_celery.settings import Configuration, our_setting
from ws_celery.shown_arguments import hidden_arguments, masked_reprs, shown_value
from ws_celery.transactions import Transactions

if TYPE_CHECKING:
    from ws_celery.declaration import TaskProxy
    from ws_celery.locks import Locks

__all__ = ("PyramidCelery", "current_celery_app", "get_celery_app")

log = logger_of(__name__)

#: What the positional arguments of ``send_task`` after name, args and kwargs are called.
_POSITIONAL = tuple(inspect.signature(Celery.send_task).parameters)[4:]

#: Options that Celery asks for with every message.
_ASKED_OFTEN = (
    "task_always_eager",
    "task_default_queue",
    "task_repr_maxlevels",
    "task_send_sent_event",
)


@implementer(ICeleryApp)
class PyramidCelery(Celery):
    """A Celery app that belongs to one Pyramid registry and obeys its transactions.

    It is Celery's current app while a request or a run of its application is on: two Pyramid
    applications in one process keep apart. It is there from the include on, for handlers to connect
    to, and of use when the application's configuration is committed: after :meth:`configure` and
    :meth:`complete`.

    :param registry: the owner.
    """

    control_cls = "ws_celery.control:Control"
    events_cls = "ws_celery.worker:Events"

    configuration: Configuration | None = None
    publisher: Publisher
    propagation: Propagation
    #: Keeps tasks with ``@one_instance`` from running twice at a time.
    locks: Locks
    #: The attribute of requests that is their SQLAlchemy session.
    session_attribute: str
    #: Names of arguments that nobody is to see, in lower case; or ``all``.
    hidden_arguments: frozenset[str] = frozenset()
    #: Runs what would be sent, with ``task_always_eager``. Celery does not know; see eager.py.
    eager: EagerWorker | None = None

    def __init__(self, registry: Registry, **options: Any) -> None:
        self.registry = registry
        self._call_options: Mapping[str, Any] = {}
        self.transactions = Transactions(self)
        #: Keeps dispatches until they have taken effect, if the application has switched it on.
        self.outbox: Any = None
        #: The schedule in the database, if the application has switched it on.
        self.schedule: Any = None
        #: Entries of the schedule that code declares: name to fields.
        self.periodic: dict[str, Mapping[str, Any]] = {}
        #: What the configuration has put into Celery's beat_schedule; the rest of it is code's.
        self.installed: dict[str, Any] = {}
        #: What beat writes for a probe, if it is to.
        self.beat_health_file: Path | None = None
        #: What ``@task`` has declared and the application has registered, by name.
        self.declared: dict[str, TaskProxy] = {}
        super().__init__(
            registry.package_name,
            set_as_current=False,
            fixups=["ws_celery.worker:PyramidFixup"],
            loader="ws_celery.worker:PyramidLoader",
            **options,
        )
        answer_celery()
        self.steps["consumer"].add("ws_celery.worker:OnRedis")
        self.on_after_configure = _SignalOfApplication(name="app.on_after_configure")
        self.on_after_finalize = _SignalOfApplication(name="app.on_after_finalize")
        self.on_after_configure.connect(_prepare_lookups)

    def configure(
        self, settings: Mapping[str, Any], configuration: Configuration | None = None
    ) -> None:
        """Take the settings of the application.

        :param settings: Celery's settings by their lower-case names, typed.
        :param configuration: where they come from, and the options of calls that Celery does not
            take from its routes, such as ``expires``.
        """
        self.configuration = configuration
        self._call_options = configuration.call_options if configuration else {}
        of_pyramid = self.registry.settings
        self.session_attribute = our_setting(of_pyramid, "ws_celery.dbsession", "dbsession")
        self.hidden_arguments = hidden_arguments(of_pyramid)
        self.publisher = Publisher(self)
        self.propagation = Propagation(self.registry)
        settings = {"beat_scheduler": "ws_celery.beat:Scheduler", **settings}
        # Celery's default would be one for all applications of a process.
        settings["beat_schedule"] = dict(settings.get("beat_schedule") or {})
        self.installed = dict(settings["beat_schedule"])
        self.eager = EagerWorker(self) if settings.pop("task_always_eager", False) else None
        self.config_from_object(settings)

    def complete(self) -> None:
        """Call the handlers of Celery's signals, now that the application's tasks are there."""
        self.finalize()
        self.on_after_configure.release()
        self.on_after_finalize.release()

    def connection_for_write(self, *args: Any, **options: Any) -> Connection:
        """Return a connection for publishing, as in Celery; Redis is not waited for without end.

        redis-py would wait for ever for a server that has stopped answering, and with it every
        call that is sent at once. Transport options of the configuration are left alone.
        """
        connection = super().connection_for_write(*args, **options)
        if connection.transport.driver_type == "redis":
            for option in ("socket_connect_timeout", "socket_timeout"):
                connection.transport_options.setdefault(option, self.publisher.timeout)
        return connection

    def close(self) -> None:
        """Clean up after the application, as in Celery; what is spooled is sent first."""
        self.publisher.end()
        self.publisher.close()
        self.locks.close()
        super().close()

    def producer_or_acquire(
        self, producer: Producer | RecordingProducer | None = None
    ) -> AbstractContextManager[Producer | RecordingProducer]:
        """Hand out the producer of a message: a recording one while a transaction is open.

        Every way of sending asks here. An explicit ``producer`` means "now"; beat passes one.
        """
        if producer is None and (recorder := self.recorder()) is not None:
            return nullcontext(recorder)
        if self.eager is not None and not isinstance(producer, RecordingProducer):
            return self.eager.producer()
        return super().producer_or_acquire(producer)

    def recorder(self) -> RecordingProducer | None:
        """Return what records for the transaction that a dispatch made now belongs to, if any."""
        return self.transactions.recorder(calling_request())

    def publish(self, publications: Sequence[Publication]) -> None:
        """Hand what a committed transaction has recorded to the broker; see ``Publisher``."""
        if self.eager is not None:
            self.eager.run(publications)
            return
        # What has a far eta waits in the outbox.
        if publications := [each for each in publications if not each.waits]:
            self.publisher.publish(publications)

    def send_task(
        self, name: str, args: Args = None, kwargs: Kwargs = None, *starargs: Any, **options: Any
    ) -> AsyncResult:
        """Send a task by name, as in Celery; adds the header that describes the calling request.

        Options of the task's route that the call does not give are added, too. Subscribers to
        :class:`~ws_celery.events.BeforeDispatch` have the last word.

        :raises ArgumentNotSerializable: at once, if a value does not serialise.
        :raises OptionNotSendable: at once, if a header or a callback would be read otherwise.
        :raises TypeError: at once, if the key of ``@one_instance`` cannot be made of the arguments.
        """
        positional = dict(zip(_POSITIONAL, starargs, strict=False))
        options = {**positional, **options, **self._missing(name, {*positional}, options)}
        options["headers"] = dict(options.get("headers") or {})
        request = self._describe_caller(options["headers"])
        if has_subscriber(self.registry, BeforeDispatch):
            call = name, tuple(args or ()), dict(kwargs or {}), options
            self.registry.notify(BeforeDispatch(self, request, *call))
        serializer = options.get("serializer") or self.conf.task_serializer
        refuse_misread(name, args, kwargs, serializer, options)
        self.locks.check_key(self.tasks.get(name), args, kwargs)
        # Without their secrets: Celery shows these words in logs and events.
        argsrepr, kwargsrepr = masked_reprs(self, name, args, kwargs)
        for key, text in (("argsrepr", argsrepr), ("kwargsrepr", kwargsrepr)):
            if text is not None and options.get(key) is None:
                options[key] = text
        try:
            with self._keeping_retries(options):
                return super().send_task(name, args, kwargs, **options)
        except EncodeError as error:
            blame_argument(error, name, args, kwargs, serializer)
            raise

    def _describe_caller(self, headers: dict[str, Any]) -> Request | None:
        """Add the header that describes the calling request, and return that, if there is one."""
        request = calling_request()
        if HEADER not in headers:
            description: dict[str, Any] | None = None
            if request is not None:
                description = self.propagation.describe(request)
            elif parent := self.current_worker_task:
                # A callback or the next task of a chain: its parent's run is over.
                description = description_of(parent.request)
            if description:
                headers[HEADER] = description
        return request

    def _missing(self, name: str, given: set[str], options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the options of the task's route that a call does not give."""
        if not self._call_options or not (routed := self._routed(name)):
            return {}
        given.update(key for key, value in options.items() if value is not None)
        if "eta" in given:
            given.add("countdown")
        return {key: value for key, value in routed.items() if key not in given}

    def _routed(self, name: str) -> Mapping[str, Any]:
        if name in self._call_options:
            return self._call_options[name]
        globs = (glob for glob in self._call_options if "*" in glob and fnmatchcase(name, glob))
        return self._call_options.get(next(globs, ""), {})

    def _keeping_retries(self, options: Mapping[str, Any]) -> AbstractContextManager[None]:
        if self.outbox is None or ROW_HEADER not in options["headers"]:
            return nullcontext()
        return self.outbox.runs.keeping_retries(options["headers"], options.get("task_id"))

    def backend_class(self) -> tuple[type[Backend], str | None]:
        """Return the class of the result backend, and its URL: one that is made may connect."""
        if self.eager is not None:
            return MemoryBackend, None
        return by_url(self.backend_cls or self.conf.result_backend, self.loader)

    def _get_backend(self) -> Backend:
        backend = super()._get_backend() if self.eager is None else MemoryBackend(self)
        not_while_recording(backend)
        end_waits(self, backend)
        # Celery has no other place from which it calls a task like a function.
        wrap_errbacks(backend, _naming_failed_run)
        return backend

    def __reduce__(self) -> tuple[Any, ...]:
        return _in_spawned_child, ()

    def bugreport(self) -> str:
        """Return what ``ws-celery report`` prints, without secrets."""
        return masked_text(bugreport(_Reported(self)))


class _Reported:
    """What Celery's report asks an app for; its settings have no secrets."""

    def __init__(self, app: PyramidCelery) -> None:
        self._app, self.conf, self.loader = app, self, app.loader
        self.connection = app.connection
        self.result_backend = app.conf.result_backend

    def humanize(self) -> str:
        """Return the settings that are no defaults, one on a line."""
        table = self._app.conf.table()
        shown = {name: shown_value(self._app, name, value) for name, value in table.items()}
        return "\n".join(f"{name}: {pretty(value, width=50)}" for name, value in shown.items())


class _SignalOfApplication(Signal):
    """A signal of a Celery app that waits until the application has registered its tasks.

    Celery sends it as soon as somebody asks for an option or a task, which is before that, and
    only logs what its handlers raise.
    """

    _released = False
    _waiting: tuple[object, dict[str, Any]] | None = None

    def connect(self, *args: Any, **options: Any) -> Any:
        """Connect a handler, as in Celery; one that ``includeme()`` has defined lives on."""
        return super().connect(*args, **{"weak": False, **options})

    def send(self, sender: object, **named: Any) -> Any:
        """Call the handlers, or do so at the release."""
        if self._released:
            return super().send(sender, **named)
        self._waiting = sender, named
        return []

    def release(self) -> None:
        """Call the handlers, if Celery has sent the signal."""
        self._released = True
        if self._waiting is not None:
            sender, named = self._waiting
            self._waiting = None
            self.send(sender, **named)


def _in_spawned_child() -> PyramidCelery:
    """Load the application again, and its logging: the child is a fresh interpreter."""
    if config_uri := os.environ.get(INI_VARIABLE):
        set_up_logging(config_uri)
    return current_celery_app("the worker")


def _naming_failed_run(call: Callable[..., None]) -> Callable[..., None]:
    """Let callbacks for errors know that they are called as such, and end nothing by their own."""

    def call_errbacks(request: Context, exc: BaseException, traceback: str | None) -> None:
        try:
            with failing(request):
                call(request, exc, traceback)
        except Exception:
            # It would take the place of the task's error, and nobody would learn of that.
            log.exception(
                "The callbacks for the error of %s[%s] have failed", request.task, request.id
            )

    return call_errbacks


def _prepare_lookups(source: Settings, **_: Any) -> None:
    # Celery looks for a default in three mappings under three names: a tenth of a dispatch. What
    # was changed is found at once.
    source.update({name: source[name] for name in _ASKED_OFTEN if name in source})
    source.maps.append(_Elsewhere())


class _Elsewhere(dict[str, Any]):
    """The last mapping of ``app.conf``: what people look for there, and have elsewhere."""

    def __missing__(self, key: str) -> Any:
        if key == "PYRAMID_REGISTRY":
            raise ConfigurationError(
                "app.conf has no PYRAMID_REGISTRY. The registry of the application is "
                "request.registry in a task, which gets a request first, and app.registry of its "
                "Celery app."
            )
        raise KeyError(key)
