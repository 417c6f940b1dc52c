"""``ws-celery shell``: Celery's command, with a request and an open transaction at hand."""

from __future__ import annotations

import code
import copy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import celery
import click
from celery.bin.shell import shell as celery_shell
from pyramid.scripting import prepare

from ws_celery.cli.tables import echo
from ws_celery.exceptions import ConfigurationError
from ws_celery.shell import open_transaction, tasks_by_name

__all__ = ("shell",)

_CANVAS = ("Task", "chain", "chord", "chunks", "group", "signature", "xmap", "xstarmap")
_SHELLS = ("ipython", "bpython")

_BANNER = """\
app       the Celery app
request   a request, and request.registry
commit()  keeps changes and sends tasks; abort() drops them
tasks     {tasks}

A transaction is open: a task that you call is sent by commit(). Leaving aborts."""


@click.pass_context
def _shell(context: click.Context, /, without_tasks: bool, **options: Any) -> None:
    """Start a shell with the application's tasks, a request and an open transaction.

    These names are there: ``app`` (the Celery app, ``celery`` too), ``request``, ``registry``,
    ``root``, ``commit``, ``abort``, the tasks by the names of their functions, and Celery's
    ``chain``, ``chord``, ``group`` and so on. What is changed or dispatched waits for ``commit()``;
    leaving the shell aborts.
    """
    for library in ("eventlet", "gevent"):
        if options[library]:
            import_module(f"celery.concurrency.{library}")
    sys.path.insert(0, str(Path.cwd()))
    app = context.obj.app
    with prepare(registry=app.registry) as env:
        names = {name: env[name] for name in ("request", "registry", "root")}
        names.update({name: getattr(celery, name) for name in _CANVAS}, app=app, celery=app)
        tasks = {} if without_tasks else tasks_by_name(app)
        names = {**tasks, **names}
        wanted = [name for name in _SHELLS if options[name]]
        with open_transaction(names):
            banner = _BANNER.format(tasks=", ".join(sorted(tasks)) or "none")
            _interact(names, banner, wanted, plain=options["python"])


def _interact(names: dict[str, Any], banner: str, wanted: list[str], *, plain: bool) -> None:
    """Run the shell that is wanted, else the best one that is installed."""
    for name in [] if plain else wanted or _SHELLS:
        try:
            module = import_module("IPython" if name == "ipython" else name)
        except ImportError:
            if wanted:
                raise ConfigurationError(
                    f"{name} is not installed. Install it: pip install {name}."
                ) from None
            continue
        echo(banner)
        if name == "ipython":
            module.start_ipython(argv=[], user_ns=names)
        else:
            module.embed(names)
        return
    try:
        import readline
        import rlcompleter
    except ImportError:
        pass  # Python may be built without
    else:
        readline.set_completer(rlcompleter.Completer(names).complete)
        readline.parse_and_bind("tab: complete")
    code.interact(banner, local=names, exitmsg="")


shell = copy.copy(celery_shell)
shell.callback = _shell
shell.help = _shell.__doc__
