"""Declaring tasks: the decorator, what it leaves behind, and how an application registers it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, overload

import venusian
from celery import Task
from celery.local import Proxy

from ws_celery.app import PyramidCelery, current_celery_app, get_celery_app
from ws_celery.exceptions import ConfigurationError, TaskNotRegistered
from ws_celery.request import calling, split_request
from ws_celery.tasks import TransactionalTask

__all__ = (
    "CATEGORY",
    "TaskProxy",
    "add_celery_task",
    "add_imported_task",
    "celery_app",
    "task",
)

#: Venusian category that ``imports`` scans for: tasks, not views.
CATEGORY = "ws_celery"


class TaskProxy:
    """What a decorated function becomes at import: the task of whichever application is current.

    Nothing is registered until an application scans the module. Each use looks the task up: in the
    application of the request that is passed, else in the current one (see
    :func:`ws_celery.app.current_celery_app`).

    :param target: the function, or a task class with a ``run(self, request, ...)``.
    :param options: options of the task, as :meth:`celery.Celery.task` takes them.
    """

    def __init__(self, target: Callable[..., Any], options: dict[str, Any]) -> None:
        update_wrapper(self, target, updated=())
        self._target = target
        self._options = options

    @property
    def name(self) -> str:
        """Name of the task: the option ``name``, else module and name of the function."""
        name = self._options.get("name") or getattr(self._target, "name", None)
        return name or self.target

    @property
    def target(self) -> str:
        """Module and name of what is declared, for messages."""
        return f"{self._target.__module__}.{self._target.__name__}"

    def register(self, app: PyramidCelery) -> Task:
        """Make the task of ``app``, and return it."""
        app.declared[self.name] = self
        options = {**self._options, "name": self.name}
        if not inspect.isclass(self._target):
            options.setdefault("base", TransactionalTask)
            return app.task(self._target, lazy=False, shared=False, **options)
        # A class of its own for each app: Celery keeps the app on the class.
        namespace = {**options, "__module__": self.__module__, "__doc__": self.__doc__}
        return app.register_task(type(self._target.__name__, (self._target,), namespace)())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._of(args, kwargs)(*args, **kwargs)

    def delay(self, *args: Any, **kwargs: Any) -> Any:
        """Dispatch with these arguments; see :meth:`RequestAwareTask.apply_async`."""
        return self._of(args, kwargs).delay(*args, **kwargs)

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Dispatch with options; see :meth:`RequestAwareTask.apply_async`."""
        return self._of(args, kwargs).apply_async(args, kwargs, **options)

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> Any:
        """Do what :meth:`delay` does; see :meth:`RequestAwareTask.delay_on_commit`."""
        return self.delay(*args, **kwargs)

    def apply_async_on_commit(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Do what :meth:`apply_async` does."""
        return self.apply_async(args, kwargs, **options)

    def _of(self, args: Any, kwargs: Any) -> Task:
        request, _, _ = split_request(args, kwargs)
        with calling(request):
            app = current_celery_app(f"the task {self.name!r}")
        try:
            return app.tasks[self.name]
        except KeyError:
            raise TaskNotRegistered(self.name) from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by inspection, which must not load anything
            raise AttributeError(name)
        return getattr(self._of((), {}), name)

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
        venusian.attach(proxy, _register_found, category=category, depth=2)
    return proxy


def _register_found(scanner: Any, _name: str, proxy: TaskProxy) -> None:
    # Not the directive: config.scan() may come before the include.
    add = getattr(scanner, "add_celery_task", None) or partial(add_celery_task, scanner.config)
    add(proxy)


def add_celery_task(
    config: Any, target: TaskProxy | Callable[..., Any] | type, **options: Any
) -> None:
    """Register a task: the directive behind ``config.scan()``.

    :param target: what ``@task`` left, or a function or task class, then with ``options`` as
        ``@task`` takes them.
    """
    declared = target if isinstance(target, TaskProxy) else TaskProxy(target, options)

    def register() -> None:
        app = get_celery_app(config.registry)
        if app.declared.get(declared.name) is not declared:
            declared.register(app)

    introspectables = (_introspectable(config, declared),)
    config.action(("celery task", declared.name), register, introspectables=introspectables)


def add_imported_task(config: Any, declared: TaskProxy) -> None:
    """Register a task that ``imports`` names, unless ``config.scan()`` has found it already.

    It is no action: one that is added while others are executed makes Pyramid stumble over actions
    of an earlier phase that were overridden.

    :raises ConfigurationError: if another task has its name.
    """
    app = get_celery_app(config.registry)
    other = app.declared.get(declared.name)
    if other is None:
        declared.register(app)
        if config.introspection:
            _introspectable(config, declared).register(config.introspector, config.action_info)
    elif other is not declared:
        raise ConfigurationError(
            f"[celery] imports: {other.target} and {declared.target} are both tasks called "
            f"{declared.name!r}. Give one of them another name."
        )


def _introspectable(config: Any, declared: TaskProxy) -> Any:
    introspectable = config.introspectable(
        "celery tasks", declared.name, repr(declared), "celery task"
    )
    introspectable["task"] = declared
    return introspectable


class _CurrentCeleryApp(Proxy):
    """The Celery app of the current application; its ``task`` is our decorator."""

    task = staticmethod(task)


#: The current application's Celery app: ``@celery_app.task(...)``, ``-A ws_celery.celery_app``.
celery_app = _CurrentCeleryApp(current_celery_app)
