"""Wiring: ``config.include("ws_celery")`` reads as a table of contents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import plaster
import transaction
from pyramid.config import PHASE2_CONFIG, global_registries
from pyramid.events import NewRequest
from pyramid.tweens import EXCVIEW

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.dispatch import raising_interruptions
from ws_celery.embedded import resolve
from ws_celery.exceptions import ConfigurationError
from ws_celery.interfaces import ICeleryApp
from ws_celery.settings import celery_settings
from ws_celery.tasks import CATEGORY, add_celery_task, retry_attempts

__all__ = ("eager_tween_factory", "includeme", "read_file")

_REMEDY = (
    "Set broker_url in the [celery] section of the INI file, and in [app:main] "
    "`ws_celery.config_uri = %(__file__)s`, which tells where that section is."
)


def includeme(config: Any) -> None:
    """Give the application its own Celery app, configured by the ``[celery...]`` INI sections.

    Adds the directives ``add_celery_task`` and ``make_celery_app``, and ``request.celery_app``.
    Settings are read when the configuration is committed, so that the order of includes does not
    matter.
    """
    config.add_directive("add_celery_task", add_celery_task)
    config.add_directive("make_celery_app", make_celery_app, action_wrap=False)
    config.add_request_method(get_celery_app, "celery_app", reify=True)
    # Around pyramid_tm, whose commit runs eager tasks.
    over = ("pyramid_tm.tm_tween_factory", EXCVIEW)
    config.add_tween("ws_celery.config.eager_tween_factory", over=over)
    config.add_subscriber(_watch_transactions, NewRequest)
    # Before PHASE3, where tasks are registered: `imports` is scanned here, which adds to them.
    config.action(ICeleryApp, _register_celery_app, args=(config,), order=PHASE2_CONFIG)


def make_celery_app(config: Any) -> PyramidCelery:
    """Commit the configuration and return the application's Celery app, without a WSGI app."""
    config.commit()
    # As make_wsgi_app() does: so the tasks find the only application of a process.
    global_registries.add(config.registry)
    return get_celery_app(config.registry)


def eager_tween_factory(handler: Any, registry: Any) -> Any:
    """Make a tween that lets the error of an eager task end the request which dispatched it.

    Without ``task_always_eager`` and ``task_eager_propagates`` there is no tween.
    """
    conf = get_celery_app(registry).conf
    if not (conf.task_always_eager and conf.task_eager_propagates):
        return handler

    def eager_tween(request: Any) -> Any:
        with raising_interruptions():
            return handler(request)

    return eager_tween


def _watch_transactions(event: NewRequest) -> None:
    # The thread's manager outlives the request: tell what was begun for it from what is left over.
    environ = event.request.environ
    begun = environ.get("tm.manager") is transaction.manager or "repoze.tm.active" in environ
    get_celery_app(event.request).transactions.watch(transaction.manager, begun=begun)


def _register_celery_app(config: Any) -> None:
    retry_attempts(config.registry.settings)  # a wrong one ends the start, not the first run
    settings = _read_settings(config.registry.settings)
    app = PyramidCelery(config.registry, resolve(settings))
    app.transactions.watch(transaction.manager, begun=False)
    config.registry.registerUtility(app, ICeleryApp)
    # The INI is the application's: what it imports has the rank of what the application scans.
    root = config.with_package(config.root_package)
    root.includepath = ()
    for module in (*app.conf.imports, *app.conf.include):
        try:
            root.scan(module, categories=(CATEGORY,))
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"[celery] imports: {error}.") from error


def _read_settings(registry_settings: Mapping[str, Any]) -> dict[str, Any]:
    config_uri = registry_settings.get("ws_celery.config_uri")
    settings = {} if not config_uri else read_file(config_uri)
    if not _has_broker(settings):
        where = f"{config_uri}: no" if config_uri else "No"
        raise ConfigurationError(f"{where} broker is configured. {_REMEDY}")
    return settings


def read_file(config_uri: str) -> dict[str, Any]:
    """Return Celery's settings from the ``[celery...]`` sections of an INI file, typed.

    :raises ConfigurationError: if the file or the section [celery] is missing, or a key is wrong.
    """
    loader = plaster.get_loader(config_uri, protocols=["wsgi"])
    try:
        # Ours only: the formats of logging sections are not to be interpolated.
        names = [name for name in loader.get_sections() if name.startswith("celery")]
        sections = {name: loader.get_settings(name) for name in names}
    except FileNotFoundError:
        raise ConfigurationError(
            f"ws_celery.config_uri = {config_uri!r}: there is no such file. "
            "Write `ws_celery.config_uri = %(__file__)s`."
        ) from None
    if "celery" not in sections:
        raise ConfigurationError(f"{config_uri}: the section [celery] is missing. {_REMEDY}")
    return celery_settings(sections, config_uri)


def _has_broker(settings: Mapping[str, Any]) -> bool:
    # Celery lets these variables beat the configuration.
    variables = ("CELERY_BROKER_URL", "CELERY_BROKER_WRITE_URL")
    return bool(
        settings.get("broker_url")
        or settings.get("broker_write_url")
        or settings.get("task_always_eager")
        or any(os.environ.get(variable) for variable in variables)
    )
