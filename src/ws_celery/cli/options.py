"""The words of a command line that say which INI file is meant, in whatever position they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from ws_celery.exceptions import ConfigurationError

__all__ = ("Options", "looks_like_ini", "options_given", "take_ini_uri")

#: Spellings of ``-A`` that name the application of the INI, which is the only one there is.
_OUR_APP = ("ws_celery", "ws_celery.celery_app", "ws_celery:celery_app")

#: ``app.ini`` or ``app.ini#name``, and what may follow it: ``key=value``.
_INI_URI = re.compile(r"[^-].*\.ini(#[\w.-]*)?")
_VARIABLE = re.compile(r"[A-Za-z_][\w.-]*=.*", re.DOTALL)
_BETWEEN = re.compile(r"(-A|--app|--ini-var)(?P<value>.*)", re.DOTALL)

#: Options of Celery that would name another configuration than the INI's.
_NOT_OURS = ("config", "loader")


@dataclass
class Options:
    """The options that are ours in every command.

    :param ini: value of ``--ini``, or ``None``.
    :param ini_vars: what all ``--ini-var`` say.
    """

    ini: str | None = None
    ini_vars: dict[str, str] = field(default_factory=dict)

    def take(self, given: Mapping[str, Any]) -> None:
        """Take what one part of the command line says, which beats the parts before it.

        :param given: values of options by name, not converted.
        :raises ConfigurationError: if another app or configuration than the INI's is asked for.
        """
        for name in _NOT_OURS:
            if given.get(name) is not None:
                raise ConfigurationError(
                    f"--{name}: the configuration comes from the INI file. Leave --{name} out."
                )
        for name in ("app", "ini"):
            if str(given.get(name)).startswith("-"):
                raise ConfigurationError(f"--{name} needs a value before {given[name]}.")
        app = given.get("app")
        if app is not None and app.removeprefix("=") not in _OUR_APP:
            raise ConfigurationError(
                f"-A {app}: the application comes from the INI file. "
                f"Leave -A out, or write -A {_OUR_APP[1]}."
            )
        self.ini = given.get("ini") or self.ini
        for text in given.get("ini_var") or ():
            self.ini_vars.update(_variables(text))


def options_given(
    command: click.Command, arguments: list[str], parent: click.Context | None = None
) -> dict[str, Any]:
    """Return the options that the words after a command give it, by name; no value is converted.

    Click tells what is an option and what the value of another one. Options that it does not know
    yet are left alone: an application may add some of its own.
    """
    settings = {**command.context_settings, "ignore_unknown_options": True}
    context = click.Context(command, parent, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Celery's events has -d twice
        parser = command.make_parser(context)
    given, rest, _ = parser.parse_args(list(arguments))
    help_option = command.get_help_option(context)
    if help_option is not None and help_option.name in given:  # click gives it a name of its own
        given["help"] = True
    if isinstance(command, click.Group) and rest:
        inner = command.get_command(context, rest[0])
        given.update(options_given(inner, rest[1:], context) if inner else {})
    return dict(given)


def take_ini_uri(options: Options, command: click.Command, arguments: list[str]) -> list[str]:
    """Take ``app.ini#name key=value`` where Pyramid's scripts have it: right after the command.

    After a command of a group only if that takes no arguments of its own: they may end in ``.ini``
    as well. With ``--ini`` nothing is taken.

    :param options: is given what is found.
    :param arguments: what comes after the command.
    :return: the arguments that are left.
    """
    place = _past_our_options(arguments, 0)
    if isinstance(command, click.Group) and place < len(arguments):
        inner = command.commands.get(arguments[place])
        if inner and not any(isinstance(each, click.Argument) for each in inner.params):
            place = _past_our_options(arguments, place + 1)
    if options.ini or place >= len(arguments) or not looks_like_ini(arguments[place]):
        return arguments
    options.ini = arguments[place]
    end = place + 1
    while end < len(arguments) and _VARIABLE.fullmatch(arguments[end]):
        name, _, value = arguments[end].partition("=")
        options.ini_vars.setdefault(name, value)  # --ini-var beats it
        end += 1
    return arguments[:place] + arguments[end:]


def _past_our_options(arguments: list[str], place: int) -> int:
    """Return the place after ``-A`` and ``--ini-var``, which may come between."""
    while place < len(arguments) and (match := _BETWEEN.fullmatch(arguments[place])):
        place += 1 if match["value"] else 2
    return place


def looks_like_ini(word: str) -> bool:
    """Tell whether a word is an INI file, perhaps with the name of an application in it."""
    return _INI_URI.fullmatch(word) is not None


def _variables(text: str) -> dict[str, str]:
    # A comma belongs to the value unless another NAME= follows it.
    pairs = [pair.partition("=") for pair in re.split(r",(?=[A-Za-z_][\w.-]*=)", text)]
    for name, equals, _ in pairs:
        if not equals or not name:
            # The value is not shown: it may be a password.
            raise ConfigurationError("--ini-var needs NAME=VALUE, or several with commas between.")
    return {name: value for name, _, value in pairs}
