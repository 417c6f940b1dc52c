"""An application as Pylons' cookiecutter makes it, tested by its own tests with the test kit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

APPLICATION = Path(__file__).parent / "apps" / "cookiecutter"


def test_the_tests_of_an_application_of_the_cookiecutter_pass(tmp_path):
    root = tmp_path / "cookiecutter"
    shutil.copytree(APPLICATION, root)

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
