"""`python refine.py --list`: what it says of runs that ended, go on, stopped or cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli_runs import call, contents, tiny_recipe
from core import config
from core.errors import UserError
from core.run_folder import RunFolder
from core.run_log import Divergence, EarlyStop, Evaluation, Row, Session, Stats
from refinement import runs_table
from refinement.recipe import read_recipe


def run(outdir: Path, *rows: Row, saved: int = 0, report: bool = False) -> RunFolder:
    """Return a run of 80 images that left these rows and a checkpoint."""
    folder = RunFolder.create(outdir, "tiny")
    recipe = read_recipe(tiny_recipe(outdir))
    folder.recipe.write_text(config.to_yaml(recipe), encoding="utf-8")
    for row in rows:
        folder.log.append(row)
    if saved:
        (folder.checkpoints / f"{saved:012d}.pt").touch()
    if report:
        (folder.report / "report.json").touch()
    return folder


def line_of(folder: RunFolder) -> str:
    """Return what the table says of a run, its columns parted by |."""
    _, *lines = runs_table.table(folder.path.parent).splitlines()
    (line,) = (line for line in lines if line.startswith(folder.path.name))
    return " | ".join(part.strip() for part in line.split("  ") if part.strip())


BEFORE = Evaluation(images_seen=0, when="before", metrics={"fid": (4.0, 5.0)})
CURVE = [
    Evaluation(images_seen=n, when="training", metrics={"fid": (v,)})
    for n, v in ((0, 5.0), (32, 2.0), (64, 3.0))
]


def test_the_command_shows_runs_in_columns_and_changes_nothing(tmp_path: Path) -> None:
    """A finished run stands with its mode, images, metric before and after, and when it ended."""
    outdir = tmp_path / "runs"
    assert call("--gan", tiny_recipe(tmp_path), "--outdir", outdir).code == 0
    before = contents(outdir)
    outcome = call("--list", "--outdir", outdir)
    assert outcome.code == 0 and contents(outdir) == before
    heading, line = outcome.stdout.splitlines()
    assert heading.split("  ")[0] == "run" and "last written" in heading
    assert line.startswith("00000-tiny  gan   finished  80      fid ")
    assert heading.index("metric") == line.index("fid") and " -> " in line


def test_a_stopped_run_shows_where_it_is_saved_and_its_best(tmp_path: Path) -> None:
    """Of what was read off after the checkpoint, only the measurements count."""
    folder = run(tmp_path, BEFORE, *CURVE, saved=48)
    assert line_of(folder).startswith(
        "00000-tiny | gan | stopped at 48 of 80 | 48 | fid 4.5 -> best 2 at 32 | 20"
    )


def test_a_running_one_is_told_by_its_lock(tmp_path: Path) -> None:
    """While a process holds it; a lock that a killed process left is none."""
    folder = run(tmp_path, BEFORE, *CURVE, saved=48)
    with folder.exclusive():
        assert f"running, 80% of 80 (process {os.getpid()} on " in line_of(folder)
        assert " | 64 | " in line_of(folder)
    (folder.path / ".lock").write_text("process 1 on earth\n")
    assert "stopped at 48 of 80" in line_of(folder)


def test_looking_keeps_a_run_free(tmp_path: Path) -> None:
    """A run can be begun while another process looks at it."""
    folder = run(tmp_path)
    assert folder.holder() is None
    with folder.exclusive():
        assert folder.holder() is not None
    with folder.exclusive():
        pass


def test_ends_are_told_apart(tmp_path: Path) -> None:
    """Finished, trained without a report, ended early, diverged, and gone on after that."""
    after = Evaluation(images_seen=80, when="after", metrics={"fid": (1.0,)})
    diverged = Divergence(images_seen=56, why="nan")
    session = Session(images_seen=48, started_at="", finished_at="", seconds={}, images=0)
    early = EarlyStop(images_seen=48, metric="fid", value=1.0, at_images_seen=32)
    going_on = Stats(images_seen=64, images_per_second=1.0, values={})
    runs = {
        "finished | 80 | fid 4.5 -> 1": run(tmp_path, BEFORE, after, saved=80, report=True),
        "trained, no report yet | 80 | fid 4.5 |": run(tmp_path, BEFORE, saved=80),
        "finished early, at 48 of 80": run(tmp_path, early, saved=48, report=True),
        "diverged after 56, saved at 48 of 80": run(tmp_path, diverged, session, saved=48),
        "stopped at 48 of 80 | 48 | not measured": run(tmp_path, diverged, going_on, saved=48),
    }
    for expected, folder in runs.items():
        assert f"| {expected}" in line_of(folder)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("recipe.yaml", "student: [", "recipe.yaml"),
        ("recipe.yaml", "name: x\nstuden: {}", "studen"),
        ("stats.jsonl", "{}\n", "line 1: expected a row"),
        ("stats.jsonl", "what\n{}\n", "line 1: expected a row"),
        ("stats.jsonl", '{"images_seen": 0, "measured": 3}\n', ""),
    ],
)
def test_an_unreadable_run_is_named_with_the_reason(
    tmp_path: Path, file: str, content: str, reason: str
) -> None:
    """One line of the table, and the other runs stand in it as ever."""
    broken, whole = run(tmp_path), run(tmp_path)
    (broken.path / file).write_text(content)
    assert line_of(broken).startswith("00000-tiny | unreadable | ")
    assert reason in line_of(broken)
    assert "stopped at 0 of 80" in line_of(whole)
    assert len(runs_table.table(tmp_path).splitlines()[2]) < 100


def test_where_there_are_no_runs_it_says_so(tmp_path: Path) -> None:
    """An empty folder is no error; a folder that is not there is."""
    assert runs_table.table(tmp_path) == f"{tmp_path}: no runs"
    with pytest.raises(UserError, match="no such folder"):
        runs_table.table(tmp_path / "nowhere")
