"""Contracts, as zope interfaces; imports nothing of ours."""

from __future__ import annotations

from zope.interface import Attribute, Interface

__all__ = ("ICeleryApp", "ICelerySource", "ITaskRequest")


class ICeleryApp(Interface):
    """The Celery app of one Pyramid registry, registered there as an unnamed utility."""

    registry = Attribute("The Pyramid registry that owns this Celery app.")


class ICelerySource(Interface):
    """Where the configuration is, as ``config.configure_celery`` was told."""

    config_uri = Attribute("The file, or None.")
    overrides = Attribute("Options set in code, by name.")


class ITaskRequest(Interface):
    """Marks the request that a task run is given, to tell it from a request of the web."""
