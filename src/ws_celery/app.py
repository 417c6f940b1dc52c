"""The Celery app of a Pyramid registry, and the one seam through which every message passes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from celery import Celery
from celery.app.backends import by_url
from celery.app.utils import bugreport
from celery.utils.text import pretty
from kombu.exceptions import EncodeError
from pyramid.registry import Registry
from zope.interface import implementer

from ws_celery.applications import INI_VARIABLE, current_celery_app
from ws_celery.arguments import blame_argument
from ws_celery.dispatch import Publication, RecordingProducer
from ws_celery.eager import EagerWorker, MemoryBackend
from ws_celery.events import BeforeDispatch, has_subscriber
from ws_celery.interfaces import ICeleryApp
from ws_celery.locks import Locks
from ws_celery.logs import set_up_logging
from ws_celery.masking import masked_text
from ws_celery.propagation import Propagation
from ws_celery.publishing import Publisher
from ws_celery.request import HEADER, calling_request, description_of
from ws_celery.settings import Configuration, our_setting
from ws_celery.shown_arguments import shown_value, told_arguments
from ws_celery.transactions import Transactions

__all__ = ("PyramidCelery",)

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

    It is never Celery's global current app: two Pyramid applications in one process keep apart.

    :param registry: the owner.
    :param settings: Celery's settings by their lower-case names, typed.
    :param configuration: where the settings come from, and the options of calls that Celery does
        not take from its routes, such as ``expires``.
    """

    control_cls = "ws_celery.control:Control"
    events_cls = "ws_celery.lifecycle:Events"

    def __init__(
        self,
        registry: Registry,
        settings: Mapping[str, Any],
        configuration: Configuration | None = None,
        **options: Any,
    ) -> None:
        self.registry = registry
        self.configuration = configuration
        self._call_options = configuration.call_options if configuration else {}
        self.transactions = Transactions()
        #: The attribute of requests that is their SQLAlchemy session.
        self.session_attribute: str = our_setting(
            registry.settings, "ws_celery.dbsession", "dbsession"
        )
        self.publisher = Publisher(self, registry)
        settings = {"beat_scheduler": "ws_celery.beat:Scheduler", **settings}
        # Celery's default would be one for all applications of a process.
        settings["beat_schedule"] = dict(settings.get("beat_schedule") or {})
        #: Runs what would be sent, with ``task_always_eager``. Celery is not told; see eager.py.
        self.eager = EagerWorker(self) if settings.pop("task_always_eager", False) else None
        #: Keeps dispatches until they have taken effect, if the application has switched it on.
        self.outbox: Any = None
        #: Keeps tasks with ``@one_instance`` from running twice at a time.
        self.locks = Locks(self)
        #: The schedule in the database, if the application has switched it on.
        self.schedule: Any = None
        #: Entries of the schedule that code declares: name to fields.
        self.periodic: dict[str, Mapping[str, Any]] = {}
        #: What the configuration has put into Celery's beat_schedule; the rest of it is code's.
        self.installed: dict[str, Any] = dict(settings.get("beat_schedule") or {})
        #: What beat writes for a probe, if it is to.
        self.beat_health_file: Path | None = None
        self.propagation = Propagation(registry)
        #: What ``@task`` has declared and the application has registered, by name.
        self.declared: dict[str, Any] = {}
        super().__init__(
            registry.package_name,
            set_as_current=False,
            fixups=["ws_celery.lifecycle:PyramidFixup"],
            loader="ws_celery.lifecycle:PyramidLoader",
            **options,
        )
        self.steps["consumer"].add("ws_celery.consumer:OnRedis")
        self.on_after_configure.connect(_keep_at_hand)
        self.config_from_object(settings)

    def connection_for_write(self, *args: Any, **options: Any) -> Any:
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
        """Clean up after the application, as in Celery."""
        self.publisher.close()
        self.locks.close()
        super().close()

    def producer_or_acquire(self, producer: Any = None) -> AbstractContextManager[Any]:
        """Hand out the producer of a message: a recording one while a transaction is open.

        Every way of sending asks here. An explicit ``producer`` means "now"; beat passes one.
        """
        if producer is None and (recorder := self.recorder()) is not None:
            return nullcontext(recorder)
        if self.eager is not None and not isinstance(producer, RecordingProducer):
            return self.eager.producer()
        context: AbstractContextManager[Any] = super().producer_or_acquire(producer)
        return context

    def recorder(self) -> RecordingProducer | None:
        """Return what records for the transaction that a dispatch made now belongs to, if any."""
        return self.transactions.recorder(self, calling_request())

    def publish(self, publications: Sequence[Publication]) -> None:
        """Hand what a committed transaction has recorded to the broker; see ``Publisher``."""
        if self.eager is not None:
            self.eager.run(publications)
            return
        if self.outbox is not None:
            publications = self.outbox.ready(publications)
        if publications:
            self.publisher.publish(publications)

    def send_task(
        self, name: str, args: Any = None, kwargs: Any = None, *starargs: Any, **options: Any
    ) -> Any:
        """Send a task by name, as in Celery; adds the header that describes the calling request.

        Options of the task's route that the call does not give are added, too. Subscribers to
        :class:`~ws_celery.events.BeforeDispatch` have the last word.

        :raises ArgumentNotSerializable: at once, if a value does not serialise.
        """
        if routed := self._routed(name):
            given = {
                *_POSITIONAL[: len(starargs)],
                *(key for key in options if options[key] is not None),
            }
            if "eta" in given:
                given.add("countdown")
            options.update((key, value) for key, value in routed.items() if key not in given)
        headers = dict(options.pop("headers", None) or {})
        if HEADER not in headers and (description := self._describe_caller()):
            headers[HEADER] = description
        options = {**dict(zip(_POSITIONAL, starargs, strict=False)), **options, "headers": headers}
        self.before_dispatch(name, args, kwargs, options)
        self._describe_arguments(name, args, kwargs, options)
        try:
            with self._keeping_retries(options):
                return super().send_task(name, args, kwargs, **options)
        except EncodeError as error:
            serializer = options.get("serializer") or self.conf.task_serializer
            blame_argument(error, name, args, kwargs, serializer)
            raise

    def _describe_arguments(
        self, name: str, args: Any, kwargs: Any, options: dict[str, Any]
    ) -> None:
        """Tell the arguments without their secrets: Celery shows these words in logs and events."""
        words = told_arguments(self, name, args, kwargs)
        for key, text in zip(("argsrepr", "kwargsrepr"), words, strict=True):
            if text is not None and options.get(key) is None:
                options[key] = text

    def _keeping_retries(self, options: dict[str, Any]) -> AbstractContextManager[None]:
        if self.outbox is None:
            return nullcontext()
        keeping: AbstractContextManager[None] = self.outbox.keeping_retries(
            options["headers"], options.get("task_id")
        )
        return keeping

    def before_dispatch(self, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        """Let subscribers look at a call before its message is built, and change ``options``.

        :raises Exception: what a subscriber raises, to stop the call.
        """
        if has_subscriber(self.registry, BeforeDispatch):
            options["headers"] = dict(options.get("headers") or {})
            event = BeforeDispatch(
                self, calling_request(), name, tuple(args or ()), dict(kwargs or {}), options
            )
            self.registry.notify(event)

    def _routed(self, name: str) -> Mapping[str, Any]:
        if name in self._call_options:
            return self._call_options[name]
        globs = (glob for glob in self._call_options if "*" in glob and fnmatchcase(name, glob))
        return self._call_options.get(next(globs, ""), {})

    def _describe_caller(self) -> dict[str, Any] | None:
        request = calling_request()
        if request is not None:
            return self.propagation.describe(request)
        # A callback or the next task of a chain: its parent's run is over, its message is at hand.
        parent = self.current_worker_task
        return description_of(parent.request) if parent else None

    def backend_class(self) -> tuple[Any, str | None]:
        """Return the class of the result backend, and its URL: one that is made may connect."""
        if self.eager is not None:
            return MemoryBackend, None
        found: tuple[Any, str | None] = by_url(
            self.backend_cls or self.conf.result_backend, self.loader
        )
        return found

    def _get_backend(self) -> Any:
        backend = super()._get_backend() if self.eager is None else MemoryBackend(self)
        on_task_call = backend.on_task_call

        def unless_recording(producer: Any, task_id: str) -> None:
            # It would contact the result backend at the call: a SUBSCRIBE for each task, and 19 s
            # of waiting for a Redis that is down. AsyncResult.get() subscribes by itself.
            if not isinstance(producer, RecordingProducer):
                on_task_call(producer, task_id)

        backend.on_task_call = unless_recording
        return backend

    def __reduce__(self) -> tuple[Any, ...]:
        return _in_spawned_child, ()

    def bugreport(self) -> str:
        """Return what ``ws-celery report`` prints, without secrets."""
        report: str = bugreport(_Reported(self))
        return masked_text(report)


class _Reported:
    """What Celery's report asks an app for; its settings tell no secrets."""

    def __init__(self, app: PyramidCelery) -> None:
        self._app, self.conf, self.loader = app, self, app.loader
        self.connection = app.connection
        self.result_backend = app.conf.result_backend

    def humanize(self) -> str:
        """Return the settings that are no defaults, one on a line."""
        table = self._app.conf.table()
        shown = {name: shown_value(self._app, name, value) for name, value in table.items()}
        return "\n".join(f"{name}: {pretty(value, width=50)}" for name, value in shown.items())


def _in_spawned_child() -> PyramidCelery:
    """Load the application again, and its logging: the child is a fresh interpreter."""
    if config_uri := os.environ.get(INI_VARIABLE):
        set_up_logging(config_uri)
    return current_celery_app("the worker")


def _keep_at_hand(source: Any, **_: Any) -> None:
    # Celery looks for a default in three mappings under three names: a tenth of a dispatch. What
    # was changed is found at once.
    source.update({name: source[name] for name in _ASKED_OFTEN if name in source})
