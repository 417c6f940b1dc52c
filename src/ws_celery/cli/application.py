"""From an INI file to its Celery app, its logging in force."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import plaster
from celery import signals

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.applications import INI_VARIABLE, load_registry
from ws_celery.beat.sources import check_sources, install
from ws_celery.checks import explain
from ws_celery.cli.tables import echo
from ws_celery.exceptions import ConfigurationError
from ws_celery.logs import log_arguments_of_failures, set_up_logging
from ws_celery.settings import our_setting

__all__ = (
    "READY_VARIABLE",
    "Options",
    "check_schedule",
    "explaining",
    "find_ini",
    "load_celery_app",
    "looks_like_ini",
    "options_given",
    "take_ini_uri",
)

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


#: Environment variable that names a file which the worker makes when it takes tasks.
READY_VARIABLE = "WS_CELERY_READY_FILE"

#: What a checkout has, and its commands use when no file is named.
_DEVELOPMENT_INI = "development.ini"


def find_ini(ini: str | None) -> str:
    """Return the INI file to work with.

    It is the one given, else that of the environment variable ``WS_CELERY_INI``, else
    ``development.ini`` of the current directory, which it says on stderr.

    :raises ConfigurationError: if there is none, or it does not exist.
    """
    config_uri = ini or os.environ.get(INI_VARIABLE) or _development_ini()
    if not config_uri:
        raise ConfigurationError(
            f"No INI file. Give it with --ini FILE, or by the environment variable {INI_VARIABLE}; "
            f"{_DEVELOPMENT_INI} of the current directory would be used, but there is none."
        )
    if not _is_file(config_uri):
        raise ConfigurationError(f"{config_uri}: there is no such file. Give its path with --ini.")
    # Absolute, because children may be started in another directory.
    return config_uri if "://" in config_uri else str(Path(config_uri).absolute())


def _development_ini() -> str | None:
    if not Path(_DEVELOPMENT_INI).is_file():
        return None
    echo(f"Using ./{_DEVELOPMENT_INI}; --ini names another file.", err=True)
    # For what asks next, and for children that start anew.
    os.environ[INI_VARIABLE] = path = str(Path(_DEVELOPMENT_INI).absolute())
    return path


def _is_file(config_uri: str) -> bool:
    try:
        return Path(plaster.parse_uri(config_uri).path).is_file()
    except plaster.InvalidURI:
        return False  # a name without a suffix


def load_celery_app(config_uri: str) -> PyramidCelery:
    """Load the application of an INI file, with the INI's logging, and return its Celery app.

    :raises WsCeleryError: whatever is wrong with the configuration, in one sentence.
    """
    with explaining(config_uri):
        set_up_logging(config_uri)
        app = get_celery_app(load_registry(config_uri))
        if our_setting(app.registry.settings, "ws_celery.log_arguments", default=False):
            log_arguments_of_failures()
    app.set_default()
    if ready_file := os.environ.get(READY_VARIABLE):
        signals.worker_ready.connect(lambda **_: Path(ready_file).touch(), weak=False)
    return app


@contextmanager
def explaining(config_uri: str) -> Iterator[None]:
    """Let what is wrong with an INI file be one sentence; errors of the application are its own.

    :raises WsCeleryError: the sentence.
    """
    try:
        yield
    except Exception as error:
        explained = explain(error, config_uri)
        if explained is None:
            raise
        raise explained from None


def check_schedule(app: PyramidCelery) -> None:
    """Make sure that what code and INI say of the schedule can be run, and let Celery have it.

    :raises ConfigurationError: with all that cannot.
    """
    check_sources(app)
    install(app)
