"""``ws-celery check``: what was read from where, and what is wrong or doubtful."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pyramid.config import Configurator

from ws_celery import get_celery_app
from ws_celery.applications import load_registry
from ws_celery.checks import examine
from ws_celery.cli import main
from ws_celery.cli.application import load_celery_app
from ws_celery.exceptions import ConfigurationError


def test_a_configuration_without_doubts_has_no_findings(found):
    assert found("[celerybeat:a]\ntask = known\ntype = integer\nschedule = 1\n") == {}


def test_a_broker_that_does_not_answer_is_an_error(found):
    finding = found("", broker="redis://:hunter2@127.0.0.1:1/0")["broker-unreachable"]

    assert finding.severity == "error"
    assert "redis://:**@127.0.0.1:1" in finding.text or "********@127.0.0.1:1" in finding.text
    assert "hunter2" not in finding.text
    assert finding.line == 6


def test_a_task_of_a_schedule_that_is_not_registered_is_an_error(found):
    finding = found("[celerybeat:a]\ntask = knwon\ntype = integer\nschedule = 1\n")["unknown-task"]

    assert (finding.severity, finding.line) == ("error", 7)
    assert "[celerybeat:a] the task 'knwon' is not registered; did you mean known?" in finding.text


def test_what_only_the_schedule_in_the_database_obeys_is_an_error_without_it(found):
    text = "[celerybeat:a]\ntask = known\ntype = integer\nschedule = 1\ncatch_up = once\n"

    assert found(text)["entry"].text == (
        "[celerybeat:a] has catch_up, which needs the schedule in the database: Celery's own "
        "scheduler would not obey. Set ws_celery.beat = true in the section of the application, or "
        "take it out."
    )
    assert "entry" not in found(text, app="ws_celery.beat = true\n")


def test_options_that_nothing_reads_are_a_warning(found):
    logging = "[loggers]\nkeys = root\n[handlers]\nkeys =\n[formatters]\nkeys =\n[logger_root]\n"
    options = "worker_log_format = %%(message)s\nworker_hijack_root_logger = false\n"

    finding = found(options + logging + "handlers =\n")["without-effect"]
    assert (finding.severity, finding.line) == ("warning", 7)
    assert finding.text.startswith("worker_log_format has no effect: the logging sections of")
    assert "without-effect" not in found(options)
    file = "beat_schedule_filename = schedule\n"
    finding = found(file, app="ws_celery.beat = true")["without-effect"]
    assert finding.text.startswith("beat_schedule_filename has no effect: the schedule is in the")
    assert "without-effect" not in found(file)


@pytest.mark.parametrize("section", ["celeryroute:knwon", "celeryroute:kno.*", "celeryannotate:x"])
def test_a_route_for_no_registered_task_is_a_warning(found, section):
    key = "priority = 1" if "route" in section else "rate_limit = 1/s"
    finding = found(f"[{section}]\n{key}\n")["unknown-task"]

    assert finding.severity == "warning"
    assert f"[{section}]: no registered task has this name" in finding.text


def test_a_route_for_a_registered_task_is_none(found):
    assert found("[celeryroute:kno*]\npriority = 1\n[celeryroute:known]\npriority = 2\n") == {}


def test_eager_mode_is_a_warning_outside_of_development(found, site):
    assert found("task_always_eager = true\n")["eager"].severity == "warning"


@pytest.mark.parametrize(
    "options",
    [{"name": "development.ini"}, {"app": "pyramid.reload_templates = true\n"}],
)
def test_eager_mode_is_none_in_development(found, options):
    assert found("task_always_eager = true\n", **options) == {}


def test_an_embedded_broker_is_a_warning_outside_of_development(found, tmp_path):
    findings = found("", broker=f"embedded://{tmp_path}/var")

    assert findings["embedded"].severity == "warning"
    assert findings["broker-not-running"].severity == "note"


def test_pickle_is_a_warning(found):
    assert found("accept_content = json, pickle\n")["pickle"].severity == "warning"


def test_root_is_a_warning(site, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    (finding,) = examine(site("")).findings

    assert (finding.severity, finding.code) == ("warning", "root")


def test_queues_without_the_default_one_are_a_warning(found):
    finding = found("[celeryqueue:slow]\n")["default-queue"]

    assert "add [celeryqueue:celery]" in finding.text


def test_an_option_that_celery_does_not_read_is_a_warning(found):
    assert "cassandra_secure_bundle_path" in found("cassandra_bundle_path = x\n")[
        "without-effect"
    ].text  # fmt: skip


def test_old_names_are_warnings_and_variables_are_notes(found, monkeypatch):
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "cache+memory://")
    findings = found("CELERYD_CONCURRENCY = 2\nresult_backend = redis://:hunter2@x\n")

    assert findings["old-name"].text == "CELERYD_CONCURRENCY is worker_concurrency today"
    assert findings["old-name"].line == 7
    assert findings["environment"].severity == "note"
    assert "hunter2" not in findings["environment"].text


def test_an_application_that_fails_is_an_error(found):
    assert "ValueError: no" in found("", "raise ValueError('no')")["application"].text


def test_an_application_that_does_not_include_us_is_an_error(tmp_path):
    path = tmp_path / "app.ini"
    path.write_text("[celery]\nbroker_url = memory://\n[app:main]\nuse = egg:nowhere\n")

    (finding,) = (f for f in examine(str(path)).findings if f.severity == "error")

    assert finding.code == "application"


def test_what_does_not_include_us_says_so_while_pyramid_commits(found):
    code = """
        import venusian
        from ws_celery.exceptions import NotIncluded

        def fail():
            raise NotIncluded()

        def late(wrapped):
            add = lambda scanner, *_: scanner.config.action("late", fail)
            venusian.attach(wrapped, add, category="pyramid")
            return wrapped

        @late
        def hook():
            pass
        """
    finding = found("", code)["application"]

    assert finding.text.startswith("The application in ")
    assert "does not include ws_celery. Add `pyramid.includes = ws_celery`" in finding.text


@pytest.mark.parametrize("password", ["hun%ter2", "hunter2%(x)s"])
def test_a_percent_sign_in_a_value_of_others_is_told_without_the_value(found, password):
    app = f"sqlalchemy.url = postgresql://u:{password}@h/d\n"
    finding = found("", app=app)["application"]

    assert "[app:main] sqlalchemy.url: " in finding.text
    assert "write %% for a percent sign" in finding.text
    assert "ter2" not in finding.text


def test_settings_of_code_are_in_the_table(site):
    path = site("", app="celery.worker_concurrency = 7\n")

    rows = {row.name: row for row in examine(path).rows}

    assert rows["worker_concurrency"].value == 7
    assert str(rows["worker_concurrency"].place) == f"{path}:4"


# The command


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for name in ("WS_CELERY_INI", "WS_CELERY_INI_VARS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(["check", *arguments])
        return caught.value.code, capsys.readouterr().out

    return run


def test_the_table_tells_name_value_type_and_place(run, site, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # the place is whole there, too
    path = site(
        """
        redis_password = hunter2
        imports =
        """
        f"{'':12}json\n"
        """
        [celeryqueue:celery]
        [celeryroute:known]
        queue = celery
        [celerybeat:a]
        task = known
        type = crontab
        schedule = */5 * * * *
        """
    )

    code, output = run("--ini", path)

    assert code == 0
    table = [line.split() for line in output.splitlines()]
    assert table[0] == ["SETTING", "VALUE", "TYPE", "FROM"]
    assert ["broker_url", "memory://", "str", f"{path}:6"] in table
    assert ["redis_password", "********", "str", f"{path}:8"] in table
    assert "queue celery" in output
    assert "crontab: */5 * * ..." in output

    monkeypatch.delenv("COLUMNS")  # in a pipe
    table = [line.split() for line in run("--ini", path)[1].splitlines()]
    entry = "crontab: */5 * * * * -> known"
    assert ["entry", "a", *entry.split(), "crontab", f"{path}:15"] in table
    assert "hunter2" not in output
    assert output.endswith(f"{path}: 0 errors, 0 warnings.\n")


def test_all_faults_are_printed_once(run, site):
    path = site("worker_concurrency = many\nbroker_ur = x\n[celery:x]\n[celerybeat:a]\n")

    code, output = run("--ini", path)

    assert code == 2
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == len(set(errors)) == 5
    assert output.endswith("5 errors, 0 warnings.\n")


@pytest.mark.parametrize("where", ["environment", "application"])
def test_sections_of_a_file_that_the_application_does_not_read_are_an_error(
    site, monkeypatch, where
):
    path = _without_config_uri(site("task_default_queue = mine\n[celeryqueue:mine]\n"))
    if where == "environment":
        monkeypatch.setenv("CELERY_BROKER_URL", "memory://")
    else:
        _replace(path, "broker_url = memory://", "task_ignore_result = true")
        _replace(path, "[celery]", "celery.broker_url = memory://\n[celery]")

    (finding,) = (each for each in examine(path).findings if each.severity == "error")

    assert finding.text == (
        "[celery] is not read, as ws_celery.config_uri does not name this file; expected "
        "`ws_celery.config_uri = %(__file__)s` in the section of the application."
    )
    assert (finding.file, finding.line) == (path, 4 if where == "environment" else 5)


def test_a_command_does_not_start_without_the_sections_of_its_file(site, monkeypatch):
    path = _without_config_uri(site(""))
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")

    with pytest.raises(
        ConfigurationError, match=r"\[celery\] is not read, as ws_celery.config_uri"
    ):
        load_celery_app(path)


def test_a_web_process_that_knows_its_file_does_not_start_without_its_sections(site):
    path = _without_config_uri(site(""))
    config = Configurator(settings={"__file__": path, "celery.broker_url": "memory://"})
    config.include("ws_celery")

    with pytest.raises(ConfigurationError, match=r"\[celery\] is not read"):
        config.commit()


def test_a_file_without_sections_of_ours_need_not_be_read(site, monkeypatch):
    path = _without_config_uri(site(""))
    _replace(path, "[celery]\nbroker_url = memory://", "[logger_celery]\nlevel = INFO")
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")

    assert get_celery_app(load_registry(path)).conf.broker_url == "memory://"


def _without_config_uri(path):
    _replace(path, "ws_celery.config_uri = %(__file__)s\n", "")
    return path


def _replace(path, old, new):
    file = Path(path)
    file.write_text(file.read_text().replace(old, new))


def test_a_command_says_which_tasks_have_one_name(site):
    path = site("", code="@task(name='known')\ndef again(request): pass\n")

    with pytest.raises(ConfigurationError) as caught:
        load_celery_app(path)

    message = str(caught.value)
    assert message.startswith(f"{path}: Conflicting configuration actions\n")
    assert ".again is a task called 'known'. Give it another name." in message


def test_a_module_of_celery_that_is_not_read_is_a_warning(found, tmp_path):
    module = tmp_path / "celeryconfig.py"
    module.write_text("worker_concurrency = 3\n")

    finding = found("")["celeryconfig"]

    assert finding.severity == "warning"
    assert finding.text.startswith(f"{module} is not read; set use_celeryconfig = true")
    assert found("use_celeryconfig = true\n") == {}


def test_strict_makes_warnings_count(run, site):
    path = site("CELERYD_CONCURRENCY = 2\n")

    assert run("--ini", path)[0] == 0
    assert run("--ini", path, "--strict")[0] == 1


def test_programs_get_json(run, site):
    path = site("redis_password = hunter2\nworker_concurrency = many\n")

    code, output = run("--ini", path, "--json")

    report = json.loads(output)
    assert code == 2
    assert report["settings"][1] == {
        "category": "option",
        "name": "redis_password",
        "value": "********",
        "type": "str",
        "file": path,
        "line": 7,
        "section": "celery",
        "key": "redis_password",
    }
    (finding,) = report["findings"]
    assert (finding["severity"], finding["code"], finding["line"]) == ("error", "configuration", 8)


def test_variables_of_the_command_line_beat_those_of_the_file(run, site):
    path = site(
        "task_default_queue = %(queue)s\nworker_state_db = %(a)s\n[DEFAULT]\nqueue = file\n"
    )

    code, output = run("--ini-var", "queue=mine,a=b,c", "--ini", path)

    assert code == 0
    assert "mine" in output
    assert "b,c" in output


@pytest.mark.parametrize("text", ["hunter2", "=hunter2"])
def test_a_variable_without_a_name_or_value_is_refused(capsys, text):
    with pytest.raises(SystemExit) as caught:
        main(["check", "--ini-var", text])

    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "--ini-var needs NAME=VALUE" in message
    assert "hunter2" not in message
