"""What happened, in which order, from whichever thread."""

from __future__ import annotations

from fastapi_tasks import Task, TaskEvent, TaskEventKind


class Observed:
    """An observer that keeps every event."""

    def __init__(self) -> None:
        self.events: list[TaskEvent] = []

    def __call__(self, event: TaskEvent) -> None:
        self.events.append(event)

    def kinds(self, task: Task | None = None) -> list[TaskEventKind]:
        """Return what happened, to one task or altogether."""
        return [e.kind for e in self.events if task is None or task in e.tasks]
