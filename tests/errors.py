"""Every class of error of the package, and one error of each, made as its own arguments say."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from uuid import UUID

import ws_celery
from ws_celery.demo.views import NotThere
from ws_celery.exceptions import Fault
from ws_celery.locks import Holder

__all__ = ("error_classes", "example_of")

#: Never raised by a run: an answer of a view.
_LEFT_OUT = (NotThere,)

#: Arguments that are no text, by their names.
_VALUES: dict[str, Any] = {
    "action": "peek",
    "candidates": 2,
    "exit_code": 3,
    "faults": Fault("is no number", file="x.ini", line=3, section="celery", key="a", value="b"),
    "found": [UUID(int=1), UUID(int=2)],
    "holder": Holder("a:1", 7, task="other", id="3", host="here", pid=4),
    "kind": "queue",
    "part": "outbox",
    "reason": "foreign",
    "row_id": UUID(int=5),
    "state": "missing",
}


def error_classes() -> list[type[Exception]]:
    """Return the classes of errors that any module of the package defines."""
    found = {
        value
        for module in _modules()
        for value in vars(module).values()
        if issubclass(type(value), type)  # celery_app says that it is of its application's class
        and issubclass(value, BaseException)
        and value.__module__ == module.__name__
        and value not in _LEFT_OUT
    }
    return sorted(found, key=lambda cls: (cls.__module__, cls.__qualname__))


def _modules() -> Iterator[Any]:
    for found in pkgutil.walk_packages(ws_celery.__path__, "ws_celery."):
        if not found.name.endswith(".__main__"):
            yield import_module(found.name)


def example_of(cls: type[Exception]) -> Exception:
    """Return an error of this class; each argument that it can have is given."""
    if not inspect.isfunction(cls.__init__):  # that of a built-in class
        return cls("why, and what to do")
    args, kwargs = [], {}
    for name, parameter in inspect.signature(cls).parameters.items():
        value = _VALUES.get(name, f"the {name}")
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[name] = value
        else:
            args.append(value)
    return cls(*args, **kwargs)
