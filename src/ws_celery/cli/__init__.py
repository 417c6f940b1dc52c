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
from typing import Any

import click
from celery import VERSION_BANNER, maybe_patch_concurrency
from celery.bin.celery import celery
from celery.platforms import EX_UNAVAILABLE
from kombu.exceptions import OperationalError

from ws_celery.app import INI_VARIABLE, PyramidCelery
from ws_celery.cli.application import check_schedule, find_ini, load_celery_app
from ws_celery.cli.arguments import Options, take_options
from ws_celery.cli.call import call
from ws_celery.cli.check import check
from ws_celery.cli.development import demo, dev
from ws_celery.exceptions import WsCeleryError
from ws_celery.masking import masked_text
from ws_celery.settings import INI_VARIABLES, ini_variables
from ws_celery.version import __version__

__all__ = ("main",)

#: Our own commands; they load what they need themselves.
_OURS: dict[str, click.Command] = {"check": check, "demo": demo, "dev": dev}
_COMMANDS = {**celery.commands, **_OURS, "call": call}

_USAGE = 2


def main(argv: list[str] | None = None) -> None:
    """Run ``ws-celery``; always exits.

    :param argv: arguments without the program's name; the process's own by default.
    """
    arguments = sys.argv[1:] if argv is None else argv
    # gevent and eventlet have to patch the standard library before anything else is imported.
    maybe_patch_concurrency(["ws-celery", *arguments])
    try:
        options, arguments = take_options(arguments)
        _remember(options)
        app = _load(options.ini, arguments)
        _group(app).main(args=arguments, prog_name="ws-celery", auto_envvar_prefix="CELERY")
    except WsCeleryError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(_USAGE)
    except OperationalError as error:
        click.echo(f"Error: the broker does not answer: {masked_text(str(error))}", err=True)
        sys.exit(EX_UNAVAILABLE)


def _remember(options: Options) -> None:
    # For children that start anew: --detach, multi, HUP, spawn.
    if options.ini:
        os.environ[INI_VARIABLE] = find_ini(options.ini)
    if options.ini_vars:
        os.environ[INI_VARIABLES] = json.dumps({**ini_variables(), **options.ini_vars})


def _load(ini: str | None, arguments: list[str]) -> PyramidCelery | None:
    command = next((word for word in arguments if word in _COMMANDS), None)
    if command is None or command in _OURS or "--help" in arguments:
        return None
    app = load_celery_app(find_ini(ini))
    if command == "beat" or {"-B", "--beat"} & set(arguments):
        check_schedule(app)
    return app


def _group(app: PyramidCelery | None) -> click.Group:
    app_option, *params = map(copy.copy, celery.params)
    app_option.default = app
    for param in params:
        if isinstance(param, click.Option) and param.name in ("config", "loader"):
            param.hidden = True  # refused: see take_options()
        elif param.name == "version":
            param.callback, param.is_eager = _print_version, True
    ini_option = click.Option(
        ["--ini"],
        metavar="FILE",
        expose_value=False,
        help=f"INI file of the application; accepted in any position. [env: {INI_VARIABLE}]",
    )
    vars_option = click.Option(
        ["--ini-var"],
        metavar="NAME=VALUE",
        multiple=True,
        expose_value=False,
        help="Value of %(NAME)s in the INI file, several separated by commas; may be repeated, "
        "and beats [DEFAULT].",
    )
    group_class: Any = type(celery)
    return group_class(
        "ws-celery",
        commands=_COMMANDS,
        params=[ini_option, vars_option, app_option, *params],
        callback=celery.callback,
        invoke_without_command=True,
        help="Run and look after the Celery of a Pyramid application.",
    )


def _print_version(context: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"ws-celery {__version__}, Celery {VERSION_BANNER}")
        context.exit()
