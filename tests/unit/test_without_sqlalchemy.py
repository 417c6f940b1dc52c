"""SQLAlchemy is the application's choice."""

from __future__ import annotations

import subprocess
import sys

DISPATCH = """
import sys
import transaction
from pyramid.config import Configurator
from pyramid.request import Request
from ws_celery import task

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
assert not any(name.partition(".")[0] == "sqlalchemy" for name in sys.modules)
"""


def test_a_dispatch_does_not_import_sqlalchemy(tmp_path):
    subprocess.run([sys.executable, "-c", DISPATCH, str(tmp_path / "test.ini")], check=True)
