from postbox.models import Letter

from ws_celery import task


@task
def stamp(request, letter_id):
    letter = request.dbsession.get(Letter, letter_id)
    letter.stamp = request.route_url("letter", id=letter_id)
    file.delay(letter_id)
    return letter.stamp


@task
def file(request, letter_id):
    return request.dbsession.get(Letter, letter_id).stamp


@task
def shout(request, text):
    return text.upper()
