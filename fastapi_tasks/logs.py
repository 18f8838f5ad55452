"""What a worker's log looks like: lines to read, or JSON for what collects it."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

__all__ = ["FORMATS", "LEVELS", "JSONFormatter", "set_up_logging"]

LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("text", "json")

_TEXT = "%(asctime)s %(levelname)-8s %(name)s: %(message)s"
_TASK_FIELDS = ("task_name", "task_id", "task_attempt")


class JSONFormatter(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line: time, level, logger, message, and of which task, with what error."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: vars(record)[name] for name in _TASK_FIELDS if name in vars(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(level: str, style: str) -> None:
    """Write all records of a level and above to standard error.

    :param level: one of ``LEVELS``
    :param style: one of ``FORMATS``
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if style == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
