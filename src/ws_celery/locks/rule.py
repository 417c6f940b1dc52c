"""What ``@one_instance`` says of a task: which of its runs exclude each other, and for how long."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from string import Formatter
from typing import Any, TypeVar

from celery import Task

from ws_celery.compat import get_current_task
from ws_celery.converters import nearest
from ws_celery.exceptions import ConfigurationError, Fault

__all__ = ("OneInstance", "apply_option", "check_rule", "one_instance", "rule_of")

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: What the runs of a task get, and its messages do not have.
_NO_ARGUMENTS = ("self", "request")


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
        self._check_fields(function)
        return _guarded(function, self)

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

    def _check_fields(self, function: Callable[..., Any]) -> None:
        parameters = inspect.signature(function).parameters.values()
        names = [
            parameter.name
            for parameter in parameters
            if parameter.name not in _NO_ARGUMENTS
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        any_other = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        for name in self.fields:
            if name in names or (any_other and name not in _NO_ARGUMENTS):
                continue
            has = f"its arguments are {', '.join(names)}" if names else "it has no arguments"
            problem = (
                f"one_instance of {function.__qualname__}: the key {self.key!r} names {name!r}, "
                f"which is no argument of it; {has}"
            )
            raise ConfigurationError(Fault(problem, nearest=nearest(name, names)))


def one_instance(
    key: str | None = None, timeout: float = 8.0, wait: float = 0.0, on_lost: str = "log"
) -> Callable[[_Function], _Function]:
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


def rule_of(task: Task) -> OneInstance | None:
    """Return what ``@one_instance`` says of a task, if it says anything.

    A class obeys the rule of the ``run`` that its own one overrides, and may call.
    """
    rule: OneInstance | None = getattr(task.run, "one_instance", None)
    return rule or _inherited(type(task))


def check_rule(task: Task) -> None:
    """Check that the ``run`` of a task has what a rule needs that it inherits.

    :raises ConfigurationError: if the key names an argument that it does not have.
    """
    if getattr(task.run, "one_instance", None) is None and (rule := _inherited(type(task))):
        rule._check_fields(type(task).run)


def _inherited(cls: type) -> OneInstance | None:
    for each in cls.__mro__:
        rule: OneInstance | None = getattr(vars(each).get("run"), "one_instance", None)
        if rule is not None:
            return rule
    return None


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


def _rule(option: Any) -> OneInstance:
    if isinstance(option, OneInstance):
        return option
    if option is True:
        return OneInstance()
    if isinstance(option, str):
        return OneInstance(option)
    try:
        return OneInstance(**option)
    except TypeError:
        raise _wrong(
            "@task", option, "True, a key, or a dictionary with key, timeout, wait, on_lost"
        ) from None


def _guarded(function: Any, rule: OneInstance) -> Any:
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


def _begins(context: Any) -> bool:
    """Tell whether a run begins: nobody calls the task like a function, and it has no lock yet."""
    return not context.called_directly and getattr(context, "one_instance", None) is None


def _fields(key: str) -> tuple[str, ...]:
    try:
        fields = [name for _, name, _, _ in Formatter().parse(key) if name is not None]
    except ValueError as error:
        raise _wrong("key", key, f"braces in pairs ({error})") from None
    if not all(map(str.isidentifier, fields)):
        raise _wrong("key", key, "names of arguments between braces; {{ is a brace")
    return tuple(fields)


def _signature(task: Task) -> inspect.Signature:
    """Return the signature of a task's messages; it is found once."""
    signature: inspect.Signature | None = vars(task).get("ws_celery_signature")
    if signature is None:
        signature = inspect.signature(task.run)
        if getattr(task, "takes_request", False):
            signature = signature.replace(parameters=[*signature.parameters.values()][1:])
        task.ws_celery_signature = signature
    return signature


def _values(task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = _signature(task)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            values.update(values.pop(parameter.name))
    return values


def _wrong(name: str, value: Any, expected: str) -> ConfigurationError:
    return ConfigurationError(
        Fault("", section="one_instance", key=name, value=str(value), expected=expected)
    )
