"""The arguments of a retry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ws_celery.request import split_request

__all__ = ("arguments_of_retry",)


def arguments_of_retry(task: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Complete what ``retry()`` was given by what the run was given.

    Celery does this as well, but counts the request among the arguments.

    :param task: the task that runs.
    :param args: positional arguments of the next run; a request among them is left out.
    :param kwargs: keyword arguments of the next run, likewise.
    """
    if args is None and kwargs is None:
        return None, None
    _, new_args, new_kwargs = split_request(args, kwargs)
    old_args, old_kwargs = task.request.args or (), task.request.kwargs or {}
    names = _positional_names(task.run)
    if kwargs is None:
        taken = names[: len(new_args)]
        kept = {name: value for name, value in old_kwargs.items() if name not in taken}
        return new_args, kept
    if args is None:
        merged = [new_kwargs.pop(name, value) for name, value in zip(names, old_args, strict=False)]
        return (*merged, *old_args[len(names) :]), new_kwargs
    return new_args, new_kwargs


def _positional_names(run: Callable[..., Any]) -> list[str]:
    parameters = list(inspect.signature(run).parameters.values())[1:]  # without the request
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]
