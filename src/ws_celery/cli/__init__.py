"""The console script ``ws-celery``."""

from __future__ import annotations


def main() -> None:
    """Run it."""
