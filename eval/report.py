"""The report of a run: what was measured before and after, on what, by which versions.

    report.json   everything, for programs; `read` gives it back
    report.md     the headline, the table, the warnings, the pictures
    report.png    pairs of images from the same latents, before above after
    curve.png     the Fréchet distance over images seen

A report takes plain data and measures nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError

from core.errors import UserError
from core.run_folder import atomic_write
from eval.features import Extractor
from eval.metrics import MetricResult
from eval.pictures import curve_picture, pairs_picture
from eval.reference import Reference
from eval.samples import Pairs

SCHEMA_VERSION = 1
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class File:
    """A file that went into a run."""

    path: str
    sha256: str | None


@dataclass(frozen=True)
class ReferenceName:
    """Which real images were compared with."""

    name: str
    sha256: str
    images: int | None

    @classmethod
    def of(cls, reference: Reference) -> ReferenceName:
        """Return the name of a reference."""
        return cls(reference.source, reference.sha256, reference.images)


@dataclass(frozen=True)
class ExtractorName:
    """Which features were compared."""

    name: str
    sha256: str

    @classmethod
    def of(cls, extractor: Extractor) -> ExtractorName:
        """Return the name of an extractor."""
        return cls(extractor.name, extractor.sha256)


@dataclass(frozen=True)
class Environment:
    """What ran: versions, code and hardware."""

    versions: Mapping[str, str]
    git_commit: str | None
    """None outside a git checkout."""
    git_dirty: bool | None
    """Whether the checkout differed from its commit."""
    hardware: str
    """Processor or accelerator, in words."""

    @classmethod
    def here(cls, device: torch.device | str = "cpu") -> Environment:
        """Return the environment of this process."""
        commit = _git("rev-parse", "HEAD")
        status = _git("status", "--porcelain", "--untracked-files=no")
        return cls(_versions(), commit, None if status is None else bool(status), _hardware(device))


@dataclass(frozen=True)
class SampleScore:
    """How far images that no student made are from the reference."""

    fid: float
    images: int | None
    """Of how many; None where their file does not say."""


class CurvePoint(NamedTuple):
    """One measurement while training."""

    images_seen: int
    fid: float


@dataclass(frozen=True)
class Curve:
    """The Fréchet distance over images seen, and lines to compare it with."""

    points: tuple[CurvePoint, ...] = ()
    images: int | None = None
    """Generated images of each point."""
    floor_fid: float | None = None
    """Of real images against other real images, where known."""


@dataclass(frozen=True)
class Report:
    """All that a run's report says, apart from the pictures of pairs."""

    name: str
    before: Mapping[str, MetricResult]
    """Metric name -> result, such as fid."""
    after: Mapping[str, MetricResult]
    """The same metrics on the same seeds."""
    images: int
    """Generated images for each value of a metric."""
    first_seed: int
    """Value k is of the images first_seed + k * images and following."""
    reference: ReferenceName | None
    extractor: ExtractorName | None
    """None where nothing was measured."""
    environment: Environment
    kernel_backend: str
    """native or reference: which custom operations ran."""
    student: File
    teacher: File
    images_seen: int
    """Student images made in training."""
    started_at: str
    """ISO 8601, with the offset from UTC."""
    finished_at: str
    durations_seconds: Mapping[str, float]
    """Part of the run -> seconds."""
    curve: Curve = field(default_factory=Curve)
    teacher_samples: SampleScore | None = None
    """Of the teacher's own samples, where they were measured."""
    teacher_sees: str | None = None
    """Size of the images that the teacher saw, where the student's are others."""
    pair_seeds: tuple[int, ...] = ()
    """Seeds of the picture's pairs."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """The resolved recipe."""
    truncation: float = 1.0
    noise_mode: str = "const"

    @property
    def seeds(self) -> list[tuple[int, int]]:
        """Return for each value its first seed and the one after its last."""
        count = max((len(result.values) for result in self.after.values()), default=0)
        starts = [self.first_seed + index * self.images for index in range(count)]
        return [(start, start + self.images) for start in starts]


def write(folder: str | Path, report: Report, pairs: Pairs | None = None) -> Path:
    """Write report.json, report.md and the pictures; return the path of report.md."""
    folder = Path(folder)
    if pairs is not None:
        _write(folder / "report.png", pairs_picture(pairs))
    if len(report.curve.points) > 1:
        _write(folder / "curve.png", _curve_png(report))
    text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    _write(folder / "report.json", text.encode())
    pictures = [name for name in ("report.png", "curve.png") if (folder / name).exists()]
    _write(folder / "report.md", markdown(report, pictures=pictures).encode())
    return folder / "report.md"


def to_json(report: Report) -> dict[str, object]:
    """Return the report as plain JSON data."""
    document = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(report)}
    document["seeds"] = [list(seeds) for seeds in report.seeds]
    document["curve"]["points"] = [list(point) for point in report.curve.points]
    for when in ("before", "after"):
        document[when] = {
            name: {"mean": result.mean, "std": result.std, "values": list(result.values)}
            for name, result in getattr(report, when).items()
        }
    return document


def read(path: str | Path) -> Report:
    """Return the report of a report.json."""
    try:
        document = json.loads(Path(path).read_text())
        version = document.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}; this program reads {SCHEMA_VERSION}"
            )
        del document["seeds"]
        for when in ("before", "after"):
            for result in document[when].values():
                del result["mean"], result["std"]
        return TypeAdapter(Report).validate_python(document)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: the run has no report yet") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UserError(f"{path} is not a report of this program: {error}") from error


def headline(report: Report) -> str:
    """Return the result in one line, such as "FID 24.1 ± 0.2 → 15.3 ± 0.1 (-36 %)"."""
    lines = [
        f"{metric_title(name, report.extractor)} {_shown(report.before[name])} → "
        f"{_shown(after)} ({_change(report.before[name], after)})"
        for name, after in report.after.items()
    ]
    return "; ".join(lines) or "nothing was measured"


def summary(report: Report) -> str:
    """Return a small before/after table for the terminal."""
    rows = [("", "before", "after", "change"), *_rows(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    teacher = [f"the teacher's own samples: {_score(report)}"] if report.teacher_samples else []
    return "\n".join([*lines, *teacher, *(f"! {warning}" for warning in warnings(report))])


def warnings(report: Report) -> list[str]:
    """Return what a reader must know before believing the numbers, one sentence each."""
    found = []
    if report.extractor is None:
        found.append("The recipe names no reference (evaluation.reference): nothing was measured.")
    elif report.extractor.name != "inception":
        found.append(
            f"Distances are between features of `{report.extractor.name}`, not Inception: "
            "not comparable with published (Inception) FIDs."
        )
    for name, after in report.after.items():
        found += _spread_warning(metric_title(name, report.extractor), report.before[name], after)
    if report.teacher_samples and report.teacher_samples.fid > report.before["fid"].mean:
        found.append(
            f"The teacher's own samples ({_score(report)}) are worse than the student was before: "
            "there is little to learn from it."
        )
    if report.teacher_sees:
        found.append(
            f"The teacher saw the student's images shrunk to {report.teacher_sees}: it can improve "
            "what is still visible there, such as shapes and colours, and says nothing of finer "
            "detail."
        )
    if report.after and report.images < 10_000:
        found.append(
            f"Each value is of {report.images:,} images: a Fréchet distance of so few is too high; "
            "compare it only with values of as many."
        )
    if report.environment.git_dirty:
        found.append("The checkout had changes that are in no commit.")
    return found


def markdown(report: Report, *, pictures: list[str]) -> str:
    """Return report.md; pictures: file names beside it."""
    captions = {
        "report.png": "Pairs from the same latents, before above after",
        "curve.png": "Distance to real images while training",
    }
    parts = [f"# {report.name}", f"**{headline(report)}**", _markdown_table(report)]
    parts += ["\n".join(f"> **Note.** {warning}  " for warning in warnings(report))]
    parts += [f"![{captions[name]}]({name})\n\n*{captions[name]}.*" for name in pictures]
    parts += ["## What was measured", _facts(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def metric_title(metric: str, extractor: ExtractorName | None) -> str:
    """Return a metric's name for a reader, with the extractor's where it is not the usual one."""
    title = metric.upper() if len(metric) <= 3 else metric.replace("_", " ")
    usual = extractor is None or extractor.name == "inception"
    return title if usual else f"{title} ({extractor.name} features)"


# Text and picture


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def _curve_png(report: Report) -> bytes:
    curve = report.curve
    metric = metric_title("fid", report.extractor)
    return curve_picture(
        curve.points,
        metric=metric,
        title=f"{metric} of {curve.images:,} images" if curve.images else metric,
        levels={
            "teacher": report.teacher_samples and report.teacher_samples.fid,
            "real images": curve.floor_fid,
        },
    )


def _rows(report: Report) -> list[tuple[str, str, str, str]]:
    return [
        (
            metric_title(name, report.extractor),
            _shown(report.before[name]),
            _shown(after),
            _change(report.before[name], after),
        )
        for name, after in report.after.items()
    ]


def _markdown_table(report: Report) -> str:
    lines = ["| metric | before | after | change |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(report)]
    count = len(report.seeds)
    text = f"Mean ± standard deviation over {count} sets of {report.images:,} images"
    if count == 1:
        text = f"One set of {report.images:,} images"
    return (
        "\n".join(lines) + f"\n\n{text}; before and after on the same seeds."
        if report.after
        else ""
    )


def _spread_warning(title: str, before: MetricResult, after: MetricResult) -> list[str]:
    if len(after.values) < 2:
        return [f"{title} was measured on one set of images: its spread is not known."]
    spread = before.std + after.std
    if abs(after.mean - before.mean) < spread:
        return [
            f"{title} changed by {_number(abs(after.mean - before.mean))}, "
            f"less than the spread over seeds ({_number(spread)}): no change was shown."
        ]
    return []


def _facts(report: Report) -> str:
    environment, reference = report.environment, report.reference
    compared = "nothing"
    if reference is not None:
        count = "an unknown number of" if reference.images is None else f"{reference.images:,}"
        compared = f"{count} images of `{reference.name}` ({_short(reference.sha256)})"
    dirty = ", with changes" if environment.git_dirty else ""
    facts = {
        "features": _named(report.extractor),
        "compared with": compared,
        "seeds": ", ".join(f"{start} to {stop - 1}" for start, stop in report.seeds) or "none",
        "truncation, noise": f"{report.truncation:g}, {report.noise_mode}",
        "student": f"`{report.student.path}` ({_short(report.student.sha256)})",
        "teacher": f"`{report.teacher.path}` ({_short(report.teacher.sha256)})",
        "teacher's own samples": _score(report),
        "images seen in training": f"{report.images_seen:,}",
        "started, finished": f"{report.started_at}, {report.finished_at}",
        "time": ", ".join(f"{k} {_duration(v)}" for k, v in report.durations_seconds.items()),
        "kernels": report.kernel_backend,
        "hardware": environment.hardware,
        "versions": ", ".join(f"{k} {v}" for k, v in environment.versions.items()),
        "commit": f"{(environment.git_commit or 'unknown')[:12]}{dirty}",
    }
    lines = [f"| {name} | {value or 'unknown'} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _score(report: Report) -> str:
    """Return what the teacher's own samples are worth, in words."""
    score = report.teacher_samples
    if score is None:
        return "not measured"
    count = "an unknown number of" if score.images is None else f"{score.images:,}"
    return f"{metric_title('fid', report.extractor)} {_number(score.fid)} of {count} images"


def _shown(result: MetricResult) -> str:
    """Return "24.1 ± 0.2": one decimal, or two where the mean or its spread is small."""
    if len(result.values) < 2:
        return _number(result.mean)
    decimals = 1 if result.mean >= 10 and result.std >= 0.1 else 2
    return f"{result.mean:.{decimals}f} ± {result.std:.{decimals}f}"


def _change(before: MetricResult, after: MetricResult) -> str:
    return f"{after.mean / before.mean - 1:+.0%}".replace("%", " %") if before.mean else "n/a"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _named(extractor: ExtractorName | None) -> str:
    return f"`{extractor.name}` ({_short(extractor.sha256)})" if extractor else "none"


def _short(sha256: str | None) -> str:
    return f"sha256 {sha256[:12]}" if sha256 else "hash unknown"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# The environment


def _versions() -> dict[str, str]:
    ours = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    return {
        ours["name"]: ours["version"],
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build, such as +cu128
        **{name: metadata.version(name) for name in ("torch-fidelity", "numpy")},
    }


def _git(*arguments: str) -> str | None:
    """Return what git prints about this checkout, or None where it cannot say."""
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _hardware(device: torch.device | str) -> str:
    device = torch.device(device)
    cores = f"{os.cpu_count()} CPU cores ({_processor()})"
    if device.type == "cuda":
        count = torch.cuda.device_count()
        return f"{count} x {torch.cuda.get_device_name(device)}, {cores}"
    return cores


def _processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())
