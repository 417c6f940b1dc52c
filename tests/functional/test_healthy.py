"""``ws-celery status --healthy``: what a probe is told while parts live and die."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest

QUICK = ("--without-mingle", "--without-gossip", "--concurrency=1", "-l", "info")


@pytest.fixture
def site(promised_site):
    return promised_site()


@pytest.fixture
def probe(run, site):
    """Ask; returns the exit code, and the parts by name."""

    def probe(*options):
        ended = run("status", "--healthy", "--json", "--ini", str(site.ini), *options)
        assert "Traceback" not in ended.stderr, ended.stderr
        answer = json.loads(ended.stdout)
        parts = {part["name"]: part for part in answer["parts"]}
        assert answer["healthy"] == (ended.returncode == 0)
        assert all(part["seconds"] < 10 for part in parts.values())
        return ended.returncode, parts

    return probe


def test_a_worker_a_broker_and_a_database_that_live_are_healthy(start, run, site, probe, wait_for):
    name = f"test-{site.ini.parent.name}-{os.getpid()}@here"
    start("worker", "--ini", str(site.ini), *QUICK, "-n", name).says(" ready.")

    _, parts = wait_for(
        lambda: (answer := probe("--destination", name))[0] == 0 and answer, "health"
    )
    assert parts["worker"]["detail"] == name
    assert sorted(parts) == ["broker", "database", "worker"]

    def seen():
        ended = run("status", "--healthy", "--ini", str(site.ini), "--part", "broker")
        return ended.returncode == 0 and ended

    ended = wait_for(seen, "the broker in time")
    assert ended.stdout.startswith("broker    ok      redis://")


def test_no_worker_answers(probe, wait_for):
    def seen():
        # On a busy machine the others may be late, too.
        code, parts = probe("--destination", "nobody@nowhere")
        return parts["broker"]["healthy"] and parts["database"]["healthy"] and (code, parts)

    code, parts = wait_for(seen, "broker and database in time")
    assert code == 69
    assert not parts["worker"]["healthy"]
    assert "nobody@nowhere" in parts["worker"]["detail"] or "within 2" in parts["worker"]["detail"]


def test_a_broker_and_a_database_that_are_down_are_named_without_their_passwords(site, probe):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        port = closed.getsockname()[1]
        text = site.ini.read_text()
        for old in ("broker_url = ", "result_backend = "):
            line = next(line for line in text.splitlines() if line.startswith(old))
            text = text.replace(line, f"{old}redis://:hunter2@127.0.0.1:{port}/0")
        site.ini.write_text(text)

        code, parts = probe("--part", "broker", "--part", "worker")

    assert code == 69
    assert not parts["broker"]["healthy"]
    assert not parts["worker"]["healthy"]
    assert "hunter2" not in str(parts)


def test_a_broker_that_does_not_answer_is_waited_for_two_seconds(site, probe):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        text = site.ini.read_text()
        line = next(line for line in text.splitlines() if line.startswith("broker_url"))
        port = silent.getsockname()[1]
        site.ini.write_text(text.replace(line, f"broker_url = redis://127.0.0.1:{port}/0"))

        code, parts = probe("--part", "broker", "--part", "worker")

    assert code == 69
    assert not any(part["healthy"] for part in parts.values())


def test_health_files_tell_of_relay_and_beat(site, probe, tmp_path):
    relay, beat = tmp_path / "relay", tmp_path / "beat"
    files = ("--relay-file", str(relay), "--beat-file", str(beat))
    ask = (*files, "--part", "relay", "--part", "beat", "--max-age", "30")
    relay.touch()

    code, parts = probe(*ask)
    assert code == 69
    assert parts["relay"]["healthy"]
    assert "No such file" in parts["beat"]["detail"]

    relay.touch()
    beat.touch()
    assert probe(*ask)[0] == 0

    os.utime(beat, (0, time.time() - 3600))
    code, parts = probe(*ask)
    assert code == 69
    assert "touched 36" in parts["beat"]["detail"]


def test_a_beat_without_a_file_cannot_be_asked_for(run, site):
    ended = run("status", "--healthy", "--part", "beat", "--ini", str(site.ini))

    assert ended.returncode == 2
    assert "--beat-file" in ended.stderr


def test_a_relay_cannot_be_asked_for_where_there_is_no_outbox(run, site):
    ended = run("status", "--healthy", "--part", "relay", "--ini", str(site.ini))

    assert (ended.returncode, ended.stdout) == (2, "")
    assert "--relay-file" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_relay_without_a_file_is_judged_by_the_outbox(run, site, tmp_path, wait_for):
    text = site.ini.read_text()
    database = f"sqlite:///{tmp_path}/outbox.sqlite"
    url = next(line for line in text.splitlines() if line.startswith("sqlalchemy.url"))
    site.ini.write_text(text.replace(url, f"sqlalchemy.url = {database}\nws_celery.outbox = true"))
    assert run("outbox", "create", "--ini", str(site.ini)).returncode == 0

    def seen():
        ended = run("status", "--healthy", "--part", "relay", "--ini", str(site.ini))
        return ended.returncode == 0 and ended

    ended = wait_for(seen, "the outbox in time")
    assert "nothing in the outbox is overdue" in ended.stdout
