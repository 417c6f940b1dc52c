"""Which application the running code belongs to, and loading one by its INI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import plaster
import transaction
from paste.deploy.loadwsgi import ConfigLoader
from plaster_pastedeploy import Loader as PasteDeployLoader
from pyramid.config import global_registries
from pyramid.registry import Registry
from pyramid.threadlocal import manager as threadlocals

from ws_celery.exceptions import NoCurrentApplication, NotIncluded
from ws_celery.interfaces import ICeleryApp
from ws_celery.request import calling_request
from ws_celery.settings import ini_variables

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = (
    "INI_VARIABLE",
    "current_celery_app",
    "get_celery_app",
    "load_registry",
    "loaded_celery_app",
)

#: Environment variable that tells a process started anew (``--detach``, spawn) which INI to load.
INI_VARIABLE = "WS_CELERY_INI"


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
    request = calling_request()
    if request is not None:
        return get_celery_app(request)
    return _app_of_the_transaction() or loaded_celery_app(what)


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
