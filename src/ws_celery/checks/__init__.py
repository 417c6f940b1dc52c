"""What ``ws-celery check`` finds out: what was read from where, and what is wrong or doubtful.

``examination`` reads and loads, ``application`` looks at what was loaded and ``code`` at its
modules; ``report`` is what they find.
"""

from __future__ import annotations

from ws_celery.checks.examination import examine, explanation
from ws_celery.checks.report import Finding, Report, shown

__all__ = ("Finding", "Report", "examine", "explanation", "shown")
