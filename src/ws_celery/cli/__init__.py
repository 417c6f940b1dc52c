"""The console script ``ws-celery``: Celery's commands for a Pyramid application, and our own.

Celery's own click commands run unchanged. What they cannot know is taken from the arguments first,
in whatever position: ``--ini`` says which application to load, and Celery's options have to find
it configured when click converts them.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from traceback import format_exception
from types import TracebackType
from typing import Any

import click
from celery import VERSION_BANNER
from celery.bin.celery import celery
from celery.platforms import EX_UNAVAILABLE
from kombu.exceptions import OperationalError

from ws_celery.app import PyramidCelery
from ws_celery.applications import INI_VARIABLE
from ws_celery.checks import check_pool
from ws_celery.cli.aliases import clean, run, view
from ws_celery.cli.application import check_schedule, find_ini, load_celery_app
from ws_celery.cli.arguments import Options, command_of, take_ini_uri, take_options
from ws_celery.cli.beat import beat
from ws_celery.cli.call import call
from ws_celery.cli.check import check
from ws_celery.cli.development import demo, dev
from ws_celery.cli.flower import flower
from ws_celery.cli.locks import locks
from ws_celery.cli.outbox import outbox
from ws_celery.cli.queues import purge, queues
from ws_celery.cli.relay import relay
from ws_celery.cli.result import result
from ws_celery.cli.results import results
from ws_celery.cli.schedule import schedule
from ws_celery.cli.shell import shell
from ws_celery.cli.status import status
from ws_celery.cli.tables import SafeContext, echo
from ws_celery.cli.tasks import tasks, workers
from ws_celery.cli.worker import multi, worker
from ws_celery.exceptions import (
    BrokerUnavailable,
    CannotPeek,
    LocksUnavailable,
    NoSuchEntry,
    NoSuchLock,
    NoSuchQueue,
    NoSuchResult,
    NoSuchRow,
    NoWorker,
    OutboxUnavailable,
    ResultsNotListed,
    ResultsUnavailable,
    ScheduleUnavailable,
    WsCeleryError,
)
from ws_celery.masking import masked_text
from ws_celery.settings import INI_VARIABLES, ini_variables
from ws_celery.version import __version__

__all__ = ("main",)

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

#: They are taken from the arguments before click sees them.
_INI_OPTIONS = (
    click.Option(
        ["--ini"],
        metavar="FILE",
        type=click.Path(),
        expose_value=False,
        help="INI file of the application, in any position; or as FILE#NAME KEY=VALUE right after "
        f"the command. [env: {INI_VARIABLE}; default: ./development.ini]",
    ),
    click.Option(
        ["--ini-var"],
        metavar="NAME=VALUE",
        multiple=True,
        expose_value=False,
        help="Value of %(NAME)s in the INI file, several separated by commas; may be repeated, "
        "and beats [DEFAULT].",
    ),
)

_USAGE = 2
_EXIT_CODES: dict[type[WsCeleryError], int] = {
    CannotPeek: 1,
    NoSuchEntry: 1,
    NoSuchLock: 1,
    NoSuchQueue: 1,
    NoSuchResult: 1,
    NoSuchRow: 1,
    ResultsNotListed: 1,
    BrokerUnavailable: EX_UNAVAILABLE,
    LocksUnavailable: EX_UNAVAILABLE,
    NoWorker: EX_UNAVAILABLE,
    OutboxUnavailable: EX_UNAVAILABLE,
    ResultsUnavailable: EX_UNAVAILABLE,
    ScheduleUnavailable: EX_UNAVAILABLE,
}


def main(argv: list[str] | None = None) -> None:
    """Run ``ws-celery``; always exits.

    :param argv: arguments without the program's name; the process's own by default.
    """
    if argv is None:
        sys.excepthook = _print_error
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options, arguments = take_options(arguments)
        arguments = take_ini_uri(options, arguments, _COMMANDS)
        _remember(options)
        app = _load(options.ini, arguments)
        _group(app).main(args=arguments, prog_name="ws-celery", auto_envvar_prefix="CELERY")
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


def _remember(options: Options) -> None:
    # For children that start anew: --detach, multi, HUP, spawn.
    if options.ini:
        os.environ[INI_VARIABLE] = find_ini(options.ini)
    if options.ini_vars:
        os.environ[INI_VARIABLES] = json.dumps({**ini_variables(), **options.ini_vars})


def _load(ini: str | None, arguments: list[str]) -> PyramidCelery | None:
    place = command_of(arguments, _COMMANDS)
    if place is None or (command := arguments[place]) in _OURS or "--help" in arguments:
        return None
    app = load_celery_app(find_ini(ini))
    if command == "beat" or {"-B", "--beat"} & set(arguments):
        check_schedule(app)
    has_pool = any(word.startswith(("-P", "--pool")) for word in arguments)
    if command in ("worker", "run") and not has_pool:
        check_pool(app)
    return app


def _group(app: PyramidCelery | None) -> click.Group:
    app_option, *params = map(copy.copy, celery.params)
    app_option.default = app
    app_option.help = "Not needed; ws_celery.celery_app, which is the INI's, is accepted."
    for param in params:
        if isinstance(param, click.Option) and param.name in ("config", "loader", "skip_checks"):
            param.hidden = True  # refused, see take_options(); or Django's
        elif param.name == "version":
            param.callback, param.is_eager = _print_version, True
    for command in _COMMANDS.values():
        _tell_of_ini(command)
    group_class: Any = type(celery)
    return group_class(
        "ws-celery",
        commands=_COMMANDS,
        params=[*_INI_OPTIONS, app_option, *params],
        callback=_prepare,
        invoke_without_command=True,
        help="Run and look after the Celery of a Pyramid application.",
    )


@click.pass_context
def _prepare(context: click.Context, /, **options: Any) -> Any:
    outcome = context.invoke(celery.callback, **options)
    if (made := context.obj) is not None:
        context.obj = SafeContext(made.app, made.no_color, made.workdir, made.quiet)
    return outcome


def _tell_of_ini(command: click.Command) -> None:
    """Let help and completion of a command have the options that are accepted in any position."""
    if _INI_OPTIONS[0] not in command.params:
        command.params.extend(_INI_OPTIONS)  # in place: Celery adds an application's options so
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _tell_of_ini(inner)


def _print_version(context: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        echo(f"ws-celery {__version__}, Celery {VERSION_BANNER}")
        context.exit()
