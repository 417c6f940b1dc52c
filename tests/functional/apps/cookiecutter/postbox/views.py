from postbox.models import Letter
from postbox.tasks import shout, stamp
from pyramid.view import exception_view_config, view_config


@view_config(route_name="letters", request_method="POST", renderer="json")
def post_letter(request):
    letter = Letter(address=request.params["address"])
    request.dbsession.add(letter)
    request.dbsession.flush()
    stamp.apply_async((letter.id,), countdown=60)
    if not letter.address:
        raise ValueError("no address")
    return {"id": letter.id}


@view_config(route_name="letters", renderer="json")
def list_letters(request):
    shout.delay(request, "listed")
    return [letter.address for letter in request.dbsession.query(Letter)]


@exception_view_config(ValueError, renderer="json")
def invalid(error, request):
    request.response.status = 400
    return str(error)
