"""An application as Pylons' cookiecutter makes it, tested by its own tests with the test kit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

APPLICATION = Path(__file__).parent / "apps" / "cookiecutter"


@pytest.mark.parametrize("outbox", ["false", "true"])
def test_the_tests_of_an_application_of_the_cookiecutter_pass(tmp_path, outbox):
    root = tmp_path / "cookiecutter"
    shutil.copytree(APPLICATION, root)
    ini = root / "testing.ini"
    ini.write_text(ini.read_text().replace("outbox = false", f"outbox = {outbox}"))

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert "8 passed" in run.stdout
