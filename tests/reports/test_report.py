"""Reports: the fields for programs, the sentences for readers, the pictures."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from eval.metrics.registry import MetricResult
from eval.nearest import Drift
from eval.samples import Neighbors, Pairs
from reports import data as reports
from reports import figures, text, write
from reports.data import (
    Curve,
    CurvePoint,
    Environment,
    ExtractorName,
    File,
    Report,
    SampleScore,
)
from tiny_reports import REPORT


def _pairs(count: int, labels: tuple[int, ...] | None, size: int = 8) -> Pairs:
    black = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    return Pairs(tuple(range(count)), black, black + 255, labels)


def test_the_teacher_s_own_samples_have_their_column() -> None:
    """Summary, page and table of facts say what they are worth, and a weak teacher is named."""
    assert text.columns(REPORT)[-1] == "teacher"
    assert text.rows(REPORT)[0].teacher == "7.00"
    said = "| teacher's own samples | FID 7.00 of 10,000 images |"
    assert said in write.markdown(REPORT, pictures=[])
    assert not any("little to learn" in warning for warning in text.warnings(REPORT))
    weak = replace(REPORT, teacher_samples=SampleScore({"fid": 24.5}, 1000))
    (warning,) = [line for line in text.warnings(weak) if "little to learn" in line]
    assert "FID 24.5" in warning
    unknown = replace(REPORT, teacher_samples=None)
    assert "| teacher's own samples | not measured |" in write.markdown(unknown, pictures=[])
    assert "teacher" not in text.summary(unknown)


MANY = replace(
    REPORT,
    before=REPORT.before
    | {"recall": MetricResult.of([0.40, 0.41]), "kid": MetricResult.of([0.002, 0.003])},
    after=REPORT.after
    | {"recall": MetricResult.of([0.30, 0.31]), "kid": MetricResult.of([0.001, 0.001])},
)


def test_a_metric_is_shown_in_its_unit_and_says_which_way_is_better() -> None:
    """KID is shown in thousandths, shares in per cent; arrows point where better is."""
    _, recall, kid = text.rows(MANY)
    assert recall[:4] == ("Recall, % ↑", "40.5 ± 0.7", "30.5 ± 0.7", "-25 %")
    assert kid[:3] == ("KID, 10⁻³ ↓", "2.50 ± 0.71", "1.00 ± 0.00")


def test_a_recall_that_fell_while_the_distance_improved_is_named() -> None:
    """Mode loss: better images of fewer kinds."""
    assert any("mode loss" in warning for warning in text.warnings(MANY))
    worse = replace(MANY, after=MANY.after | {"fid": MetricResult.of([30.0, 30.1])})
    assert not any("mode loss" in warning for warning in text.warnings(worse))


def test_a_run_that_made_the_student_worse_says_so_first() -> None:
    """Beyond the spread: the first sentence, with what to try; within it there is none."""
    before, spread = MetricResult.of([13.0, 13.2]), MetricResult.of([13.0, 13.4])
    worse = replace(REPORT, before={"fid": before}, after={"fid": MetricResult.of([190.0, 192.0])})
    first = text.warnings(worse)[0]
    assert (
        first.startswith("FID rose from 13.1 ± 0.1 to 191 ± 1: ") and "keep the original" in first
    )
    assert "a smaller training.student_lr" in first
    same = replace(REPORT, before={"fid": before}, after={"fid": spread})
    assert not any("keep the original" in warning for warning in text.warnings(same))


def test_mode_loss_is_not_said_of_what_began_as_noise() -> None:
    """A student without a file had nothing to lose."""
    drawn = replace(MANY, student=File("freshly drawn edm", None))
    assert not any("mode loss" in warning for warning in text.warnings(drawn))


def test_refined_weights_of_an_earlier_time_are_told_with_both_values() -> None:
    last = {"fid": MetricResult.of([18.4, 18.6])}
    report = replace(REPORT, last=last, exported_images_seen=4000, images_seen=9000)
    told = " ".join(text.warnings(report))
    assert "The refined weights are those after 4,000 images" in told
    assert "The last ones, after 9,000 images, have FID 18.5 ± " in told


def test_what_stayed_and_what_was_copied_is_said() -> None:
    """How far images moved, how many still know their latent, how near they come to real ones."""
    remarks = text.remarks(REPORT)
    assert "moved by 25 % of the distance between two latents' images" in remarks["What stayed"]
    assert "98 % of the images after" in remarks["What stayed"]
    assert "2.0 % are as near to a real image" in remarks["Copies"]
    assert "within 1.20 times the median distance" in remarks["Copies"]
    assert text.remarks(replace(REPORT, drift=None, nearness=None)) == {}


def test_json_has_every_field(tmp_path: Path) -> None:
    """report.json gives each metric as mean, std and values, and says what was measured on what."""
    write.write(tmp_path / "report", REPORT)
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    assert document["schema_version"] == 3
    assert document["before"]["fid"]["values"] == [24.2, 24.1, 23.8]
    assert document["after"]["fid"]["mean"] == pytest.approx(15.3)
    assert document["after"]["fid"]["std"] == pytest.approx(0.1)
    assert document["seeds"] == [[50, 10_050], [10_050, 20_050], [20_050, 30_050]]
    assert document["reference"] == {"name": "digits.zip", "sha256": "a" * 64, "images": 8000}
    assert document["extractor"] == {"name": "mnist32", "sha256": "b" * 64}
    assert document["teacher_samples"] == {"metrics": {"fid": 7.0}, "images": 10_000}
    assert document["metrics"]["fid"] == {"title": "Fréchet Inception Distance", "better": "lower"}
    assert document["nearness"]["nearest"][1] == {"image": 3, "real": 30, "distance": 0.6}
    assert document["curve"]["points"] == [[0, 24.5], [200_000, 15.9]]
    assert document["environment"]["git_commit"] == "c" * 40
    assert (document["truncation"], document["noise_mode"]) == (1.0, "const")
    assert document["recipe"] == {"training": {"seed": 0}}


def test_a_report_is_read_back(tmp_path: Path) -> None:
    """What report.json holds is the whole report."""
    write.write(tmp_path, REPORT)
    assert reports.read(tmp_path / "report.json") == REPORT


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 99}', '{"schema_version": 3}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    """Half a file, another form, another version: a sentence that names the file."""
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=r"report\.json"):
        reports.read(tmp_path / "report.json")


def test_the_speed_is_of_the_images_that_were_timed() -> None:
    """A process that was killed leaves no times, but images."""
    known = text.facts(replace(REPORT, timed_images=40_000))["images seen in training"]
    assert known == "200,000, 100 images per second of training"
    assert "500 images per second" in text.facts(REPORT)["images seen in training"]


def test_headline_is_the_result_in_a_line() -> None:
    """The headline has before, after and the change in percent."""
    assert text.headline(REPORT) == "FID (mnist32 features) 24.0 ± 0.2 → 15.3 ± 0.1 (-36 %)"
    inception = replace(REPORT, extractor=ExtractorName("inception", "b" * 64))
    assert text.headline(inception).startswith("FID 24.0")


def test_markdown_names_the_extractor_and_warns() -> None:
    """A reader of digit-network distances is told that they are not Inception's."""
    text = write.markdown(REPORT, pictures=["report.png"])
    assert "features of `mnist32`, not of inception: not comparable" in text
    assert "![Pairs" in text and "(report.png)" in text and "curve.png" not in text


def test_inception_needs_no_such_warning() -> None:
    """A clean report of Inception FIDs of enough images has no warning."""
    assert text.warnings(replace(REPORT, extractor=ExtractorName("inception", "b" * 64))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"after": {"fid": MetricResult.of([24.3, 23.9, 24.0])}}, "no change was shown"),
        (
            {"before": {"fid": MetricResult.of([24])}, "after": {"fid": MetricResult.of([15])}},
            "spread is not known",
        ),
        ({"images": 500}, "500 images: a Fréchet distance of so few"),
        (
            {"environment": replace(REPORT.environment, git_dirty=True)},
            "changes that are in no commit",
        ),
    ],
)
def test_warnings_say_what_a_reader_must_know(change: dict[str, object], message: str) -> None:
    """A change within the spread, one seed, few images, a dirty checkout: a sentence each."""
    assert any(message in warning for warning in text.warnings(replace(REPORT, **change)))
    assert not any(message in warning for warning in text.warnings(REPORT))


def test_summary_is_a_small_table() -> None:
    """The terminal gets a line a metric below a heading, columns aligned, and the warnings."""
    lines = text.summary(REPORT).splitlines()
    assert lines[0].split() == ["mnist32", "features", "before", "after", "change", "teacher"]
    assert lines[1].endswith("24.0 ± 0.2  15.3 ± 0.1   -36 %     7.00")
    assert len(lines[0]) == len(lines[1])
    assert lines[2].startswith("! ")


def test_pictures_are_written_beside_the_text(tmp_path: Path) -> None:
    """A report with pairs and a curve has both pictures, and nothing half-written beside."""
    path = write.write(tmp_path / "report", REPORT, _pairs(4, (0, 1, 0, 1)))
    names = {file.name for file in path.parent.iterdir()}
    assert names == {
        "report.json",
        "report.md",
        "report.html",
        "report.png",
        "curve.png",
        "pairs.png",
    }
    assert path.name == "report.html"
    assert "(curve.png)" in (path.parent / "report.md").read_text()


@pytest.mark.parametrize(
    ("count", "labels", "rows", "columns"),
    [(4, (0, 1, 0, 1), 2, 2), (5, (0, 1, 0, 1, 0), 3, 2), (16, None, 2, 8), (3, None, 1, 3)],
)
def test_every_pair_is_in_the_picture(
    tmp_path: Path, count: int, labels: tuple[int, ...] | None, rows: int, columns: int
) -> None:
    """Each black before-image is there in full, in a column for each class or 8 of them."""
    write.write(tmp_path, REPORT, _pairs(count, labels))
    picture = Image.open(tmp_path / "report.png").convert("L")
    black = int((np.asarray(picture) == 0).sum())
    assert count * 72 * 72 <= black < count * 72 * 72 + 300
    assert picture.width == 92 + columns * 76 + 20
    assert abs(picture.height - rows * 166) < 90


def test_the_curve_has_its_size(tmp_path: Path) -> None:
    """curve.png is 860 x 470; a single point makes no curve."""
    write.write(tmp_path / "two", REPORT)
    assert Image.open(tmp_path / "two" / "curve.png").size == (860, 470)
    write.write(tmp_path / "one", replace(REPORT, curve=Curve("fid", (CurvePoint(0, 24.5),))))
    assert not (tmp_path / "one" / "curve.png").exists()


def test_environment_says_what_runs_here() -> None:
    """Versions of what matters, and the hardware in words."""
    environment = Environment.here("cpu")
    assert environment.versions["torch"] == str(torch.__version__)
    assert {"python", "torch-fidelity"} <= environment.versions.keys()
    assert "CPU cores" in environment.hardware


# The page


class _Tags(HTMLParser):
    """Every tag of a page with its attributes, and whether all that were opened were closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img", "input", "line", "circle", "polyline", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"line", "circle", "polyline"}:
            assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _page(folder: Path, report: Report = REPORT, pairs: Pairs | None = None) -> str:
    return write.write(folder, report, pairs).read_text()


def test_the_page_needs_nobody(tmp_path: Path) -> None:
    """Pictures are in the page; it names no other file or address; every tag is closed."""
    page = _Tags(_page(tmp_path, pairs=_pairs(4, (0, 1, 0, 1))))
    assert page.open == []
    images = [image["src"] for image in page.of("img")]
    assert len(images) == 8 and all(source.startswith("data:image/png") for source in images)
    assert not page.of("link")[0]["href"].startswith("http") and len(page.of("link")) == 1
    assert all("src" not in script for script in page.of("script"))


def test_the_page_says_what_the_report_says(tmp_path: Path) -> None:
    """Headline, verdict, every warning, the classes and seeds of the pairs, the teacher's line."""
    text = _page(tmp_path, pairs=_pairs(4, (0, 1, 0, 1)))
    for said in ("24.0 ± 0.2", "15.3 ± 0.1", "-36 %", "more than the spread", "class 1, seed 3"):
        assert said in text
    assert "<code>mnist32</code>, not of inception" in text
    assert 'class="name"' in text and ">teacher 7<" in text and ">real images 1<" in text
    within = replace(REPORT, after={"fid": MetricResult.of([24.3, 23.9, 24.0])})
    assert "no more than the spread" in _page(tmp_path, within)


def test_the_page_shows_what_comes_nearest_to_real_images(tmp_path: Path) -> None:
    """Each generated image beside its real one, with its seed."""
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    text = write.write(tmp_path, REPORT, None, Neighbors((7, 3), images, images + 9)).read_text()
    assert [image["alt"] for image in _Tags(text).of("img")] == ["generated", "real"] * 2
    assert "<figcaption>seed 7</figcaption>" in text


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    """What a user named is shown as it is, not run."""
    evil = "<script>alert(1)</script>"
    report = replace(REPORT, name=evil, student=File(evil, None), recipe={"name": evil})
    page = _Tags(_page(tmp_path, report))
    assert len(page.of("script")) == 1 and page.open == []


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_curve_that_never_rises_is_drawn(tmp_path: Path, value: float) -> None:
    """A distance of nothing, or below it as a KID may be: the page is made."""
    flat = Curve("fid", (CurvePoint(0, value), CurvePoint(100, value)), 5_000)
    report = replace(REPORT, curve=flat, teacher_samples=None, real_halves=None)
    page = _Tags(_page(tmp_path, report))
    assert len(page.of("circle")) == 2
    bottom = float(page.of("svg")[0]["viewbox"].split()[3])
    assert all(0 < float(dot["cy"]) < bottom for dot in page.of("circle"))


def test_the_picture_of_the_curve_has_the_page_s_geometry(tmp_path: Path) -> None:
    """Each circle of the page is at the same place of curve.png, scaled to its width."""
    page = _Tags(_page(tmp_path))
    pixels = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
    blue = (abs(pixels - np.array([0x1F, 0x6F, 0xEB])).sum(axis=2) < 30).nonzero()
    scale = pixels.shape[1] / float(page.of("svg")[0]["viewbox"].split()[2])
    first, last = ((float(dot["cx"]), float(dot["cy"])) for dot in page.of("circle"))
    middle = ((first[0] + last[0]) / 2 * scale, (first[1] + last[1]) / 2 * scale + 72)
    assert np.hypot(blue[1] - middle[0], blue[0] - middle[1]).min() < 2


def test_levels_that_are_close_have_texts_apart() -> None:
    """Lines stay at their values; the higher value's text is above the other's."""
    series = [figures.Series("FID", (CurvePoint(0, 24.5), CurvePoint(1000, 15.9)))]
    low, high = figures.curve_drawing(series, {"teacher": 7.0, "real images": 6.9}).levels
    assert (low.text, high.text) == ("real images 6.9", "teacher 7")
    assert 0 < low.y - high.y < 3 and low.text_y - high.text_y >= 18


def test_a_run_without_a_curve_has_its_page(tmp_path: Path) -> None:
    """An empty curve, of no metric, is left out of page and text; levels have nothing to cross."""
    (tmp_path / "curve.png").write_bytes(b"of another run")
    page = _Tags(_page(tmp_path, replace(REPORT, curve=Curve())))
    assert not page.of("svg") and page.open == []
    assert "curve.png" not in (tmp_path / "report.md").read_text()
    assert text.levels(replace(REPORT, curve=Curve())) == {}


def test_what_stayed_is_said_of_a_student_whose_images_were_all_alike() -> None:
    """Latents' images that are no distance apart are no reason to fail."""
    alike = replace(REPORT, drift=Drift(1000, moved=1.5, apart=0.0, recognised=0.0))
    assert "were alike before" in text.remarks(alike)["What stayed"]


def test_the_curve_of_the_page_is_where_the_numbers_are(tmp_path: Path) -> None:
    """Points fall from left to right as the metric falls; a larger value stands higher."""
    first, last = _Tags(_page(tmp_path)).of("circle")
    assert float(first["cx"]) < float(last["cx"]) and float(first["cy"]) < float(last["cy"])


def test_large_images_are_shrunk_in_the_page(tmp_path: Path) -> None:
    """A page of pairs of 1024x1024 stays a page that can be sent."""
    page = _Tags(_page(tmp_path, pairs=_pairs(1, None, size=1024)))
    content = base64.b64decode(page.of("img")[0]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (256, 256)
