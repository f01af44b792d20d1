"""benchmarks/metrics.py: both columns compute the same thing, and the table is what it says."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from benchmarks import metrics


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "GENERATED", 120)
    monkeypatch.setattr(metrics, "REAL", 100)
    monkeypatch.setattr(metrics, "_SUBSET_SIZE", 50)


@pytest.mark.parametrize(
    ("pair", "tolerance"),
    [(metrics.trace, 1e-8), (metrics.precision, 0.0)],
)
def test_ours_and_theirs_agree(pair, tolerance: float) -> None:
    """The same images, the same definition."""
    ours, theirs = (function() for function in pair(16))
    assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-6)
    assert theirs > 0.1


def test_a_row_is_of_medians_of_runs_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow run of three does not count; the ratio is of neighbours in time."""
    times = iter([0.0, 1.0, 1.0, 4.0, 4.0, 54.0, 54.0, 57.0, 57.0, 58.0, 58.0, 61.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    row = metrics.measured("x", metrics.Pair(lambda: 1.1, lambda: 1.0), runs=3)
    assert row[:4] == ("x", 1.0, 3.0, 3.0)
    assert row.difference == pytest.approx(0.1)


def test_the_command_prints_the_rows_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By how their names begin."""
    monkeypatch.setitem(metrics.CASES, "tiny", lambda: metrics.kernel(8, 2))
    result = CliRunner().invoke(metrics.main, ["--case", "tiny", "--runs", "1"])
    assert result.exception is None, result.output
    _, rule, row = result.output.splitlines()
    assert rule.startswith("|---") and row.startswith("| tiny |")
    assert float(row.split("|")[-2]) < 1e-2  # torch-fidelity adds up in float32
