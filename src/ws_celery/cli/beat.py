"""``ws-celery beat``: Celery's command, with a file for probes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click
from celery.bin.base import CeleryOption
from celery.bin.beat import beat as celery_beat

from ws_celery.beat import SCHEDULER
from ws_celery.cli.values import HealthFile

__all__ = ("beat",)


@click.pass_context
def _beat(context: click.Context, /, health_file: Path | None, **options: Any) -> Any:
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
