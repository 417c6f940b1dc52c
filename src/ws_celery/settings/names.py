"""What options are called: today, in older releases of Celery, and not any more."""

from __future__ import annotations

from celery.app import defaults

from ws_celery.settings.options import OPTIONS

__all__ = ("OLD_NAMES", "REMOVED", "find_option", "option_names")


#: Old spellings that Celery's own table does not have.
_OLDER = {
    "BROKER_BACKEND": "broker_transport",
    "CELERY_BACKEND": "result_backend",
    "CELERY_RESULT_EXPIRES": "result_expires",
    "CELERY_AMQP_TASK_RESULT_EXPIRES": "result_expires",
    "CELERYD_TASK_ANNOTATIONS": "task_annotations",
}

#: Old upper-case names, to today's.
OLD_NAMES: dict[str, str] = {
    **_OLDER,
    **{old: new for old, new in defaults._TO_NEW_KEY.items() if old.lower() != new},
}

_MAIL = "tell somebody from the signal task_failure, or with an error tracker"
_LOGGING = "use --logfile and --loglevel, or the logging sections of the INI file"
_MONITOR = "celerymon is gone; Flower took its place"
_TYRANT = "Tokyo Tyrant is gone; use another result_backend"

#: Options that are gone, by their upper-case names, and what to do instead.
REMOVED: dict[str, str] = {
    # Celery 4 sends no mail; a handler of task_failure, or Sentry, does it better.
    "ADMINS": _MAIL,
    "CELERY_SEND_TASK_ERROR_EMAILS": _MAIL,
    "CELERY_TASK_ERROR_WHITELIST": _MAIL,
    "EMAIL_CHARSET": _MAIL,
    "EMAIL_HOST": _MAIL,
    "EMAIL_HOST_PASSWORD": _MAIL,
    "EMAIL_HOST_USER": _MAIL,
    "EMAIL_PORT": _MAIL,
    "EMAIL_TIMEOUT": _MAIL,
    "EMAIL_USE_SSL": _MAIL,
    "EMAIL_USE_TLS": _MAIL,
    "SERVER_EMAIL": _MAIL,
    # Options of the command line: a file and a level belong to one process.
    "CELERYBEAT_LOG_FILE": _LOGGING,
    "CELERYBEAT_LOG_LEVEL": _LOGGING,
    "CELERYD_LOG_FILE": _LOGGING,
    "CELERYD_LOG_LEVEL": _LOGGING,
    "CELERYMON_LOG_FILE": _MONITOR,
    "CELERYMON_LOG_FORMAT": _MONITOR,
    "CELERYMON_LOG_LEVEL": _MONITOR,
    "CELERYD_AUTORELOADER": "use ws-celery dev --reload while you develop",
    "CELERYD_BOOT_STEPS": "add steps to app.steps in code",
    "CELERYD_FORCE_EXECV": "use worker_pool_start_method = spawn, with Celery 5.7 or later",
    "CELERYD_MEDIATOR": "the worker has no mediator thread any more; remove it",
    "CELERYD_ETA_SCHEDULER": "use worker_timer",
    "CELERYD_ETA_SCHEDULER_PRECISION": "use worker_timer_precision",
    "CELERYD_LISTENER": "use worker_consumer",
    "CELERY_AMQP_TASK_RESULT_CONNECTION_MAX": "use broker_pool_limit",
    "CELERY_BROADCAST_EXCHANGE": "use control_exchange",
    "CELERY_BROADCAST_EXCHANGE_TYPE": "it is always fanout; remove it",
    "CELERY_BROADCAST_QUEUE": "each worker names its own; remove it",
    "CELERY_CHORD_PROPAGATES": "errors of a chord always propagate; remove it",
    "CELERY_DB_REUSE_MAX": "use database_engine_options",
    "CELERY_REDIS_CONNECT_RETRY": "use redis_retry_on_timeout or result_backend_always_retry",
    "CELERY_TASK_PUBLISH_CONNECTION_TIMEOUT": "use broker_connection_timeout",
    "BROKER_INSIST": "brokers redirect nobody any more; remove it",
    "CASSANDRA_COLUMN_FAMILY": "use cassandra_table",
    "CASSANDRA_DETAILED_MODE": "the cassandra backend was written anew; remove it",
    "CASSANDRA_READ_CONSISTENCY_LEVEL": "use cassandra_read_consistency",
    "RIAK_BACKEND_SETTINGS": "riak is gone; use another result_backend",
    "TT_HOST": _TYRANT,
    "TT_PORT": _TYRANT,
}


def find_option(name: str) -> str | None:
    """Return today's name of an option, whatever its spelling; ``None`` if it is none.

    Accepted are today's names, the upper-case names of Celery 3 and 4, both in any case, and
    today's names with ``CELERY_`` before them.
    """
    lower, upper = name.lower(), name.upper()
    if lower in OPTIONS:
        return lower
    if upper in OLD_NAMES:
        return OLD_NAMES[upper]
    without = lower.removeprefix("celery_")
    return without if without in OPTIONS else None


def option_names() -> list[str]:
    """Return all names that may be suggested: today's, then old ones in both cases."""
    return [*OPTIONS, *(old.lower() for old in OLD_NAMES)]
