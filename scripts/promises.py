"""What tests have measured of promises, and the table of it that stands in the documentation.

For scripts that are run as modules: ``python -m scripts.servers``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]

Outcomes = Mapping[tuple[str, str], str | None]
"""By test and column: why the promise cannot be kept, or ``None`` if it is."""
Measurements = Mapping[tuple[str, str], str]
"""By test and column: what was measured, if it was more than that."""


def measure(
    tests: str, *options: str, environment: Mapping[str, str] = MappingProxyType({})
) -> tuple[bool, Outcomes, Measurements]:
    """Run tests, and return whether they came out as they expect, and what came of each.

    :param tests: their file
    :param options: more options of pytest's
    :param environment: more environment variables
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-n", "2", f"--junit-xml={report}", tests, *options]
        command += ["-k", "not table"]  # which this run is about to write
        status = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, check=False
        ).returncode
        outcomes: dict[tuple[str, str], str | None] = {}
        measurements: dict[tuple[str, str], str] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            test, _, parameter = case.attrib["name"].partition("[")
            key = test, parameter.removesuffix("]")
            limit = case.find("skipped")
            outcomes[key] = None if limit is None else limit.attrib["message"]
            for found in case.iterfind("properties/property[@name='measured']"):
                measurements[key] = found.attrib["value"]
        return status == 0, outcomes, measurements


def render(
    promises: Mapping[str, str],
    columns: Sequence[str],
    outcomes: Outcomes,
    measurements: Measurements = MappingProxyType({}),
) -> str:
    """Return the table, with a footnote for each limit.

    :param promises: the text of each promise, by its test
    :param columns: who is to keep them
    :param outcomes: what came of each promise in each column; nothing, if it means nothing there
    :param measurements: what else is to be said where a promise is kept
    """
    reasons: list[str] = []

    def cell(test: str, column: str) -> str:
        if (test, column) not in outcomes:
            return "n/a"
        reason = outcomes[test, column]
        if reason is None:
            more = measurements.get((test, column))
            return "kept" if more is None else f"kept: {more}"
        if reason not in reasons:
            reasons.append(reason)
        return f"no [{reasons.index(reason) + 1}]_"

    lines = ["", ".. list-table::", "   :header-rows: 1", "   :stub-columns: 1", ""]
    for first, cells in [
        ("", [re.sub(r"--\S.*", r"``\g<0>``", column) for column in columns]),
        *((text, [cell(test, column) for column in columns]) for test, text in promises.items()),
    ]:
        lines += [f"   * - {first}".rstrip(), *(f"     - {text}" for text in cells)]
    lines.append("")
    lines += [f".. [{number}] {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n"


def versions(packages: Sequence[str]) -> str:
    """Return the installed versions of packages, each of them once."""
    return ", ".join(f"{package} {version(package)}" for package in dict.fromkeys(packages))
