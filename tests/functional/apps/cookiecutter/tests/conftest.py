"""The fixtures that the cookiecutter gives, and three lines for ws_celery."""

import alembic.command
import alembic.config
import pytest
import transaction
from postbox import main, models
from pyramid.paster import get_appsettings
from pyramid.scripting import prepare
from pyramid.testing import DummyRequest, testConfig
from sqlalchemy import create_engine
from webtest import TestApp

from ws_celery import get_celery_app

pytest_plugins = ["celery.contrib.pytest", "ws_celery.testing"]


@pytest.fixture
def celery_environ(tm, dbsession):
    return {"app.dbsession": dbsession}


@pytest.fixture
def celery_app(app):
    return get_celery_app(app)


@pytest.fixture(scope="session")
def app_settings(pytestconfig):
    return get_appsettings(str(pytestconfig.rootpath / "testing.ini"))


@pytest.fixture(scope="session")
def dbengine(app_settings, pytestconfig):
    engine = create_engine(app_settings["sqlalchemy.url"])
    migrations = alembic.config.Config(str(pytestconfig.rootpath / "testing.ini"))
    models.Base.metadata.drop_all(engine)
    alembic.command.stamp(migrations, None, purge=True)
    alembic.command.upgrade(migrations, "head")
    yield engine
    models.Base.metadata.drop_all(engine)
    alembic.command.stamp(migrations, None, purge=True)
    engine.dispose()


@pytest.fixture(scope="session")
def app(app_settings, dbengine):
    return main({}, dbengine=dbengine, **app_settings)


@pytest.fixture
def tm():
    tm = transaction.TransactionManager(explicit=True)
    tm.begin()
    tm.doom()
    yield tm
    tm.abort()


@pytest.fixture
def dbsession(app, tm):
    return models.get_tm_session(app.registry["dbsession_factory"], tm)


@pytest.fixture
def testapp(app, tm, dbsession):
    environ = {
        "HTTP_HOST": "example.com",
        "tm.active": True,
        "tm.manager": tm,
        "app.dbsession": dbsession,
    }
    return TestApp(app, extra_environ=environ)


@pytest.fixture
def app_request(app, tm, dbsession):
    with prepare(registry=app.registry) as env:
        request = env["request"]
        request.host = "example.com"
        request.dbsession = dbsession
        request.tm = tm
        yield request


@pytest.fixture
def dummy_request(tm, dbsession):
    request = DummyRequest()
    request.host = "example.com"
    request.dbsession = dbsession
    request.tm = tm
    return request


@pytest.fixture
def dummy_config(dummy_request):
    with testConfig(request=dummy_request) as config:
        yield config
