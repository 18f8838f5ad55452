"""gunicorn's worker, as the documentation says to derive it: open requests do not hold it up."""

from __future__ import annotations

from typing import ClassVar

from uvicorn_worker import UvicornWorker


class BoundedWorker(UvicornWorker):
    """Waits a second for open requests when it stops."""

    CONFIG_KWARGS: ClassVar = {**UvicornWorker.CONFIG_KWARGS, "timeout_graceful_shutdown": 1}
