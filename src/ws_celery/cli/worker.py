"""``ws-celery worker``, ``multi``, ``beat`` and ``relay``: what runs tasks, and what sends them.

The first three are Celery's commands; where they start a process anew, it is ``ws-celery``.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import click
from celery.app.defaults import DEFAULTS
from celery.apps.multi import MultiParser, Node
from celery.bin.base import LOG_LEVEL, CeleryOption
from celery.bin.beat import beat as celery_beat
from celery.bin.multi import MultiTool
from celery.bin.multi import multi as celery_multi
from celery.bin.worker import detach
from celery.bin.worker import worker as celery_worker

from ws_celery.beat import SCHEDULER
from ws_celery.cli.tables import with_app
from ws_celery.exceptions import ConfigurationError, WsCeleryError
from ws_celery.masking import logger_of

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery
    from ws_celery.outbox.relay import Relay
    from ws_celery.outbox.store import Outbox

__all__ = (
    "LAST_RUNS_VARIABLE",
    "beat",
    "flower",
    "multi",
    "relay",
    "run",
    "worker",
)

log = logger_of(__name__)

_PROGRAM = ("-m", "ws_celery")

#: What the process that detaches needs of the options; the worker gets all of them again.
_DETACHING = ("logfile", "pidfile", "uid", "gid", "umask", "workdir", "executable", "hostname")

#: Options that have done their work when the worker starts again.
_DONE = ("-D", "--detach")
_DONE_WITH_VALUE = ("--uid", "--gid")


@click.pass_context
def _worker(context: click.Context, /, **options: Any) -> object:
    if not options["detach"]:
        return context.invoke(celery_worker.callback, **options)
    arguments = [*_PROGRAM, *_left_over(sys.argv[1:])]
    chosen = {name: options.get(name) for name in _DETACHING}
    return detach(sys.executable, arguments, app=context.obj.app, **chosen)


def _left_over(arguments: Iterable[str]) -> Iterable[str]:
    words = iter(arguments)
    for word in words:
        if word in _DONE_WITH_VALUE:
            next(words, None)
        elif word not in _DONE and not word.startswith(tuple(f"{o}=" for o in _DONE_WITH_VALUE)):
            yield word


class _Node(Node):
    """A worker of ``multi``."""

    argv: tuple[str, ...]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        command, *rest = self.argv
        self.argv = (command.replace("-m celery", " ".join(_PROGRAM), 1), *rest)


class _Parser(MultiParser):
    Node = _Node


class _MultiTool(MultiTool):
    MultiParser = _Parser


@click.pass_context
def _multi(context: click.Context, /, **_: object) -> None:
    """Start multiple worker instances."""
    tool = _MultiTool(quiet=context.obj.quiet, no_color=context.obj.no_color)
    context.exit(tool.execute_from_commandline(["ws-celery multi", *context.args]))


worker = copy.copy(celery_worker)
worker.callback = _worker
worker.help = """Start worker instance.

\b
Examples
--------

\b
$ ws-celery worker --ini production.ini --loglevel=info
$ ws-celery worker production.ini#shop --queues=high,low --concurrency=4
$ ws-celery worker --ini production.ini --pool=threads --hostname=slow@%h
$ ws-celery worker --ini production.ini --autoscale=10,0
"""

run = copy.copy(worker)
run.name, run.short_help = "run", "Start worker instance; the same as worker."

multi = copy.copy(celery_multi)
multi.callback = _multi


class HealthFile(click.Path):
    """A file that can be written, or made. It is not yet: that would tell that all is well."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Path:
        """Return the file.

        :raises click.BadParameter: if it cannot be written.
        """
        file = cast("Path", super().convert(value, param, ctx))
        folder = file.parent
        if not (folder.is_dir() and (file.exists() or os.access(folder, os.W_OK | os.X_OK))):
            self.fail(
                f"'{folder}' is no folder that a file can be made in. Make it, or name another "
                "one.",
                param,
                ctx,
            )
        return file


#: Environment variable that names the file of the last runs where nothing else does.
LAST_RUNS_VARIABLE = "WS_CELERY_LAST_RUNS"


@click.pass_context
def _beat(context: click.Context, /, health_file: Path | None, **options: Any) -> object:
    app, scheduler = context.obj.app, options["scheduler"]
    if health_file is not None and scheduler != SCHEDULER:
        raise click.UsageError(
            f"--health-file is for the scheduler {SCHEDULER}, and this is {scheduler}."
        )
    if app.schedule is not None and scheduler != SCHEDULER:
        raise click.UsageError(
            f"the scheduler {scheduler} does not read the schedule in the database. Take out "
            "--scheduler, or ws_celery.beat = true."
        )
    app.beat_health_file = health_file
    if options["schedule"] == DEFAULTS["beat_schedule_filename"]:
        options["schedule"] = os.environ.get(LAST_RUNS_VARIABLE) or options["schedule"]
    return context.invoke(celery_beat.callback, **options)


beat = copy.copy(celery_beat)
beat.callback = _beat
beat.params = [
    *celery_beat.params,
    CeleryOption(
        ["--health-file"],
        type=HealthFile(),
        help_group="Beat Options",
        help="Write FILE every few seconds while beat ticks, and what it needs answers.",
    ),
]


@click.command
@click.option(
    "--batch",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="How many messages one transaction claims and one flush sends.",
)
@click.option(
    "--health-file",
    type=HealthFile(),
    help="Touch FILE whenever database and broker have answered, at least every few seconds.",
)
@click.option("-l", "--loglevel", type=LOG_LEVEL, default="INFO", show_default=True)
@click.option("-f", "--logfile", help="Where to log to. [default: stderr]")
@with_app
def relay(
    app: PyramidCelery, batch: int, health_file: Path | None, loglevel: str, logfile: str | None
) -> None:
    """Send what is due in the outbox: what could not be published, has an eta, or got lost.

    Every beat does so too, in a thread. Any number of both may run at once. SIGTERM and SIGINT let
    it finish the batch in hand.
    """
    if app.outbox is None:
        raise ConfigurationError(
            "The application has no outbox: there is nothing to send. Switch it on with "
            "`ws_celery.outbox = true`."
        )
    app.log.setup(loglevel, logfile)
    app.outbox.relay.batch = batch
    app.outbox.relay.health_file = health_file
    _check(app.outbox)
    _run(app.outbox.relay)


def _check(outbox: Outbox) -> None:
    """Let what no relay can work with be an error at the start.

    :raises WsCeleryError: such as a table that is not there.
    """
    try:
        with outbox.begin() as connection:
            outbox.rows.seconds_until_due(connection)
    except WsCeleryError:
        raise  # it would not mend itself
    except outbox.errors as error:
        log.debug("%s", error)  # a database that is down comes back; the relay says so


def _run(relay: Relay) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _end)
    # It ends with the main thread; signals reach only that one. Not join(): one that a signal
    # interrupts takes the thread for ended, and Python would not wait for it.
    thread = relay.start()
    while thread.is_alive():
        time.sleep(1)


def _end(signum: int, _frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second one kills
    sys.exit(0)


@click.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def flower() -> None:
    """Watch workers and tasks in the browser, by Flower (not installed)."""
    raise ConfigurationError("Flower is not installed. Install it: pip install flower.")
