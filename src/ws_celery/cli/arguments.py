"""What ``ws-celery`` takes from the command line before Celery sees it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import click

from ws_celery.exceptions import ConfigurationError

__all__ = ("Options", "command_of", "take_ini_uri", "take_options")

#: Spellings of ``-A`` that name the application of the INI, which is the only one there is.
_OUR_APP = ("ws_celery", "ws_celery.celery_app", "ws_celery:celery_app")

#: ``app.ini`` or ``app.ini#name``, and what may follow it: ``key=value``.
_INI_URI = re.compile(r"[^-].*\.ini(#[\w.-]*)?")
_VARIABLE = re.compile(r"[A-Za-z_][\w.-]*=.*", re.DOTALL)

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


def take_ini_uri(
    options: Options, arguments: list[str], commands: Mapping[str, click.Command]
) -> list[str]:
    """Take ``app.ini#name key=value`` where Pyramid's scripts have it: right after the command.

    After a command of a group only if that takes no arguments of its own: they may end in ``.ini``
    as well. With ``--ini`` nothing is taken.

    :param options: is given what is found.
    :return: the arguments that are left.
    """
    start = command_of(arguments, commands)
    if options.ini or start is None:
        return arguments
    place = start + 1
    command = commands[arguments[start]]
    if isinstance(command, click.Group) and place < len(arguments):
        inner = command.commands.get(arguments[place])
        if inner and not any(isinstance(each, click.Argument) for each in inner.params):
            place += 1
    if place >= len(arguments) or not _INI_URI.fullmatch(arguments[place]):
        return arguments
    options.ini = arguments[place]
    end = place + 1
    while end < len(arguments) and _VARIABLE.fullmatch(arguments[end]):
        name, _, value = arguments[end].partition("=")
        options.ini_vars.setdefault(name, value)  # --ini-var beats it
        end += 1
    return arguments[:place] + arguments[end:]


def command_of(arguments: list[str], commands: Mapping[str, click.Command]) -> int | None:
    """Return the place of the command among the arguments, or ``None``."""
    return next((place for place, word in enumerate(arguments) if word in commands), None)


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
