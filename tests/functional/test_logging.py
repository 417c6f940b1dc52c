"""What real processes log: by the INI's logging, with the task, and never a secret."""

from __future__ import annotations

import json
import re

import pytest

QUICK = ("--without-mingle", "--without-gossip", "--concurrency=1")

LOGGING = """
[loggers]
keys = root, celery, seeded

[handlers]
keys = console

[formatters]
keys = plain, json

[logger_root]
level = WARN
handlers = console

[logger_celery]
level = INFO
handlers =
qualname = celery

[logger_seeded]
level = INFO
handlers =
qualname = seeded

[handler_console]
class = StreamHandler
args = (sys.stderr,)
formatter = {formatter}

[formatter_plain]
class = ws_celery.logs.TaskFormatter
format = OURS %(levelname)s %(name)s <%(task_name)s %(task_id)s> %(message)s

[formatter_json]
class = pythonjsonlogger.json.JsonFormatter
format = %(levelname)s %(name)s %(task_name)s %(task_id)s %(message)s
"""


@pytest.fixture
def make_site(promised_site):
    def make(formatter="plain", celery="", settings=""):
        site = promised_site(celery=f"    seeded\n{celery}")
        text = site.ini.read_text().replace("[celery]", f"{settings}\n[celery]", 1)
        site.ini.write_text(text + LOGGING.format(formatter=formatter))
        return site

    return make


def call(run, site, *arguments):
    ended = run("call", *arguments, "--ini", str(site.ini))
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_the_inis_logging_is_that_of_worker_and_children_and_has_the_task(
    make_site, start, run, start_method
):
    site = make_site(celery=f"worker_pool_start_method = {start_method}")
    worker = start("worker", "--ini", str(site.ini), *QUICK)
    worker.says("OURS INFO celery.apps.worker <- -> ")
    task_id = call(run, site, "update_rates")

    worker.says(f"OURS INFO seeded <update_rates {task_id}> Fetching the rates")
    worker.says(f"OURS INFO celery.app.trace <update_rates {task_id}> Task update_rates[{task_id}]")
    worker.says(f"OURS INFO celery.worker.strategy <update_rates {task_id}> Task update_rates")


def test_the_inis_logging_is_that_of_beat_and_a_level_that_is_given_counts(make_site, start):
    site = make_site()
    start("beat", "--ini", str(site.ini)).says("OURS INFO celery.beat <- -> Scheduler: Sending")
    start("beat", "--ini", str(site.ini), "-l", "debug", "-s", f"{site.ini}.2").says(
        "OURS DEBUG celery.beat"
    )


def test_a_file_that_is_given_gets_the_log(make_site, start, wait_for, tmp_path):
    site, log = make_site(), tmp_path / "worker.log"
    start("worker", "--ini", str(site.ini), *QUICK, "--logfile", str(log))

    wait_for(lambda: log.is_file() and "OURS INFO celery.apps.worker" in log.read_text(), "the log")


def test_each_line_is_json_where_the_ini_says_so(make_site, start, run, wait_for):
    site = make_site("json")
    worker = start("worker", "--ini", str(site.ini), *QUICK)
    worker.says(" ready.")
    task_id = call(run, site, "update_rates")
    worker.says("Fetching the rates")

    lines = [json.loads(line) for line in worker.text.splitlines() if line.startswith("{")]
    (line,) = [each for each in lines if each["name"] == "seeded"]
    assert (line["task_name"], line["task_id"]) == ("update_rates", task_id)
    assert line["message"].startswith("Fetching the rates")


def test_a_failure_is_logged_once_with_its_arguments_masked(make_site, start, run):
    site = make_site(settings="ws_celery.log_arguments = true\n")
    worker = start("worker", "--ini", str(site.ini), *QUICK)
    worker.says(" ready.")
    kwargs = '{"amount": 5, "password": "hunter2"}'
    task_id = call(run, site, "pay", "--kwargs", kwargs)
    call(run, site, "update_rates")
    worker.says("Fetching the rates")

    (line,) = [each for each in worker.output if f"pay[{task_id}]" in each and "ERROR" in each]
    assert f"<pay {task_id}>" in line
    assert "LookupError" in line
    assert "'amount': 5" in line
    assert worker.text.count("Traceback") == 1
    assert "hunter2" not in worker.text


SECRETS = """\
result_backend_transport_options = {"global_keyprefix": "x", "password": "hunter2"}
redis_password = hunter2
mongodb_backend_settings = {"host": "mongodb://shop:hunter2@db.example"}
"""


def test_no_secret_is_printed_by_a_banner_a_report_an_inspection_or_an_error(
    promised_site, start, run
):
    site = promised_site(celery=SECRETS)
    text = site.ini.read_text()
    broker = next(line for line in text.splitlines() if line.startswith("broker_url"))
    results = next(line for line in text.splitlines() if line.startswith("result_backend ="))
    text = text.replace(broker, re.sub("//", "//shop:hunter2@", broker))
    text = text.replace(results, re.sub("//", "//:hunter2@", results))
    site.ini.write_text(text)
    ini = ("--ini", str(site.ini))

    said = [run(*words, *ini) for words in (["report"], ["status"])]
    worker = start("worker", *ini, *QUICK, "-l", "debug")
    worker.says("transport:")
    worker.says("consumer: Cannot connect")

    printed = worker.text + "".join(each.stdout + each.stderr for each in said)
    assert "hunter2" not in printed
    assert "mongodb_backend_settings" in printed
