"""Arguments of calls as people may see them: secrets masked, by the names of the parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from celery.utils.saferepr import saferepr

from ws_celery.masking import MASK, is_secret, masked, masked_text
from ws_celery.settings import our_setting

__all__ = ("described_arguments", "shown_arguments")

_SETTING = "ws_celery.mask_arguments"

#: A tuple is a list when it has travelled.
_AS_TRAVELLED = str.maketrans("()", "[]")


def shown_arguments(app: Any, task: str | None, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call for people.

    What looks secret is masked, and what ``ws_celery.mask_arguments`` names; positional arguments
    by the names that they have in the task's function.

    :return: ``args`` and ``kwargs``.
    """
    names = our_setting(app.registry.settings, _SETTING, default=[])
    hidden = {name.lower() for name in names}
    positions = _parameters(app.tasks.get(task))
    return {
        "args": [
            _shown(positions[number] if number < len(positions) else "", value, hidden)
            for number, value in enumerate(args if isinstance(args, Sequence) else ())
        ],
        "kwargs": {
            name: _shown(name, value, hidden)
            for name, value in (kwargs if isinstance(kwargs, Mapping) else {}).items()
        },
    }


def described_arguments(
    app: Any, task: str | None, call: tuple[Any, Any] | None, told: tuple[str | None, str | None]
) -> tuple[str, str]:
    """Return the arguments of a call as a log has them: cut short, and masked as for people.

    :param call: ``args`` and ``kwargs``; ``None`` if they are not known.
    :param told: ``argsrepr`` and ``kwargsrepr`` of the message; what a call gave itself is kept.
    """
    if call is None:
        names = our_setting(app.registry.settings, _SETTING, default=[])
        hide = names or any(map(is_secret, _parameters(app.tasks.get(task))))
        args, kwargs = (MASK if hide else masked_text(str(text)) for text in told)
        return args, kwargs
    try:
        shown = shown_arguments(app, task, *call)
        args = _described(app, tuple(call[0] or ()), tuple(shown["args"]), told[0])
        kwargs = _described(app, dict(call[1] or {}), shown["kwargs"], told[1])
    except Exception:  # noqa: BLE001 - a log is written though a value cannot be looked into
        return MASK, MASK
    return args, kwargs


def _described(app: Any, real: Any, shown: Any, told: str | None) -> str:
    original = _repr(app, real)
    if told and _travelled(told) != _travelled(original):
        # The caller's own words, most likely: other words of Celery's would have all in them.
        return masked_text(told) if shown == real else MASK
    return masked_text(_repr(app, shown))


def _repr(app: Any, value: Any) -> str:
    maxlevels = app.conf.get("task_repr_maxlevels", 3)  # Celery 5.5 has no such option
    text: str = saferepr(value, maxlen=app.amqp.argsrepr_maxsize, maxlevels=maxlevels)
    return text


def _travelled(text: str) -> str:
    return text.translate(_AS_TRAVELLED).replace(",]", "]")


def _shown(name: str, value: Any, hidden: set[str]) -> Any:
    if hidden & {"all", name.lower()}:
        return MASK
    return masked(name if is_secret(name) else "", _without(value, hidden))


def _without(value: Any, hidden: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: MASK if str(key).lower() in hidden else _without(inner, hidden)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        inside = [_without(inner, hidden) for inner in value]
        return inside if isinstance(value, list) else tuple(inside)
    return value


def _parameters(task: Any) -> Sequence[str]:
    """Return the names of a task's positional parameters, without the request."""
    header = getattr(task, "__header__", None)
    if header is None:
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(header).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]
