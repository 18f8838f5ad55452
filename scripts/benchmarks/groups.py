"""What is timed together in a round: the sides of one or more figures, by the group's name."""

from __future__ import annotations

import asyncio
import statistics
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping

from fastapi.routing import APIRoute

from .client import Client, serving
from .clock import Side, interleaved, production_gc
from .contenders.baselines import RawTasks, background, bare, bare_in_thread, raw_threads
from .rounds import Round
from .work import Work

Values = dict[str, float]
"""By side: seconds, or bytes."""


async def _send(client: Client, count: int, work: Work | None = None) -> None:
    """Send requests one after the other, each in a task of its own, as servers do it."""
    for _ in range(count):
        if work is not None:
            work.expected += 1
        await asyncio.create_task(client.request())
    if work is not None:
        await work.finish()


async def routes(given: Round) -> Values:
    """Time requests that have no tasks."""
    contender, size = given.contender, given.size
    clients = {
        "without": given.client(bare, installed=False),
        "plain": given.client(bare, route_class=APIRoute),
        "plain_again": given.client(bare, route_class=APIRoute),
    }
    if contender.route_class is not None:
        clients["route"] = given.client(bare, route_class=contender.route_class)

    def side(client: Client) -> Side:
        return lambda: _send(client, size.requests)

    async with serving(*clients.values()):
        sides = {name: side(client) for name, client in clients.items()}
        for each in sides.values():
            await each()
        return await interleaved(sides, size.slices, given.dice)


async def requests(given: Round) -> Values:
    """Time requests that have one task."""
    size, work = given.size, Work(0)
    clients = {
        name: given.client(background(work.work, 1), installed=False)
        for name in ("background", "background_again")
    }
    for name, takes_turn in (("raw", False), ("raw_turn", True)):
        endpoint = RawTasks().endpoint(work.work, 1, takes_turn=takes_turn)
        clients[name] = given.client(endpoint, installed=False)
    for how in ("now", "after_route", "after_response"):
        if given.contender.has(how):
            clients[how] = given.scheduling(how, work.work, 1)

    def side(client: Client) -> Side:
        return lambda: _send(client, size.requests, work)

    async with serving(*clients.values()):
        sides = {name: side(client) for name, client in clients.items()}
        for each in sides.values():
            await each()
        return await interleaved(sides, size.slices, given.dice)


async def flood(given: Round) -> Values:
    """Time requests that have very many tasks."""
    count = given.size.tasks

    def side(client: Client, work: Work) -> Side:
        async def run() -> None:
            await client.request()
            await work.finish()

        return run

    works: dict[str, Work] = {"raw": Work(count)}
    clients = {"raw": given.client(RawTasks().endpoint(works["raw"].work, count), installed=False)}
    for how in ("now", "shielded", "configured"):
        if given.contender.has(how):
            works[how] = Work(count)
            clients[how] = given.scheduling(how, works[how].work, count)
    async with serving(*clients.values()):
        sides = {name: side(client, works[name]) for name, client in clients.items()}
        times = await interleaved(sides, 1, given.dice)
    return {"flood" if name == "now" else name: value for name, value in times.items()}


async def memory(given: Round) -> Values:
    """Count the bytes of live tasks, as the memory allocator was asked for them."""
    count = given.size.tasks
    values: Values = {}
    names = ["live", "raw"]
    given.dice.shuffle(names)
    for name in names:
        work = Work(count)
        tasks = RawTasks()
        client = (
            given.client(tasks.endpoint(work.wait, count), installed=False)
            if name == "raw"
            else given.scheduling("now", work.wait, count)
        )
        async with serving(client):
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                await client.request()
                await work.finish()
                values[name] = (tracemalloc.get_traced_memory()[0] - before) / count
            finally:
                tracemalloc.stop()
            await work.let_go()
    return values


async def growth(given: Round) -> Values:
    """Time a task, from its scheduling to its end, while few and while many others are live."""
    size = given.size
    times: Values = {}
    for live, name in ((size.few_live, "few"), (size.many_live, "many")):
        repetitions = max(1, min(10, size.many_live // live // 10))
        for _ in range(repetitions):
            for side, value in (await _live(given, live)).items():
                times[f"{side}_{name}"] = times.get(f"{side}_{name}", 0.0) + value / (
                    live * repetitions
                )
    return {
        "growth": times["ours_many"] / times["ours_few"],
        "raw_growth": times["raw_many"] / times["raw_few"],
    }


async def _live(given: Round, count: int) -> Values:
    works = {"raw": Work(count), "ours": Work(count)}
    clients = {
        "raw": given.client(RawTasks().endpoint(works["raw"].wait, count), installed=False),
        "ours": given.scheduling("now", works["ours"].wait, count),
    }

    def side(client: Client, work: Work) -> Side:
        async def run() -> None:
            await client.request()
            await work.finish()
            await work.let_go()

        return run

    async with serving(*clients.values()):
        sides = {name: side(client, works[name]) for name, client in clients.items()}
        return await interleaved(sides, 1, given.dice)


async def drain(given: Round) -> Values:
    """Time the end of many tasks that wait."""
    if not given.contender.has("drain"):
        return {}
    count = given.size.tasks
    works = {"raw": Work(count), "drain": Work(count)}
    raw = RawTasks()
    clients = {
        "raw": given.client(raw.endpoint(works["raw"].wait, count), installed=False),
        "drain": given.scheduling("now", works["drain"].wait, count),
    }
    async with serving(*clients.values()):
        for name, client in clients.items():
            await client.request()
            await works[name].finish()

        async def gather() -> None:
            await raw.cancel()
            await clients["raw"].shut_down()

        sides = {"raw": gather, "drain": clients["drain"].shut_down}
        times = await interleaved(sides, 1, given.dice)
        for work in works.values():
            work.check_cancelled()
        return times


async def threads(given: Round) -> Values:
    """Time calls in threads."""
    count = given.size.threads
    works: dict[str, Work] = {}

    def side(name: str) -> tuple[Client, Side]:
        work = works[name] = Work(count)
        client = (
            given.client(raw_threads(work.work_in_thread, count), installed=False)
            if name.startswith("raw")
            else given.scheduling("now", work.work_in_thread, count)
        )

        async def run() -> None:
            await client.request()
            await work.finish_in_threads()

        return client, run

    names = ["raw_threads", "threads", "raw_warm", "warm"]
    made = {name: side(name) for name in names}
    async with serving(*(client for client, _ in made.values())):
        # The first calls start the threads.
        for name in names[2:]:
            await made[name][1]()
        return await interleaved({name: made[name][1] for name in names[:2]}, 1, given.dice)


async def latency(given: Round) -> Values:
    """Take the 99th percentile of a sync endpoint's time on the wall, with tasks and without."""
    count = given.size.waits
    works = {"busy": Work(count), "raw_busy": Work(count)}
    raw = raw_threads(works["raw_busy"].block, count, own_limiter=True)
    clients = {
        "busy": given.scheduling("now", works["busy"].block, count),
        "raw_busy": given.client(raw),
    }
    quiet = given.client(bare_in_thread)
    durations: list[float] = []

    async def send_until(is_over: Callable[[], bool]) -> float:
        taken: list[float] = []
        while len(taken) < 2 or not is_over():
            start = time.perf_counter()
            await quiet.request()
            taken.append(time.perf_counter() - start)
        return statistics.quantiles(taken, n=100, method="inclusive")[-1]

    async def beside(name: str) -> float:
        start = time.perf_counter()
        request = asyncio.create_task(clients[name].request())
        await asyncio.sleep(0)
        value = await send_until(lambda: works[name].is_done)
        durations.append(time.perf_counter() - start)
        await request
        await works[name].finish_in_threads()
        return value

    async def alone() -> float:
        end = time.perf_counter() + durations[0]
        return await send_until(lambda: time.perf_counter() > end)

    async with serving(*clients.values(), quiet):
        for _ in range(20):
            await quiet.request()
        names = list(works)
        given.dice.shuffle(names)
        with production_gc():
            values = {names[0]: await beside(names[0])}
            values["calm"] = await alone()  # in between, for as long
            values[names[1]] = await beside(names[1])
        return values


GROUPS: Mapping[str, Callable[[Round], Awaitable[Values]]] = {
    each.__name__: each
    for each in (routes, requests, flood, memory, growth, drain, threads, latency)
}
