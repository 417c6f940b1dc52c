"""A site of Django with django-celery-outbox, whose relay ours is compared with: its settings.

They are also the module of its Celery app. The environment says what it works with.
"""

from __future__ import annotations

from copy import copy
from os import environ

from celery.utils import uuid
from django_celery_outbox.app import OutboxCelery
from sqlalchemy import make_url

__all__ = ("app", "fill", "noop")

_URL = make_url(environ["BENCHMARK_DATABASE"])

SECRET_KEY = "of no use here"  # noqa: S105 - Django wants one
INSTALLED_APPS = ["django_celery_outbox"]
USE_TZ = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": _URL.host,
        "PORT": _URL.port,
        "NAME": _URL.database,
        "USER": _URL.username,
        "PASSWORD": _URL.password,
        "OPTIONS": {"options": f"-c search_path={environ['BENCHMARK_SCHEMA']}"},
    }
}
CELERY_OUTBOX_APP = "benchmarks.django_site.app"
MONITORING_METRICS_ENABLED = False  # there is no statsd here that would take them

app = OutboxCelery("django", broker=environ["BENCHMARK_BROKER"])
app.conf.update(task_default_queue=environ["BENCHMARK_QUEUE"], task_ignore_result=True)


@app.task(name="noop")
def noop(number: int) -> None:
    """Do nothing."""


def fill(count: int) -> None:
    """Create the tables, and have a row in the outbox for each of ``count`` calls of ``noop``."""
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)
    from django_celery_outbox.models import CeleryOutbox

    noop.delay(0)
    first = CeleryOutbox.objects.get()

    def like_the_first(number: int) -> CeleryOutbox:
        row = copy(first)
        row.pk, row.task_id, row.args = None, uuid(), [number]
        return row

    CeleryOutbox.objects.bulk_create(map(like_the_first, range(1, count)), batch_size=1000)
