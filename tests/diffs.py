"""The diffs in the documentation, and the apps that are their two sides."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from fastapi import FastAPI

DOCS = Path(__file__).parent.parent / "docs"


def diffs_of(page: str) -> list[str]:
    """Return all diffs of a page.

    :param page: its name
    """
    text = (DOCS / f"{page}.rst").read_text(encoding="utf-8")
    blocks = re.findall(r"^\.\. code-block:: diff\n\n((?:   .*\n|\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") for block in blocks]


def sides(diff: str) -> tuple[str, str]:
    """Return the text before and the text after a diff that shows all of both.

    :param diff: lines that begin with a minus, a plus or a blank
    """
    before: list[str] = []
    after: list[str] = []
    for line in diff.splitlines():
        mark, rest = line[:1], line[1:]
        assert mark in {"-", "+", " ", ""}, line
        if mark != "+":
            before.append(rest)
        if mark != "-":
            after.append(rest)
    return "\n".join(before), "\n".join(after)


def app_of(source: str, **names: object) -> FastAPI:
    """Return the app that a module makes, from its text.

    :param source: the text
    :param names: what it takes from elsewhere
    """
    namespace: dict[str, Any] = dict(names)
    # Annotations are looked up in the module, even those of functions within it.
    exec(compile(source, "<docs/migrating.rst>", "exec", dont_inherit=True), namespace)
    app: FastAPI = namespace["app"]
    return app
