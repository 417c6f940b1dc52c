"""``ws-celery flower`` where Flower is not installed; else its own command is there."""

from __future__ import annotations

import click

from ws_celery.exceptions import ConfigurationError

__all__ = ("flower",)


@click.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def flower() -> None:
    """Watch workers and tasks in the browser, by Flower (not installed)."""
    raise ConfigurationError("Flower is not installed. Install it: pip install flower.")
