"""How the sides of a figure are timed: in turns, in one process, and each as the other."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

Side = Callable[[], Awaitable[None]]


@contextmanager
def production_gc() -> Iterator[None]:
    """Leave the garbage collector on, and let it begin anew for each side.

    It stays on as in production: who makes more objects pays for more collections. What was there
    before is frozen, so that no side pays for a heap that is not its own.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def cpu_time(side: Side) -> float:
    """Return the seconds of CPU time that a side takes, in all threads of the process."""
    gc.collect()
    start = time.process_time()
    await side()
    return time.process_time() - start


async def interleaved(
    sides: Mapping[str, Side], slices: int, dice: random.Random
) -> dict[str, float]:
    """Return the CPU time of each side, which come in turns, each time in another order.

    :param slices: how often each comes
    """
    times = dict.fromkeys(sides, 0.0)
    names = list(sides)
    with production_gc():
        for _ in range(slices):
            dice.shuffle(names)
            for name in names:
                times[name] += await cpu_time(sides[name])
    return times
