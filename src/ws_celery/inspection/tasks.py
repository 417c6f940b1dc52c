"""The tasks of an application: where each comes from, and what was decided about it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from celery.exceptions import QueueNotFound

from ws_celery.app import get_celery_app
from ws_celery.beat.sources import entries_of
from ws_celery.exceptions import TaskNotRegistered
from ws_celery.inspection.schedule import look
from ws_celery.shown_arguments import shown_value

if TYPE_CHECKING:
    from ws_celery.beat.entries import Entry, Known

__all__ = ("RegisteredTask", "queue_of", "registered_task", "registered_tasks")


@dataclass(frozen=True)
class RegisteredTask:
    """A task that the application has registered.

    :param name: of the task.
    :param target: module and name of the function or class.
    :param origin: how it was found: ``config.scan``, ``config.add_celery_task``, ``imports``,
        ``plugin``, ``celery`` for Celery's own, or ``app.task``.
    :param plugin: the distribution that brings it.
    :param base: module and name of its class.
    :param queue: where it is sent; ``None`` if its route leads nowhere.
    :param outbox: whether the outbox keeps what is dispatched; ``False`` where there is none.
    :param acknowledge: when a run takes its row of the outbox, where that was decided.
    :param max_retries: how often it may ask to be tried again; ``None`` without limit.
    :param schedule: the names of its entries in beat's schedule, also of those that are off;
        without those of the database while it does not answer.
    :param options: what its declaration says.
    """

    name: str
    target: str
    origin: str
    plugin: str | None
    base: str
    queue: str | None
    outbox: bool
    acknowledge: str | None
    max_retries: int | None
    schedule: tuple[str, ...]
    options: Mapping[str, Any] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields; the options as text, where JSON has no such value."""
        options = {key: _plain(value) for key, value in self.options.items()}
        return {**asdict(self), "options": options}


def registered_tasks(source: Any) -> list[RegisteredTask]:
    """Return the tasks of the application, by name; Celery's own come last.

    :param source: a registry, or what has one: a request, a Celery app.
    """
    app = get_celery_app(source)
    names = sorted(app.tasks, key=lambda name: (name.startswith("celery."), name))
    introspected, entries = _introspected(app), _entries(app)
    return [_registered(app, name, introspected.get(name, {}), entries) for name in names]


def registered_task(source: Any, name: str) -> RegisteredTask:
    """Return one task.

    :raises TaskNotRegistered: if there is none of this name.
    """
    app = get_celery_app(source)
    if name not in app.tasks:
        raise TaskNotRegistered(name)
    return _registered(app, name, _introspected(app).get(name, {}), _entries(app))


def _introspected(app: Any) -> dict[str, Any]:
    found = app.registry.introspector.get_category("celery tasks", default=())
    return {each["introspectable"]["name"]: each["introspectable"] for each in found}


def _registered(
    app: Any, name: str, known: Mapping[str, Any], entries: Mapping[str, Entry]
) -> RegisteredTask:
    task = app.tasks[name]
    return RegisteredTask(
        name=name,
        target=known.get("target") or f"{task.__module__}.{type(task).__name__}",
        origin=known.get("origin") or ("celery" if name.startswith("celery.") else "app.task"),
        plugin=known.get("plugin"),
        base=_base(task, known),
        queue=queue_of(app, name),
        outbox=app.outbox is not None and bool(getattr(task, "outbox", True)),
        acknowledge=getattr(task, "acknowledge", None),
        max_retries=task.max_retries,
        schedule=tuple(sorted(key for key, entry in entries.items() if entry.task == name)),
        options=_options(app, name, known.get("options") or {}),
    )


def _options(app: Any, name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options of a task, secrets masked; the schedule among them may have arguments."""
    schedule = options.get("schedule")
    if isinstance(schedule, Mapping):
        told = shown_value(app, "", {**schedule, "task": name})
        options = {**options, "schedule": {key: told[key] for key in schedule}}
    return dict(shown_value(app, "", options))


def _base(task: Any, known: Mapping[str, Any]) -> str:
    base = known.get("base") or type(task).__mro__[1]
    return f"{base.__module__}.{base.__qualname__}"


def queue_of(app: Any, name: str) -> str | None:
    """Return where a task is sent; ``None`` if its route leads nowhere."""
    queue = getattr(app.tasks[name], "queue", None)
    try:
        options = app.amqp.router.route({"queue": queue} if queue else {}, name)
    except QueueNotFound:
        return None
    found = options.get("queue")
    return str(getattr(found, "name", found) or options.get("routing_key"))


def _entries(app: Any) -> dict[str, Entry]:
    known: Mapping[str, Known] = {}
    if app.schedule is not None:
        with suppress(*app.schedule.errors):
            known = look(app)[1]
    found = entries_of(app, known)
    return {name: entry for name, entry in found.items() if not entry.orphaned}


def _plain(value: Any) -> Any:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)
