"""Adding a metric is adding a file: nothing else has to know its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval.metrics
from core.distributed import World
from core.errors import UserError
from eval import features
from eval.evaluator import Config, Evaluator
from eval.feature_stats import FeatureStatistics
from eval.metrics import display, registry
from eval.reference import Reference
from repository import ROOT

MODULE = '''
"""Distance of the means: a metric that no other file knows."""

from eval.metrics.registry import Metric


def _compute(generated, real, config, device):
    return {MEANS.name: float((generated.mean - real.mean).norm())}


MEANS = Metric(
    name="mean_distance",
    label="Means",
    title="distance of the means",
    better="lower",
    needs="moments",
    published_features="inception",
    compute=_compute,
    least_images=lambda config: 3,
    position=99,
    scale=1000,
    unit="10⁻³",
)
METRICS = (MEANS,)
'''


@pytest.fixture
def new_metric(tmp_path: Path) -> Iterator[None]:
    """Add a file to the folder of metrics, as a user would."""
    (tmp_path / "mean_distance.py").write_text(MODULE, encoding="utf-8")
    eval.metrics.__path__.append(str(tmp_path))
    registry.metrics.cache_clear()
    yield
    eval.metrics.__path__.remove(str(tmp_path))
    registry.metrics.cache_clear()


def _reference(statistics: FeatureStatistics) -> Reference:
    return Reference(statistics.mean, statistics.covariance, "x", "", 9, (1, 2, 2), "pixels", None)


@pytest.mark.usefixtures("new_metric")
def test_a_new_file_is_parsed_computed_and_displayed() -> None:
    """It is a name of a recipe and of the command line, with the published form of it too."""
    assert Config(metrics=("fid", "mean_distance")).metrics[-1] == "mean_distance"
    (request,) = registry.parse(["mean_distance5k_full"])
    assert (request.metrics, request.images) == (("mean_distance",), 5000)
    assert "mean_distance" in registry.groups()

    real = FeatureStatistics.of(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    evaluator = Evaluator(
        config=Config(metrics=("mean_distance",), images=6),
        requests=registry.parse(["mean_distance"]),
        extractor=features.load("pixels"),
        distance=None,
        world=World.single(),
        real=_reference(real),
    )
    results = evaluator.evaluate(lambda seeds: torch.zeros(len(seeds), 1, 2, 2, dtype=torch.uint8))
    expected = features.load("pixels")(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))[0] - real.mean
    assert results["mean_distance"].mean == pytest.approx(float(expected.norm()))
    assert display.unit("mean_distance") == ", 10⁻³"
    assert display.number("mean_distance", 0.0123) == "12.3"

    with pytest.raises(UserError, match="mean_distance needs at least 3 generated images, got 2"):
        registry.check(
            registry.parse(["mean_distance"]),
            images=2,
            real=_reference(real),
            can_classify=False,
            config=registry.Config(),
        )


@pytest.mark.usefixtures("new_metric")
def test_a_new_metric_of_the_student_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only path lengths are: any other would have no value, and nothing would say so."""
    metric = registry.metrics()["mean_distance"]
    monkeypatch.setitem(registry.metrics(), metric.name, replace(metric, needs="student"))
    evaluator = Evaluator(
        config=Config(metrics=("mean_distance",), images=6),
        requests=registry.parse(["mean_distance"]),
        extractor=features.load("pixels"),
        distance=None,
        world=World.single(),
    )
    with pytest.raises(UserError, match="mean_distance needs the student itself"):
        evaluator.check(student=None)


def test_no_metric_is_named_outside_of_its_file() -> None:
    """The program asks the metric objects; a literal name elsewhere is another place to change."""
    folders = ("eval", "reports", "refinement", "training", "core")
    files = [ROOT / "refine.py", *(f for d in folders for f in (ROOT / d).rglob("*.py"))]
    named = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.value!r}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and node.value in registry.metrics()
        and file.stem not in registry.known_modules()
    ]
    assert len(files) > 60 and named == []
