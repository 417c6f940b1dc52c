from __future__ import annotations

import os

import sqlalchemy as sa
from myapp.models import Delivery, Run
from myapp.tasks import record, send_review, slow
from pyramid.view import view_config


@view_config(route_name="deliveries", request_method="POST", renderer="json")
def deliver(request):
    delivery = Delivery()
    request.dbsession.add(delivery)
    request.dbsession.flush()
    how = request.params.get("how", "delay")
    if how == "delay":
        result = send_review.delay(delivery.id)
    elif how == "delay with request":
        result = send_review.delay(request, delivery.id)
    elif how == "apply_async":
        result = send_review.apply_async(args=(request, delivery.id), countdown=1)
    else:
        result = send_review.apply_async(kwargs={"request": request, "delivery_id": delivery.id})
    if "fail" in request.params:
        record.delay()
        raise RuntimeError("after the call")
    return {"id": delivery.id, "task_id": result.id, "pid": os.getpid()}


@view_config(route_name="review", request_method="GET", renderer="json")
def review(request):
    delivery = request.dbsession.get(Delivery, request.matchdict["id"])
    return {"review_url": delivery.review_url, "pid": delivery.pid}


@view_config(route_name="deliveries", request_method="GET", renderer="json")
def deliveries(request):
    return {
        "deliveries": request.dbsession.scalar(sa.select(sa.func.count(Delivery.id))),
        "runs": list(request.dbsession.scalars(sa.select(Run.task).order_by(Run.id))),
    }


@view_config(route_name="deliveries", request_method="PUT", renderer="json")
def run_slowly(request):
    started, finished = request.params["started"], request.params["finished"]
    return {"task_id": slow.delay(started, finished, float(request.params["seconds"])).id}
