"""SQLAlchemy is the application's choice."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import transaction
from pyramid.config import Configurator
from pyramid.request import Request
from ws_celery import get_celery_app, task
from ws_celery.beat import Scheduler

@task(name="add")
def add(request):
    pass

with open(sys.argv[1], "w") as file:
    file.write("[celery]\\nbroker_url = memory://")
config = Configurator(settings={"ws_celery.config_uri": sys.argv[1]})
config.include("ws_celery")
config.add_celery_task(add)
config.make_wsgi_app()
request = Request.blank("/")
request.registry = config.registry
with transaction.manager:
    add.delay(request)
Scheduler(get_celery_app(request), schedule_filename=sys.argv[1] + ".schedule").close()
assert not any(name.partition(".")[0] == "sqlalchemy" for name in sys.modules)
"""


def test_neither_a_dispatch_nor_beat_without_the_database_imports_sqlalchemy(tmp_path):
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "test.ini")], check=True)
