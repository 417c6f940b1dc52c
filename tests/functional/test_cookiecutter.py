"""An application as Pylons' cookiecutter makes it, tested by its own tests with the test kit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

APPLICATION = Path(__file__).parent / "apps" / "cookiecutter"


@pytest.fixture
def run(tmp_path):
    """Run a module of Python in a copy of the application; returns what it says."""
    root = tmp_path / "cookiecutter"
    shutil.copytree(APPLICATION, root)

    def run(*arguments):
        ended = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    run.ini = root / "testing.ini"
    return run


def test_the_tests_of_an_application_of_the_cookiecutter_pass_each_time(run):
    """They make the tables by the migrations, and drop those of the application's metadata."""
    run("alembic", "-c", "testing.ini", "revision", "--autogenerate", "-m", "all tables")
    assert "8 passed" in run("pytest", "-q")

    run.ini.write_text(run.ini.read_text().replace("outbox = false", "outbox = true"))
    assert "8 passed" in run("pytest", "-q")
