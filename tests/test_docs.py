"""The documentation is true: every block in it is run, and every public name is described."""

from __future__ import annotations

import inspect
import re
import shlex
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from sybil import Example, Sybil
from sybil.parsers.rest import CaptureParser, CodeBlockParser, PythonCodeBlockParser

import fastapi_tasks
from fastapi_tasks import engines, testing
from fastapi_tasks.__main__ import command_line

from . import asgi, clocks, diffs

ROOT = Path(__file__).parent.parent
needs_telemetry = pytest.mark.skipif(
    "telemetry" not in inspect.signature(FastAPI).parameters,
    reason="the page is about a newer FastAPI",
)
needs_engines = pytest.mark.skipif(
    not all(map(find_spec, ("asyncpg", "dbos", "docket", "pgqueuer"))),
    reason="the page is about engines, whose packages are not installed",
)
MARKS = {
    "README": [needs_engines],
    "engines": [needs_engines],
    "tracing": [needs_telemetry],
    "workers": [needs_engines],
}
DOCUMENTS = [
    pytest.param(path, id=path.stem, marks=MARKS.get(path.stem, []))
    for path in [ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))]
]

TASK_ID = re.compile(r"\b[0-9a-f]{8}-\d+\b")


def check_make(targets: list[str]) -> None:
    """The Makefile has the targets."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"


def check_pip(arguments: list[str]) -> None:
    """What is to be installed is this checkout, or one of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [f".[{extra}]" for extra in project["optional-dependencies"]]
    command, what = arguments
    assert (command, what in [".", *extras]) == ("install", True)


def check_uvicorn(arguments: list[str]) -> None:
    """The server knows the options."""
    uvicorn.main.make_context("uvicorn", arguments)


def check_worker(arguments: list[str]) -> None:
    """The worker knows the options."""
    assert arguments[:3] == ["-m", "fastapi_tasks", "worker"]
    command_line().parse_args(arguments[2:])


COMMANDS = {
    "make": check_make,
    "pip": check_pip,
    "python": check_worker,
    "uvicorn": check_uvicorn,
}


def check_console(example: Example) -> None:
    """Check, without running them, that the commands which a page tells readers to type work."""
    for line in example.parsed.splitlines():
        prompt, command, *arguments = shlex.split(line)
        assert prompt == "$"
        COMMANDS[command](arguments)


SYBIL = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser(language="console", evaluator=check_console),
        CaptureParser(),
    ]
)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What a page's blocks have printed since the last call."""
    return lambda: capsys.readouterr().out


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What a page's blocks have logged since the last call, every task with the same id."""
    caplog.set_level("INFO", logger="fastapi_tasks")

    def logged() -> str:
        lines = [
            f"{record.levelname} {record.getMessage()}\n"
            for record in caplog.records
            if record.name == "fastapi_tasks"
        ]
        caplog.clear()
        return TASK_ID.sub("5c1f09ab-7", "".join(lines))

    return logged


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_block_does_what_its_page_says(
    path: Path, printed: Callable[[], str], logged: Callable[[], str]
) -> None:
    """A reader who types the blocks of a page, from its top to its end, sees what it tells."""
    document = SYBIL.parse(path)
    document.namespace.update(printed=printed, logged=logged, asgi=asgi, clocks=clocks, diffs=diffs)
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("path", DOCUMENTS)
def test_no_block_is_left_out(path: Path) -> None:
    """A block is Python or commands, which the tests run or check, a diff, of which they run both
    sides, or a picture or an output."""
    text = path.read_text(encoding="utf-8")
    languages = re.findall(r"^ *\.\. (?:invisible-)?code-block::? *(\S*)$", text, re.MULTILINE)
    captures = re.findall(r"^ *\.\. -> \w+$", text, re.MULTILINE)
    assert set(languages) <= {"python", "console", "text", "diff"}
    shown = languages.count("text") + languages.count("diff")
    evaluated = len(languages) - shown + len(captures)
    assert len(list(SYBIL.parse(path).examples())) == evaluated
    assert languages.count("diff") <= len(captures)
    # A paragraph that ends in two colons, and a prompt, open blocks that say no language.
    assert not re.findall(r"^(?! *\.\. ).*::$|^ *>>>", text, re.MULTILINE)


def test_every_public_name_is_described() -> None:
    """The API page has each public name once, and no other."""
    text = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    directive = r"^\.\. (?:data|auto(?:class|exception|function)):: (\w+)"
    public = [*fastapi_tasks.__all__, *engines.__all__, *testing.__all__]
    assert sorted(re.findall(directive, text, re.MULTILINE)) == sorted(public)
