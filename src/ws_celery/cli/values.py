"""Values that options of several commands have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import click

__all__ = ("LIMIT", "HealthFile")

#: How many to show at most, as all databases take it.
LIMIT = click.IntRange(1, 2**31 - 1)


class HealthFile(click.Path):
    """A file that can be written, or made. It is not yet: that would tell that all is well."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
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
