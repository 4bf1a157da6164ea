"""A file of tests/gpu as a part of a run on a GPU: a row for each test, as soon as it has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from measure import ROOT, Row
from parts import MissingError, require


class FailedTests(RuntimeError):
    """How many failed; pytest has told why."""


def run(name: str, emit: Callable[[Row], None]) -> None:
    """Run tests/gpu/test_`name`.py.

    Raises FailedTests after the last test, and MissingError where the whole file is skipped.
    """
    require("pytest")
    import pytest

    told = Reporter(emit)
    # The suites' settings, but for what asks for plugins of pytest.
    settings = ["-c", f"{ROOT}/tests/pytest.ini", "--rootdir", f"{ROOT}/tests", "-p", "no:cacheprovider"]
    options = ["-o", "addopts=--import-mode=importlib", "-v", "-rs"]
    status = pytest.main([*settings, *options, f"{ROOT}/tests/gpu/test_{name}.py"], plugins=[told])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and told.skipped:
        raise MissingError(told.skipped)
    if status != pytest.ExitCode.OK:
        raise FailedTests(
            f"{told.failed} tests failed: the log says how"
            if told.failed
            else f"pytest ended with status {int(status)}"
        )


class Reporter:
    """A plugin of pytest that makes rows of its reports."""

    def __init__(self, emit: Callable[[Row], None]):
        self.emit = emit
        self.failed = 0
        self.skipped = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.skipped:
            self.emit(Row.open(name, f"skipped: {report.longrepr[2]}"))
        elif report.failed:
            self.failed += 1
            self.emit(Row.open(name, f"failed in {report.when}: {report.longrepr.reprcrash.message.splitlines()[0]}"))
        elif report.when == "call":
            said = "".join(f"; {name} {value}" for name, value in report.user_properties)
            self.emit(Row(name, report.duration, None, "s", note=f"passed{said}"))

    def pytest_collectreport(self, report: Any) -> None:
        if report.skipped:
            self.skipped = report.longrepr[2]
