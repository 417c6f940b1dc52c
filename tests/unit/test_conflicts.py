"""Which errors are conflicts: worth running the task again at once."""

from __future__ import annotations

import subprocess
import sys

import pyramid_retry
import pytest
import transaction
from pymysql.err import IntegrityError, OperationalError
from sqlalchemy.exc import DBAPIError

from ws_celery import task
from ws_celery.transactional import is_conflict


class Refused(Exception):
    """An error of the application."""


class MariadbError(Exception):
    """An error as MariaDB's own driver makes it, which needs a library in C to be installed."""

    __module__ = "mariadb"

    def __init__(self, errno, message):
        super().__init__(message)
        self.errno = errno


def marked(error):
    pyramid_retry.mark_error_retryable(error)
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OperationalError(1213, "Deadlock found"), True),
        (OperationalError(1205, "Lock wait timeout exceeded"), True),
        (OperationalError(1020, "Record has changed since last read"), True),
        (OperationalError(2006, "MySQL server has gone away"), False),
        (IntegrityError(1062, "Duplicate entry"), False),
        (OperationalError(), False),
        (MariadbError(1213, "Deadlock found"), True),
        (DBAPIError("UPDATE", {}, MariadbError(1205, "Lock wait timeout exceeded")), True),
        (MariadbError(2006, "MySQL server has gone away"), False),
        (OperationalError({"no": "number"}), False),
        (OSError(1213, "of the system"), False),
        (LookupError(1213), False),
        (pyramid_retry.RetryableException(), True),
        (marked(Refused()), True),
        (Refused(), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_an_error_is_a_conflict_or_not(error, expected):
    manager = transaction.TransactionManager(explicit=True)

    assert is_conflict(manager, error) is expected


def test_a_task_whose_error_is_marked_is_run_again(make_app):
    runs = []

    @task(name="refused")
    def refused(request):
        runs.append(request)
        if len(runs) < 3:
            raise marked(Refused())

    make_app(refused).celery.tasks["refused"].apply().get()

    assert len(runs) == 3


def test_pyramid_retry_and_database_drivers_are_not_needed():
    program = (
        "import sys, transaction\n"
        "sys.modules['pyramid_retry'] = None\n"
        "from ws_celery.transactional import is_conflict\n"
        "assert not is_conflict(transaction.manager, LookupError(1213))\n"
        "assert 'sqlite3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
