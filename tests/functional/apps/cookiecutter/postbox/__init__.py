"""An application in the shape of the Pylons cookiecutter; ws_celery comes by its INI file."""

from pyramid.config import Configurator


def main(_global_config, **settings):
    with Configurator(settings=settings) as config:
        config.include(".models")
        config.include(".routes")
        config.scan(".views")
    return config.make_wsgi_app()
