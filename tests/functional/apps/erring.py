"""An application whose task fails with each of the package's errors, and in each way."""

from __future__ import annotations

from celery.exceptions import Reject
from pyramid.config import Configurator
from tests.errors import error_classes, example_of

from ws_celery import RequestAwareTask, task


class Surprise(Exception):
    """Pickles, and cannot be read again."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


ERRORS = [*map(example_of, error_classes()), Surprise(1, 2)]


def main(_global_config, **settings):
    config = Configurator(settings=settings)
    config.scan()
    return config.make_wsgi_app()


@task(name="fail", base=RequestAwareTask, bind=True, max_retries=1)
def fail(self, request, how, number):
    """Fail with one of the errors."""
    error = ERRORS[number]
    if how == "raise":
        raise error
    if how == "reject":
        raise Reject(error)
    raise self.retry(exc=error, countdown=0)


@task(name="retry_badly", base=RequestAwareTask, bind=True)
def retry_badly(self, request):
    """Ask for a retry whose message cannot be written."""
    raise self.retry(args=({1, 2},))


@task(name="answer", base=RequestAwareTask)
def answer(request):
    """Tell that the worker goes on."""
    return 42
