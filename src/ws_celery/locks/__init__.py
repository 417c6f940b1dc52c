"""One run of a task at a time: the rule of ``@one_instance``, and how a run obeys it.

``holding`` has the lock of one run and the thread that renews locks; ``redis_store`` and
``postgresql`` keep them where the setting ``ws_celery.locks`` says.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from string import Formatter
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

from celery import Task, states

from ws_celery.compat import get_current_task
from ws_celery.converters import nearest
from ws_celery.events import SKIPPED, LockLost, TaskSkipped, notify
from ws_celery.exceptions import Abandoned, ConfigurationError, Fault, LockGone, Skipped
from ws_celery.locks.holding import Held, Holder, LockStore, MemoryStore, Renewal
from ws_celery.masking import logger_of
from ws_celery.settings import our_setting
from ws_celery.worker import run_of

if TYPE_CHECKING:
    from celery.app.task import Context
    from celery.backends.base import Backend

    from ws_celery.app import PyramidCelery

__all__ = (
    "Held",
    "Holder",
    "Locks",
    "OneInstance",
    "apply_option",
    "check_rule",
    "one_instance",
    "rule_of",
)

log = logger_of(__name__)

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: What the runs of a task get, and its messages do not have.
_NO_ARGUMENTS = ("self", "request")


def one_instance(
    key: str | None = None, timeout: float = 8.0, wait: float = 0.0, on_lost: str = "log"
) -> OneInstance:
    """Let at most one run per key go on at a time, among all workers; a decorator below ``@task``.

    The lock is taken when a worker begins the run, not when the task is called, and is given back
    after the run's transaction has ended. A run that does not get it is skipped: the function is
    not called, and the state of the task is ``SKIPPED``. ``@task(one_instance=...)`` does the same.

    :param key: which runs exclude each other: a text in which ``{name}`` is the argument of that
        name. The name of the task if not given.
    :param timeout: seconds after which the lock is free if nothing is heard of its run any more,
        because its process was killed or is cut off. It is no limit for the run: the lock of a run
        that lives is renewed each quarter of it.
    :param wait: seconds that a run waits for the lock before it is skipped; its worker does nothing
        else meanwhile.
    :param on_lost: what becomes of a run whose lock was lost: ``"log"``, an error in the log and an
        event; ``"raise"``, that too, and it fails with :exc:`ws_celery.exceptions.LockGone` when
        its function has returned, before its transaction would commit.
    :raises ConfigurationError: if the key names an argument that the function does not have, or a
        value is out of range.
    """
    if callable(key):
        raise ConfigurationError("Write @one_instance() with parentheses.")
    return OneInstance(key, timeout, wait, on_lost)


@dataclass(frozen=True)
class OneInstance:
    """Which runs of a task exclude each other; see :func:`one_instance`."""

    key: str | None = None
    timeout: float = 8.0
    wait: float = 0.0
    on_lost: str = "log"
    #: The names between the braces of the key.
    fields: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if not 1 <= self.timeout <= 86400:
            raise _wrong("timeout", self.timeout, "1 to 86400 seconds")
        if not 0 <= self.wait < math.inf:
            raise _wrong("wait", self.wait, "0 or more seconds")
        if self.on_lost not in ("log", "raise"):
            raise _wrong("on_lost", self.on_lost, '"log" or "raise"')
        if self.key is not None:
            object.__setattr__(self, "fields", _fields(self.key))

    def __call__(self, function: _Function) -> _Function:
        """Return the function of a task, or the ``run`` of its class, that obeys this.

        :raises ConfigurationError: if the key names an argument that it does not have.
        """
        if not inspect.isfunction(function):
            raise ConfigurationError(
                f"@one_instance is on {function!r}, which is no function. Put it below @task, "
                "on the function itself, or on the method run of a class."
            )
        if getattr(function, "one_instance", None) is not None:
            raise ConfigurationError(
                f"{function.__qualname__} has one_instance twice. Keep one of them."
            )
        self.check_fields(function)
        return _obeying(function, self)

    def check_fields(self, function: Callable[..., Any]) -> None:
        """Check that a function has the arguments that the key names.

        :raises ConfigurationError: if it lacks one.
        """
        parameters = inspect.signature(function).parameters.values()
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [each.name for each in parameters if each.kind not in variable]
        names = [name for name in names if name not in _NO_ARGUMENTS]
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
        for name in self.fields:
            if name in names or (takes_any and name not in _NO_ARGUMENTS):
                continue
            has = f"its arguments are {', '.join(names)}" if names else "it has no arguments"
            problem = (
                f"one_instance of {function.__qualname__}: the key {self.key!r} names {name!r}, "
                f"which is no argument of it; {has}"
            )
            raise ConfigurationError(Fault(problem, nearest=nearest(name, names)))

    def key_of(self, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the key of a run.

        :param args: the positional arguments of the message.
        :param kwargs: its keyword arguments.
        :raises TypeError: if the run lacks an argument that the key names, or has one that no key
            can be made of.
        """
        if self.key is None:
            return str(task.name)
        if not self.fields:
            return self.key.format()
        values = _values(task, args, kwargs)
        try:
            key = self.key.format_map(values)
            key.encode()  # as the stores do
        except (KeyError, ValueError) as error:
            raise TypeError(
                f"{task.name}: the key {self.key!r} of one_instance cannot be made of the "
                f"arguments of this run: {type(error).__name__}: {error}."
            ) from error
        return key


def _wrong(name: str, value: object, expected: str) -> ConfigurationError:
    return ConfigurationError(
        Fault("", section="one_instance", key=name, value=str(value), expected=expected)
    )


def _fields(key: str) -> tuple[str, ...]:
    try:
        fields = [name for _, name, _, _ in Formatter().parse(key) if name is not None]
    except ValueError as error:
        raise _wrong("key", key, f"braces in pairs ({error})") from None
    if not all(map(str.isidentifier, fields)):
        raise _wrong("key", key, "names of arguments between braces; {{ is a brace")
    return tuple(fields)


def _values(task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a message by their names."""
    signature = _signature(task)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            values.update(values.pop(parameter.name))
    return values


def _signature(task: Task) -> inspect.Signature:
    """Return the signature of a task's messages; it is found once."""
    signature: inspect.Signature | None = vars(task).get("ws_celery_signature")
    if signature is None:
        signature = inspect.signature(task.run)
        if getattr(task, "takes_request", False):
            signature = signature.replace(parameters=[*signature.parameters.values()][1:])
        task.ws_celery_signature = signature
    return signature


def _obeying(function: Callable[..., Any], rule: OneInstance) -> Any:
    """Wrap a function: RequestAwareTask finds the rule on it, and a plain task obeys it here."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        task = get_current_task()
        if task is None or rule_of(task) is not rule or not _begins(task.request):
            return function(*args, **kwargs)
        context = task.request
        with task.app.locks.hold(task, rule, context.args, context.kwargs) as held:
            result = function(*args, **kwargs)
            held.ensure()
            return result

    run.one_instance = rule  # type: ignore[attr-defined]
    run.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return run


def _begins(context: Context) -> bool:
    """Return whether a run begins: nobody calls the task like a function, nor has it its lock."""
    return not context.called_directly and getattr(context, "one_instance", None) is None


def rule_of(task: Task) -> OneInstance | None:
    """Return what ``@one_instance`` says of a task, if it says anything.

    A class obeys the rule of the ``run`` that its own one overrides, and may call.
    """
    return getattr(task.run, "one_instance", None) or _inherited(type(task))


def check_rule(task: Task) -> None:
    """Check that the ``run`` of a task has what a rule needs that it inherits.

    :raises ConfigurationError: if the key names an argument that it does not have.
    """
    if getattr(task.run, "one_instance", None) is None and (rule := _inherited(type(task))):
        rule.check_fields(type(task).run)


def _inherited(cls: type) -> OneInstance | None:
    rules = (getattr(vars(each).get("run"), "one_instance", None) for each in cls.__mro__)
    return next(filter(None, rules), None)


def apply_option(target: Any, option: Any) -> Any:
    """Return the target of ``@task(one_instance=option)`` with the rule.

    :param target: a function, or a task class.
    :param option: ``True``, a key, a dictionary of the arguments of :func:`one_instance`, or what
        that returns.
    :raises ConfigurationError: if it is something else.
    """
    if option is None or option is False:
        return target
    rule = _rule(option)
    if not inspect.isclass(target):
        return rule(target)
    cls: Any = target
    own = {"run": rule(cls.run), "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), own)


def _rule(option: object) -> OneInstance:
    if isinstance(option, OneInstance):
        return option
    if option is True:
        return OneInstance()
    if isinstance(option, str):
        return OneInstance(option)
    if isinstance(option, Mapping):
        with suppress(TypeError):  # a name that is none of the arguments
            return OneInstance(**option)
    raise _wrong("@task", option, "True, a key, or a dictionary with key, timeout, wait, on_lost")


class Locks:
    """The one-instance locks of an application.

    :param app: its Celery app.
    """

    def __init__(self, app: PyramidCelery) -> None:
        self._app = app
        self._renewal = Renewal()

    @cached_property
    def store(self) -> LockStore:
        """Where the locks are, by the setting ``ws_celery.locks``.

        If it is not set: the Redis of the broker, else that of the results, else the database; this
        process where the broker is ``memory://``.

        :raises ConfigurationError: if it is a Redis, and redis-py is not installed.
        """
        app = self._app
        place: str = our_setting(app.registry.settings, "ws_celery.locks", "auto")
        if place == "auto":
            place = _default_place(app)
        if place == "memory":
            return MemoryStore()
        if place == "database":
            from ws_celery.locks.postgresql import PostgresqlStore  # needs SQLAlchemy

            return PostgresqlStore(app)
        try:
            from ws_celery.locks.redis_store import RedisStore
        except ImportError as error:
            raise ConfigurationError(
                f"The locks are in Redis, and redis-py is missing ({error}). "
                "Install `ws-celery[redis]`, or set `ws_celery.locks = database`."
            ) from error
        return RedisStore(app, place)

    def close(self) -> None:
        """Close the connections that no run holds a lock with."""
        if "store" in vars(self):
            self.store.close()

    def check_key(
        self, task: Task | None, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
    ) -> None:
        """Check that the key of a run can be made, when the task is called.

        :param task: what is called, as far as this process knows it.
        :raises TypeError: if it cannot.
        """
        if task is not None and (rule := rule_of(task)) is not None and rule.fields:
            rule.key_of(task, args or (), kwargs or {})

    @contextmanager
    def hold(
        self, task: Task, rule: OneInstance, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[Held]:
        """Hold the lock of a run of ``task``; it is ``task.request.one_instance`` meanwhile.

        :param args: the positional arguments of the message.
        :param kwargs: its keyword arguments.
        :raises Skipped: if another task holds it.
        :raises Abandoned: if another run of the same task holds it: the message has come twice.
        :raises LockGone: if another task holds it, and this run is an item of a ``map()``.
        :raises LocksUnavailable: if nobody can tell.
        """
        context = task.request
        held = Held(
            rule.key_of(task, args, kwargs),
            rule.timeout,
            task=str(task.name),
            id=context.id,
            store=self.store,
            raises=rule.on_lost == "raise",
            on_loss=partial(self._notify_loss, task),
        )
        if (holder := _acquire(held, rule.wait)) is not None:
            raise self._refusal(task, held, holder)
        context.one_instance = held
        try:
            self._renewal.add(held)
            yield held
        finally:
            context.one_instance = None
            self._renewal.end(held)

    def _refusal(self, task: Task, held: Held, holder: Holder) -> Exception:
        """Return what ends a run that has not got the lock; a skipped one keeps its result."""
        context = task.request
        if context.id is None:
            return LockGone(held.task, None, held.key, str(holder))
        if holder.id == context.id:
            run_of(context).is_settled = True  # its row is that of the other run
            return Abandoned(f"{task.name}[{context.id}] runs elsewhere: {holder}")
        skipped = Skipped(held.task, context.id, held.key, holder)
        log.info("%s", skipped)
        _store_result(task, skipped)
        notify(TaskSkipped(self._app, task, context.id, held.key, holder))
        return skipped

    def _notify_loss(self, task: Task, held: Held, reason: str) -> None:
        log.error("%s[%s] has lost the lock %r: %s", held.task, held.id, held.key, reason)
        notify(LockLost(self._app, task, held.id, held.key, held.token, reason))


#: Seconds between two tries to take a lock: the first time, and at most.
_PAUSES = 0.01, 0.25


def _acquire(held: Held, wait: float) -> Holder | None:
    """Take the lock, or return who has it after ``wait`` seconds."""
    begun = monotonic()
    pause, longest = _PAUSES
    while True:
        now = monotonic()
        holder = held.store.acquire(held)
        if holder is None:
            held.renewed(now)
            return None
        # Its own task: a run that was killed, whose message has come again, or one that is about
        # to end and has sent its retry. One that lives is still there when the lock would be free.
        patience = wait + held.timeout if holder.id and holder.id == held.id else wait
        left = begun + patience - now
        if left <= 0:
            return holder
        sleep(min(pause, left))
        pause = min(pause * 2, longest)


def _store_result(task: Task, skipped: Skipped) -> None:
    context = task.request
    wanted = task.store_eager_result if context.is_eager else True
    # What the call says, if it does: the context's class has a default that says nothing.
    ignored = vars(context).get("ignore_result")
    if wanted and not (task.ignore_result if ignored is None else ignored):
        with _storing_an_end(task.backend) as backend:
            backend.store_result(context.id, skipped.as_dict(), SKIPPED, request=context)
    if context.chord:
        # Its body would wait for ever.
        error = LockGone(str(task.name), context.id, skipped.key, str(skipped.holder))
        task.backend.on_chord_part_return(context, states.FAILURE, error)


@contextmanager
def _storing_an_end(backend: Backend) -> Iterator[Backend]:
    """Let a backend store when a skipped run has ended: Celery cleans up a database by that."""
    backend.READY_STATES = states.READY_STATES | {SKIPPED}
    try:
        yield backend
    finally:
        backend.READY_STATES = states.READY_STATES


def _default_place(app: PyramidCelery) -> str:
    broker = app.conf.broker_write_url or app.conf.broker_url or ""
    if not isinstance(broker, str):
        broker = ";".join(broker)
    for url in (broker, app.conf.result_backend):
        if re.match(r"(rediss?|sentinel)(\+\w+)?://", url or ""):
            return url
    return "memory" if broker.startswith("memory") else "database"
