"""Importing does nothing but define names."""

from __future__ import annotations

import subprocess
import sys

MODULE = """
from ws_celery import RequestAwareTask, celery_app, task

@task
def one(request): ...

@task(base=RequestAwareTask, bind=True)
def two(self, request): ...

@celery_app.task(base=RequestAwareTask)
def three(request): ...

@task
class Four(RequestAwareTask):
    def run(self, request): ...
"""


def python(program: str) -> str:
    """Run a program in a fresh interpreter; return what it printed."""
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_importing_ws_celery_imports_neither_sqlalchemy_nor_redis():
    program = """
import sys
from ws_celery import *
print(sorted({"sqlalchemy", "redis", "zope.sqlalchemy"} & set(sys.modules)))
"""
    assert python(program) == "[]"


def test_the_console_script_comes_before_all_that_gevent_has_to_patch():
    program = """
import sys
import ws_celery.__main__
print(sorted({"kombu", "pyramid", "socket", "transaction"} & set(sys.modules)))
"""
    assert python(program) == "[]"


def test_importing_a_module_of_tasks_registers_nothing(tmp_path):
    (tmp_path / "tasks.py").write_text(MODULE)
    program = f"""
import sys
from celery import _state
from pyramid.config import global_registries
sys.path.insert(0, {str(tmp_path)!r})

def registered():
    return set(_state._apps), set(_state._on_app_finalizers), len(list(global_registries))

from ws_celery import task
before = registered()
import tasks
print(registered() == before, len(before[0]))
"""
    assert python(program) == "True 0"
