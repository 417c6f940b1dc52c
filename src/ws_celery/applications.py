"""Which application, and so which Celery app, the running code belongs to; loading one."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from threading import RLock, local
from typing import TYPE_CHECKING, Any

import transaction
from celery import Celery
from paste.deploy.loadwsgi import ConfigLoader
from plaster_pastedeploy import Loader as PasteDeployLoader
from pyramid.config import global_registries
from pyramid.registry import Registry
from pyramid.threadlocal import manager as threadlocals

from ws_celery.compat import open_transaction, replace_current_app
from ws_celery.exceptions import ConfigurationError, NoCurrentApplication
from ws_celery.interfaces import ICeleryApp
from ws_celery.request import calling_request, get_celery_app
from ws_celery.settings import ini_variables
from ws_celery.settings.reader import loader_of

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = (
    "INI_VARIABLE",
    "answer_celery",
    "app_if_loaded",
    "app_without_request",
    "current_celery_app",
    "load_registry",
    "loaded_celery_app",
)

#: Environment variable that tells a process started anew (``--detach``, spawn) which INI to load.
INI_VARIABLE = "WS_CELERY_INI"

#: The modules whose functions run while an application is loaded.
_LOADERS = ("paste.deploy.loadwsgi", "pyramid.config", "pyramid.config.actions")

#: The modules between a proxy and what uses it.
_OURS = ("ws_celery.applications", "ws_celery.declaration", "celery.local")

#: Two threads that need the application of the environment load it once.
_loading = RLock()


def current_celery_app(what: str = "celery_app") -> PyramidCelery:
    """Return the Celery app of the application that the running code belongs to.

    Tried in this order: the request passed to the call, or Pyramid's current request; the request
    or task run that this thread's transaction was begun for; Pyramid's current registry; the only
    application loaded in this process; the INI named by the environment variable
    ``WS_CELERY_INI``, which is loaded.

    :param what: what needs the app, for the error message.
    :raises NoCurrentApplication: if none or more than one is loaded.
    """
    request = calling_request()
    return app_without_request(what) if request is None else get_celery_app(request)


def app_without_request(what: str) -> PyramidCelery:
    """Return what :func:`current_celery_app` does if there is no request.

    :raises NoCurrentApplication: likewise.
    """
    return _app_of_transaction() or loaded_celery_app(what)


def app_if_loaded() -> PyramidCelery | None:
    """Return what :func:`current_celery_app` would, but ``None`` where it would raise or load."""
    request = calling_request()
    if request is not None:
        return _app_of(getattr(request, "registry", None))
    return _app_of_transaction() or _app_of(threadlocals.get()["registry"]) or _only_app()


def _app_of(registry: Registry | None) -> PyramidCelery | None:
    return None if registry is None else registry.queryUtility(ICeleryApp)


def _app_of_transaction() -> PyramidCelery | None:
    """Return the app of the request or run that this thread's transaction was begun for."""
    # Not get(): it would make a transaction that nobody finishes.
    txn = open_transaction(transaction.manager.manager)
    try:
        return None if txn is None else txn.data(ICeleryApp)
    except KeyError:
        return None


def loaded_celery_app(what: str) -> PyramidCelery:
    """Return the Celery app of the current registry, or of the only application that is loaded.

    It is what is left to :func:`current_celery_app` without a request.

    :param what: what needs the app, for the error message.
    :raises NoCurrentApplication: if none or more than one is loaded.
    :raises ConfigurationError: if the application is only being loaded.
    """
    if current := _app_of(threadlocals.get()["registry"]):
        return current
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
    return [registry for registry in global_registries if _app_of(registry)]


def _place_in_loading() -> str | None:
    """Return what asks, if this thread is loading an application, whoever has begun it."""
    places = [
        (frame.f_globals.get("__name__", ""), frame) for frame, _ in traceback.walk_stack(None)
    ]
    if not any(module in _LOADERS for module, _ in places):
        return None
    asks = next(frame for module, frame in places if not module.startswith(_OURS))
    return f"{asks.f_code.co_filename}:{asks.f_lineno}"


def load_registry(config_uri: str) -> Registry:
    """Load the Pyramid application of an INI file and return its registry.

    :param config_uri: what plaster takes: a path, with ``#name`` for another application than
        ``main``.
    :raises ConfigurationError: if its ``[celery...]`` sections are not what the application reads.
    """
    loader = loader_of(config_uri)
    variables = ini_variables()
    if variables and isinstance(loader, PasteDeployLoader):
        wsgi_app = _with_variables(loader, variables)
    else:
        wsgi_app = loader.get_wsgi_app(defaults=variables or None)
    # Middleware around the application hides its registry.
    registry = getattr(wsgi_app, "registry", None) or global_registries.last
    app = _app_of(registry)
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
    web, a bootstrap, a shell or a run; without one it is what ``set_current()`` has set,
    else the only application that is loaded, else Celery's default. Nothing is loaded.
    """
    replace_current_app(lambda kept: kept if isinstance(kept, _CurrentApp) else _CurrentApp(kept))


class _CurrentApp:
    """Stands in the place of Celery's thread-local that keeps the current app.

    :param of_celery: that thread-local.
    """

    def __init__(self, of_celery: local) -> None:
        self._of_celery = of_celery

    @property
    def current_app(self) -> Celery | None:
        request = calling_request()
        if request is not None:
            return _app_of(getattr(request, "registry", None)) or self._of_celery.current_app
        found = _app_of_transaction() or _app_of(_configured_registry())
        return found or self._of_celery.current_app or _only_app()

    @current_app.setter
    def current_app(self, app: Celery | None) -> None:
        self._of_celery.current_app = app


def _configured_registry() -> Registry | None:
    # While one is being configured, venusian looks at each shared task: its app would be finalized.
    registry = threadlocals.get()["registry"]
    return registry if registry in global_registries else None


def _only_app() -> PyramidCelery | None:
    loaded = _loaded()
    return _app_of(loaded[0]) if len(loaded) == 1 else None
