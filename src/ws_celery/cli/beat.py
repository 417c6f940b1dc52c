"""``ws-celery beat``: Celery's command, with a file for probes."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import click
from celery.app.defaults import DEFAULTS
from celery.bin.base import CeleryOption
from celery.bin.beat import beat as celery_beat

from ws_celery.beat import SCHEDULER
from ws_celery.cli.values import HealthFile

__all__ = ("LAST_RUNS_VARIABLE", "beat")

#: Environment variable that names the file of the last runs where nothing else does.
LAST_RUNS_VARIABLE = "WS_CELERY_LAST_RUNS"


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
