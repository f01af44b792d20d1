"""All that a GPU can tell, by one command for a rented machine, in at most 8 minutes.

    python -m benchmarks.gpu --out RESULTS
    python -m benchmarks.gpu --out RESULTS --published STYLEGAN3 --published-edm DIFF_INSTRUCT
    python -m benchmarks.gpu --out RESULTS --only suite --seconds 540    the whole test suite
    python -m benchmarks.gpu --out RESULTS --device cpu                  tiny, to try it out

Every step is a program of its own, of this folder or pytest, with its own time limit: its share of
the time that is left when it starts. At the limit it is killed with all its processes. What it
prints is written as it comes: the rows of its table to gpu.jsonl and gpu.md, everything else to
log.txt, of tests to tests.txt and suite.txt. So whatever ends the command, the rows so far are
there.

STYLEGAN3 is a checkout of the published StyleGAN3 code, DIFF_INSTRUCT one of the official
Diff-Instruct code, which contains EDM's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import click
import torch

from core.cli import report_user_errors
from core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480
_MARK = "BENCHMARK_STEP"
"""Environment variable by which the processes of a step are known."""
PARTS = ("build", "tests", "custom_ops", "generators", "round", "evaluation", "demo")
SUITE = "suite"
"""A part that runs only if it is named: all tests take longer than all else together."""
_TINY_DEMO = (
    *("training.duration_kimg=0.256", "objective.head_start_kimg=0", "training.anneal_kimg=0"),
    *("evaluation.images=1000", "evaluation.seeds=1", "evaluation.every_kimg=0"),
)


class Step(NamedTuple):
    """A program to run, and its share of the time."""

    part: str
    case: str
    words: tuple[str, ...]
    """Arguments of Python."""
    share: float
    """Seconds that it gets if no step before it spares or takes any."""


class Ending(NamedTuple):
    """How a step ended."""

    outcome: str
    seconds: float

    @property
    def is_good(self) -> bool:
        """Return whether it ran to its end without a complaint."""
        return self.outcome == "done"


class Results:
    """The files of the results, written row by row."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        for name in ("gpu.jsonl", "gpu.md"):
            (folder / name).write_text("")

    def facts(self, facts: dict[str, str]) -> None:
        """Begin the Markdown with what was measured on which machine."""
        self._append("gpu.md", "# Measured on one machine\n\n| of the machine | |\n|---|---|\n")
        for name, value in facts.items():
            self._append("gpu.md", f"| {name} | {value} |\n")
        self._record({"part": "machine", **facts})

    def heading(self, step: Step) -> None:
        """Begin the section of a step."""
        self._append("gpu.md", f"\n## {name_of(step)}\n\n    python {shlex.join(step.words)}\n\n")

    def line(self, text: str) -> None:
        """Add a line of a step's table to the Markdown."""
        self._append("gpu.md", f"{text}\n")

    def row(self, step: Step, cells: dict[str, str]) -> None:
        """Add a row of a step's table to the JSON lines; numbers become numbers."""
        values = {name: _number(cell) for name, cell in cells.items()}
        self._record({"part": step.part, "case": step.case, **values})

    def ended(self, step: Step, ending: Ending) -> None:
        """Close the section of a step."""
        self._append("gpu.md", f"\n{ending.outcome}, {ending.seconds:.1f} s\n")
        self._record(
            {
                "part": step.part,
                "case": step.case,
                "ended": ending.outcome,
                "seconds": round(ending.seconds, 1),
            }
        )

    def log_of(self, step: Step) -> TextIO:
        """Return the file for everything that a step prints, to be closed by the caller."""
        name = f"{step.part}.txt" if step.part in ("tests", SUITE) else "log.txt"
        return (self._folder / name).open("a", buffering=1)

    def _record(self, row: dict[str, object]) -> None:
        self._append("gpu.jsonl", json.dumps(row, ensure_ascii=False) + "\n")

    def _append(self, name: str, text: str) -> None:
        with (self._folder / name).open("a") as file:
            file.write(text)


class Table:
    """Finds the one Markdown table in what a program prints, line by line."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._columns: list[str] = []

    def takes(self, line: str) -> bool:
        """Return whether the line is one of the table's."""
        if not (line.startswith("|") and line.endswith("|")):
            return False
        if len(self._lines) < 2:
            self._columns = self._columns or _cells(line)
        elif len(_cells(line)) != len(self._columns):
            return False
        self._lines.append(line)
        return True

    @property
    def newest(self) -> dict[str, str] | None:
        """Return the row that was taken last; None if that was the head."""
        if len(self._lines) <= 2:
            return None
        return dict(zip(self._columns, _cells(self._lines[-1]), strict=True))


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--published", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--published-edm", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", help=f"Parts, with commas between: {', '.join(PARTS)}; or {SUITE}.")
@click.option("--seconds", type=click.FloatRange(1), default=SECONDS, show_default=True)
@click.option("--device", default="cuda", show_default=True, help="cpu: tiny, to try it out.")
@click.option("--commit", help="What is measured, where there is no git to tell.")
@report_user_errors(stopped="stopped: the rows so far are written")
def main(
    out: Path,
    published: Path | None,
    published_edm: Path | None,
    only: str | None,
    seconds: float,
    device: str,
    commit: str | None,
) -> None:
    """Run the steps, and write their rows as they come."""
    end = time.monotonic() + seconds
    parts = tuple(only.split(",")) if only else PARTS
    unknown = [part for part in parts if part not in (*PARTS, SUITE)]
    if unknown:
        raise UserError(f"no part {', '.join(unknown)}: expected {', '.join((*PARTS, SUITE))}")
    results, failed = Results(out), []
    results.facts(facts(device, commit))

    # each step gets its share of what is left
    waiting = [step for step in steps(device, published, published_edm) if step.part in parts]
    while waiting:
        left, shares = end - time.monotonic(), sum(step.share for step in waiting)
        step = waiting.pop(0)
        ending = run(step, results, limit=max(left, 0) * step.share / shares)
        if not ending.is_good:
            failed.append(f"{name_of(step)}: {ending.outcome}")
    if failed:
        raise UserError("; ".join(failed))


def run(step: Step, results: Results, *, limit: float) -> Ending:
    """Run a step for at most `limit` seconds; return how it ended."""
    started, mark = time.monotonic(), f"{_MARK}={uuid.uuid4()}"
    results.heading(step)
    click.echo(f"\n== {name_of(step)}, at most {limit:.0f} s", err=True)
    process = subprocess.Popen(
        [sys.executable, *step.words],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", _MARK: mark.partition("=")[2]},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    is_late, table = True, Table()
    try:
        with results.log_of(step) as log:
            for line in _lines(process, until=started + limit):
                if line is None:
                    is_late = False
                    break
                click.echo(line)
                log.write(f"{line}\n")
                if table.takes(line):
                    results.line(line)
                    if table.newest is not None:
                        results.row(step, table.newest)
    finally:
        _kill(process, mark)
    outcome = f"killed at its limit of {limit:.0f} s" if is_late else _ended(process.returncode)
    ending = Ending(outcome, time.monotonic() - started)
    results.ended(step, ending)
    return ending


def _lines(process: subprocess.Popen[str], *, until: float) -> Iterator[str | None]:
    """Yield the lines of a process, and None at its end; stop without it when it is late."""
    arrived: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, arrived), daemon=True).start()
    while (left := until - time.monotonic()) > 0:
        try:
            line = arrived.get(timeout=left)
        except queue.Empty:
            return
        yield line


def _read(process: subprocess.Popen[str], arrived: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        arrived.put(line.rstrip("\n"))
    process.wait()
    arrived.put(None)


def _kill(process: subprocess.Popen[str], mark: str) -> None:
    """End a process and all that it started: its group, and what left it for a group of its own,
    which still has the mark in its environment.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for environment in Path("/proc").glob("[0-9]*/environ"):  # Linux; elsewhere there is none
        with contextlib.suppress(OSError):
            if mark.encode() in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def _ended(code: int | None) -> str:
    return "done" if code == 0 else f"ended with exit code {code}"


def steps(device: str, published: Path | None, published_edm: Path | None) -> list[Step]:
    """Return the steps of all parts, in their order; on a CPU they are tiny."""
    on_cpu = device == "cpu"
    beside = ("--published", str(published.resolve())) if published else ()
    few = ("--images", "32", "--batch", "16") if on_cpu else ()
    quick = ("--runs", "1") if on_cpu else ()
    return [
        Step("build", "", _module("build", device, *beside), 75),
        Step("tests", "", _pytest(*test_files()), 45),
        Step("custom_ops", "", _module("custom_ops", device, *quick), 25),
        *_generators(device, beside),
        *_rounds(device, published_edm),
        Step("evaluation", "", _module("evaluation", device, *few), 35),
        Step("demo", "", ("-m", "benchmarks.demo", *(_TINY_DEMO if on_cpu else ())), 60),
        Step(SUITE, "", _pytest(), 480),
    ]


def _module(name: str, device: str, *words: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", "--device", device, *words)


def _generators(device: str, beside: Sequence[str]) -> Iterator[Step]:
    """Yield a step for each generator; plain PyTorch is there at 256 pixels alone."""
    if device == "cpu":
        words = ("--case", "stylegan2-32", "--batch", "1", "--runs", "1", *beside)
        yield Step("generators", "stylegan2-32", _module("generators", device, *words), 120)
        return
    lower = ("--precision", "bfloat16", "--precision", "float16")
    for case, share in {
        "stylegan2-256": 22,
        "stylegan3-t-256": 26,
        "stylegan3-r-256": 30,
        "stylegan2-1024": 20,
        "stylegan3-t-1024": 22,
    }.items():
        plain = "--reference" if case.endswith("-256") else "--no-reference"
        words = ("--case", case, "--runs", "5", plain, *lower, *beside)
        yield Step("generators", case, _module("generators", device, *words), share)


def _rounds(device: str, official: Path | None) -> Iterator[Step]:
    """Yield a step for each shape of a round; a process for each of its columns comes with it."""
    beside = ("--published", str(official.resolve())) if official else ()
    shared = "bfloat16, shared batch"
    if device == "cpu":
        shapes = {"tiny": (2, ("float32", shared), 1, 120)}
    else:
        shapes = {
            "cifar10": (128, (shared, "bfloat16", "float32"), 5, 60),
            "ffhq-64": (64, (shared,), 3, 28),
            "imagenet-64": (32, (shared,), 3, 32),
        }
    for shape, (batch, columns, rounds, share) in shapes.items():
        named = [word for column in columns for word in ("--column", column)]
        words = ("--shape", shape, "--batch", str(batch), "--rounds", str(rounds), *named, *beside)
        yield Step("round", shape, _module("step", device, *words), share)


def _pytest(*files: str) -> tuple[str, ...]:
    """Return the words that run tests, all of them by default, in as many processes as it may."""
    spread = ("-n", str(min(14, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    quiet = ("-rf", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider")
    return ("-m", "pytest", "-vv", "-p", "benchmarks._failures", *quiet, *spread, *files)


def test_files() -> list[str]:
    """Return the test files that speak of CUDA: they need a GPU, or differ if there is one."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    own = "test_gpu_benchmark.py"
    return [
        str(file.relative_to(ROOT))
        for file in files
        if file.name != own and "cuda" in file.read_text().lower()
    ]


def facts(device: str, commit: str | None) -> dict[str, str]:
    """Return what the numbers depend on: card, driver, versions, commit."""
    smi = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
    card, _, driver = _said(*smi.split()).partition("\n")[0].partition(", ")
    return {
        "card": (card or "unknown") if device != "cpu" else "none: on the CPU",
        "driver": driver or "unknown",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "Python": platform.python_version(),
        "CPU cores": str(os.cpu_count()),
        "commit": commit or _said("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown",
        "begun at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _said(*command: str) -> str:
    """Return what a program prints; nothing if there is none or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode else done.stdout.strip()


def name_of(step: Step) -> str:
    """Return the name of a step, to be read."""
    return f"{step.part}: {step.case}" if step.case else step.part


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _number(cell: str) -> object:
    try:
        return float(cell)
    except ValueError:
        return cell


if __name__ == "__main__":
    main()
