"""The command line: ``python -m fastapi_tasks``, which is installed as ``fastapi-tasks``."""

from __future__ import annotations

import argparse
import math
import sys

from .logs import FORMATS, LEVELS, set_up_logging
from .signals import StopSignals
from .worker import CannotStartError, WorkerOptions, run_worker

__all__ = ["command_line", "main"]

_USAGE = 2
"""The exit status of what could not be started, as argparse has it."""


def main() -> int:
    """Run the command, and return its exit status.

    0: all went well; 1: something was cut off when the worker was stopped; 2: it could not start.
    """
    # Whoever starts processes may stop one before it has imported what it needs.
    stop = StopSignals()
    stop.install()
    options = command_line().parse_args()
    set_up_logging(options.log_level, options.log_format)
    try:
        return run_worker(
            WorkerOptions(
                engine=options.engine,
                observers=tuple(options.observer),
                concurrency=options.concurrency,
                shutdown_timeout=options.shutdown_timeout,
            ),
            stop,
        )
    except CannotStartError as error:
        sys.stderr.write(f"fastapi-tasks worker: error: {error}\n")
        return _USAGE


def command_line() -> argparse.ArgumentParser:
    """Return what knows the commands and their options."""
    parser = argparse.ArgumentParser(
        prog="fastapi-tasks", description="Background work for FastAPI: its workers"
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    worker = commands.add_parser(
        "worker",
        help="run the jobs of an engine, until SIGTERM or SIGINT",
        description="Run the jobs of an engine. At SIGTERM or SIGINT the worker takes no more "
        "jobs, waits for those that run, and ends: with status 0, or 1 if one was cut off. A "
        "second signal ends it at once.",
    )
    worker.add_argument(
        "engine",
        metavar="package.module:engine",
        help="where the engine is; the module has to import those that register functions with it",
    )
    worker.add_argument(
        "--concurrency",
        type=_count,
        metavar="N",
        help="how many jobs run at once; default: as the engine was made, which is 10 if it was "
        "not said",
    )
    worker.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=25.0,
        metavar="SECONDS",
        help="how long the worker takes to end at most; shortly before, jobs that still run are "
        "cut off, and run again elsewhere; default: 25",
    )
    worker.add_argument(
        "--observer",
        action="append",
        default=[],
        metavar="package.module:observer",
        help="is told what happens to jobs, an OpenTelemetryObserver() for one; may be repeated",
    )
    worker.add_argument("--log-level", choices=LEVELS, default="info", help="default: info")
    worker.add_argument("--log-format", choices=FORMATS, default="text", help="default: text")
    return parser


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got {text!r}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
