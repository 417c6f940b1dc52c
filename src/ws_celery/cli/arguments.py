"""What ``ws-celery`` takes from the command line before Celery sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ws_celery.exceptions import ConfigurationError

__all__ = ("Options", "take_options")

#: Spellings of ``-A`` that name the application of the INI, which is the only one there is.
_OUR_APP = ("ws_celery", "ws_celery.celery_app", "ws_celery:celery_app")

#: Options of Celery that would name another configuration than the INI's.
_NOT_OURS = ("--config", "--loader")


@dataclass
class Options:
    """The options that are ours in every command.

    :param ini: value of ``--ini``, or ``None``.
    :param ini_vars: what all ``--ini-var`` say.
    """

    ini: str | None = None
    ini_vars: dict[str, str] = field(default_factory=dict)


def take_options(arguments: list[str]) -> tuple[Options, list[str]]:
    """Take ``--ini``, ``--ini-var`` and ``-A`` out of the arguments, in any place before a ``--``.

    :return: the options, and the arguments that are left.
    :raises ConfigurationError: if one has no value, or another app or configuration than the INI's
        is asked for.
    """
    options, rest = Options(), []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
            break
        name, glued, value = _split(word)
        if name in _NOT_OURS:
            raise ConfigurationError(
                f"{name}: the configuration comes from the INI file. Leave {name} out."
            )
        if name not in ("--ini", "--ini-var", "--app", "-A"):
            rest.append(word)
            continue
        text = value if glued else next(words, None)
        if not text or (not glued and text.startswith("-")):
            raise ConfigurationError(f"{name} needs a value.")
        if name == "--ini":
            options.ini = text
        elif name == "--ini-var":
            options.ini_vars.update(_variables(text))
        elif text not in _OUR_APP:
            raise ConfigurationError(
                f"{name} {text}: the application comes from the INI file. "
                f"Leave {name} out, or write {name} {_OUR_APP[1]}."
            )
    return options, rest


def _variables(text: str) -> dict[str, str]:
    # A comma belongs to the value unless another NAME= follows it.
    pairs = [pair.partition("=") for pair in re.split(r",(?=[A-Za-z_][\w.-]*=)", text)]
    for name, equals, _ in pairs:
        if not equals or not name:
            # The value is not shown: it may be a password.
            raise ConfigurationError("--ini-var needs NAME=VALUE, or several with commas between.")
    return {name: value for name, _, value in pairs}


def _split(word: str) -> tuple[str, bool, str]:
    if word.startswith("-A") and len(word) > 2:
        return "-A", True, word[2:].removeprefix("=")
    name, equals, value = word.partition("=")
    return name, bool(equals), value
