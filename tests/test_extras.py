"""What is said if an extra is not there: only then, and about nothing else."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from fastapi_tasks import MissingPackageError
from fastapi_tasks.extras import extra

from .servers import ROOT


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it is installed as, which is not always what it is imported as."""
    monkeypatch.setitem(sys.modules, "wool", None)
    with (
        pytest.raises(MissingPackageError, match=r"^loom needs pywool, .*'fastapi-tasks\[yarn\]'$"),
        extra("yarn", "loom", wool="pywool"),
    ):
        import_module("wool.spun")


def test_a_package_that_is_too_old_is_one_that_is_missing() -> None:
    """It has not got what is imported from it."""
    with (
        pytest.raises(MissingPackageError, match="loom needs python"),
        extra("yarn", "loom", sys="python"),
    ):
        from sys import spindle  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize(
    "error", [ImportError("a library is missing"), ModuleNotFoundError(name="loom.x")]
)
def test_another_error_passes_as_it_is(error: ImportError) -> None:
    """What to install would be a false lead."""
    with pytest.raises(ImportError) as caught, extra("yarn", "loom", wool="pywool"):
        raise error
    assert caught.value is error


@pytest.mark.skipif(
    not all(map(find_spec, ("dbos", "docket", "pgqueuer"))), reason="lanes have no engines"
)
@pytest.mark.parametrize(
    ("engine", "missing"),
    [
        ("DBOSEngine", "fastapi_tasks.engines.dbos_store"),
        ("DBOSEngine", "zlib"),
        ("DocketEngine", "fastapi_tasks.engines.docket_records"),
        ("DocketEngine", "pickle"),
        ("PgQueuerEngine", "fastapi_tasks.engines.pgqueuer_driver"),
        ("PgQueuerEngine", "zlib"),
    ],
)
def test_an_engine_whose_extra_is_there_does_not_ask_for_it(engine: str, missing: str) -> None:
    """One of our own modules may be missing, or one of somebody else's."""
    code = (
        "import sys, fastapi_tasks.engines\n"
        f"sys.modules[{missing!r}] = None\n"
        "try:\n"
        f"    from fastapi_tasks.engines import {engine}\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error.name)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout == f"ModuleNotFoundError {missing}\n"
