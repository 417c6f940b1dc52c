"""Task derivers wrap the functions of tasks, as Pyramid's view derivers wrap views."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeAlias

from celery import Task
from pyramid.config import PHASE1_CONFIG, Configurator
from pyramid.config.settings import Settings
from pyramid.registry import Registry
from pyramid.util import Sentinel, TopologicalSorter, as_sorted_tuple
from pyramid.viewderivers import INGRESS
from zope.interface import implementer

from ws_celery.compat import run_attribute
from ws_celery.converters import nearest
from ws_celery.exceptions import ConfigurationError, Fault
from ws_celery.interfaces import ITaskDeriverInfo, ITaskDerivers
from ws_celery.settings.options import ANNOTATION_KEYS
from ws_celery.tasks import RequestAwareTask

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = (
    "INGRESS",
    "TASK",
    "TaskDeriverInfo",
    "add_task_deriver",
    "check_options",
    "derive",
    "task_derivers",
)

#: Wraps the function of a task; see :class:`ws_celery.interfaces.ITaskDeriver`.
Deriver: TypeAlias = Callable[[Callable[..., Any], "TaskDeriverInfo"], Callable[..., Any]]

#: Where a deriver is among the others: next to one of these.
Place: TypeAlias = str | Sentinel | Iterable[str | Sentinel]

#: The inner end of the derivers: the function itself. The outer end is Pyramid's ``INGRESS``.
TASK = Sentinel("TASK")

#: Options that Celery takes to make a task of a function; they are no attributes of it.
_OF_FUNCTIONS = frozenset(
    (
        *("base", "bind", "filter"),
        *("pydantic", "pydantic_strict", "pydantic_context", "pydantic_dump_kwargs"),
    )
)

#: Options that Celery reads although its class of tasks does not have them.
_READ_BY_CELERY = frozenset(
    (
        *ANNOTATION_KEYS,
        *("exchange_type", "immediate", "mandatory"),
        *("autoretry_for", "dont_autoretry_for", "retry_kwargs"),
        *("retry_backoff", "retry_backoff_max", "retry_jitter"),
        "schedule",  # our own: the task's entry of the schedule
    )
)


@implementer(ITaskDeriverInfo)
@dataclass(frozen=True)
class TaskDeriverInfo:
    """What a deriver knows of a task.

    :param task: Celery's task, which ``bind=True`` hands to the function.
    :param original_task: the function or class that ``@task`` was put on.
    :param options: the options of ``@task``, and of those that derivers declare also what is an
        attribute of the task's class.
    """

    task: RequestAwareTask
    original_task: Callable[..., Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the task."""
        return str(self.task.name)

    @property
    def registry(self) -> Registry:
        """The Pyramid registry of the application."""
        return self.task.app.registry

    @property
    def settings(self) -> Settings:
        """The settings of the application."""
        return self.registry.settings


def add_task_deriver(
    config: Configurator,
    deriver: Deriver | str,
    name: str | None = None,
    under: Place | None = None,
    over: Place | None = None,
) -> None:
    """Wrap the functions of tasks in ``deriver(run, info)``: a directive.

    :param deriver: a callable, or its dotted name; see :class:`ws_celery.interfaces.ITaskDeriver`.
    :param name: its name among the derivers; that of the callable if not given.
    :param under: the name of a deriver, or several, which wraps this one; ``INGRESS`` if not given.
    :param over: the name of a deriver, or several, which this one wraps; ``TASK`` if not given.
    :raises ConfigurationError: if it were outside of ``INGRESS`` or inside of ``TASK``.
    """
    deriver = config.maybe_dotted(deriver)
    name = name or getattr(deriver, "__name__", type(deriver).__name__)
    under = as_sorted_tuple(INGRESS if under is None else under)
    over = as_sorted_tuple(TASK if over is None else over)
    if name in (INGRESS, TASK) or INGRESS in over or TASK in under:
        raise ConfigurationError(
            f"The task deriver {name!r} cannot be there: every deriver is under INGRESS and over "
            "TASK, and none is called so."
        )
    introspectable = config.introspectable("celery task derivers", name, name, "celery deriver")
    introspectable.update(name=name, deriver=deriver, under=under, over=over)

    def register() -> None:
        derivers = config.registry.queryUtility(ITaskDerivers)
        if derivers is None:
            derivers = TopologicalSorter(
                default_before=None, default_after=INGRESS, first=INGRESS, last=TASK
            )
            config.registry.registerUtility(derivers, ITaskDerivers)
        derivers.add(name, deriver, before=over, after=under)

    # Before tasks are registered.
    config.action(
        ("celery task deriver", name),
        register,
        introspectables=(introspectable,),
        order=PHASE1_CONFIG,
    )


def task_derivers(registry: Registry) -> list[tuple[str, Deriver]]:
    """Return names and derivers of an application, the outermost first.

    :raises ConfigurationError: if one is to be under or over what there is not.
    """
    derivers = registry.queryUtility(ITaskDerivers)
    if derivers is None:
        return []
    if faults := list(_misplaced(derivers)):
        raise ConfigurationError(*faults)
    return derivers.sorted()


def _misplaced(derivers: TopologicalSorter) -> Iterator[Fault]:
    there = {INGRESS, TASK, *derivers.names}
    for side, wanted_by in (("under", derivers.name2after), ("over", derivers.name2before)):
        for name, wanted in wanted_by.items():
            if there.isdisjoint(wanted):
                names = ", ".join(repr(each) for each in wanted)
                problem = f"the task deriver {name!r} is to be {side} {names}, which is no deriver"
                yield Fault(problem, nearest=nearest(str(wanted[0]), derivers.names))


def check_options(
    name: str,
    original: Callable[..., Any],
    base: type,
    options: Mapping[str, Any],
    app: PyramidCelery,
) -> None:
    """Refuse options of a task that nobody would read, and what would be misread.

    :param name: the name of the task.
    :param original: what is to become the task.
    :param base: its class.
    :raises ConfigurationError: with all of them.
    """
    known = {*_READ_BY_CELERY, "outbox"}  # of tasks of every class
    if issubclass(base, RequestAwareTask):
        known.update(_declared(task_derivers(app.registry)))
    if not inspect.isclass(original):
        known.update(_OF_FUNCTIONS)
    unknown = [
        option
        for option in options
        if option not in known and (option in _OF_FUNCTIONS or not hasattr(base, option))
    ]
    if unknown:
        known.update(each for each in dir(base) if not each.startswith("_"))
        problem = (
            "the task {!r} has the unknown option {!r}; an option of your own is an attribute of "
            "the task's base class, or is declared by a task deriver"
        )
        raise ConfigurationError(
            *(Fault(problem.format(name, each), nearest=nearest(each, known)) for each in unknown)
        )
    outbox = options.get("outbox", getattr(base, "outbox", True))
    if not isinstance(outbox, bool):
        raise ConfigurationError(f"The task {name!r} has outbox = {outbox!r}. Write True or False.")
    if issubclass(base, RequestAwareTask) and options.get("takes_request", True) is not True:
        raise ConfigurationError(
            f"The task {name!r} has takes_request = {options['takes_request']!r}. Write True, or "
            "give it base=celery.Task, whose functions get no request."
        )


def _declared(derivers: Iterable[tuple[str, Deriver]]) -> Iterator[str]:
    for _, deriver in derivers:
        yield from getattr(deriver, "options", ())


def derive(task: Task, original: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Wrap the function of a new task in the derivers of its application.

    Inside of ``autoretry_for``, so that a deriver sees what the function raises, and what a deriver
    raises is tried again.

    :raises ConfigurationError: if a deriver returns nothing that can be called.
    """
    derivers = task_derivers(task.app.registry)
    if not derivers or not isinstance(task, RequestAwareTask):
        return
    attributes = {each: getattr(task, each) for each in _declared(derivers) if hasattr(task, each)}
    info = TaskDeriverInfo(task, original, {**attributes, **options})
    attribute = run_attribute(task)
    derived = run = getattr(task, attribute)
    for name, deriver in reversed(derivers):
        derived = deriver(derived, info)
        if not callable(derived):
            raise ConfigurationError(
                f"The task deriver {name!r} has returned {derived!r} for the task {info.name!r}. "
                "Let it return the function that it is given, or one that calls it."
            )
    if derived is not run:
        # A function of its own: a deriver may return one object for many tasks.
        @wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            return derived(*args, **kwargs)

        setattr(task, attribute, call)
