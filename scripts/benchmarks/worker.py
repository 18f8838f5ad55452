"""The process of one contender: measures a group of sides for each line that it is sent.

Usage: python -m benchmarks.worker CONTENDER DISTRIBUTION
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import platform
import random
import sys
from importlib.metadata import version
from typing import Any

from .contenders.contender import Contender
from .groups import GROUPS
from .rounds import Round, Size

SHOWN = ("fastapi", "starlette", "anyio", "pydantic")


def contender_of(name: str) -> Contender:
    """Return a contender.

    :param name: its module below ``contenders``, a colon, and its class
    """
    module, _, kind = name.partition(":")
    return getattr(importlib.import_module(f".contenders.{module}", __package__), kind)()


def measure(contender: Contender, group: str, seed: int, scale: float) -> dict[str, float]:
    """Measure a group of sides once, in an event loop of its own.

    :param seed: decides the order of the sides
    :param scale: how much of the usual is done
    """
    size = Size() if scale == 1 else Size().scaled(scale)
    given = Round(contender, size, random.Random(seed))
    return asyncio.run(GROUPS[group](given))


def answer(contender: Contender, order: dict[str, Any]) -> dict[str, Any]:
    """Do what a line asks for."""
    try:
        return {"values": measure(contender, **order)}
    except Exception as error:
        logging.getLogger(__name__).exception("%s failed", order)
        return {"error": f"{type(error).__name__}: {error}"}


def main(name: str, distribution: str) -> None:
    """Answer lines until there are no more."""
    # Warnings are written as in production, to where nobody reads them.
    logging.basicConfig(stream=open(os.devnull, "w"), level=logging.WARNING)  # noqa: PTH123, SIM115
    contender = contender_of(name)
    versions = {each: version(each) for each in (*SHOWN, distribution)}
    hello = {
        "python": platform.python_version(),
        "versions": versions,
        "not_comparable": contender.not_comparable,
        "remarks": contender.remarks,
    }
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(contender, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
