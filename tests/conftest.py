"""How a whole run goes: side by side what shares nothing; and a skipped test did not pass.

With ``-n 2`` the tests of one file run in their order on one worker, or those of one folder where the folder
has fixtures of its own; nothing else is shared. Tests on real nodes begin, because they take the longest, and
those on machines first of all.
What tests on real nodes print, which is figures, is said at the end also where they pass.
A run fails where a test, or a whole file of them, was skipped, unless it needs a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parent
MACHINES = "test_machines.py"
_skipped: list[str] = []
_figures: list[str] = []


class Together(LoadScopeScheduling):  # type: ignore[misc]
    """Hands a worker all tests that share something."""

    def _split_scope(self, nodeid: str) -> str:
        """The file of a test, or its folder where that has fixtures of its own."""
        file = TESTS.parent / nodeid.partition("::")[0]
        own = (file.parent / "conftest.py").is_file()
        return str(file.parent if own else file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Together:
    config.option.loadscopereorder = (
        False  # by the number of tests, which says nothing of their seconds
    )
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lab = TESTS / "lab"
    items.sort(key=lambda item: (not item.path.is_relative_to(lab), item.path != lab / MACHINES))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown" and report.nodeid.startswith("tests/lab/"):
        _figures.extend(report.capstdout.splitlines())
    if report.skipped and "GPU" not in str(report.longrepr):
        _skipped.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A whole file, as by ``importorskip``."""
    if report.skipped and "GPU" not in str(report.longrepr):
        _skipped.append(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _figures:
        terminalreporter.write_line(line)
    for name in _skipped:
        terminalreporter.write_line(f"skipped, which counts as failed: {name}", red=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _skipped and exitstatus == 0:
        session.exitstatus = 1
