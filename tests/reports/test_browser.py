"""The pages in a real browser: no complaint, no request that leaves the machine, a slider that
slides, on a phone, on a desk and in the dark.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import browser
import tiny_reports
from browser import Browser
from eval.metrics.registry import MetricResult
from eval.samples import Pairs
from reports import compare, write
from reports.data import (
    ExtractorName,
    File,
    ReferenceName,
)

PROGRAM = browser.found()
PHONE, DESK = 390, 1280
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason=f"none of {', '.join(browser.NAMES)} is installed"
)
REPORT = replace(
    tiny_reports.REPORT,
    name="mnist32",
    before={"fid": MetricResult.of([24.2, 24.0]), "precision": MetricResult.of([0.665, 0.667])},
    after={"fid": MetricResult.of([15.3, 15.1]), "precision": MetricResult.of([0.701, 0.703])},
    first_seed=0,
    reference=ReferenceName("mnist-8k-32x32.zip", "a" * 64, 8000),
    student=File("assets/mnist32/student.safetensors", "d" * 64),
    teacher=File("assets/mnist32/teacher.safetensors", "e" * 64),
    real_halves=None,
    drift=None,
    nearness=None,
    sampler=None,
    pair_seeds=(),
    recipe={"name": "mnist32", "training": {"seed": 0, "student_lr": 1e-3}},
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests here."""
    assert PROGRAM is not None
    with browser.started(PROGRAM, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The report of a run whose images turned from black to white, and a comparison of two."""
    folder = tmp_path_factory.mktemp("pages")
    black = torch.zeros(12, 1, 32, 32, dtype=torch.uint8)
    pairs = Pairs(tuple(range(12)), black, black + 255, None, black + 100)
    other = replace(REPORT, recipe={"name": "b", "training": {"seed": 1, "student_lr": 1e-3}})
    runs = [folder / "00000-mnist32", folder / "00001-mnist32"]
    for run, report in zip(runs, (REPORT, other), strict=True):
        write.write(run / "report", report, pairs)
    paths = [run / "report" / "report.json" for run in runs]
    page = folder / "comparison.html"
    write.write_comparison(page, compare.compare([REPORT, other], paths, beside=page))
    return {
        "report": (runs[0] / "report" / "report.html").as_uri(),
        "comparison": page.as_uri(),
    }


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_complains_of_nothing_and_asks_nobody(
    tab: Browser, addresses: dict[str, str], name: str, width: int
) -> None:
    """No word on the console; of requests only the file and what is in it; nothing sticks out."""
    tab.open(addresses[name], width=width)
    assert tab.complaints == []
    asked = [request for request in tab.requests if not request.startswith("data:")]
    assert asked == [addresses[name]]
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("document.querySelectorAll('svg polyline').length") >= 1


def test_on_a_phone_every_value_is_in_sight(tab: Browser, tmp_path: Path) -> None:
    """A long name of an extractor or a run takes more lines and pushes no value off the page."""
    extractor = ExtractorName("classifier-of-handwritten-digits-and-letters-32x32-v2", "b" * 64)
    report = replace(REPORT, extractor=extractor)
    runs = [tmp_path / f"0000{index}-gan-{extractor.name}" for index in range(2)]
    pages = [write.write(run / "report", report) for run in runs]
    pages.append(tmp_path / "comparison.html")
    paths = [page.with_name("report.json") for page in pages[:2]]
    write.write_comparison(pages[2], compare.compare([report] * 2, paths, beside=pages[2]))
    for page in pages:
        tab.open(page.as_uri(), width=PHONE)
        right = "Math.max(...[...document.querySelectorAll('.values td')]"
        assert tab.run(f"{right}.map(cell => cell.getBoundingClientRect().right))") <= PHONE
        assert tab.run("document.documentElement.scrollWidth") <= PHONE


def test_a_complaint_and_a_request_would_be_seen(tab: Browser, tmp_path: Path) -> None:
    """A page that does both is caught."""
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png"><script>nothing()</script>')
    tab.open(page.as_uri(), width=DESK)
    assert any("nothing is not defined" in complaint for complaint in tab.complaints)
    assert "http://127.0.0.1:9/x.png" in tab.requests


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_slider_uncovers_the_images_after(
    tab: Browser, addresses: dict[str, str], width: int
) -> None:
    """Half of an image is white at first; dragged to the left, most of it; to the right, little."""
    tab.open(addresses["report"], width=width)
    assert _white(tab) == pytest.approx(0.5, abs=0.05)
    at = 0.5
    for share in (0.1, 0.9):
        slider = tab.place("#cut")
        start, end = (
            (slider["x"] + slider["width"] * part, slider["y"] + slider["height"] / 2)
            for part in (at, share)
        )
        tab.drag(start, end)
        assert _white(tab) == pytest.approx(1 - share, abs=0.08)
        at = share


def test_the_slider_s_words_stand_on_the_sides_of_the_images(
    tab: Browser, addresses: dict[str, str]
) -> None:
    """The images before (black) are on the side of the word "before", those after on the other."""
    tab.open(addresses["report"], width=DESK)
    words = tab.run("[...document.querySelectorAll('.slide label')].map(l => l.textContent)")
    pixels = tab.picture(".pair").min(axis=2)
    width = pixels.shape[1]
    left, right = pixels[:, : width // 3].mean(), pixels[:, -width // 3 :].mean()
    assert words == ["before", "after"]
    assert left < 50 and right > 200


def _white(tab: Browser) -> float:
    """Return how much of the first pair is white."""
    return float((tab.picture(".pair").min(axis=2) > 250).mean())


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_in_the_dark_the_page_is_dark(tab: Browser, addresses: dict[str, str], name: str) -> None:
    """Paper and ink change places."""
    brightness = {}
    for dark in (False, True):
        tab.open(addresses[name], width=DESK, dark=dark)
        pixels = tab.picture("h1")
        brightness[dark] = (np.median(pixels), pixels.min(), pixels.max())
    assert brightness[False][0] > 240 and brightness[True][0] < 40
    assert brightness[False][1] < 130 and brightness[True][2] > 130
