"""core/run_log.py: rows come back as they were written, a crash costs one line at most."""

import math
from pathlib import Path

import pytest

from core.errors import UserError
from core.run_log import (
    Divergence,
    EarlyStop,
    Evaluation,
    ImageComparison,
    Rollback,
    Row,
    RunLog,
    Session,
    Stats,
)

ROWS = (
    Evaluation(images_seen=0, when="before", metrics={"fid": (4.0, 5.0)}),
    Stats(images_seen=64, images_per_second=1 / 3, values={"score_loss": 0.1, "skipped": 0.0}),
    Evaluation(images_seen=64, when="training", metrics={"fid": (1 / 7,)}),
    Rollback(images_seen=64, why="nan", from_images_seen=128, lr_scale=0.5),
    ImageComparison(images_seen=128, name="drift", result={"moved": 0.5, "images": 3}),
    Session(images_seen=128, started_at="a", finished_at="b", seconds={"x": 1.5}, images=64),
    Divergence(images_seen=128, why="inf"),
    EarlyStop(images_seen=128, metric="fid", value=1.0, at_images_seen=64),
)


def _log(tmp_path: Path, *rows: Row) -> RunLog:
    log = RunLog(tmp_path / "stats.jsonl")
    for row in rows:
        log.append(row)
    return log


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    """Every kind of row, with every digit; a log that is not there has none."""
    assert RunLog(tmp_path / "none").rows() == []
    assert _log(tmp_path, *ROWS).rows() == list(ROWS)


def test_a_kind_of_row_has_its_own_key() -> None:
    """A new kind must be registered, under a key that no other has."""
    kinds = {kind.kind for kind in Row.__subclasses__()}
    assert kinds == {type(row).kind for row in ROWS} and len(kinds) == len(Row.__subclasses__())


def test_rows_are_found_by_kind_and_fields(tmp_path: Path) -> None:
    """The newest one whose fields have the given values, or None."""
    log = _log(tmp_path, *ROWS)
    assert log.all(Evaluation) == [ROWS[0], ROWS[2]]
    assert log.last(Evaluation) == ROWS[2]
    assert log.last(Evaluation, when="before", images_seen=0) == ROWS[0]
    assert log.last(Evaluation, when="after") is None
    assert ROWS[0].means == {"fid": 4.5}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path, cut: int) -> None:
    """A crash in the middle of a line costs that line, and a resumed run writes on cleanly."""
    log = _log(tmp_path, *ROWS[:3])
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    log.keep_until(10**9)
    log.append(ROWS[6])
    assert log.rows() == [*ROWS[:2], ROWS[6]]


@pytest.mark.parametrize("content", [b"", b"whole\n", b"cut", b"\n\ncut"])
def test_a_row_after_a_cut_line_takes_its_place(tmp_path: Path, content: bytes) -> None:
    """What a full disk cut off is not run together with the line that follows."""
    log = RunLog(tmp_path / "stats.jsonl")
    log.path.write_bytes(content)
    log.append(Divergence(images_seen=192, why="x"))
    whole = content[: content.rfind(b"\n") + 1]
    expected = b'{"images_seen": 192, "divergence": {"why": "x"}}\n'
    assert log.path.read_bytes() == whole + expected


@pytest.mark.parametrize(
    "line",
    [
        "oops",
        "{}",
        "[]",
        "3",
        '{"images_seen": 0}',
        '{"images_seen": 0, "what": {}}',
        '{"images_seen": 0, "divergence": 3}',
        '{"images_seen": 0, "divergence": {}}',
        '{"images_seen": "many", "divergence": {"why": "x"}}',
        '{"images_seen": 0, "divergence": {"why": "x"}, "best": {}}',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    """Only a cut last line is expected; any other is told by its number, not skipped."""
    log = _log(tmp_path, ROWS[0])
    log.path.write_text(log.path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"stats.jsonl, line 2: expected a row of a run's log"):
        log.rows()


def test_resuming_drops_later_rows_but_no_rollback(tmp_path: Path) -> None:
    """Rows at the checkpoint's count of images stay, byte for byte; later ones go."""
    late = Rollback(images_seen=999, why="", from_images_seen=1000, lr_scale=0.5)
    log = _log(tmp_path, *ROWS, late)
    before = log.path.read_text().splitlines()
    log.keep_until(64, then=[Divergence(images_seen=64, why="new")])
    *kept, last = log.path.read_text().splitlines()
    assert kept == [*before[:4], before[-1]] and "new" in last


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, number: float) -> None:
    """JSON has no NaN: nothing is written."""
    log = RunLog(tmp_path / "stats.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append(Stats(images_seen=0, images_per_second=1.0, values={"loss": number}))
    assert not log.path.exists()
