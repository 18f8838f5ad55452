"""An app that could run tasks and has none, and the same one without ``fastapi_tasks``."""

from __future__ import annotations

from fastapi import FastAPI

from fastapi_tasks import add_tasks

with_tasks = FastAPI()
add_tasks(with_tasks)

plain = FastAPI()
