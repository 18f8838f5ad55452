"""Measures what each server keeps of what is promised, and writes the table for the documentation.

The tests in ``tests/test_servers.py`` are the measurement. The table is written only if each of
them came out as it says itself: a promise that is kept, or a limit with its reason.
"""

from __future__ import annotations

import sys

from scripts.promises import ROOT, measure, render, versions

TABLE = ROOT / "docs" / "servers_table.txt"


def main() -> int:
    """Measure, write the table, and return the exit status."""
    from tests import test_servers

    is_expected, *measured = measure("tests/test_servers.py")
    if not is_expected:
        print("The table is as it was.", file=sys.stderr)
        return 1
    kinds = test_servers.KINDS
    packages = versions([package for kind in kinds for package in kind.packages])
    promises = {test: promise.text for test, promise in test_servers.PROMISES.items()}
    table = render(promises, [kind.name for kind in kinds], *measured)
    TABLE.write_text(f"Measured with {packages}.\n{table}", encoding="utf-8")
    print(f"Written: {TABLE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
