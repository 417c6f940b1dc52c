"""What the loaded code of an application gives away: where it reads results, what it opened."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ("engines_of_modules", "modules_of", "places_that_read_results")

#: What is called only by somebody who wants results.
_READERS = frozenset(("AsyncResult", "GroupResult", "ResultSet", "chord"))
_SENDERS = frozenset(("delay", "apply_async", "send_task"))


def modules_of(app: Any) -> list[ModuleType]:
    """Return the loaded modules of the packages that the registered tasks belong to.

    :param app: a Celery app. Its own tasks and those of this package do not count.
    """
    ours = {"celery", __name__.partition(".")[0]}
    names = {str(task.__module__).partition(".")[0] for task in app.tasks.values()} - ours
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in names and isinstance(module, ModuleType)
    ]


def places_that_read_results(modules: list[ModuleType]) -> Iterator[tuple[str, int]]:
    """Find calls that need a result backend; yields file and line."""
    for module in modules:
        file = getattr(module, "__file__", None)
        if not file or not file.endswith(".py"):
            continue
        try:
            tree = ast.parse(Path(file).read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # loaded from something else
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _reads(node):
                yield file, node.lineno


def _reads(call: ast.Call) -> bool:
    name = _called(call)
    if name in _READERS:
        return True
    # The result of a call, waited for on the spot.
    function = call.func
    return (
        name in ("get", "join")
        and isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Call)
        and _called(function.value) in _SENDERS
    )


def _called(call: ast.Call) -> str:
    function = call.func
    return str(getattr(function, "attr", None) or getattr(function, "id", ""))


def engines_of_modules() -> Iterator[tuple[str, str | None]]:
    """Find SQLAlchemy engines that are global to a module; yields dotted name and file."""
    alchemy = sys.modules.get("sqlalchemy.engine")
    if alchemy is None:
        return
    for module_name, module in sorted(sys.modules.items()):
        if module_name.partition(".")[0] == "sqlalchemy" or not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            # type(), because a lazy proxy would evaluate itself.
            if issubclass(type(value), alchemy.Engine):
                yield f"{module_name}.{name}", getattr(module, "__file__", None)
