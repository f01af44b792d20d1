"""The report of a run that reached much of its teacher."""

from eval.metrics.registry import MetricResult
from eval.nearest import Drift, Near, Nearness
from reports.data import (
    Curve,
    CurvePoint,
    Environment,
    ExtractorName,
    File,
    ReferenceName,
    Report,
    SampleScore,
)

REPORT = Report(
    name="gan-mnist32",
    before={"fid": MetricResult.of([24.2, 24.1, 23.8])},
    after={"fid": MetricResult.of([15.3, 15.2, 15.4])},
    images=10_000,
    first_seed=50,
    reference=ReferenceName("digits.zip", "a" * 64, 8000),
    extractor=ExtractorName("mnist32", "b" * 64),
    environment=Environment({"torch": "2.9"}, "c" * 40, False, "2 CPU cores"),
    kernel_backend="reference",
    student=File("student.safetensors", "d" * 64),
    teacher=File("teacher.safetensors", None),
    images_seen=200_000,
    started_at="2026-01-02T10:00:00+00:00",
    finished_at="2026-01-02T10:08:00+00:00",
    durations_seconds={"training": 400.0},
    curve=Curve("fid", (CurvePoint(0, 24.5), CurvePoint(200_000, 15.9)), 5_000),
    teacher_samples=SampleScore({"fid": 7.0}, 10_000),
    real_halves=SampleScore({"fid": 1.0}, 4_000),
    drift=Drift(1000, moved=1.5, apart=6.0, recognised=0.985),
    nearness=Nearness(1000, 8000, 3.0, 2.5, 0.02, (Near(7, 70, 0.5), Near(3, 30, 0.6))),
    sampler="Heun",
    pair_seeds=(0, 1),
    recipe={"training": {"seed": 0}},
)
