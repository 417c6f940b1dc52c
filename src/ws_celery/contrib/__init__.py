"""Tasks that ship with ws_celery; an application switches on those that it wants."""
