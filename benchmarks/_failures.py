"""A pytest plugin (`-p benchmarks._failures`) that prints a row for each failure as it happens.

A run that is cut off has then named what failed so far. With pytest-xdist only the process that
collects the results prints.
"""

from __future__ import annotations

import pytest

_LONGEST_REASON = 300


class _Rows:
    """Prints a Markdown table: each test that failed and why; at the end how many there were."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._counts = config, dict[str, int]()

    def pytest_sessionstart(self) -> None:
        self._print("| test | outcome | reason |")
        self._print("|---|---|---|")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._counts[report.outcome] = self._counts.get(report.outcome, 0) + 1
        if report.failed:
            self._print(f"| {report.nodeid} | failed in {report.when} | {reason(report)} |")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._print(f"| {report.nodeid} | not collected | {reason(report)} |")

    def pytest_sessionfinish(self) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self._counts.items())
        self._print(f"| all | {counts or 'none ran'} | |")

    def _print(self, row: str) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        assert terminal is not None, "pytest's own reporter"
        terminal.ensure_newline()
        terminal.write_line(row, flush=True)


def pytest_configure(config: pytest.Config) -> None:
    """Install the plugin, not in the workers of pytest-xdist."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Rows(config))


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test failed, in one line that a cell of a table can hold."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext.rpartition("\n")[2]
    return " ".join(text.split()).replace("|", "/")[:_LONGEST_REASON] or "unknown"
