"""What is wrong ends with one sentence that names the remedy, exit code 2 and no traceback."""

from __future__ import annotations

import re

import pytest


@pytest.fixture
def ini(make_site, sqlite_url):
    """An INI file that is right; each test breaks one thing."""
    return make_site(sqlite_url, "redis://127.0.0.1:1/0").ini


def check_refused(result, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


def replace(ini, old: str, new: str) -> None:
    text, count = re.subn(old, new, ini.read_text(), flags=re.MULTILINE)
    assert count == 1
    ini.write_text(text)


def test_no_broker_is_configured(ini, run):
    replace(ini, "^broker_url = .*$", "")

    check_refused(run("worker", "--ini", str(ini)), str(ini), "broker_url", "[celery]")


def test_the_ini_file_is_missing(run, tmp_path):
    missing = str(tmp_path / "missing.ini")

    check_refused(run("worker", "--ini", missing), missing, "no such file", "--ini")


def test_no_ini_file_is_given(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no development.ini is here
    check_refused(run("worker"), "--ini FILE", "WS_CELERY_INI")


def test_the_celery_section_is_missing(ini, run):
    replace(ini, r"^\[celery\]$", "[cellery]")

    check_refused(run("worker", "--ini", str(ini)), str(ini), "[cellery]", "mean [celery]?")


def test_the_application_section_is_missing(ini, run):
    replace(ini, r"^\[app:main\]$", "[app:other]")

    check_refused(run("worker", "--ini", str(ini)), str(ini), "[app:main]")


def test_the_application_does_not_include_ws_celery(ini, run):
    replace(ini, "pyramid_tm ws_celery", "pyramid_tm")

    check_refused(run("worker", "--ini", str(ini)), str(ini), "pyramid.includes = ws_celery")


def test_a_schedule_names_a_task_that_is_not_registered(ini, run):
    replace(ini, "^task = backup$", "task = backpu")

    check_refused(
        run("beat", "--ini", str(ini)), "[celerybeat:backup]", "'backpu'", "config.scan()"
    )


def test_a_key_is_misspelt(ini, run):
    replace(ini, "^worker_concurrency", "worker_concurency")

    check_refused(run("worker", "--ini", str(ini)), "worker_concurency", "worker_concurrency?")


def test_a_value_has_the_wrong_type(ini, run):
    replace(ini, "^worker_concurrency = 2", "worker_concurrency = many")

    check_refused(
        run("worker", "--ini", str(ini)), "[celery] worker_concurrency", "'many'", "whole number"
    )


@pytest.mark.parametrize("command", ["worker", "dev"])
def test_the_file_is_not_in_utf_8(ini, run, command):
    with ini.open("ab") as file:
        file.write(b"# \xff")

    check_refused(run(command, "--ini", str(ini)), str(ini), "UTF-8")


@pytest.mark.parametrize("command", ["worker", "dev"])
def test_a_key_stands_twice_in_a_section(ini, run, command):
    replace(ini, "^worker_concurrency = 2", "worker_concurrency = 2\nworker_concurrency = 3")

    check_refused(run(command, "--ini", str(ini)), "worker_concurrency", "already set")


def test_dev_has_no_web_server_to_run(ini, run):
    replace(ini, r"^\[server:main\]$", "[server:other]")

    check_refused(run("dev", "--ini", str(ini)), str(ini), "[server:main]", "missing")


def test_the_value_of_ini_is_forgotten(run):
    check_refused(run("worker", "--ini", "--loglevel=info"), "--ini needs a value")


def test_the_ini_is_a_directory_or_has_no_suffix(run, tmp_path):
    for path in (".", "production", str(tmp_path)):
        check_refused(run("worker", "--ini", path), path, "no such file")


@pytest.mark.parametrize("use", ["call:nomod:main", "egg:no-such-dist", "call:myapp:nothing"])
def test_the_application_cannot_be_found(ini, run, use):
    replace(ini, "^use = call:myapp:main$", f"use = {use}")

    check_refused(run("worker", "--ini", str(ini)), str(ini), "`use")


def test_a_percent_sign_is_not_doubled_and_the_value_is_not_shown(ini, run):
    replace(ini, "^sqlalchemy.url = .*$", "sqlalchemy.url = postgresql://u:hun%ter2@h/d")

    result = run("worker", "--ini", str(ini))

    check_refused(result, str(ini), "sqlalchemy.url", "%%")
    assert "ter2" not in result.stderr


def test_the_logging_sections_are_not_complete(ini, run):
    ini.write_text(ini.read_text() + "\n[loggers]\nkeys = root\n")

    check_refused(run("worker", "--ini", str(ini)), str(ini), "[formatters]")


@pytest.mark.parametrize("option", ["--config", "--loader"])
def test_another_configuration_is_asked_for(ini, run, option):
    check_refused(run(option, "other", "worker", "--ini", str(ini)), option, "INI file")


def test_a_task_that_is_called_is_not_registered(ini, run):
    check_refused(run("call", "no.such.task", "--ini", str(ini)), "'no.such.task'", "imports")


def test_the_arguments_of_a_call_do_not_fit_the_task(ini, run):
    result = run("call", "myapp.tasks.send_review", "--args=[1, 2, 3]", "--ini", str(ini))

    assert result.returncode == 2
    assert "send_review() takes" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_broker_is_down(ini, run):
    replace(ini, "^result_backend = .*$", "")

    result = run("call", "backup", "--ini", str(ini))

    assert result.returncode == 69
    assert result.stderr.startswith("Error: the broker does not answer")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words", [("call", "backup"), ("result", "7"), ("result", "7", "-t", "backup")]
)
def test_the_result_backend_is_down(ini, run, words):
    backend = "result_backend = redis://:hunter2@127.0.0.1:1/0"
    once = 'result_backend_transport_options = {"retry_policy": {"max_retries": 1}}'
    replace(ini, "^result_backend = .*$", f"{backend}\n{once}")
    replace(ini, "^broker_url = .*$", "broker_url = memory://")

    result = run(*words, "--ini", str(ini))

    assert result.returncode == 69, result.stderr
    assert "Traceback" not in result.stderr
    assert "hunter2" not in result.stderr
    said = result.stderr.strip().splitlines()[-1]  # after what Celery logs of its tries
    assert said.startswith("Error: The result backend does not answer: ")
    assert "`result_backend`" in said


def test_another_celery_app_is_asked_for(ini, run):
    result = run("worker", "-A", "myapp.celery", "--ini", str(ini))

    check_refused(result, "-A myapp.celery", "ws_celery.celery_app")


def test_the_port_of_the_demo_is_in_use(run, free_port):
    import socket

    with socket.create_server(("127.0.0.1", free_port)):
        check_refused(run("demo", "--port", str(free_port)), str(free_port), "in use", "--port")


def test_help_needs_no_ini(run):
    for command in ((), ("worker",), ("beat",), ("dev",), ("demo",)):
        result = run(*command, "--help")
        assert result.returncode == 0, result.stderr
        assert "Usage: ws-celery" in result.stdout
