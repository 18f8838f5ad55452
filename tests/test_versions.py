"""The lanes: they run what the package promises, and the documentation tells which they are."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def read(path: str) -> dict[str, Any]:
    """Return what a TOML file of the project contains."""
    return tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


LANES = read("scripts/lanes.toml")
PROJECT = read("pyproject.toml")["project"]


def test_the_floor_has_the_lowest_versions_that_the_package_declares() -> None:
    """A bound that is lowered without a test of it is a guess."""
    floor = dict(package.split("==") for package in LANES["floor"]["packages"])
    extras = PROJECT["optional-dependencies"].values()
    for dependency in [*PROJECT["dependencies"], *chain.from_iterable(extras)]:
        name, lowest = dependency.split(">=")
        assert f"{floor[name]}.".startswith(f"{lowest}.")
    assert f">={LANES['floor']['python']}" == PROJECT["requires-python"]


def test_every_python_that_the_package_declares_has_a_lane_with_the_newest_packages() -> None:
    """A new Python comes with a lane."""
    declared = [re.fullmatch(r".* :: (3\.\d+)", line) for line in PROJECT["classifiers"]]
    newest = {lane["python"] for lane in LANES.values() if "fastapi" in lane["packages"]}
    assert newest == {match[1] for match in declared if match}


def test_the_documentation_lists_the_lanes() -> None:
    """With their Pythons, and with each version that users can have."""
    text = (ROOT / "docs" / "versions.rst").read_text(encoding="utf-8")
    rows = re.findall(
        r"^   \* - ``(\w+)``\n     - (\S+)\n     - ((?:.*\n {7})*.*)\n", text, re.MULTILINE
    )
    # Starlette's TestClient, and what the observer's tests look at
    of_tests = {"httpx", "opentelemetry-sdk", "opentelemetry-semantic-conventions"}
    defined = []
    for name, lane in LANES.items():
        pinned = [package.split("==") for package in lane["packages"] if "==" in package]
        versions = ", ".join(" ".join(pin) for pin in pinned if pin[0] not in of_tests)
        defined.append((name, lane["python"], versions or "the newest"))
    assert [(name, python, " ".join(cell.split())) for name, python, cell in rows] == defined
