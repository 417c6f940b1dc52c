"""Declaring tasks: the decorator, what it leaves behind, and how an application registers it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import update_wrapper
from itertools import chain, islice
from typing import Any, TypeAlias, overload

import venusian
from celery import Task
from celery.local import Proxy
from celery.result import AsyncResult, GroupResult
from celery.schedules import BaseSchedule
from pyramid.config import Configurator
from pyramid.config.actions import action_method
from pyramid.registry import Introspectable
from venusian import Scanner

from ws_celery.app import PyramidCelery
from ws_celery.applications import (
    app_if_loaded,
    app_without_request,
    current_celery_app,
)
from ws_celery.beat.sources import declare
from ws_celery.bulk import split_call
from ws_celery.derivers import check_options, derive, task_derivers
from ws_celery.exceptions import ConfigurationError, Fault, TaskNotRegistered
from ws_celery.locks import apply_option, check_rule
from ws_celery.masking import logger_of, masked, without_arguments
from ws_celery.request import Args, Kwargs, calling_request, get_celery_app, split_request
from ws_celery.signatures import without_request
from ws_celery.tasks import problem_of_request
from ws_celery.transactional import TransactionalTask

__all__ = (
    "CATEGORY",
    "TaskProxy",
    "add_celery_task",
    "add_imported_task",
    "add_periodic_task",
    "celery_app",
    "task",
)

log = logger_of(__name__)

#: What people may write as a schedule.
Schedule: TypeAlias = BaseSchedule | timedelta | float | str | Mapping[str, Any]

#: A handler of a signal of Celery's.
Handler: TypeAlias = Callable[..., Any]

#: Venusian category that ``imports`` scans for: tasks, not views.
CATEGORY = "ws_celery"


class TaskProxy:
    """What a decorated function becomes at import: the task of whichever application is current.

    Nothing is registered until an application scans the module. Each use looks the task up: in the
    application of the request that is passed, else in the current one (see
    :func:`ws_celery.applications.current_celery_app`).

    :param target: the function, or a task class with a ``run(self, request, ...)``.
    :param options: options of the task, as :meth:`celery.Celery.task` takes them, and
        ``one_instance``.
    """

    def __init__(self, target: Callable[..., Any], options: dict[str, Any]) -> None:
        update_wrapper(self, target, updated=())
        self._options = dict(options)
        self._target = apply_option(target, self._options.pop("one_instance", None))
        #: Module and name of what is declared, for messages.
        self.target = f"{self._target.__module__}.{self._target.__name__}"
        #: Name of the task: the option ``name``, else module and name of the function.
        self.name: str = (
            self._options.get("name") or getattr(self._target, "name", None) or self.target
        )
        #: File, line, function and source of the decorator, as Pyramid reports conflicts.
        self.place: tuple[str, int, str, str] | None = None
        if not inspect.isclass(target) and getattr(self.base, "takes_request", False):
            bound = bool(self._options.get("bind"))
            self.__wrapped__ = without_request(target, int(bound), bound=bound)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the task, as ``@task`` was given them."""
        return dict(self._options)

    @property
    def base(self) -> type[Task]:
        """The class of the task."""
        if inspect.isclass(self._target):
            return self._target
        base: type[Task] = self._options.get("base") or TransactionalTask
        return base

    def register(self, app: PyramidCelery) -> Task:
        """Make the task of ``app``, and return it.

        :raises ConfigurationError: if nobody would read one of its options.
        """
        check_options(self.name, self._target, self.base, self._options, app)
        made = self._make(app)
        check_rule(made)
        if problem := problem_of_request(made):
            log.warning("%s", Fault(problem))
        derive(made, self._target, self._options)
        app.declared[self.name] = self
        if self._options.get("schedule") is not None:
            declare(app, self.name, self.name, self._options["schedule"])
        return made

    def _make(self, app: PyramidCelery) -> Task:
        options = {**self._options, "name": self.name}
        if not inspect.isclass(self._target):
            options["base"] = self.base
            return app.task(self._target, lazy=False, shared=False, **options)
        # A class of its own for each app: Celery keeps the app on the class.
        namespace = {**options, "__module__": self.__module__, "__doc__": self.__doc__}
        return app.register_task(type(self._target.__name__, (self._target,), namespace)())

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # As Celery's own proxies have it, for isinstance(): autodoc asks whether it is a task.
        return self.base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._of(args, kwargs)(*args, **kwargs)

    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult:
        """Dispatch with these arguments; see :meth:`RequestAwareTask.apply_async`."""
        return self._of(args, kwargs).delay(*args, **kwargs)

    def apply_async(self, args: Args = None, kwargs: Kwargs = None, **options: Any) -> AsyncResult:
        """Dispatch with options; see :meth:`RequestAwareTask.apply_async`."""
        return self._of(args, kwargs).apply_async(args, kwargs, **options)

    def delay_many(self, calls: Iterable[Sequence[Any]]) -> GroupResult:
        """Dispatch once for each tuple of arguments; see :meth:`RequestAwareTask.delay_many`."""
        return self.apply_async_many((args, None) for args in calls)

    def apply_async_many(self, calls: Iterable[tuple[Any, Any]], **options: Any) -> GroupResult:
        """Dispatch once for each call; see :meth:`RequestAwareTask.apply_async_many`."""
        remaining = iter(calls)
        first = list(islice(remaining, 1))
        task = self._of(*split_call(self.name, 0, first[0])) if first else self._of((), {})
        return task.apply_async_many(chain(first, remaining), **options)

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> AsyncResult:
        """Do what :meth:`delay` does; see :meth:`RequestAwareTask.delay_on_commit`."""
        return self.delay(*args, **kwargs)

    def apply_async_on_commit(
        self, args: Args = None, kwargs: Kwargs = None, **options: Any
    ) -> AsyncResult:
        """Do what :meth:`apply_async` does."""
        return self.apply_async(args, kwargs, **options)

    def _of(self, args: Args, kwargs: Kwargs) -> Task:
        request, _, _ = split_request(args, kwargs)
        if request is None:
            request = calling_request()
        if request is None:
            app = app_without_request(f"the task {self.name!r}")
        else:
            app = get_celery_app(request)
        try:
            return app.tasks[self.name]
        except KeyError:
            raise TaskNotRegistered(self.name) from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by inspection, which must not load anything
            raise AttributeError(name)
        if name in self._options or any(name in vars(each) for each in self.base.__mro__):
            return getattr(self._of((), {}), name)
        # Only a registered task can have it: annotations, say. None is loaded to find that out.
        app = app_if_loaded()
        if app is None or self.name not in app.tasks:
            raise AttributeError(f"the task {self.name!r} has no attribute {name!r}")
        return getattr(app.tasks[self.name], name)

    def __repr__(self) -> str:
        return f"<task {self.name}>"


@overload
def task(target: Callable[..., Any], /) -> TaskProxy: ...


@overload
def task(**options: Any) -> Callable[[Callable[..., Any]], TaskProxy]: ...


def task(*args: Any, **options: Any) -> Any:
    """Declare a task; nothing is registered before ``config.scan()`` or ``imports`` find it.

    ``@task`` or ``@task(...)``, on a function or on a task class. Options are those of
    :meth:`celery.Celery.task`; ``base`` is :class:`TransactionalTask` if not given.
    ``one_instance`` is ``True``, a key, or a dictionary of arguments of :func:`one_instance`.

    :return: a :class:`TaskProxy`.
    """
    if args:
        (target,) = args
        return _declare(target, options)
    return lambda target: _declare(target, options)


def _declare(target: Callable[..., Any], options: dict[str, Any]) -> TaskProxy:
    proxy = TaskProxy(target, options)
    for category in ("pyramid", CATEGORY):  # config.scan() looks for the first
        # Two frames above is the module that decorates: task() or its lambda is between.
        attached = venusian.attach(proxy, _register_found, category=category, depth=2)
        proxy.place = attached.codeinfo
    return proxy


def _register_found(scanner: Scanner, _name: str, proxy: TaskProxy) -> None:
    # Not the directive: config.scan() may come before the include.
    add = getattr(scanner, "add_celery_task", None)
    if add is not None:
        add(proxy)
    else:
        file, line, function, _ = proxy.place or (None, 0, "", "")
        said = f"{proxy.target} is a task called {proxy.name!r}. Give it another name."
        # So do Pyramid's own decorators tell where they are.
        add = action_method(_add)
        add(scanner.config, proxy, "config.scan", _info=(file, line, function, said))


def add_celery_task(
    config: Configurator, target: TaskProxy | Callable[..., Any] | type, **options: Any
) -> None:
    """Register a task: the directive behind ``config.scan()``.

    :param target: what ``@task`` left, or a function or task class, then with ``options`` as
        ``@task`` takes them.
    """
    declared = target if isinstance(target, TaskProxy) else TaskProxy(target, options)
    _add(config, declared, "config.add_celery_task")


def _add(config: Configurator, declared: TaskProxy, origin: str) -> None:
    introspectable = _introspectable(config, declared, origin)

    def register() -> None:
        app = get_celery_app(config.registry)
        if app.declared.get(declared.name) is not declared:
            declared.register(app)
        _relate(config, introspectable)

    config.action(("celery task", declared.name), register, introspectables=(introspectable,))


def add_periodic_task(
    config: Configurator,
    task: Task | TaskProxy | str,
    schedule: Schedule,
    name: str | None = None,
    **fields: Any,
) -> None:
    """Let a task run at its times: a directive.

    INI and database can change it; see ``docs/schedules.rst``.

    :param task: what ``@task`` left, a task of Celery, or the name of a task.
    :param schedule: Celery's schedule, a ``timedelta``, seconds, a text (a crontab, or a period
        such as ``1h``), or a mapping of the keys that ``[celerybeat:NAME]`` has.
    :param name: of the entry; that of the task if not given.
    :param fields: more of these keys: ``args``, ``kwargs``, ``options``, ``overlap``.
    :raises pyramid.exceptions.ConfigurationConflictError: when the configuration is committed, if
        another call has declared an entry of this name.
    """
    task_name = task if isinstance(task, str) else task.name
    name = name or task_name
    introspectable = config.introspectable(
        "celery periodic tasks", name, name, "celery periodic task"
    )
    introspectable.update(name=name, task=task_name, fields=without_arguments(masked("", fields)))
    shown = without_arguments(schedule) if isinstance(schedule, Mapping) else schedule
    introspectable["schedule"] = shown

    def register() -> None:
        declare(get_celery_app(config.registry), name, task_name, schedule, **fields)

    config.action(("celery periodic task", name), register, introspectables=(introspectable,))


def add_imported_task(config: Configurator, declared: TaskProxy, plugin: str | None = None) -> None:
    """Register a task that ``imports`` or a plugin names, unless ``config.scan()`` has found it.

    It is no action: one that is added while others are executed makes Pyramid stumble over actions
    of an earlier phase that were overridden.

    :param plugin: the distribution that brings it.
    :raises ConfigurationError: if another task has its name.
    """
    app = get_celery_app(config.registry)
    other = app.declared.get(declared.name)
    if other is None:
        declared.register(app)
        if config.introspection:
            origin = "plugin" if plugin else "imports"
            introspectable = _introspectable(config, declared, origin, plugin)
            _relate(config, introspectable)
            introspectable.register(config.introspector, config.action_info)
    elif other is not declared:
        where = f"The plugin {plugin}" if plugin else "[celery] imports"
        raise ConfigurationError(
            f"{where}: {other.target} and {declared.target} are both tasks called "
            f"{declared.name!r}. Give one of them another name."
        )


def _introspectable(
    config: Configurator, declared: TaskProxy, origin: str, plugin: str | None = None
) -> Introspectable:
    introspectable = config.introspectable(
        "celery tasks", declared.name, repr(declared), "celery task"
    )
    introspectable.update(
        task=declared,
        name=declared.name,
        target=declared.target,
        base=declared.base,
        options=declared.options,
        origin=origin,
        plugin=plugin,
    )
    return introspectable


def _relate(config: Configurator, introspectable: Introspectable) -> None:
    """Relate a task to its derivers, routes and schedule entries, which are registered already."""
    name = introspectable["name"]
    for deriver, _ in task_derivers(config.registry):
        introspectable.relate("celery task derivers", deriver)
    for each in _configured(config, "celery routes"):
        if fnmatchcase(name, each.discriminator):
            introspectable.relate(each.category_name, each.discriminator)
    for each in _configured(config, "celery schedule entries"):
        if each["value"].get("task") == name:
            introspectable.relate(each.category_name, each.discriminator)


def _configured(config: Configurator, category: str) -> list[Introspectable]:
    found = config.introspector.get_category(category, default=())
    return [each["introspectable"] for each in found]


class _SignalProxy:
    """A signal of Celery's app, to connect to before there is one: ``connect`` is a declaration.

    As with ``@task``, each application that scans the module connects the handler.

    :param name: ``on_after_configure``, for example.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def connect(self, *args: Any, **options: Any) -> Any:
        """Declare a handler; in a function, connect it to the current application's app at once.

        Arguments are those of Celery's signals, whose decorators this is, too.
        """
        if args and callable(args[0]):
            return self._declare(args[0], args[1:], options)
        return lambda handler: self._declare(handler, args, options)

    def _declare(self, handler: Handler, args: tuple[Any, ...], options: dict[str, Any]) -> Handler:
        def connect(app: PyramidCelery) -> None:
            getattr(app, self._name).connect(handler, *args, **options)

        def found(scanner: Scanner, _name: str, _what: object) -> None:
            _connect_found(scanner, connect)

        for category in ("pyramid", CATEGORY):
            # As for @task, two frames above is what declares.
            info = venusian.attach(connect, found, category=category, depth=2)
        if info.scope == "function call":
            connect(current_celery_app(f"celery_app.{self._name}"))
        else:
            # A scan looks at what the module has; the handler may be hidden, or take no attribute.
            info.globals[f"_celery_handler_{id(connect)}"] = connect
        return handler


def _connect_found(scanner: Scanner, connect: Callable[[PyramidCelery], None]) -> None:
    config = scanner.config
    if hasattr(scanner, "add_celery_task"):  # while actions are executed, see _scan_imports()
        connect(get_celery_app(config.registry))
    else:
        # Not before, because config.scan() may come before the include.
        config.action(None, lambda: connect(get_celery_app(config.registry)))


class _CurrentCeleryApp(Proxy):
    """The Celery app of the current application; modules can declare with it before there is one.

    Its ``task`` is our decorator. Whatever looks at what a module has, such as a scan, does not
    make it look for the application.
    """

    task = staticmethod(task)
    Task = Task
    on_after_configure = _SignalProxy("on_after_configure")
    on_after_finalize = _SignalProxy("on_after_finalize")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and not hasattr(PyramidCelery, name):
            raise AttributeError(name)
        return getattr(current_celery_app(f"celery_app.{name}"), name)


#: The current application's Celery app: ``@celery_app.task(...)``, ``-A ws_celery.celery_app``.
celery_app = _CurrentCeleryApp(current_celery_app)
