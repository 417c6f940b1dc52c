"""The console script ``ws-celery``: Celery's commands for a Pyramid application, and our own.

Celery's own click commands run unchanged. ``--ini``, in whatever position, says which application
to load, and Celery's options have to find it configured when click converts them.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from traceback import format_exception
from types import TracebackType
from typing import Any

import click
from celery import VERSION_BANNER
from celery.bin.celery import celery
from celery.platforms import EX_UNAVAILABLE
from click_didyoumean import DYMGroup
from kombu.exceptions import OperationalError

from ws_celery import __version__
from ws_celery.app import PyramidCelery
from ws_celery.applications import INI_VARIABLE
from ws_celery.checks import check_pool
from ws_celery.cli.application import (
    Options,
    check_schedule,
    find_ini,
    load_celery_app,
    looks_like_ini,
    options_given,
    take_ini_uri,
)
from ws_celery.cli.check import check
from ws_celery.cli.development import demo, dev
from ws_celery.cli.locks import locks
from ws_celery.cli.outbox import outbox
from ws_celery.cli.queues import clean, purge, queues, run, view
from ws_celery.cli.results import result, results
from ws_celery.cli.schedule import schedule
from ws_celery.cli.shell import shell
from ws_celery.cli.tables import SafeContext, echo
from ws_celery.cli.tasks import call, status, tasks, workers
from ws_celery.cli.worker import beat, flower, multi, relay, worker
from ws_celery.exceptions import (
    BrokerUnavailable,
    ConfigurationError,
    LocksUnavailable,
    NotFound,
    NotSupported,
    Unavailable,
    WsCeleryError,
)
from ws_celery.masking import masked_text
from ws_celery.settings import INI_VARIABLES, ini_variables

__all__ = ("main", "main_group")

#: Our own commands; they load what they need themselves.
_OURS: dict[str, click.Command] = {"check": check, "demo": demo, "dev": dev}
_COMMANDS: dict[str, click.Command] = {
    "flower": flower,  # a plugin of Celery takes its place where it is installed
    **celery.commands,
    **_OURS,
    "beat": beat,
    "call": call,
    "clean": clean,
    "locks": locks,
    "multi": multi,
    "outbox": outbox,
    "purge": purge,
    "queues": queues,
    "relay": relay,
    "result": result,
    "results": results,
    "run": run,
    "schedule": schedule,
    "shell": shell,
    "status": status,
    "tasks": tasks,
    "view": view,
    "worker": worker,
    "workers": workers,
}

#: What every command accepts, in any position. Its values are read before the command is.
_INI_OPTIONS = (
    click.Option(
        ["--ini"],
        metavar="FILE",
        type=click.Path(),
        expose_value=False,
        allow_from_autoenv=False,
        help="INI file of the application, in any position; or as FILE#NAME KEY=VALUE right after "
        f"the command. [env: {INI_VARIABLE}; default: ./development.ini]",
    ),
    click.Option(
        ["--ini-var"],
        metavar="NAME=VALUE",
        multiple=True,
        expose_value=False,
        allow_from_autoenv=False,
        help="Value of %(NAME)s in the INI file, several separated by commas; may be repeated, "
        "and beats [DEFAULT].",
    ),
)

#: What would name another application; see :meth:`Options.take`.
_APP_OPTIONS = tuple(
    click.Option(names, hidden=True, expose_value=False, allow_from_autoenv=False)
    for names in (["-A", "--app"], ["--config"], ["--loader"])
)

_USAGE = 2
_EXIT_CODES: dict[type[WsCeleryError], int] = {
    NotFound: 1,
    NotSupported: 1,
    BrokerUnavailable: EX_UNAVAILABLE,
    LocksUnavailable: EX_UNAVAILABLE,
    Unavailable: EX_UNAVAILABLE,
}


def main(argv: list[str] | None = None) -> None:
    """Run ``ws-celery``; always exits.

    :param argv: arguments without the program's name; the process's own by default.
    """
    if argv is None:
        sys.excepthook = _print_error
    arguments = sys.argv[1:] if argv is None else argv
    try:
        main_group().main(args=arguments, prog_name="ws-celery", auto_envvar_prefix="CELERY")
    except WsCeleryError as error:
        echo(f"Error: {error}", err=True)
        sys.exit(_EXIT_CODES.get(type(error), _USAGE))
    except OperationalError as error:
        echo(f"Error: the broker does not answer: {masked_text(str(error))}", err=True)
        sys.exit(EX_UNAVAILABLE)


def _print_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print what nobody has handled as Python does, without its secrets."""
    echo(masked_text("".join(format_exception(kind, error, trace)).rstrip()), err=True)


class _NoApplication:
    """Stands for the Celery app where a command is not to use one, nor Celery's default instead."""

    user_options: Mapping[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        raise ConfigurationError("No application is loaded. Leave --help out to run the command.")


class _Commands(DYMGroup):
    """All commands. The application is loaded when click has told which of them it is for.

    That is the last moment before options are converted, whose defaults the application has.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command among the words that click has left, and load the application for it.

        :raises WsCeleryError: whatever is wrong with it.
        """
        if args[0] not in self.commands and looks_like_ini(args[0]):
            raise ConfigurationError(_ini_first(args))
        name, command, rest = super().resolve_command(ctx, args)
        if name is None or command is None or ctx.resilient_parsing:  # for completion
            return name, command, rest
        options, given = Options(), options_given(command, rest, ctx)
        for each in (ctx.params, given):
            options.take(each)
        rest = take_ini_uri(options, command, rest)
        wanted = not given.get("help")
        if wanted and name != "demo":
            _set_environment(options, ctx.params)
        loads = wanted and name not in _OURS
        ctx.params["app"] = _load(name, given) if loads else _NoApplication()
        if workdir := ctx.params["workdir"]:
            os.chdir(workdir)  # not before, because other paths are meant from where it was called
        return name, command, rest


def _ini_first(words: list[str]) -> str:
    ini, *rest = words
    line = shlex.join(["ws-celery", *(rest or ["worker"]), "--ini", ini])
    return f"{ini} is no command: the INI file comes after the command. Write `{line}`."


def _set_environment(options: Options, params: Mapping[str, Any]) -> None:
    # For children that start anew too: --detach, multi, HUP, spawn.
    os.environ[INI_VARIABLE] = find_ini(options.ini)
    if options.ini_vars:
        os.environ[INI_VARIABLES] = json.dumps({**ini_variables(), **options.ini_vars})
    for name in ("broker", "result_backend"):
        if params[name]:  # as Celery does it, but before the configuration is read
            variable = "CELERY_BROKER_URL" if name == "broker" else "CELERY_RESULT_BACKEND"
            os.environ[variable] = params[name]


def _load(command: str, given: Mapping[str, Any]) -> PyramidCelery:
    app = load_celery_app(find_ini(None))
    if command == "beat" or given.get("beat"):
        check_schedule(app)
    if command in ("worker", "run") and not given.get("pool"):
        check_pool(app)
    return app


def main_group() -> click.Group:
    """Return all of ``ws-celery`` as a click command."""
    for command in _COMMANDS.values():
        _accept_everywhere(command)
    return _Commands(
        "ws-celery",
        commands=_COMMANDS,
        params=list(_group_params()),
        callback=_begin,
        invoke_without_command=True,
        help="Run and look after the Celery of a Pyramid application.",
    )


@click.pass_context
def _begin(context: click.Context, /, ini: Any, ini_var: Any, **params: Any) -> None:  # noqa: ARG001 - taken before
    context.invoke(celery.callback, **params)
    if (made := context.obj) is not None:
        context.obj = SafeContext(made.app, made.no_color, made.workdir, made.quiet)


def _group_params() -> Iterator[click.Parameter]:
    """Return Celery's options before the command, as far as they are not the INI's, and ours."""
    for option in map(copy.copy, _INI_OPTIONS):
        option.expose_value = True
        yield option
    for param in map(copy.copy, celery.params):
        if param.name in ("app", "config", "loader"):
            # Celery would take APP, CONFIG_MODULE or LOADER of the environment for another app.
            param.envvar, param.allow_from_autoenv = None, False
        if param.name == "app":
            param.help = "Not needed; ws_celery.celery_app, which is the INI's, is accepted."
        elif param.name == "workdir":
            param.callback = None  # see _Commands
        elif param.name == "version":
            param.callback, param.is_eager = _print_version, True
        param.hidden = param.name in ("config", "loader", "skip_checks")  # refused, or Django's
        yield param


def _accept_everywhere(command: click.Command) -> None:
    """Let a command have the options that are accepted in any position."""
    if _INI_OPTIONS[0] not in command.params:
        # In place: Celery adds an application's options so.
        command.params.extend((*_INI_OPTIONS, *_APP_OPTIONS))
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _accept_everywhere(inner)


def _print_version(context: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        echo(f"ws-celery {__version__}, Celery {VERSION_BANNER}")
        context.exit()
