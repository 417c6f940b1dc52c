"""From an INI file to its Celery app, its logging in force."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import plaster
from celery import signals
from celery.bin.base import CLIContext

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.applications import INI_VARIABLE, load_registry
from ws_celery.beat.sources import check_sources, install
from ws_celery.checks import check_pool, explain
from ws_celery.cli.options import Options
from ws_celery.cli.tables import echo
from ws_celery.exceptions import ConfigurationError
from ws_celery.logs import log_arguments_of_failures, set_up_logging
from ws_celery.masking import MASK, masked_text, printable
from ws_celery.settings import INI_VARIABLES, ini_variables, our_setting
from ws_celery.shown_arguments import shown_value

__all__ = (
    "READY_VARIABLE",
    "app_for",
    "begin",
    "check_schedule",
    "explaining",
    "find_ini",
    "load_celery_app",
)

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


class NoApplication:
    """Stands for the Celery app where a command is not to use one, nor Celery's default instead."""

    user_options: Mapping[str, set[click.Option]] = {}

    def __getattr__(self, name: str) -> Any:
        raise ConfigurationError("No application is loaded. Leave --help out to run the command.")


#: Commands of ours that load what they need themselves.
_WITHOUT_APPLICATION = ("check", "demo", "dev")


def app_for(
    command: str, options: Options, before: Mapping[str, Any], given: Mapping[str, Any]
) -> PyramidCelery | NoApplication:
    """Load the application for a command, unless it loads it itself, or only its help is wanted.

    :param options: those that are ours in every command.
    :param before: the options before the command, by name; ``given``: those after it.
    :raises WsCeleryError: whatever is wrong with the application, or would stop the command.
    """
    if not given.get("help") and command != "demo":
        _set_environment(options, before)
    if given.get("help") or command in _WITHOUT_APPLICATION:
        return NoApplication()
    app = load_celery_app(find_ini(None))
    if command == "beat" or given.get("beat"):
        check_schedule(app)
    if command in ("worker", "run") and not given.get("pool"):
        check_pool(app)
    return app


def _set_environment(options: Options, before: Mapping[str, Any]) -> None:
    # For children that start anew too: --detach, multi, HUP, spawn.
    os.environ[INI_VARIABLE] = find_ini(options.ini)
    if options.ini_vars:
        os.environ[INI_VARIABLES] = json.dumps({**ini_variables(), **options.ini_vars})
    for name in ("broker", "result_backend"):
        if before[name]:  # as Celery does it, but before the configuration is read
            variable = "CELERY_BROKER_URL" if name == "broker" else "CELERY_RESULT_BACKEND"
            os.environ[variable] = before[name]


def begin(context: click.Context, options: dict[str, Any]) -> None:
    """Give a command its context, as Celery's own group of commands does.

    :param options: those before the command, by name.
    """
    app = options["app"]
    if any(app.user_options.values()):
        # Options that the application adds to Celery's commands. Only for them is all of Celery's
        # group imported, with every plugin.
        from celery.bin.celery import celery

        celerys = {param.name: options.get(param.name or "") for param in celery.params}
        context.invoke(celery.callback, **celerys)
    context.obj = SafeContext(app, options["no_color"], options["workdir"], options["quiet"])


#: What Celery writes in colours, and what it says of a message that it moves.
_COLOURS = re.compile(r"(\x1b\[[\d;]*m)")
_MIGRATED = re.compile(r"(Migrating task \S+: ).*", re.DOTALL)


class SafeContext(CLIContext):
    """What Celery's own commands print with; what workers answer is shown without its secrets."""

    def style(self, message: str | None = None, **options: Any) -> str | None:
        """Return a text with its colours, as in Celery."""
        styled: str | None = super().style(message and printable(message), **options)
        return styled

    def pretty(self, n: Any) -> tuple[str, str]:
        """Return an answer as text, as in Celery."""
        status, text = super().pretty(self._shown(n))
        return status, text

    def echo(self, message: Any = None, **options: Any) -> None:
        """Print a text, or a value."""
        super().echo(self._safe(message), **options)

    def _safe(self, message: Any) -> Any:
        if not isinstance(message, str):
            return self._shown(message)
        if message.startswith(("{", "[")):  # --json
            with suppress(ValueError):
                return json.dumps(self._shown(json.loads(message)))
        text = masked_text(_MIGRATED.sub(rf"\g<1>{MASK}", message))
        parts = enumerate(_COLOURS.split(text))
        return "".join(part if number % 2 else printable(part) for number, part in parts)

    def _shown(self, value: Any) -> Any:
        if isinstance(self.app, PyramidCelery):
            value = shown_value(self.app, "", value)
        return _printable_within(value)


def _printable_within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_printable_within(key): _printable_within(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable_within(each) for each in value]
    return printable(value) if isinstance(value, str) else value
