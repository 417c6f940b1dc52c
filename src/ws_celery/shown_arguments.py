"""Arguments of calls as people may see them: secrets masked, by the names of the parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from celery import Task
from celery.utils.saferepr import saferepr

from ws_celery.masking import MASK, is_secret, masked, masked_text
from ws_celery.settings import our_setting

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = (
    "hidden_arguments",
    "logged_arguments",
    "masked_reprs",
    "shown_arguments",
    "shown_text",
    "shown_value",
)

#: The positional or keyword arguments of a call, as it or its message has them; text if Celery
#: has made it of them.
Arguments: TypeAlias = Sequence[Any] | Mapping[str, Any] | str | None

#: What people see of a value: it has the same form, or is a mask.
Shown: TypeAlias = Any

#: Parameters have the same names at each call.
_is_secret = lru_cache(maxsize=1024)(is_secret)

#: How many characters a hidden value has at least that is looked for in other texts.
_SHORTEST = 4

#: Types of values that say nothing but themselves.
_NUMBERS = frozenset((int, float, bool, type(None)))

#: A tuple is a list when it has travelled.
_AS_TRAVELLED = str.maketrans("()", "[]")


def hidden_arguments(settings: Mapping[str, Any] | None) -> frozenset[str]:
    """Return the names that ``ws_celery.mask_arguments`` hides, in lower case."""
    names: Iterable[str] = our_setting(settings, "ws_celery.mask_arguments", default=[])
    return frozenset(name.lower() for name in names)


def shown_arguments(
    app: PyramidCelery, task: str | None, args: Arguments, kwargs: Arguments
) -> dict[str, Any]:
    """Return the arguments of a call for people.

    What looks secret is masked, and what ``ws_celery.mask_arguments`` names; positional arguments
    by the names that they have in the task's function.

    :return: ``args`` and ``kwargs``.
    """
    hidden = app.hidden_arguments
    positions = _parameters(app.tasks.get(task))
    if isinstance(args, str) or isinstance(kwargs, str):  # Celery's words of them
        texts = logged_arguments(app, task, None, (str(args), str(kwargs)))
        return {"args": [texts[0]], "kwargs": {"...": texts[1]}}
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


def shown_value(app: PyramidCelery, name: str, value: object) -> Any:
    """Return a value for people: its secrets masked, and the arguments of each call inside of it.

    :param name: the option or field that has the value.
    :param value: what JSON can hold, and whatever Celery's settings and answers of workers hold.
    """
    return masked(name, _with_shown_calls(app, value, app.hidden_arguments))


def shown_text(
    app: PyramidCelery, task: str | None, call: tuple[Any, Any] | None, text: str
) -> str:
    """Return a text about a call, such as its traceback, for people.

    The values that are hidden among its arguments are hidden in the text, too.
    """
    if call is not None:
        shown = shown_arguments(app, task, *call)
        for real, part in ((call[0], shown["args"]), (call[1], shown["kwargs"])):
            for value in sorted(_hidden_texts(real, part), key=len, reverse=True):
                text = text.replace(value, MASK)
    return masked_text(text)


def _hidden_texts(real: object, shown: Shown) -> Iterator[str]:
    """Yield the texts inside of ``real`` for which ``shown`` has a mask."""
    # A log is written though a value cannot be looked into.
    with suppress(Exception):
        yield from _texts_inside(real, shown)


def _texts_inside(real: object, shown: Shown) -> Iterator[str]:
    if isinstance(real, Mapping):
        for key, value in real.items():
            yield from _hidden_texts(value, shown[key] if isinstance(shown, Mapping) else shown)
    elif isinstance(real, (list, tuple)):
        for number, value in enumerate(real):
            yield from _hidden_texts(value, shown if isinstance(shown, str) else shown[number])
    elif shown == MASK and isinstance(real, str) and len(real) >= _SHORTEST:
        yield real


def _with_shown_calls(app: PyramidCelery, value: object, hidden: frozenset[str]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_with_shown_calls(app, inner, hidden) for inner in value]
    if not isinstance(value, Mapping):
        return value
    shown = {
        key: MASK if str(key).lower() in hidden else _with_shown_calls(app, inner, hidden)
        for key, inner in value.items()
    }
    if call := {"args", "kwargs"} & value.keys():
        task = value.get("task") or value.get("name")
        arguments = shown_arguments(app, task, value.get("args"), value.get("kwargs"))
        shown.update({key: arguments[key] for key in call})
    return shown


def masked_reprs(
    app: PyramidCelery, task: str, args: Arguments, kwargs: Arguments
) -> tuple[str | None, str | None]:
    """Return the texts that a message has for its arguments; Celery shows them in logs and events.

    :return: ``argsrepr`` and ``kwargsrepr``; ``None`` where Celery's own have no secret.
    """
    try:
        shown = shown_arguments(app, task, args, kwargs)
        positional, named = tuple(shown["args"]), shown["kwargs"]
        return (
            None if positional == tuple(args or ()) else _repr(app, positional),
            None if named == (kwargs or {}) else _repr(app, named),
        )
    except Exception:  # noqa: BLE001 - values compare as they like; what cannot be sent fails later
        return MASK, MASK


def logged_arguments(
    app: PyramidCelery,
    task: str | None,
    call: tuple[Any, Any] | None,
    reprs: tuple[str | None, str | None],
) -> tuple[str, str]:
    """Return the arguments of a call as a log has them: cut short, and masked as for people.

    :param call: ``args`` and ``kwargs``; ``None`` if they are not known.
    :param reprs: ``argsrepr`` and ``kwargsrepr`` of the message; what a call gave itself is kept.
    """
    if call is None:
        hide = app.hidden_arguments or any(map(is_secret, _parameters(app.tasks.get(task))))
        args, kwargs = (MASK if hide else masked_text(str(text)) for text in reprs)
        return args, kwargs
    try:
        shown = shown_arguments(app, task, *call)
        args = _logged(app, tuple(call[0] or ()), tuple(shown["args"]), reprs[0])
        kwargs = _logged(app, dict(call[1] or {}), shown["kwargs"], reprs[1])
    except Exception:  # noqa: BLE001 - a log is written though a value cannot be looked into
        return MASK, MASK
    return args, kwargs


def _logged(app: PyramidCelery, real: object, shown: object, given: str | None) -> str:
    ours = _repr(app, shown)
    known = {_travelled(ours), _travelled(_repr(app, real))} if given else ()
    if given and _travelled(given) not in known:
        # The caller's own words, most likely: other words of Celery's would have all in them.
        return masked_text(given) if shown == real else MASK
    return masked_text(ours)


def _repr(app: PyramidCelery, value: object) -> str:
    maxlevels = app.conf.get("task_repr_maxlevels", 3)  # Celery 5.5 has no such option
    text: str = saferepr(value, maxlen=app.amqp.argsrepr_maxsize, maxlevels=maxlevels)
    return text


def _travelled(text: str) -> str:
    return text.translate(_AS_TRAVELLED).replace(",]", "]")


def _shown(name: str, value: object, hidden: frozenset[str]) -> object:
    if hidden and hidden & {"all", name.lower()}:
        return MASK
    secret = _is_secret(name)
    if type(value) in _NUMBERS and not secret:
        return value  # nothing is inside of it
    try:
        return masked(name if secret else "", _without(value, hidden))
    except Exception:  # noqa: BLE001 - it cannot be looked into
        return MASK


def _without(value: object, hidden: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: MASK if str(key).lower() in hidden else _without(inner, hidden)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        inside = [_without(inner, hidden) for inner in value]
        return inside if isinstance(value, list) else tuple(inside)
    return value


def _parameters(task: Task | None) -> Sequence[str]:
    """Return the names of a task's positional parameters, without the request."""
    header = getattr(task, "__header__", None)
    if task is None or header is None:
        return ()
    names: Sequence[str] | None = vars(task).get("_names_of_arguments")
    if names is None:  # it is asked for at each call
        names = task._names_of_arguments = _names(header)
    return names


def _names(header: Callable[..., Any]) -> Sequence[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(header).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]
