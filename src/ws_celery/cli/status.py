"""``ws-celery status``: Celery's command, and ``--healthy`` for probes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import click
from celery.bin.control import status as celery_status
from celery.platforms import EX_UNAVAILABLE
from click.core import ParameterSource

from ws_celery.cli.tables import echo
from ws_celery.inspection import health

__all__ = ("status",)

_PARTS = ("broker", "worker", "database", "relay", "beat")
_FILE = click.Path(dir_okay=False, path_type=Path)

_OPTIONS = (
    click.Option(
        ["--healthy"],
        is_flag=True,
        help="For probes: one line for each part, and exit code 69 if one is not alive. With "
        "--destination these workers have to answer, else any one.",
    ),
    click.Option(
        ["--part", "parts"],
        multiple=True,
        type=click.Choice(_PARTS),
        help="With --healthy: ask this part only; may be repeated.",
    ),
    click.Option(["--relay-file"], type=_FILE, help="With --healthy: health file of the relay."),
    click.Option(["--beat-file"], type=_FILE, help="With --healthy: health file of beat."),
    click.Option(
        ["--max-age"],
        type=click.FloatRange(0, min_open=True),
        default=60,
        show_default=True,
        help="With --healthy: seconds that a health file may be old, or the outbox be behind.",
    ),
)
_OURS = tuple(option.name for option in _OPTIONS)


@click.pass_context
def _status(context: click.Context, /, **options: Any) -> None:
    """Show the workers that are online, or whether all parts are healthy."""
    ours = {name: options.pop(name) for name in _OURS if name}
    if not ours.pop("healthy"):
        _refuse_ours(context)
        context.invoke(celery_status.callback, **options)
        return
    if "beat" in ours["parts"] and ours["beat_file"] is None:
        raise click.UsageError("--part beat needs --beat-file: only that tells of a beat.")
    found = health(context.obj.app, workers=options["destination"] or (), **ours)
    healthy = all(part.healthy for part in found)
    if options["json"]:
        parts = [part.as_dict() for part in found]
        echo(json.dumps({"healthy": healthy, "parts": parts}, indent=2))
    else:
        for part in found:
            echo(f"{part.name:8}  {'ok' if part.healthy else 'FAILED':6}  {part.detail}")
    context.exit(0 if healthy else EX_UNAVAILABLE)


def _refuse_ours(context: click.Context) -> None:
    # A probe that has forgotten --healthy would be content with any worker.
    for option in _OPTIONS:
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} is for --healthy only.")


status = copy.copy(celery_status)
status.callback = _status
status.help = _status.__doc__
status.params = [*celery_status.params, *_OPTIONS]
