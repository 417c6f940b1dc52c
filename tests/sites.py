"""Applications that are written to a file for ``ws-celery check``; handed out as fixtures."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest
from pyramid.config import global_registries

from ws_celery.checks import examine

APPLICATION = """
from pyramid.config import Configurator
from ws_celery import task

@task(name="known", bind=True)
def known(self, request):
    pass

{code}

def app(global_config, **settings):
    config = Configurator(settings=settings)
    config.include("ws_celery")
    config.scan(__name__)
    return config.make_wsgi_app()
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Write an application and its INI file; returns the file's path."""
    module = f"checked_{tmp_path.name}".replace("-", "_")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(global_registries)

    def write(text, code="", name="production.ini", app="", broker="memory://"):
        (tmp_path / f"{module}.py").write_text(APPLICATION.format(code=textwrap.dedent(code)))
        path = tmp_path / name
        path.write_text(
            f"[app:main]\npaste.app_factory = {module}:app\n"
            f"ws_celery.config_uri = %(__file__)s\n{textwrap.dedent(app)}\n"
            f"[celery]\nbroker_url = {broker}\n{textwrap.dedent(text)}"
        )
        return str(path)

    yield write
    sys.modules.pop(module, None)
    for registry in list(global_registries):
        if registry not in before:
            global_registries.remove(registry)


@pytest.fixture
def found(site, monkeypatch):
    """Examine; returns code to finding. Whoever runs the tests is no root."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    def find(*args, **options):
        findings = examine(site(*args, **options)).findings
        return {finding.code: finding for finding in findings}

    return find
