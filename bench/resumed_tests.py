"""A plug-in for pytest: tests that stand in a ledger are not run again.

    PYTHONPATH=bench python -m pytest -p resumed_tests --ledger FILE

With pytest-xdist too. A process whose GPU is lost ends, for all its later tests would fail as well.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from ledger import LOST, Ledger, gpu_is_lost


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ledger", type=Path, help="tests in this file are not run again")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--ledger"):
        config.pluginmanager.register(ResumedTests(file, getattr(config, "workerinput", None)))


class ResumedTests:
    """`from_controller`: what one of xdist's workers is told, where the controller writes."""

    def __init__(self, file: Path, from_controller: dict[str, Any] | None) -> None:
        self.ledger, self.is_worker = Ledger(file), from_controller is not None
        # The file grows while workers collect, and all must collect the same.
        self.done = set(from_controller["done"]) if from_controller else self.ledger.done()
        self.reports: dict[str, list[pytest.TestReport]] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["done"] = sorted(self.done)

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid in self.done])
        items[:] = [item for item in items if item.nodeid not in self.done]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.done:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if not self.is_worker:
            self.ledger.start(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.setdefault(report.nodeid, []).append(report)
        if report.when not in ("setup", "call", "teardown"):  # xdist's, of a worker that died
            self.pytest_runtest_logfinish(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        reports = self.reports.pop(nodeid, [])
        outcomes = [report.outcome for report in reports]
        outcome = next((x for x in ("failed", "skipped") if x in outcomes), "passed")
        if not self.is_worker:
            self.ledger.end(nodeid, outcome, why=next(map(said, filter(failed, reports)), ""))
        if outcome == "failed" and gpu_is_lost():
            if self.is_worker:
                os._exit(LOST)  # before the test counts as finished: xdist then blames this one
            pytest.exit("a kernel's fault has lost the GPU", LOST)


def failed(report: pytest.TestReport) -> bool:
    return report.outcome == "failed"


def said(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return text.strip().partition("\n")[0][:200]
