"""benchmarks/gpu.py: rows are kept whatever ends a step, and the steps are ones that can run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import demo, gpu
from benchmarks.evaluation import drawn_inception
from eval import features

_TABLE = "print('| of | ms |\\n|---|---:|\\n| first | 1.5 |', flush=True)"
_HANGS = f"{_TABLE}; import time; time.sleep(600)"


def step(program: str, *, share: float = 1.0) -> gpu.Step:
    """Return a step that runs a program."""
    return gpu.Step("demo", "", ("-c", program), share)


def rows_of(folder: Path) -> list[dict[str, object]]:
    """Return what was written to the JSON lines."""
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def test_a_step_that_hangs_is_killed_with_its_children_and_its_rows_stay(tmp_path: Path) -> None:
    """One of them, in a session of its own, would outlive it; after the limit none runs, and its
    row is kept.
    """
    start = "subprocess.Popen(['sleep', '600'], start_new_session=True)"
    program = f"{_TABLE}; import subprocess; p = {start}; print(p.pid); p.wait()"
    ending = gpu.run(step(program), gpu.Results(tmp_path), limit=2)
    assert ending.outcome == "killed at its limit of 2 s" and 2 <= ending.seconds < 10
    child = int((tmp_path / "log.txt").read_text().split()[-1])
    deadline = time.monotonic() + 10  # a signal may take a moment to arrive
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_running(child)
    row, end = rows_of(tmp_path)
    assert row == {"part": "demo", "case": "", "of": "first", "ms": 1.5}
    assert end["ended"] == ending.outcome
    assert "| first | 1.5 |" in (tmp_path / "gpu.md").read_text()


def _is_running(pid: int) -> bool:
    """Return whether a process runs: one that was killed may not have been waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_rows_are_written_when_they_are_printed(tmp_path: Path) -> None:
    """A row is in the file before its program has ended: the program itself reads it there."""
    path = tmp_path / "gpu.jsonl"
    waits = f"import pathlib, time\nwhile 'first' not in pathlib.Path({str(path)!r}).read_text():\n"
    program = f"{_TABLE}\n{waits}    time.sleep(0.05)"
    assert gpu.run(step(program), gpu.Results(tmp_path), limit=30).outcome == "done"


def test_a_step_that_fails_leaves_its_rows_and_its_last_words(tmp_path: Path) -> None:
    """The exit code is told, and what went to standard error is in the log."""
    ending = gpu.run(step(f"{_TABLE}; exit('no memory')"), gpu.Results(tmp_path), limit=30)
    assert ending.outcome == "ended with exit code 1" and not ending.is_good
    assert rows_of(tmp_path)[0]["of"] == "first"
    assert "no memory" in (tmp_path / "log.txt").read_text()


def test_the_whole_command_ends_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two steps that hang share the time; what the first, a short one, spares goes to them."""
    steps = [step("", share=8), step(_HANGS), step(_HANGS)]
    monkeypatch.setattr(gpu, "steps", lambda *_: steps)
    started = time.monotonic()
    words = ["--out", str(tmp_path), "--device", "cpu", "--seconds", "5"]
    result = CliRunner().invoke(gpu.main, words)
    assert result.exit_code == 2 and result.output.count("killed at its limit") == 2
    assert 4.9 <= time.monotonic() - started < 8
    machine, first, *rest = rows_of(tmp_path)
    assert machine["torch"] == torch.__version__ and first["ended"] == "done"
    assert [row.get("of") for row in rest] == ["first", None, "first", None]
    assert all(1.5 < row["seconds"] < 3.5 for row in (rest[1], rest[3]))  # pyright: ignore


def test_a_table_is_told_from_what_else_is_printed() -> None:
    """Lines of another width, and lines that only begin as a row does, are none of it."""
    table = gpu.Table()
    lines = ["| a | b |", "|---|---|", "| 1 | 2 |", "| 3 |", "| x | y", "note", "| 4 | 5 |"]
    assert [table.takes(line) for line in lines] == [True, True, True, False, False, False, True]
    assert table.newest == {"a": "4", "b": "5"}


def test_failures_are_named_as_they_happen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The test that fails and the one whose fixture fails have a row each, with the reason, before
    the tests after them have run.
    """
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_first(): assert 1 == 2, 'one | two'\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no card')\n"
        "def test_second(broken): pass\n"
        "def test_third(): os._exit(9)\n"
    )
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)  # a process is to die
    words = [*gpu._pytest(str(tmp_path)), f"--rootdir={tmp_path}"]
    monkeypatch.undo()
    ran = subprocess.run([sys.executable, *words], cwd=gpu.ROOT, capture_output=True, text=True)
    assert ran.returncode == 9, ran.stdout + ran.stderr
    table = gpu.Table()
    found = [table.newest for line in ran.stdout.splitlines() if table.takes(line) and table.newest]
    first, second = found
    assert first["test"].endswith("test_first") and first["outcome"] == "failed in call"
    assert "one / two" in first["reason"]
    assert second["outcome"] == "failed in setup" and "no card" in second["reason"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_step_is_a_command_that_takes_its_words(device: str, tmp_path: Path) -> None:
    """Options, cases, columns and shapes are ones that the programs know."""
    steps = gpu.steps(device, tmp_path, tmp_path)
    assert {step.part for step in steps} == {*gpu.PARTS, gpu.SUITE}
    for _, module, *words in (step.words for step in steps):
        if module != "pytest":
            importlib.import_module(module).main.make_context(module, list(words))
    assert sum(step.share for step in steps if step.part != gpu.SUITE) <= gpu.SECONDS


def test_tests_that_need_a_gpu_are_among_the_files() -> None:
    """Those of the CUDA kernels are; this one, which only speaks of them, is not."""
    names = [Path(file).name for file in gpu.test_files()]
    assert "test_custom_ops_cuda.py" in names and Path(__file__).name not in names
    assert all((gpu.ROOT / file).is_file() for file in gpu.test_files())


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    """Before anything is measured or written."""
    result = CliRunner().invoke(gpu.main, ["--out", str(tmp_path / "out"), "--only", "demo,tets"])
    assert result.exit_code == 2 and "no part tets" in result.output
    assert not (tmp_path / "out").exists()


def test_a_report_of_the_demo_gives_its_rows() -> None:
    """Seconds of each part, the speed of training, and each metric twice."""
    before, after = {"mean": 11.4, "std": 0.0}, {"mean": 6.55, "std": 0.26}
    report = {"durations_seconds": {"training": 30.0}, "timed_images": 24000}
    rows = list(demo.rows({**report, "before": {"fid": before}, "after": {"fid": after}}))
    assert rows == [
        "| training, s | 30.0 |",
        "| images/s while training | 800 |",
        "| fid before | 11.4 +- 0 |",
        "| fid after | 6.55 +- 0.26 |",
    ]


def test_drawn_inception_tells_images_apart(tmp_path: Path) -> None:
    """Activations neither vanish nor overflow on their way through 94 convolutions."""
    torch.manual_seed(0)
    extractor = features.load(f"inception:{drawn_inception(tmp_path)}")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    first, second = extractor(images)
    assert 1e-3 < first.std() < 1e3 and (first - second).abs().max() > 1e-2 * first.std()
