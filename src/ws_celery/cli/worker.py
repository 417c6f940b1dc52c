"""``ws-celery worker`` and ``multi``: Celery's commands, but that they start ``ws-celery`` anew."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

import click
from celery.apps.multi import MultiParser, Node
from celery.bin.multi import MultiTool
from celery.bin.multi import multi as celery_multi
from celery.bin.worker import detach
from celery.bin.worker import worker as celery_worker

__all__ = ("multi", "worker")

_PROGRAM = ("-m", "ws_celery")

#: What the process that detaches needs of the options; the worker gets all of them again.
_DETACHING = ("logfile", "pidfile", "uid", "gid", "umask", "workdir", "executable", "hostname")

#: Options that have done their work when the worker starts again.
_DONE = ("-D", "--detach")
_DONE_WITH_VALUE = ("--uid", "--gid")


@click.pass_context
def _worker(context: click.Context, /, **options: Any) -> Any:
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
def _multi(context: click.Context, /, **_: Any) -> Any:
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

multi = copy.copy(celery_multi)
multi.callback = _multi
