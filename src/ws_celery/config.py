"""Wiring: ``config.include("ws_celery")`` reads as a table of contents."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeAlias

import plaster
import transaction
from pyramid.config import (
    PHASE1_CONFIG,
    PHASE2_CONFIG,
    PHASE3_CONFIG,
    Configurator,
    global_registries,
)
from pyramid.events import NewRequest
from pyramid.exceptions import ConfigurationExecutionError
from pyramid.registry import Deferred, Registry
from pyramid.request import Request
from pyramid.response import Response
from pyramid.tweens import EXCVIEW
from zope.interface import implementer

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.converters import nearest
from ws_celery.declaration import (
    CATEGORY,
    add_celery_task,
    add_imported_task,
    add_periodic_task,
)
from ws_celery.derivers import add_task_deriver
from ws_celery.embedded import resolve
from ws_celery.exceptions import ConfigurationError, Fault
from ws_celery.interfaces import ICeleryApp, ICelerySource, IRequestPropagator
from ws_celery.locks import Locks
from ws_celery.masking import masked, without_arguments
from ws_celery.request import Propagator
from ws_celery.settings import Configuration, Setting, our_setting, read_configuration
from ws_celery.settings.options import OUR_SETTINGS
from ws_celery.transactional import retry_attempts
from ws_celery.transactions import raising_interruptions

__all__ = (
    "GROUP",
    "SETTING",
    "Plugin",
    "eager_tween_factory",
    "includeme",
    "read_file",
    "wanted_plugins",
)

#: A tween, or what is inside of it.
Tween: TypeAlias = Callable[[Request], Response]

GROUP = "ws_celery.tasks"
SETTING = "ws_celery.plugins"


@dataclass(frozen=True)
class Plugin:
    """An entry point of an installed distribution, which names modules with tasks.

    :param distribution: the name of the distribution, as ``pip list`` shows it.
    """

    distribution: str
    entry_point: EntryPoint

    def modules(self) -> list[str]:
        """Ask the distribution for the names of its modules; they are not imported.

        :raises TypeError: if it does not return names.
        """
        found = self.entry_point.load()()
        names = [found] if isinstance(found, str) else list(found)  # it may be a generator
        if isinstance(found, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"expected a list of names of modules, got {found!r}")
        return names

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Let an error name the distribution, and the way to do without it.

        :raises ConfigurationError: for whatever is raised inside.
        """
        try:
            yield
        except ConfigurationError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".rstrip(".")
            raise ConfigurationError(
                f"The distribution {self.distribution} brings tasks by its entry point "
                f"`{self.entry_point.name} = {self.entry_point.value}` of the group {GROUP}, which "
                f"cannot be loaded ({reason}). Repair or uninstall it, or set {SETTING} to none or "
                "to the names of the others."
            ) from error


def wanted_plugins(settings: Mapping[str, Any]) -> list[Plugin]:
    """Return the installed plugins that the setting ``ws_celery.plugins`` asks for, by name.

    :raises ConfigurationError: if it names one that is not installed.
    """
    wanted = OUR_SETTINGS[SETTING].accept(settings.get(SETTING, "all"))
    if wanted == ["none"]:
        return []
    installed = sorted(_installed(), key=lambda plugin: (plugin.distribution, plugin.entry_point))
    if wanted == ["all"]:
        return installed
    by_name = {_normalized(plugin.distribution): plugin.distribution for plugin in installed}
    if unknown := [name for name in wanted if _normalized(name) not in by_name]:
        raise ConfigurationError(*(_not_installed(name, by_name) for name in unknown))
    names = {by_name[_normalized(name)] for name in wanted}
    return [plugin for plugin in installed if plugin.distribution in names]


def _installed() -> Iterator[Plugin]:
    for entry_point in entry_points(group=GROUP):
        distribution: Any = entry_point.dist
        yield Plugin(distribution.metadata["Name"], entry_point)


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _not_installed(name: str, by_name: Mapping[str, str]) -> Fault:
    problem = f"{SETTING} = {name!r}: no distribution of this name that brings tasks is installed"
    expected = f"all, none, or some of: {', '.join(by_name.values())}" if by_name else "none"
    return Fault(problem, expected=expected, nearest=nearest(name, by_name.values()))


def includeme(config: Configurator) -> None:
    """Give the application its own Celery app, configured by the ``[celery...]`` INI sections.

    Adds the directives ``add_celery_task``, ``add_periodic_task``, ``add_task_deriver``,
    ``add_request_propagator``, ``configure_celery`` and ``make_celery_app``, and
    ``request.celery_app``.
    Settings are read when the configuration is committed, so that the order of includes does not
    matter.
    """
    config.add_directive("add_celery_task", add_celery_task)
    config.add_directive("add_task_deriver", add_task_deriver)
    config.add_directive("add_periodic_task", add_periodic_task)
    config.add_directive("add_request_propagator", add_request_propagator)
    config.add_directive("configure_celery", configure_celery)
    config.add_directive("make_celery_app", make_celery_app, action_wrap=False)
    config.add_request_method(get_celery_app, "celery_app", reify=True)
    # Around pyramid_tm, whose commit runs eager tasks.
    over = ("pyramid_tm.tm_tween_factory", EXCVIEW)
    config.add_tween("ws_celery.config.eager_tween_factory", over=over)
    app = PyramidCelery(config.registry)
    app.locks = Locks(app)
    config.registry.registerUtility(app, ICeleryApp)
    config.add_subscriber(app.transactions.watch_request, NewRequest)
    # Configured before PHASE3, where tasks are registered; after it what `imports` and plugins
    # name, and last the handlers that look for tasks.
    _add_action(config, _configure_celery_app, order=PHASE2_CONFIG)
    _add_action(config, _include_parts, order=PHASE3_CONFIG - 1)
    _add_action(config, _scan_imports, order=PHASE3_CONFIG + 1)
    _add_action(config, _complete, order=PHASE3_CONFIG + 2)


def _add_action(config: Configurator, function: Callable[[Any], None], order: int) -> None:
    """Let a function be called when the configuration is committed; what it raises is not wrapped.

    Pyramid wraps what an action raises, so that nobody could ask for ``except ConfigurationError``,
    but not what the computing of its discriminator raises.
    """

    def discriminator() -> str:
        function(config)
        return f"ws_celery {function.__name__}"

    config.action(Deferred(discriminator), order=order)


def make_celery_app(config: Configurator) -> PyramidCelery:
    """Commit the configuration and return the application's Celery app, without a WSGI app.

    :raises ConfigurationError: whatever is wrong with the settings, or with a task.
    """
    try:
        config.commit()
    except ConfigurationExecutionError as error:
        if isinstance(error.evalue, ConfigurationError):
            raise error.evalue from error
        raise
    # As make_wsgi_app() does: so the tasks find the only application of a process.
    global_registries.add(config.registry)
    return get_celery_app(config.registry)


def eager_tween_factory(handler: Tween, registry: Registry) -> Tween:
    """Make a tween that lets the error of an eager task end the request which dispatched it.

    Without ``task_always_eager`` and ``task_eager_propagates`` there is no tween.
    """
    app = get_celery_app(registry)
    if app.eager is None or not app.conf.task_eager_propagates:
        return handler

    def eager_tween(request: Request) -> Response:
        with raising_interruptions() as errors:
            try:
                return handler(request)
            finally:
                if errors:
                    _end_attempts(request)

    return eager_tween


def _end_attempts(request: Request) -> None:
    # The request has committed: pyramid_retry must not do its work again for the error of a task.
    environ = request.environ
    environ["retry.attempts"] = environ.get("retry.attempt", 0) + 1


def configure_celery(config: Configurator, config_uri: str | None = None, **overrides: Any) -> None:
    """Say where Celery's settings are, and set some of them in code: a directive.

    :param config_uri: the file with the ``[celery...]`` sections, as plaster takes it; the setting
        ``ws_celery.config_uri`` if not given.
    :param overrides: options by name, which beat those of the file: ``worker_concurrency=2``.
    :raises pyramid.exceptions.ConfigurationConflictError: when the configuration is committed, if
        it is called twice.
    """
    introspectable = config.introspectable(
        "celery configuration", None, "configure_celery", "celery configuration"
    )
    introspectable["config_uri"] = config_uri
    introspectable["overrides"] = masked("", overrides)

    def remember() -> None:
        config.registry.registerUtility(_Source(config_uri, overrides), ICelerySource)

    config.action(
        "celery configuration", remember, order=PHASE1_CONFIG, introspectables=(introspectable,)
    )


def add_request_propagator(
    config: Configurator,
    name: str,
    capture: Callable[[Any], Any] | str,
    restore: Callable[[Any, Any], None] | str,
) -> None:
    """Add something that can travel with a task; ``ws_celery.propagate`` switches it on.

    :param name: its name in the setting and in the message header; ``locale``, ``request_id`` or
        ``user`` takes the place of what ws_celery has under this name.
    :param capture: called with the request of each dispatch, or its dotted name: returns a JSON
        value, or ``None`` for nothing.
    :param restore: called with the request of the task and the value, before the task runs.
    :raises ConfigurationError: if the name cannot stand in the setting.
    """
    if name == "url" or not re.fullmatch(r"[^\W\d]\w*", name):
        raise ConfigurationError(
            f"add_request_propagator({name!r}): expected a name of letters, digits and "
            "underscores other than url. Call it tenant, for example."
        )
    propagator = Propagator(config.maybe_dotted(capture), config.maybe_dotted(restore))
    introspectable = config.introspectable("request propagators", name, name, "request propagator")
    introspectable["propagator"] = propagator
    config.action(
        ("request propagator", name),
        partial(config.registry.registerUtility, propagator, IRequestPropagator, name),
        order=PHASE1_CONFIG,
        introspectables=(introspectable,),
    )


@implementer(ICelerySource)
@dataclass(frozen=True)
class _Source:
    config_uri: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def _configure_celery_app(config: Configurator) -> None:
    retry_attempts(config.registry.settings)  # a wrong one ends the start, not the first run
    configuration = _read(config.registry)
    configuration.report()
    app = get_celery_app(config.registry)
    app.configure(resolve(configuration.settings), configuration)
    app.transactions.watch(transaction.manager, begun=False)
    if config.introspection:
        for row in configuration.rows:
            _introspect(config, row)


def _complete(config: Configurator) -> None:
    get_celery_app(config.registry).complete()


#: Parts that a setting of their name switches on, and the attribute of the app that each sets.
_PARTS = {"ws_celery.outbox": "outbox", "ws_celery.beat": "schedule"}


def _include_parts(config: Configurator) -> None:
    """Include the parts that settings ask for and the application has not included."""
    app = get_celery_app(config.registry)
    # At once: an action that is added while others are executed makes Pyramid stumble.
    at_once = Configurator(registry=config.registry, autocommit=True)
    for part, attribute in _PARTS.items():
        wanted = our_setting(config.registry.settings, part, default=False)
        if wanted and getattr(app, attribute) is None:
            at_once.include(part)


def _scan_imports(config: Configurator) -> None:
    app = get_celery_app(config.registry)
    for module in (*app.conf.imports, *app.conf.include):
        try:
            _scan(config, module)
        except ModuleNotFoundError as error:
            raise _not_found(app.configuration, error) from error
    for plugin in wanted_plugins(config.registry.settings):
        with plugin.blamed():
            for module in plugin.modules():
                _scan(config, module, plugin.distribution)


def _scan(config: Configurator, module: str, plugin: str | None = None) -> None:
    add = partial(add_imported_task, config, plugin=plugin)
    config.scan(module, categories=(CATEGORY,), add_celery_task=add)


def _read(registry: Registry) -> Configuration:
    source = registry.queryUtility(ICelerySource, default=_Source())
    setting = registry.settings.get("ws_celery.config_uri")
    config_uri = source.config_uri or setting
    if setting and source.config_uri and not _same_file(setting, source.config_uri):
        raise ConfigurationError(
            f"ws_celery.config_uri = {setting} and configure_celery({source.config_uri!r}) name "
            "different files. Keep one of them."
        )
    configuration = read_configuration(config_uri, registry.settings, source.overrides)
    if file := registry.settings.get("__file__"):  # of an application that merges global_config
        configuration.refuse_unread(file)
    return configuration


def read_file(config_uri: str) -> dict[str, Any]:
    """Return Celery's settings from an INI file, typed; a broker need not be among them.

    :raises ConfigurationError: with all that is wrong.
    """
    return read_configuration(config_uri, need_broker=False).settings


def _same_file(one: str, other: str) -> bool:
    first, second = (plaster.parse_uri(each) for each in (one, other))
    return os.path.realpath(first.path) == os.path.realpath(second.path)


def _introspect(config: Configurator, row: Setting) -> None:
    category, title = _CATEGORIES[row.category]
    introspectable = config.introspectable(category, row.name, row.name, title)
    # The name of a task or an entry says nothing of its values.
    introspectable["value"] = masked(row.name if row.category == "option" else "", row.value)
    if row.category == "entry":
        introspectable["value"] = without_arguments(introspectable["value"])
    introspectable["type"] = row.type
    introspectable["file"] = row.place.file
    introspectable["line"] = row.place.line
    introspectable["section"] = row.place.section
    # Not by an action: one that is added while others are executed makes Pyramid stumble over
    # actions of an earlier phase that were overridden.
    introspectable.register(config.introspector, config.action_info)


#: Category of introspectables, and what one of them is called, for each category of settings.
_CATEGORIES = {
    "option": ("celery settings", "celery setting"),
    "route": ("celery routes", "celery route"),
    "queue": ("celery queues", "celery queue"),
    "annotation": ("celery annotations", "celery annotation"),
    "entry": ("celery schedule entries", "celery schedule entry"),
}


def _not_found(
    configuration: Configuration | None, error: ModuleNotFoundError
) -> ConfigurationError:
    missing = str(error.name)
    for row in configuration.rows if configuration else ():
        if row.name in ("imports", "include") and any(
            f"{name}.".startswith(f"{missing}.") for name in row.value
        ):
            return ConfigurationError(row.place.fault(str(error)))
    return ConfigurationError(f"[celery] imports: {error}.")
