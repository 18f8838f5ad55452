"""Measures what each server keeps of what is promised, and writes the table for the documentation.

The tests in ``tests/test_servers.py`` are the measurement. The table is written only if each of
them came out as it says itself: a promise that is kept, or a limit with its reason.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "servers_table.txt"

Outcomes = Mapping[tuple[str, str], str | None]
"""By test and server: why the promise cannot be kept, or ``None`` if it is."""


def measure() -> Outcomes | None:
    """Run the tests, and return what came of them, or ``None`` if that is not what they expect."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-n", "2", f"--junit-xml={report}", "tests/test_servers.py"]
        command += ["-k", "not table"]  # which this run is about to write
        if subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
            return None
        cases = ElementTree.parse(report).iter("testcase")
        outcomes: dict[tuple[str, str], str | None] = {}
        for case in cases:
            test, _, parameter = case.attrib["name"].partition("[")
            limit = case.find("skipped")
            reason = None if limit is None else limit.attrib["message"]
            outcomes[test, parameter.removesuffix("]")] = reason
        return outcomes


def render(promises: Mapping[str, str], servers: Sequence[str], outcomes: Outcomes) -> str:
    """Return the table, with a footnote for each limit.

    :param promises: the text of each promise, by its test
    :param servers: their names
    :param outcomes: what came of each promise on each server; nothing, if it means nothing there
    """
    reasons: list[str] = []

    def cell(test: str, server: str) -> str:
        if (test, server) not in outcomes:
            return "n/a"
        reason = outcomes[test, server]
        if reason is None:
            return "kept"
        if reason not in reasons:
            reasons.append(reason)
        return f"no [{reasons.index(reason) + 1}]_"

    lines = ["", ".. list-table::", "   :header-rows: 1", "   :stub-columns: 1", ""]
    for first, cells in [
        ("", [re.sub(r"--\S.*", r"``\g<0>``", server) for server in servers]),
        *((text, [cell(test, server) for server in servers]) for test, text in promises.items()),
    ]:
        lines += [f"   * - {first}".rstrip(), *(f"     - {text}" for text in cells)]
    lines.append("")
    lines += [f".. [{number}] {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write the table, and return the exit status."""
    sys.path.insert(0, str(ROOT))
    from tests import test_servers

    outcomes = measure()
    if outcomes is None:
        print("The table is as it was.", file=sys.stderr)
        return 1
    kinds = test_servers.KINDS
    packages = dict.fromkeys(package for kind in kinds for package in kind.packages)
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    promises = {test: promise.text for test, promise in test_servers.PROMISES.items()}
    table = render(promises, [kind.name for kind in kinds], outcomes)
    TABLE.write_text(f"Measured with {versions}.\n{table}", encoding="utf-8")
    print(f"Written: {TABLE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
