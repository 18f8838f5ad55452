"""An office that accepts the order for a report, and is asked later how far it has come.

Run it with ``uvicorn --app-dir docs/examples reports:app``, then order a report, and poll what its
``Location`` names::

    curl --include --json '{"month": "2025-04"}' http://127.0.0.1:8000/reports
"""

from __future__ import annotations

from typing import Annotated

import anyio
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from fastapi_tasks import Supervisor, TaskInfo, Tasks, add_tasks, current_task, get_supervisor

PAGES = 40
POLL_AFTER = "1"  # seconds


class Order(BaseModel):
    """What is wanted."""

    month: str


async def write_report(month: str) -> None:
    """Write one page after the other, and say so."""
    task = current_task()
    for page in range(PAGES):
        task.set_progress(page, PAGES, f"page {page + 1}")
        await anyio.sleep(0.1)
    task.set_progress(PAGES, PAGES)


async def supervisor_of(request: Request) -> Supervisor:
    """Return the app's supervisor; unlike Tasks, it is there for a server that is busy, too."""
    return get_supervisor(request.app)


TheSupervisor = Annotated[Supervisor, Depends(supervisor_of)]

app = FastAPI(title="Reports")
add_tasks(app, grace=10, shutdown_timeout=25, max_tasks=1000, history=1000)


@app.post("/reports", status_code=202)
async def order_report(
    order: Order, tasks: Tasks, request: Request, response: Response
) -> TaskInfo:
    """Accept the order for a report."""
    task = tasks.schedule(write_report, order.month)
    response.headers["Location"] = request.url_for("show_task", task_id=task.id).path
    response.headers["Retry-After"] = POLL_AFTER
    return task.info()


@app.get("/tasks/{task_id}")
async def show_task(task_id: str, supervisor: TheSupervisor) -> TaskInfo:
    """Tell how far a task has come."""
    return known(supervisor.find(task_id))


@app.delete("/tasks/{task_id}", status_code=202)
async def cancel_task(task_id: str, supervisor: TheSupervisor) -> TaskInfo:
    """Ask for a task to be cancelled; one that is over stays what it is."""
    supervisor.cancel(task_id)
    return known(supervisor.find(task_id))


def known(info: TaskInfo | None) -> TaskInfo:
    """Return what is known of a task, if anything is."""
    if info is None:
        raise HTTPException(404, "This process knows no such task. It may have been restarted.")
    return info


@app.exception_handler(HTTPException)
async def answer_problem(request: Request, error: HTTPException) -> Response:
    """Answer as RFC 9457 has it."""
    problem = {"type": "about:blank", "status": error.status_code, "detail": error.detail}
    return JSONResponse(
        problem, error.status_code, error.headers, media_type="application/problem+json"
    )
