"""The Celery app of a Pyramid registry, and the one seam through which every message passes."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from threading import RLock, local
from typing import TYPE_CHECKING, Any

import plaster
import transaction
from celery import Celery, _state
from celery.app.backends import by_url
from celery.app.task import Context
from celery.app.utils import bugreport
from celery.utils.dispatch import Signal
from celery.utils.text import pretty
from kombu.exceptions import EncodeError
from paste.deploy.loadwsgi import ConfigLoader
from plaster_pastedeploy import Loader as PasteDeployLoader
from pyramid.config import global_registries
from pyramid.registry import Registry
from pyramid.threadlocal import manager as threadlocals
from zope.interface import implementer

from ws_celery.eager import EagerWorker, MemoryBackend
from ws_celery.events import BeforeDispatch, has_subscriber
from ws_celery.exceptions import ConfigurationError, NoCurrentApplication, NotIncluded
from ws_celery.interfaces import ICeleryApp
from ws_celery.logs import set_up_logging
from ws_celery.masking import logger_of, masked_text
from ws_celery.publishing import Publisher
from ws_celery.recording import (
    ROW_HEADER,
    Publication,
    RecordingProducer,
    blame_argument,
    refuse_misread,
)
from ws_celery.request import HEADER, Propagation, calling_request, description_of, failing
from ws_celery.results import fit
from ws_celery.settings import Configuration, ini_variables, our_setting
from ws_celery.shown_arguments import shown_value, told_arguments
from ws_celery.transactions import Transactions

if TYPE_CHECKING:
    from ws_celery.locks import Locks

__all__ = (
    "INI_VARIABLE",
    "PyramidCelery",
    "answer_celery",
    "app_if_loaded",
    "current_celery_app",
    "get_celery_app",
    "load_registry",
    "loaded_celery_app",
)

log = logger_of(__name__)

#: Environment variable that tells a process started anew (``--detach``, spawn) which INI to load.
INI_VARIABLE = "WS_CELERY_INI"

#: The modules whose functions run while an application is loaded.
_LOADERS = ("paste.deploy.loadwsgi", "pyramid.config", "pyramid.config.actions")

#: The modules between a proxy and what uses it.
_OURS = ("ws_celery.app", "ws_celery.declaration", "celery.local")

#: Two threads that need the application of the environment load it once.
_loading = RLock()


def get_celery_app(source: Any) -> PyramidCelery:
    """Return the Celery app of a Pyramid registry, or of the registry of a request.

    :param source: a registry, or anything that has one as its attribute ``registry``.
    :raises NotIncluded: if the application does not include ws_celery.
    """
    registry = getattr(source, "registry", source)
    app: PyramidCelery | None = registry.queryUtility(ICeleryApp)
    if app is None:
        raise NotIncluded
    return app


def current_celery_app(what: str = "celery_app") -> PyramidCelery:
    """Return the Celery app of the application that the running code belongs to.

    Tried in this order: the request passed to the call, or Pyramid's current request; the request
    or task run that this thread's transaction was begun for; Pyramid's current registry; the only
    application loaded in this process; the INI named by the environment variable
    ``WS_CELERY_INI``, which is loaded.

    :param what: what needs the app, for the error message.
    :raises NoCurrentApplication: if none or more than one is loaded.
    """
    return _app_at_hand() or loaded_celery_app(what)


def app_if_loaded() -> PyramidCelery | None:
    """Return what :func:`current_celery_app` would, but ``None`` where it would raise or load."""
    registry: Registry = threadlocals.get()["registry"]
    registries = [registry] if _includes_us(registry) else _loaded()
    try:
        app = _app_at_hand()
    except NotIncluded:
        return None
    return app or (get_celery_app(registries[0]) if len(registries) == 1 else None)


def _app_at_hand() -> PyramidCelery | None:
    request = calling_request()
    return _app_of_the_transaction() if request is None else get_celery_app(request)


def _app_of_the_transaction() -> PyramidCelery | None:
    # Not get(): it would make a transaction that nobody finishes.
    txn = transaction.manager.manager._txn
    try:
        app: PyramidCelery | None = None if txn is None else txn.data(ICeleryApp)
    except KeyError:
        return None
    return app


def loaded_celery_app(what: str) -> PyramidCelery:
    """Return the Celery app of the current registry, or of the only application that is loaded.

    It is what is left to :func:`current_celery_app` without a request.

    :param what: what needs the app, for the error message.
    :raises NoCurrentApplication: if none or more than one is loaded.
    :raises ConfigurationError: if the application is only being loaded.
    """
    current: Registry = threadlocals.get()["registry"]
    if _includes_us(current):
        return get_celery_app(current)
    if place := _place_in_loading():
        raise ConfigurationError(
            f"{place}: {what} is used while the application is being loaded, so that it has no "
            "Celery app yet. Use it in a function that is called later, or in includeme(config) "
            "as get_celery_app(config.registry)."
        )
    loaded = _loaded()
    if not loaded and (config_uri := os.environ.get(INI_VARIABLE)):
        with _loading:
            loaded = _loaded() or [load_registry(config_uri)]
    if len(loaded) != 1:
        raise NoCurrentApplication(what, len(loaded))
    return get_celery_app(loaded[0])


def _loaded() -> list[Registry]:
    return [registry for registry in global_registries if _includes_us(registry)]


def _place_in_loading() -> str | None:
    """Return what asks, if this thread is loading an application, whoever has begun it."""
    places = [
        (frame.f_globals.get("__name__", ""), frame) for frame, _ in traceback.walk_stack(None)
    ]
    if not any(module in _LOADERS for module, _ in places):
        return None
    asks = next(frame for module, frame in places if not module.startswith(_OURS))
    return f"{asks.f_code.co_filename}:{asks.f_lineno}"


def _includes_us(registry: Registry) -> bool:
    return registry.queryUtility(ICeleryApp) is not None


def load_registry(config_uri: str) -> Registry:
    """Load the Pyramid application of an INI file and return its registry.

    :param config_uri: what plaster takes: a path, with ``#name`` for another application than
        ``main``.
    :raises ConfigurationError: if its ``[celery...]`` sections are not what the application reads.
    """
    loader = plaster.get_loader(config_uri, protocols=["wsgi"])
    variables = ini_variables()
    if variables and isinstance(loader, PasteDeployLoader):
        wsgi_app = _with_variables(loader, variables)
    else:
        wsgi_app = loader.get_wsgi_app(defaults=variables or None)
    # Middleware around the application hides its registry.
    registry = getattr(wsgi_app, "registry", None) or global_registries.last
    app = registry.queryUtility(ICeleryApp)
    if app is not None and app.configuration is not None:
        app.configuration.refuse_unread(config_uri)
    return registry


def _with_variables(loader: PasteDeployLoader, variables: Mapping[str, str]) -> Any:
    # As plaster does it, but that [DEFAULT] does not beat what the command line says.
    config = ConfigLoader(loader.uri.path)
    config.update_defaults({key: value.replace("%", "%%") for key, value in variables.items()})
    global_conf = {**loader.uri.options, **variables}
    return config.get_app(loader.uri.fragment or "main", global_conf)


def answer_celery() -> None:
    """Let Celery ask Pyramid which app is current, for ``shared_task``, ``signature("name")``.

    From now on, in this process, Celery's current app is that of the current request, be it of the
    web, a bootstrap, a shell or a run; without one it is what Celery was told by ``set_current()``,
    else the only application that is loaded, else Celery's default. Nothing is loaded.
    """
    # Celery has no public way to ask for the current app anew in each thread at each look.
    if not isinstance(_state._tls, _CurrentApp):
        _state._tls = _CurrentApp(_state._tls)


class _CurrentApp:
    """Stands in the place of Celery's thread-local that keeps the current app.

    :param told: that thread-local.
    """

    def __init__(self, told: local) -> None:
        self._told = told

    @property
    def current_app(self) -> Celery | None:
        request = calling_request()
        if request is not None:
            return _app_of(getattr(request, "registry", None)) or self._told.current_app
        found = _app_of_the_transaction() or _app_of(_configured_registry())
        return found or self._told.current_app or _only_app()

    @current_app.setter
    def current_app(self, app: Celery | None) -> None:
        self._told.current_app = app


def _app_of(registry: Registry | None) -> PyramidCelery | None:
    found: PyramidCelery | None = None
    if registry is not None:
        found = registry.queryUtility(ICeleryApp)
    return found


def _configured_registry() -> Registry | None:
    # While one is being configured, venusian looks at each shared task: its app would be finalized.
    registry = threadlocals.get()["registry"]
    return registry if registry in global_registries else None


def _only_app() -> PyramidCelery | None:
    apps = [app for registry in global_registries if (app := _app_of(registry))]
    return apps[0] if len(apps) == 1 else None


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
    #: Runs what would be sent, with ``task_always_eager``. Celery is not told; see eager.py.
    eager: EagerWorker | None = None

    def __init__(self, registry: Registry, **options: Any) -> None:
        self.registry = registry
        self._call_options: Mapping[str, Any] = {}
        self.transactions = Transactions()
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
        self.declared: dict[str, Any] = {}
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
        self.publisher = Publisher(self, self.registry)
        self.propagation = Propagation(self.registry)
        settings = {"beat_scheduler": "ws_celery.beat:Scheduler", **settings}
        # Celery's default would be one for all applications of a process.
        settings["beat_schedule"] = dict(settings.get("beat_schedule") or {})
        self.installed = dict(settings["beat_schedule"])
        self.eager = EagerWorker(self) if settings.pop("task_always_eager", False) else None
        self.config_from_object(settings)

    def complete(self) -> None:
        """Tell the handlers of Celery's signals, now that the application's tasks are there."""
        self.finalize()
        self.on_after_configure.release()
        self.on_after_finalize.release()

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
        """Clean up after the application, as in Celery; what is spooled is sent first."""
        self.publisher.end()
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
        if publications := [each for each in publications if not each.waits]:
            self.publisher.publish(publications)

    def send_task(
        self, name: str, args: Any = None, kwargs: Any = None, *starargs: Any, **options: Any
    ) -> Any:
        """Send a task by name, as in Celery; adds the header that describes the calling request.

        Options of the task's route that the call does not give are added, too. Subscribers to
        :class:`~ws_celery.events.BeforeDispatch` have the last word.

        :raises ArgumentNotSerializable: at once, if a value does not serialise.
        :raises OptionNotSendable: at once, if a header or a callback would be read otherwise.
        :raises TypeError: at once, if the key of ``@one_instance`` cannot be made of the arguments.
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
        serializer = options.get("serializer") or self.conf.task_serializer
        refuse_misread(name, args, kwargs, serializer, options)
        self.locks.check_key(self.tasks.get(name), args, kwargs)
        self._describe_arguments(name, args, kwargs, options)
        try:
            with self._keeping_retries(options):
                return super().send_task(name, args, kwargs, **options)
        except EncodeError as error:
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
        if self.outbox is None or ROW_HEADER not in options["headers"]:
            return nullcontext()
        keeping: AbstractContextManager[None] = self.outbox.runs.keeping_retries(
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
        fit(self, backend)
        # Celery has no other place from which it calls a task like a function.
        backend._call_task_errbacks = _telling_tasks(backend._call_task_errbacks)
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


class _SignalOfApplication(Signal):
    """A signal of a Celery app that waits until the application has registered its tasks.

    Celery sends it as soon as somebody asks for an option or a task, which is before that, and
    only logs what its handlers raise.
    """

    _released = False
    _held: tuple[Any, dict[str, Any]] | None = None

    def connect(self, *args: Any, **options: Any) -> Any:
        """Connect a handler, as in Celery; one that ``includeme()`` has defined lives on."""
        return super().connect(*args, **{"weak": False, **options})

    def send(self, sender: Any, **named: Any) -> Any:
        """Call the handlers, or do so at the release."""
        if self._released:
            return super().send(sender, **named)
        self._held = sender, named
        return []

    def release(self) -> None:
        """Call the handlers, if Celery has sent the signal."""
        self._released = True
        if self._held is not None:
            sender, named = self._held
            self._held = None
            self.send(sender, **named)


def _in_spawned_child() -> PyramidCelery:
    """Load the application again, and its logging: the child is a fresh interpreter."""
    if config_uri := os.environ.get(INI_VARIABLE):
        set_up_logging(config_uri)
    return current_celery_app("the worker")


def _telling_tasks(call: Callable[..., None]) -> Callable[..., None]:
    """Let callbacks for errors know that they are called as such, and end nothing by their own."""

    def call_errbacks(request: Context, exc: BaseException, traceback: str | None) -> None:
        try:
            with failing(request):
                call(request, exc, traceback)
        except Exception:
            # It would take the place of the task's error, and nobody would be told of that.
            log.exception(
                "The callbacks for the error of %s[%s] have failed", request.task, request.id
            )

    return call_errbacks


def _prepare_lookups(source: Any, **_: Any) -> None:
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
