"""What others see of a task's function: all but its request, which no message has.

Celery 5.5 to 5.7 looks at a task's function in these places, each of a task's class:

``__header__``
    ``Task.apply_async`` checks a call's arguments by it. By the number of its parameters a result
    backend tells whether a callback for errors is called with ``(request, exc, traceback)``, or
    sent the id of what has failed; a ``partial`` is a bound task's, which is sent the id.
``__wrapped__``
    ``celery.contrib.sphinx`` shows its signature, and so does ``inspect.signature(task)``.
``__annotations__``
    From 5.6; for ``typing.get_type_hints(task)``.
``_dump_pydantic_arguments``
    From 5.7, with ``pydantic=True``: what makes JSON of the models among a call's arguments.

``Task.retry`` (5.7) looks at ``run`` if it is given only a part of the arguments: ``tasks``
gives it all. What is called with the request has to see it: ``run``, the wrapper that makes models
of the arguments, and that of ``autoretry_for``. ``_decorated_fun`` (5.7) is only compared.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any

from celery import Task
from celery.utils.functional import head_from_fun

__all__ = ("hide_request", "positional_names", "without_request")

if sys.version_info >= (3, 14):
    from annotationlib import Format

    # Annotations may name what only type checkers import.
    _signature = partial(inspect.signature, annotation_format=Format.FORWARDREF)
else:
    _signature = inspect.signature

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def hide_request(cls: type[Task]) -> None:
    """Let a new class of tasks look as if its function had no request."""
    own = vars(cls)
    if "__header__" in own:
        cls.__header__ = staticmethod(_header(cls.__header__))
    elif "run" in own:
        # A class: Celery has no header for it, and sends it the id of what has failed.
        cls.__header__ = staticmethod(partial(head_from_fun(cls.run, bound=True), None))
    if "__wrapped__" in own:
        bound = not isinstance(own["run"], staticmethod)
        seen = without_request(cls.run, 1 if bound else 0)
        cls.__wrapped__ = seen if bound else staticmethod(seen)
        if "__annotations__" in own:
            cls.__annotations__ = seen.__annotations__
    if own.get("_dump_pydantic_arguments") is not None:
        cls._dump_pydantic_arguments = staticmethod(_dumping(cls._dump_pydantic_arguments))


def without_request(
    function: Callable[..., Any], position: int = 0, *, bound: bool = False
) -> Callable[..., Any]:
    """Return a function that does the same, and whose signature has no request.

    :param function: is called with a request.
    :param position: of the request among its parameters.
    :param bound: whether what stands before the request is left out as well.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__signature__ = seen = _without(_signature(function), position, bound)  # type: ignore[attr-defined]
    annotations = {each.name: each.annotation for each in seen.parameters.values()}
    annotations["return"] = seen.return_annotation
    call.__annotations__ = {
        name: value for name, value in annotations.items() if value is not seen.empty
    }
    return call


def positional_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters that take positional arguments."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in _POSITIONAL]


def _without(signature: inspect.Signature, position: int, bound: bool) -> inspect.Signature:
    parameters = [*signature.parameters.values()]
    if all(each.kind in _POSITIONAL for each in parameters[: position + 1]):
        del parameters[0 if bound else position : position + 1]
    return signature.replace(parameters=parameters)


def _header(check: Callable[..., Any]) -> Callable[..., Any]:
    """Return what checks the arguments of a call, which have no request."""
    if not inspect.isfunction(check):
        return partial(check, None)  # of a bound task
    parameters = [*inspect.signature(check).parameters.values()]
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return check  # it takes any arguments
    if not parameters or parameters[0].kind not in _POSITIONAL:
        return partial(check, None)  # its error says that there is no place for a request
    header: Callable[..., Any] = head_from_fun(without_request(check))
    return header


def _dumping(dump: Callable[..., Any]) -> Callable[..., Any]:
    def dump_arguments(
        args: Iterable[Any] | None, kwargs: Mapping[str, Any] | None
    ) -> tuple[Any, Any]:
        (_, *dumped), kwargs = dump((None, *(args or ())), kwargs)
        return tuple(dumped), kwargs

    return dump_arguments
