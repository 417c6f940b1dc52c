"""Contracts, as zope interfaces; imports nothing of ours."""

from __future__ import annotations

from zope.interface import Attribute, Interface

__all__ = ("ICeleryApp", "ITaskRequest")


class ICeleryApp(Interface):
    """The Celery app of one Pyramid registry, registered there as an unnamed utility."""

    registry = Attribute("The Pyramid registry that owns this Celery app.")


class ITaskRequest(Interface):
    """Marks the request that a task run is given, to tell it from a request of the web."""
