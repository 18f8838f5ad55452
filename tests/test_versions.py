"""The lanes: they run what the package promises, and the documentation tells which they are."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def read(path: str) -> dict[str, Any]:
    """Return what a TOML file of the project contains."""
    return tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


LANES = read("scripts/lanes.toml")
PROJECT = read("pyproject.toml")["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_the_floor_has_the_lowest_versions_that_the_package_declares() -> None:
    """A bound that is lowered without a test of it is a guess."""
    floor = dict(package.split("==") for package in LANES["floor"]["packages"])
    for dependency in [*PROJECT["dependencies"], *EXTRAS["opentelemetry"]]:
        name, lowest = dependency.split(">=")
        assert f"{floor[name]}.".startswith(f"{lowest}.")
    assert f">={LANES['floor']['python']}" == PROJECT["requires-python"]


def test_the_engines_are_tested_with_the_lowest_versions_that_the_package_declares() -> None:
    """They are in no lane, so those of "make test" are the only ones that are known to work."""
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    for engine in ("dbos", "docket", "pgqueuer"):
        for dependency in EXTRAS[engine]:
            name, lowest = re.sub(r"\[.*\]|,.*", "", dependency).split(">=")
            assert f"{pinned[name]}.".startswith(f"{lowest}.")


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
