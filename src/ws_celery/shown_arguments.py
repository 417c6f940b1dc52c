"""Arguments of calls as people may see them: secrets masked, by the names of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from celery.utils.saferepr import saferepr

from ws_celery.masking import MASK, is_secret, masked, masked_text
from ws_celery.settings import our_setting
from ws_celery.signatures import positional_names

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery
    from ws_celery.request import Args, Kwargs

__all__ = (
    "hidden_arguments",
    "logged_arguments",
    "masked_reprs",
    "shown_arguments",
    "shown_text",
    "shown_value",
)

#: How many characters a hidden value has at least that is looked for in other texts.
_SHORTEST = 4


def hidden_arguments(settings: Mapping[str, Any] | None) -> frozenset[str]:
    """Return the names that ``ws_celery.mask_arguments`` hides, in lower case."""
    names: Iterable[str] = our_setting(settings, "ws_celery.mask_arguments", default=[])
    return frozenset(name.lower() for name in names)


def shown_arguments(
    app: PyramidCelery, task: str | None, args: object, kwargs: object
) -> dict[str, Any]:
    """Return the arguments of a call for people.

    What looks secret is masked, and what ``ws_celery.mask_arguments`` names; positional arguments
    by the names that they have in the task's function.

    :param args: as they are, or Celery's words of them; likewise ``kwargs``.
    :return: ``args`` and ``kwargs``.
    """
    if isinstance(args, str) or isinstance(kwargs, str):
        texts = logged_arguments(app, task, None, (args, kwargs))
        return {"args": [texts[0]], "kwargs": {"...": texts[1]}}
    hidden = app.hidden_arguments
    names = _parameters(app, task)
    return {
        "args": [
            _shown(names[number] if number < len(names) else "", value, hidden)
            for number, value in enumerate(args if isinstance(args, Sequence) else ())
        ],
        "kwargs": {
            name: _shown(name, value, hidden)
            for name, value in (kwargs if isinstance(kwargs, Mapping) else {}).items()
        },
    }


def _shown(name: str, value: object, hidden: frozenset[str]) -> Any:
    if hidden and not hidden.isdisjoint(("all", name.lower())):
        return MASK
    try:
        inside = _without(value, hidden) if hidden else value
        return masked(name if is_secret(name) else "", inside)
    except Exception:  # noqa: BLE001 - it cannot be looked into
        return MASK


def _without(value: object, hidden: frozenset[str]) -> object:
    if isinstance(value, Mapping):
        return {
            key: MASK if str(key).lower() in hidden else _without(inner, hidden)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        inside = [_without(inner, hidden) for inner in value]
        return inside if isinstance(value, list) else tuple(inside)
    return value


def _parameters(app: PyramidCelery, task: str | None) -> Sequence[str]:
    """Return the names of a task's positional parameters, without the request."""
    found = app.tasks.get(task)
    if not hasattr(found, "__header__"):
        return ()
    names: Sequence[str] | None = vars(found).get("ws_celery_parameters")
    if names is None:  # it is asked for at each call
        names = found.ws_celery_parameters = positional_names(found.__header__)
    return names


# What a message and a log have


def masked_reprs(
    app: PyramidCelery, task: str, args: Args, kwargs: Kwargs
) -> tuple[str | None, str | None]:
    """Return the words that a message has for its arguments, which Celery shows in logs and events.

    :return: ``argsrepr`` and ``kwargsrepr``; ``None`` where Celery's own words have no secret.
    """
    try:
        if not (app.hidden_arguments or _may_have_secrets(app, task, args, kwargs)):
            return None, None
        shown = shown_arguments(app, task, args, kwargs)
        positional, named = tuple(shown["args"]), shown["kwargs"]
        return (
            None if positional == tuple(args or ()) else _repr(app, positional),
            None if named == (kwargs or {}) else _repr(app, named),
        )
    except Exception:  # noqa: BLE001 - values compare as they like; what cannot be sent fails later
        return MASK, MASK


def _may_have_secrets(app: PyramidCelery, task: str, args: Args, kwargs: Kwargs) -> bool:
    """Return whether to look closer; it is asked at each call, and most have numbers and words."""
    args, kwargs = args or (), kwargs or {}
    if not all(map(_is_plain, args)) or not all(map(_is_plain, kwargs.values())):
        return True
    names = _parameters(app, task)[: len(args)] if args else ()
    return any(map(is_secret, (*names, *kwargs)))


def _is_plain(value: object) -> bool:
    if type(value) is str:
        return ":" not in value and "=" not in value  # see masked_text()
    return value is None or type(value) in (bool, int, float)


def logged_arguments(
    app: PyramidCelery, task: str | None, call: tuple[Any, Any] | None, reprs: tuple[Any, Any]
) -> tuple[str, str]:
    """Return the arguments of a call as a log has them: cut short, and masked as for people.

    :param call: ``args`` and ``kwargs``; ``None`` if they are not known.
    :param reprs: ``argsrepr`` and ``kwargsrepr`` of the message; what a call gave itself is kept.
    """
    if call is None:
        hide = app.hidden_arguments or any(map(is_secret, _parameters(app, task)))
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
    return str(saferepr(value, maxlen=app.amqp.argsrepr_maxsize, maxlevels=maxlevels))


def _travelled(text: str) -> str:
    # A tuple is a list then.
    return text.replace("(", "[").replace(")", "]").replace(",]", "]")


# Calls inside of something else


def shown_value(app: PyramidCelery, name: str, value: object) -> Any:
    """Return a value for people: its secrets masked, and the arguments of each call inside of it.

    :param name: the option or field that has the value.
    :param value: what JSON can hold, and whatever Celery's settings and answers of workers hold.
    """
    return masked(name, _with_shown_calls(app, value))


def _with_shown_calls(app: PyramidCelery, value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_with_shown_calls(app, inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    shown = {
        key: MASK if str(key).lower() in app.hidden_arguments else _with_shown_calls(app, inner)
        for key, inner in value.items()
    }
    if call := {"args", "kwargs"} & value.keys():
        task = value.get("task") or value.get("name")
        arguments = shown_arguments(app, task, value.get("args"), value.get("kwargs"))
        shown.update({key: arguments[key] for key in call})
    return shown


def shown_text(
    app: PyramidCelery, task: str | None, call: tuple[Any, Any] | None, text: str
) -> str:
    """Return a text about a call, such as its traceback, for people.

    The values that are hidden among its arguments are hidden in the text, too.
    """
    if call is not None:
        shown = shown_arguments(app, task, *call)
        for real, masks in ((call[0], shown["args"]), (call[1], shown["kwargs"])):
            for value in sorted(_hidden_texts(real, masks), key=len, reverse=True):
                text = text.replace(value, MASK)
    return masked_text(text)


def _hidden_texts(real: object, shown: Any) -> Iterator[str]:
    """Yield the texts inside of ``real`` for which ``shown`` has a mask."""
    # A log is written though a value cannot be looked into.
    with suppress(Exception):
        yield from _texts_inside(real, shown)


def _texts_inside(real: object, shown: Any) -> Iterator[str]:
    if isinstance(real, Mapping):
        for key, value in real.items():
            yield from _hidden_texts(value, shown[key] if isinstance(shown, Mapping) else shown)
    elif isinstance(real, (list, tuple)):
        for number, value in enumerate(real):
            yield from _hidden_texts(value, shown if isinstance(shown, str) else shown[number])
    elif shown == MASK and isinstance(real, str) and len(real) >= _SHORTEST:
        yield real
