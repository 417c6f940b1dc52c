"""What ``ws-celery check`` finds out: what was read from where, and what is wrong or doubtful.

``examination`` reads and loads, ``application`` looks at what was loaded and ``code`` at its
modules; ``report`` is what they find.
"""

from __future__ import annotations

from ws_celery.checks.application import check_pool
from ws_celery.checks.examination import examine, explain
from ws_celery.checks.report import Finding, Report, shown

__all__ = ("Finding", "Report", "check_pool", "examine", "explain", "shown")
