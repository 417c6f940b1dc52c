"""The Celery app of a Pyramid registry, and the one seam through which every message passes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import plaster
from celery import Celery
from paste.deploy.loadwsgi import ConfigLoader
from plaster_pastedeploy import Loader as PasteDeployLoader
from pyramid.config import global_registries
from pyramid.registry import Registry
from pyramid.threadlocal import manager as threadlocals
from zope.interface import implementer

from ws_celery.arguments import naming_the_argument
from ws_celery.dispatch import Publication, RecordingProducer, Transactions
from ws_celery.exceptions import NoCurrentApplication, NotIncluded
from ws_celery.interfaces import ICeleryApp
from ws_celery.publishing import Publisher
from ws_celery.request import HEADER, calling_request, describe
from ws_celery.settings import Configuration, ini_variables

__all__ = ("INI_VARIABLE", "PyramidCelery", "current_celery_app", "get_celery_app", "load_registry")

#: Environment variable that tells a process started anew (``--detach``, spawn) which INI to load.
INI_VARIABLE = "WS_CELERY_INI"

#: What the positional arguments of ``send_task`` after name, args and kwargs are called.
_POSITIONAL = tuple(inspect.signature(Celery.send_task).parameters)[4:]


@implementer(ICeleryApp)
class PyramidCelery(Celery):
    """A Celery app that belongs to one Pyramid registry and obeys its transactions.

    It is never Celery's global current app: two Pyramid applications in one process keep apart.

    :param registry: the owner.
    :param settings: Celery's settings by their lower-case names, typed.
    :param configuration: where the settings come from, and the options of calls that Celery does
        not take from its routes, such as ``expires``.
    """

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
        self.publisher = Publisher(self, registry)
        #: What ``@task`` has declared and the application has registered, by name.
        self.declared: dict[str, Any] = {}
        super().__init__(
            registry.package_name,
            set_as_current=False,
            fixups=["ws_celery.lifecycle:PyramidFixup"],
            **options,
        )
        self.config_from_object(dict(settings))

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
        super().close()

    def producer_or_acquire(self, producer: Any = None) -> AbstractContextManager[Any]:
        """Hand out the producer of a message: a recording one while a transaction is open.

        Every way of sending asks here. An explicit ``producer`` means "now"; beat passes one.
        """
        if producer is None:
            recorder = self.transactions.recorder(self, calling_request())
            if recorder is not None:
                return nullcontext(recorder)
        context: AbstractContextManager[Any] = super().producer_or_acquire(producer)
        return context

    def publish(self, publications: Sequence[Publication]) -> None:
        """Hand what a committed transaction has recorded to the broker; see ``Publisher``."""
        self.publisher.publish(publications)

    def send_task(
        self, name: str, args: Any = None, kwargs: Any = None, *starargs: Any, **options: Any
    ) -> Any:
        """Send a task by name, as in Celery; adds the header that describes the calling request.

        Options of the task's route that the call does not give are added, too.

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
        serializer = options.get("serializer") or self.conf.task_serializer
        with naming_the_argument(name, args, kwargs, serializer):
            return super().send_task(name, args, kwargs, *starargs, headers=headers, **options)

    def _routed(self, name: str) -> Mapping[str, Any]:
        if name in self._call_options:
            return self._call_options[name]
        globs = (glob for glob in self._call_options if "*" in glob and fnmatchcase(name, glob))
        return self._call_options.get(next(globs, ""), {})

    def _describe_caller(self) -> dict[str, Any] | None:
        request = calling_request()
        if request is not None:
            return describe(request)
        # A callback or the next task of a chain: its parent's run is over, its message is at hand.
        parent = self.current_worker_task
        inherited: dict[str, Any] | None = (
            (parent.request.headers or {}).get(HEADER) if parent else None
        )
        return inherited

    def _get_backend(self) -> Any:
        backend = super()._get_backend()
        on_task_call = backend.on_task_call

        def unless_recording(producer: Any, task_id: str) -> None:
            # It would contact the result backend at the call: a SUBSCRIBE for each task, and 19 s
            # of waiting for a Redis that is down. AsyncResult.get() subscribes by itself.
            if not isinstance(producer, RecordingProducer):
                on_task_call(producer, task_id)

        backend.on_task_call = unless_recording
        return backend

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned child is a fresh interpreter: it loads the application again.
        return current_celery_app, ("the worker",)


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

    Tried in this order: the request passed to the call, or Pyramid's current request; Pyramid's
    current registry; the only application loaded in this process; the INI named by the environment
    variable ``WS_CELERY_INI``, which is loaded.

    :param what: what needs the app, for the error message.
    :raises NoCurrentApplication: if none or more than one is loaded.
    """
    request = calling_request()
    if request is not None:
        return get_celery_app(request)
    return loaded_celery_app(what)


def loaded_celery_app(what: str) -> PyramidCelery:
    """Return the Celery app of the current registry, or of the only application that is loaded.

    It is what is left to :func:`current_celery_app` without a request.

    :param what: what needs the app, for the error message.
    :raises NoCurrentApplication: if none or more than one is loaded.
    """
    current: Registry = threadlocals.get()["registry"]
    loaded: list[Registry] = [current] if _includes_us(current) else []
    loaded = loaded or [registry for registry in global_registries if _includes_us(registry)]
    if not loaded and (config_uri := os.environ.get(INI_VARIABLE)):
        loaded = [load_registry(config_uri)]
    if len(loaded) != 1:
        raise NoCurrentApplication(what, len(loaded))
    return get_celery_app(loaded[0])


def _includes_us(registry: Registry) -> bool:
    return registry.queryUtility(ICeleryApp) is not None


def load_registry(config_uri: str) -> Registry:
    """Load the Pyramid application of an INI file and return its registry.

    :param config_uri: what plaster takes: a path, with ``#name`` for another application than
        ``main``.
    """
    loader = plaster.get_loader(config_uri, protocols=["wsgi"])
    variables = ini_variables()
    if variables and isinstance(loader, PasteDeployLoader):
        wsgi_app = _with_variables(loader, variables)
    else:
        wsgi_app = loader.get_wsgi_app(defaults=variables or None)
    # Middleware around the application hides its registry.
    return getattr(wsgi_app, "registry", None) or global_registries.last


def _with_variables(loader: PasteDeployLoader, variables: Mapping[str, str]) -> Any:
    # As plaster does it, but that [DEFAULT] does not beat what the command line says.
    config = ConfigLoader(loader.uri.path)
    config.update_defaults({key: value.replace("%", "%%") for key, value in variables.items()})
    global_conf = {**loader.uri.options, **variables}
    return config.get_app(loader.uri.fragment or "main", global_conf)
