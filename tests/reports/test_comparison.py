"""Several runs beside each other: the values, what differs, and whether they may be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from core.errors import UserError
from eval.metrics.registry import MetricResult
from eval.samples import Pairs
from reports import compare, data, write
from reports.__main__ import main
from reports.compare import Comparison
from reports.data import (
    Curve,
    CurvePoint,
    ExtractorName,
    File,
    ReferenceName,
    Report,
)
from tiny_reports import REPORT

FIRST = replace(
    REPORT,
    name="mnist32",
    before={"fid": MetricResult.of([24.2, 24.0]), "recall": MetricResult.of([0.4, 0.41])},
    after={"fid": MetricResult.of([15.3, 15.1]), "recall": MetricResult.of([0.3, 0.31])},
    first_seed=0,
    real_halves=None,
    drift=None,
    nearness=None,
    sampler=None,
    pair_seeds=(),
    recipe={"name": "a", "training": {"seed": 0, "student_lr": 1e-3}, "objective": {"name": "x"}},
)
SECOND = replace(
    FIRST,
    after={"fid": MetricResult.of([12.3, 12.1]), "recall": MetricResult.of([0.2, 0.21])},
    curve=Curve("fid", (CurvePoint(0, 24.5), CurvePoint(100_000, 12.5)), 5_000),
    recipe={"name": "b", "training": {"seed": 1, "student_lr": 1e-3}, "objective": {"size": None}},
)


class _Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _runs(folder: Path, reports: Sequence[Report]) -> list[Path]:
    """Write each report as that of a run; return the runs' folders."""
    folders = [folder / f"{index:05d}-mnist32" for index in range(len(reports))]
    for path, report in zip(folders, reports, strict=True):
        write.write(path / "report", report)
    return folders


def _compared(*reports: Report) -> Comparison:
    paths = [Path(f"runs/{index:05d}/report/report.json") for index in range(len(reports))]
    return compare.compare(reports, paths, beside=Path("comparison.html"))


def test_the_values_of_each_run_stand_under_their_metric() -> None:
    """Before, after, change and the teacher's; the best is marked, whichever way that is."""
    compared = _compared(FIRST, SECOND)
    first, second = compare.lines(compared, "fid")
    assert first.cells == ("24.1 ± 0.1", "15.2 ± 0.1", "-37 %", "7.00")
    assert second.cells[1:] == ("12.2 ± 0.1", "-49 %", "7.00")
    assert (first.is_best, second.is_best) == (False, True)
    assert [line.is_best for line in compare.lines(compared, "recall")] == [True, False]


def test_a_metric_that_one_run_lacks_stays_empty() -> None:
    """And the other's is not the best of anything."""
    fid_alone = replace(SECOND, before={"fid": FIRST.before["fid"]})
    first, second = compare.lines(_compared(FIRST, fid_alone), "recall")
    assert second.cells == ("", "", "", "") and not first.is_best


def test_only_settings_that_differ_are_shown() -> None:
    """By their key paths; a key that a recipe lacks is a dash; the runs' names are not settings."""
    assert _compared(FIRST, SECOND).settings == {
        "training.seed": ("0", "1"),
        "objective.name": ("x", "-"),
        "objective.size": ("-", "null"),
    }
    other = replace(FIRST, environment=replace(FIRST.environment, git_commit="e" * 40))
    assert _compared(FIRST, other).facts == {"commit": ("c" * 12, "e" * 12)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"extractor": ExtractorName("inception", "f" * 64)},
            "different extractors, so no two values can be compared: mnist32 in 00000, inception",
        ),
        ({"reference": ReferenceName("other.zip", "f" * 64, 9)}, "different references"),
        ({"images": 5000}, "different numbers of images, which alone changes a FID: 10,000 in"),
        ({"recipe": {"evaluation": {"definitions": {"neighbors": 5}}}}, "different definitions"),
        ({"student": File("other.pkl", "f" * 64)}, "began from different students"),
        ({"after": {"fid": MetricResult.of([1.0])}}, "One set of images in 00001"),
        ({"before": {}, "after": {}}, "Nothing was measured in 00001"),
    ],
)
def test_what_may_not_be_compared_is_said(change: dict[str, object], message: str) -> None:
    """In a sentence that names the runs, and then no value is called the best."""
    compared = _compared(FIRST, replace(SECOND, **change))
    assert any(message in warning for warning in compared.warnings)
    assert not any(line.is_best for line in compare.lines(compared, "fid"))
    assert _compared(FIRST, SECOND).warnings == ()


def test_the_page_shows_both_runs(tmp_path: Path) -> None:
    """Values, a curve for each run in one drawing, what differs; links that lead to the reports."""
    folders = _runs(tmp_path / "my runs", [FIRST, SECOND])
    result = CliRunner().invoke(main, [*map(str, folders), "--out", str(tmp_path / "c.html")])
    assert result.exit_code == 0, result.output
    page = _Tags((tmp_path / "c.html").read_text())
    for said in ("15.2 ± 0.1", "12.2 ± 0.1", "training.seed", "FID of 5,000 images", "Recall"):
        assert said in page.text
    links = [link["href"] for link in page.of("a")]
    assert (
        links
        == [f"my%20runs/{name}/report/report.html" for name in ("00000-mnist32", "00001-mnist32")]
        * 2
    )
    curves = [line for line in page.of("polyline") if len(line["points"].split()) == 2]
    assert {line["class"] for line in curves} == {"c0", "c1"}
    assert "12.2 ± 0.1" in result.stdout and "00001-mnist32 *" in result.stdout


def test_the_page_needs_nobody_and_names_cannot_break_it(tmp_path: Path) -> None:
    """No address, no script but its own, whatever stands in a recipe."""
    evil = "<script src='http://x'>alert(1)</script>"
    reports = [FIRST, replace(SECOND, recipe={evil: evil}, teacher=File(evil, None))]
    paths = [folder / "report" / "report.json" for folder in _runs(tmp_path, reports)]
    write.write_comparison(
        tmp_path / "c.html", compare.compare(reports, paths, beside=tmp_path / "c.html")
    )
    page = _Tags((tmp_path / "c.html").read_text())
    assert page.of("script") == [{}] and evil in page.text
    assert not any("://" in str(value) for _, found in page.tags for value in found.values())


def test_one_run_is_told_in_the_terminal(tmp_path: Path) -> None:
    """Its table and warnings; a page of its own it has already."""
    (folder,) = _runs(tmp_path, [FIRST])
    for named in (folder, folder / "report", folder / "report" / "report.json"):
        result = CliRunner().invoke(main, [str(named)])
        assert result.exit_code == 0 and "24.1 ± 0.1  15.2 ± 0.1   -37 %" in result.stdout
    result = CliRunner().invoke(main, [str(folder), "--out", str(tmp_path / "c.html")])
    assert result.exit_code == 2 and "has a page already" in result.stderr


def test_runs_are_told_apart_by_as_much_of_their_path_as_that_takes() -> None:
    """The same run twice is refused."""
    paths = [Path(f"/w/{place}/00000-x/report/report.json") for place in ("a", "b")]
    compared = compare.compare([FIRST, SECOND], paths, beside=Path("/w/c.html"))
    assert [run.name for run in compared.runs] == ["a/00000-x", "b/00000-x"]
    with pytest.raises(UserError, match="00000-x is given twice"):
        compare.compare([FIRST, FIRST], [paths[0]] * 2, beside=Path("/w/c.html"))


def test_a_run_without_a_report_is_named(tmp_path: Path) -> None:
    """A folder that is none, and one whose run has not ended."""
    result = CliRunner().invoke(main, [str(tmp_path / "no")])
    assert result.exit_code == 2 and "there is no" in result.stderr
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 2 and "the run has no report yet" in result.stderr


def test_samples_of_different_teachers_are_different_references() -> None:
    """They have no hash; what they were made by tells them apart."""
    samples = ReferenceName("the teacher's own samples", "", 10_000)
    first = replace(FIRST, reference=samples, recipe={"teacher": {"config": {"seed": 1}}})
    same, other = first, replace(first, recipe={"teacher": {"config": {"seed": 7}}})
    assert not any("references" in warning for warning in _compared(first, same).warnings)
    assert any("different references" in warning for warning in _compared(first, other).warnings)


# Pictures


def _with_pictures(folder: Path, seeds: Sequence[Sequence[int]]) -> tuple[list[Path], list[Pairs]]:
    """Write runs with reports and pictures of these seeds; return their paths and pictures."""
    paths, all_pairs = [], []
    for number, own in enumerate(seeds):
        generator = torch.Generator().manual_seed(number)
        before, after = torch.randint(
            0, 256, (2, len(own), 3, 8, 8), dtype=torch.uint8, generator=generator
        )
        pairs = Pairs(tuple(own), before, after, None)
        report = replace(REPORT, pair_seeds=tuple(own))
        path = folder / f"0000{number}-run" / "report"
        path.mkdir(parents=True)
        write.write(path, report, pairs)
        paths.append(path / "report.json")
        all_pairs.append(pairs)
    return paths, all_pairs


def test_runs_are_shown_by_images_of_the_same_seeds(tmp_path: Path) -> None:
    """The common seeds; the student once, then each run after, pixel for pixel."""
    paths, pairs = _with_pictures(tmp_path, [(5, 7, 9), (9, 1, 5)])
    reports = [data.read(path) for path in paths]
    compared = compare.compare(reports, paths, beside=tmp_path / "c.html")
    seeds, rows = compare.pictures(compared)
    assert seeds == (5, 9)
    assert [row.name for row in rows] == ["before: student.safetensors", "00000-run", "00001-run"]
    assert torch.equal(rows[0].images, pairs[0].before[[0, 2]])
    assert torch.equal(rows[1].images, pairs[0].after[[0, 2]])
    assert torch.equal(rows[2].images, pairs[1].after[[2, 0]])
    write.write_comparison(tmp_path / "c.html", compared)
    page = (tmp_path / "c.html").read_text()
    assert "Images of the same seeds" in page and page.count("data:image/png") == 6


def test_runs_without_pictures_are_compared_all_the_same(tmp_path: Path) -> None:
    """A missing or a damaged picture leaves the section out."""
    paths, _ = _with_pictures(tmp_path, [(5, 7), (5, 7)])
    paths[0].with_name(compare.STRIP).write_bytes(b"no picture")
    reports = [data.read(path) for path in paths]
    compared = compare.compare(reports, paths, beside=tmp_path / "c.html")
    assert compare.pictures(compared) == ((), [])
    write.write_comparison(tmp_path / "c.html", compared)
    assert "Images of the same seeds" not in (tmp_path / "c.html").read_text()
