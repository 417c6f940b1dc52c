"""The console script ``ws-celery``: Celery's commands for a Pyramid application, and our own.

Celery's own click commands run unchanged. ``--ini``, in whatever position, says which application
to load, and Celery's options have to find it configured when click converts them.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from traceback import format_exception
from types import TracebackType
from typing import Any

import click
from celery import VERSION_BANNER
from celery.platforms import EX_UNAVAILABLE
from click_didyoumean import DYMGroup
from kombu.exceptions import OperationalError

from ws_celery import __version__
from ws_celery.cli.options import Options, looks_like_ini, options_given, take_ini_uri
from ws_celery.exceptions import (
    BrokerUnavailable,
    ConfigurationError,
    LocksUnavailable,
    NotFound,
    NotSupported,
    Unavailable,
    WsCeleryError,
)
from ws_celery.masking import masked_text, printable

__all__ = ("COMMANDS", "TEXTS", "main", "main_group")

#: Where each command is; it is imported when it is called.
COMMANDS = {
    "amqp": "celery.bin.amqp:amqp",
    "beat": "ws_celery.cli.worker:beat",
    "call": "ws_celery.cli.tasks:call",
    "check": "ws_celery.cli.check:check",
    "clean": "ws_celery.cli.queues:clean",
    "control": "celery.bin.control:control",
    "demo": "ws_celery.cli.development:demo",
    "dev": "ws_celery.cli.development:dev",
    "events": "celery.bin.events:events",
    "graph": "celery.bin.graph:graph",
    "inspect": "celery.bin.control:inspect",
    "list": "celery.bin.list:list_",
    "locks": "ws_celery.cli.locks:locks",
    "logtool": "celery.bin.logtool:logtool",
    "migrate": "celery.bin.migrate:migrate",
    "multi": "ws_celery.cli.worker:multi",
    "outbox": "ws_celery.cli.outbox:outbox",
    "purge": "ws_celery.cli.queues:purge",
    "queues": "ws_celery.cli.queues:queues",
    "relay": "ws_celery.cli.worker:relay",
    "report": "celery.bin.celery:report",
    "result": "ws_celery.cli.results:result",
    "results": "ws_celery.cli.results:results",
    "run": "ws_celery.cli.worker:run",
    "schedule": "ws_celery.cli.schedule:schedule",
    "shell": "ws_celery.cli.shell:shell",
    "status": "ws_celery.cli.tasks:status",
    "tasks": "ws_celery.cli.tasks:tasks",
    "upgrade": "celery.bin.upgrade:upgrade",
    "view": "ws_celery.cli.queues:view",
    "worker": "ws_celery.cli.worker:worker",
    "workers": "ws_celery.cli.tasks:workers",
}

#: What the list of all commands says of each, so that none has to be imported for it.
TEXTS = {
    "amqp": "AMQP Administration Shell.",
    "beat": "Start the beat periodic task scheduler.",
    "call": "Call a task by name.",
    "check": "Print the configuration with its origins, and what is wrong or doubtful.",
    "clean": "Throw away what waits in all queues; the same as purge.",
    "control": "Send the COMMAND control command to the workers.",
    "demo": "Run the demonstration application with a worker, beat and an embedded broker.",
    "dev": "Run web server, worker and beat, and the embedded broker if it is configured.",
    "events": "Event-stream utilities.",
    "graph": "The ``celery graph`` command.",
    "inspect": "Inspect the workers by sending them the COMMAND inspect command.",
    "list": "Get info from broker.",
    "locks": "Look at the locks of @one_instance, and free one.",
    "logtool": "The ``celery logtool`` command.",
    "migrate": "Migrate tasks from one broker to another.",
    "multi": "Start multiple worker instances.",
    "outbox": "Look after the outbox: its table, what waits in it, its dead letters.",
    "purge": "Throw away what waits in all queues of the application, for ever.",
    "queues": "Show how much waits in which queue; look into one, empty it, delete it.",
    "relay": "Send what is due in the outbox: what could not be published, has an eta, or "
    "got lost.",
    "report": "Shows information useful to include in bug-reports.",
    "result": "Print the return value for a given task id.",
    "results": "List results, the youngest first; show or forget one.",
    "run": "Start worker instance; the same as worker.",
    "schedule": "Look after the schedule: what runs when, from code, INI and database.",
    "shell": "Start a shell with the application's tasks, a request and an open transaction.",
    "status": "Show the workers that are online, or whether all parts are healthy.",
    "tasks": "List the registered tasks; show what runs, and stop it.",
    "upgrade": "Perform upgrade between versions.",
    "view": "Show what waits in the default queue; `queues peek` shows it of any.",
    "worker": "Start worker instance.",
    "workers": "List the workers that answer.",
    "flower": "Watch workers and tasks in the browser, by Flower.",
}

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
        _print(f"Error: {error}")
        sys.exit(_EXIT_CODES.get(type(error), _USAGE))
    except OperationalError as error:
        _print(f"Error: the broker does not answer: {masked_text(str(error))}")
        sys.exit(EX_UNAVAILABLE)


def _print_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print what nobody has handled as Python does, without its secrets."""
    _print(masked_text("".join(format_exception(kind, error, trace)).rstrip()))


def _print(text: str) -> None:
    click.echo(printable(text), err=True)


def main_group() -> click.Group:
    """Return all of ``ws-celery`` as a click command."""
    return _Commands(
        "ws-celery",
        params=_options(),
        callback=_begin,
        invoke_without_command=True,
        help="Run and look after the Celery of a Pyramid application.",
    )


class _Commands(DYMGroup):
    """All commands; a module is imported when one of its commands is called.

    The application is loaded when click has found the command that it is for: that is the last
    moment before options are converted, whose defaults the application has.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """Return the names of all commands, those of Celery's plugins too."""
        return sorted({*COMMANDS, *_plugins()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command."""
        place = COMMANDS.get(cmd_name) or _plugins().get(cmd_name)
        if place is None:
            return None
        command: click.Command = resolve_name(place)
        _accept_everywhere(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of all commands, which imports none."""
        plugin = "A command that is added to Celery's."
        with formatter.section("Commands"):
            formatter.write_dl([(n, TEXTS.get(n, plugin)) for n in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command among the words that click has left, and load the application for it.

        :raises WsCeleryError: whatever is wrong with it.
        """
        if args[0] not in COMMANDS and looks_like_ini(args[0]):
            raise ConfigurationError(_ini_first(args))
        name, command, rest = super().resolve_command(ctx, args)
        if name is None or command is None or ctx.resilient_parsing:  # for completion
            return name, command, rest
        options, given = Options(), options_given(command, rest, ctx)
        for each in (ctx.params, given):
            options.take(each)
        rest = take_ini_uri(options, command, rest)
        # Here, because it imports Pyramid and Celery, which the list of commands does not need.
        from ws_celery.cli.application import app_for

        ctx.params["app"] = app_for(name, options, ctx.params, given)
        if workdir := ctx.params["workdir"]:
            os.chdir(workdir)  # not before, because other paths are meant from where it was called
        return name, command, rest


def _plugins() -> dict[str, str]:
    """Return where the commands are that other distributions add to Celery's."""
    plugins = {each.name: each.value for each in entry_points(group="celery.commands")}
    return {"flower": "ws_celery.cli.worker:flower", **plugins}  # without Flower, ours says so


def _ini_first(words: list[str]) -> str:
    ini, *rest = words
    line = shlex.join(["ws-celery", *(rest or ["worker"]), "--ini", ini])
    return f"{ini} is no command: the INI file comes after the command. Write `{line}`."


@click.pass_context
def _begin(context: click.Context, /, **params: object) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        return
    from ws_celery.cli.application import begin

    begin(context, params)


def _options() -> list[click.Parameter]:
    """Return the options before the command: ours, and those of ``celery`` but Django's."""
    return [
        *_options_everywhere(before=True),
        click.Option(["-b", "--broker"], envvar="BROKER_URL"),
        click.Option(["--result-backend"], envvar="RESULT_BACKEND"),
        click.Option(["--workdir"], type=Path),
        click.Option(["-C", "--no-color"], envvar="NO_COLOR", is_flag=True),
        click.Option(["-q", "--quiet"], is_flag=True),
        click.Option(["--version"], is_flag=True, is_eager=True, callback=_print_version),
        click.Option(["--skip-checks"], envvar="SKIP_CHECKS", is_flag=True, hidden=True),
    ]


def _options_everywhere(*, before: bool) -> list[click.Parameter]:
    """Return what is accepted in any position; its values are read before the command is.

    :param before: whether before the command, which is where help on ``-A`` is given.
    """
    # Celery would take APP, CONFIG_MODULE or LOADER of the environment for another app.
    common: dict[str, Any] = {"expose_value": before, "allow_from_autoenv": False}
    return [
        click.Option(
            ["--ini"],
            metavar="FILE",
            type=click.Path(),
            help="INI file of the application, in any position; or as FILE#NAME KEY=VALUE right "
            "after the command. [env: WS_CELERY_INI; default: ./development.ini]",
            **common,
        ),
        click.Option(
            ["--ini-var"],
            metavar="NAME=VALUE",
            multiple=True,
            help="Value of %(NAME)s in the INI file, several separated by commas; may be "
            "repeated, and beats [DEFAULT].",
            **common,
        ),
        click.Option(
            ["-A", "--app"],
            hidden=not before,
            help="Not needed; ws_celery.celery_app, which is the INI's, is accepted.",
            **common,
        ),
        # Refused; see Options.take.
        *(click.Option([name], hidden=True, **common) for name in ("--config", "--loader")),
    ]


def _accept_everywhere(command: click.Command) -> None:
    """Let a command have the options that are accepted in any position."""
    if not any(each.name == "ini" for each in command.params):
        # In place: Celery adds an application's options so.
        command.params.extend(_options_everywhere(before=False))
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _accept_everywhere(inner)


def _print_version(context: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"ws-celery {__version__}, Celery {VERSION_BANNER}")
        context.exit()
