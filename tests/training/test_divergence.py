"""A run that diverges: what is noticed, what is not, and how it goes back to where it was sound."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.distributed import World
from core.errors import EvaluationCancelled, UserError
from core.randomness import Draws
from core.roles import LossOutput, Networks, Phase
from core.run_folder import RunFolder
from core.run_log import Divergence, EarlyStop, Evaluation, Rollback, Row, Stats
from training import checkpoint
from training.checkpoint import WatchedMetric
from training.divergence import Diverged, DivergenceConfig, DivergenceMonitor
from training.state import TrainState, start
from training.trainer import Config, Interrupted, Trainer

ALONE = World.single()
BATCH = 10
HEALTHY = {"images_per_second": 1.0, "score_loss": 2.0, "student_gradient": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "run")


# What is noticed ----------------------------------------------------------------------------------


def monitor(*rows: Row, highest: bool = False, **settings: object) -> DivergenceMonitor:
    config = DivergenceConfig.model_validate(settings)
    return DivergenceMonitor(config, rows, watched=WatchedMetric("fid", highest=highest))


def stats(*values: dict[str, float]) -> list[Stats]:
    """Return a row of stats for each of these values."""
    return [Stats(images_seen=n, images_per_second=1.0, values=v) for n, v in enumerate(values)]


@pytest.mark.parametrize("name", ["score_loss", "student_gradient"])
def test_a_reading_far_above_its_running_median_is_divergence(name: str) -> None:
    """A hundred times the median of the rows before, and no less; one wild row hides nothing."""
    usual = HEALTHY[name]
    rows = stats(*[HEALTHY] * 9, {**HEALTHY, name: 50 * usual})
    monitor(*rows).add_stats(11, {**HEALTHY, name: 99 * usual})
    with pytest.raises(Diverged, match=rf"after 11 images {name} is .*101 times its median"):
        monitor(*rows).add_stats(11, {**HEALTHY, name: 101 * usual})
    monitor(*rows, stats_factor=None).add_stats(11, {**HEALTHY, name: 1e30})
    monitor(*rows, stats_factor=200).add_stats(11, {**HEALTHY, name: 101 * usual})


def test_nothing_is_judged_before_there_is_a_range() -> None:
    """The first ten rows of a reading may do what they like, and a reading that was 0 too."""
    monitor(*stats(*[HEALTHY] * 9)).add_stats(10, {"score_loss": 1e9})
    monitor(*stats(*[HEALTHY] * 20)).add_stats(21, {"ikl_gradient": 1e9})
    monitor(*stats(*[{**HEALTHY, "ikl_gradient": 0.0}] * 20)).add_stats(21, {"ikl_gradient": 1e9})


def test_the_range_runs_along() -> None:
    """A loss that falls slowly by a factor of 1000 and rises again slowly is no divergence; only
    the last rows count.
    """
    found = monitor(window_rows=10)
    levels = [1000 * 0.9**n for n in range(66)]
    for n, level in enumerate(levels + levels[::-1]):
        found.add_stats(n, {"score_loss": level})
    with pytest.raises(Diverged):
        found.add_stats(200, {"score_loss": 1e6})


def test_early_rows_that_vary_as_those_of_the_shipped_recipes_raise_no_alarm() -> None:
    """The embedded default's score gradient falls from 4000 to 100 and jumps by a factor of 4."""
    found = monitor()
    for n in range(96):
        jump = 4.0 if n % 20 == 13 else 1.0
        found.add_stats(n, {"score_gradient": jump * max(4000 * 0.9**n, 100)})


def test_a_metric_far_worse_than_at_the_start_is_divergence() -> None:
    """Ten times the first measurement; a tenth of it, where the highest is the best."""
    begun = Evaluation(images_seen=0, when="training", metrics={"fid": (4.0,)})
    monitor(begun).add_evaluation(8, {"fid": 39.0})
    monitor(begun).add_evaluation(8, {"precision": 1e9})
    monitor(begun, metric_factor=None).add_evaluation(8, {"fid": 1e9})
    with pytest.raises(Diverged, match=r"after 8 images fid is 41, and was 4 at the start"):
        monitor(begun).add_evaluation(8, {"fid": 41.0})
    monitor(begun, highest=True).add_evaluation(8, {"fid": 0.5})
    for low in (0.3, 0.0):
        with pytest.raises(Diverged, match=rf"after 8 images fid is {low:.4g}, and was 4"):
            monitor(begun, highest=True).add_evaluation(8, {"fid": low})


# What is done -------------------------------------------------------------------------------------


class Line(nn.Module):
    """One number; `forward` gives it for each latent."""

    latent_shape, image_shape, num_classes = (1,), (1, 1, 1), 0

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.value + 0 * latents.view(-1, 1, 1, 1)


class Runaway:
    """A parabola: at a learning rate of 3 each step of SGD doubles the number and turns its sign;
    at rates below 2 it shrinks.
    """

    def __init__(self) -> None:
        self.phases = (Phase("only", ("student",), self.loss),)

    def loss(self, networks: Networks, draws: Draws) -> LossOutput:
        latents = draws.normal("latents", (1,))
        value = networks.student(latents).flatten(1).sum(1)
        noise = 1 + 0.01 * latents.flatten()
        return LossOutput(value.square() / 2 * noise, {"size": value.detach().abs().mean()})


def settings(**changed: object) -> Config:
    plain = {
        "duration_kimg": 60 * BATCH / 1000,
        "batch_size": BATCH,
        "student_lr": 3.0,  # |1 - 3| > 1: the number doubles each round
        "optimizer": {"name": "SGD"},
        "stats_every_kimg": BATCH / 1000,
        "checkpoint_every_kimg": 5 * BATCH / 1000,
        "divergence": {"action": "rollback", "lr_factor": 0.5},
    }
    return Config.model_validate(plain | changed)


def begin(config: Config) -> TrainState:
    return start(
        Networks(Line()), student_lr=config.student_lr, score_lr=1.0, optimizer=config.optimizer
    )


def run(
    folder: RunFolder,
    config: Config,
    *,
    state: TrainState | None = None,
    measure: Callable[[TrainState], dict[str, float]] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    objective: object = None,
) -> TrainState:
    return Trainer(
        state or begin(config),
        objective or Runaway(),
        config,
        folder=folder,
        world=ALONE,
        evaluate=measure,
        watched=WatchedMetric("fid"),
        evaluate_every_kimg=0.0 if measure is None else 5 * BATCH / 1000,
        stop_requested=stop_requested,
    ).train()


def evaluated_at(folder: RunFolder) -> list[int]:
    return [row.images_seen for row in folder.log.all(Evaluation) if row.when == "training"]


def numbers(state: TrainState) -> list[float]:
    return [float(m.value.detach()) for m in (state.networks.student, state.student_ema)]


def test_a_run_goes_back_and_on_at_a_lower_rate(folder: RunFolder) -> None:
    """At a learning rate of 3 the number doubles each round; halved once, it shrinks, and the run
    ends. Its log names the rollback, and holds no row of the undone iterations.
    """
    state = run(folder, settings())
    (done,) = folder.log.all(Rollback)
    assert "student_gradient is" in done.why or "size is" in done.why
    assert done.lr_scale == 0.5 == state.lr_scale
    assert done.images_seen < done.from_images_seen < 60 * BATCH
    assert state.images_seen == 60 * BATCH and abs(numbers(state)[0]) < 1e-6
    seen = [row.images_seen for row in folder.log.all(Stats)]
    assert seen == list(range(BATCH, 61 * BATCH, BATCH))


def test_each_rollback_lowers_the_rate_until_the_run_stops(folder: RunFolder) -> None:
    """With rates that never suffice, it goes back as often as it may, and then ends in an error;
    what is saved is of before.
    """
    config = settings(
        student_lr=1000.0, divergence={"action": "rollback", "max_rollbacks": 2, "lr_factor": 0.9}
    )
    with pytest.raises(Diverged, match=r"training\.student_lr"):
        run(folder, config)
    assert [row.lr_scale for row in folder.log.all(Rollback)] == pytest.approx([0.9, 0.81])
    assert len(folder.log.all(Divergence)) == 1
    state = begin(config)
    checkpoint.restore_newest(state, folder, ALONE)
    assert math.isfinite(numbers(state)[0])


def test_by_default_it_stops(folder: RunFolder) -> None:
    """No weight is put back, no reading dropped, every checkpoint stays."""
    config = settings(divergence={}, keep={"newest": 99})
    with pytest.raises(Diverged, match=r"training\.divergence\.action=rollback"):
        run(folder, config)
    assert folder.log.all(Rollback) == [] and len(folder.log.all(Divergence)) == 1
    assert checkpoint.images_saved(folder) > 0


def test_a_loss_that_is_not_finite_goes_back_too(folder: RunFolder) -> None:
    """Also where nothing is saved but the start."""
    config = settings(checkpoint_every_kimg=0, divergence={**DIVERGENCE, "stats_factor": None})
    state = run(folder, config.model_copy(update={"student_lr": 1e20}))
    assert {row.images_seen for row in folder.log.all(Rollback)} == {0}
    assert state.images_seen == 60 * BATCH


DIVERGENCE = {"action": "rollback", "lr_factor": 1e-10}


def test_it_goes_back_to_the_best_where_that_is_kept(folder: RunFolder) -> None:
    """Not to the newest, which was measured worse; later checkpoints go."""
    values = {0: 2.0, 50: 1.5, 100: 1.0, 150: 1.8, 200: 30.0}
    settled: list[int] = []

    def measure(state: TrainState) -> dict[str, float]:
        settled.append(state.images_seen)
        return {"fid": values.get(state.images_seen, 1.9) if state.lr_scale == 1 else 1.9}

    folder.log.append(Evaluation(images_seen=0, when="training", metrics={"fid": (2.0,)}))
    config = settings(student_lr=0.1, keep={"newest": 9})
    run(folder, config, measure=measure)
    (done,) = folder.log.all(Rollback)
    assert (done.from_images_seen, done.images_seen) == (200, 100)
    assert "fid is 30, and was 2 at the start" in done.why
    assert settled[:6] == [50, 100, 150, 200, 150, 200]


def test_a_resumed_run_keeps_the_lower_rate_and_the_same_bytes(
    folder: RunFolder, tmp_path: Path
) -> None:
    """Stopped after it went back, or before it would, it ends as the run that nothing stopped."""
    config = settings(stats_every_kimg=BATCH / 1000, checkpoint_every_kimg=0.02)
    expected = run(folder, config)
    (done,) = folder.log.all(Rollback)
    for number, rounds in enumerate((3, 12, 20)):
        other = RunFolder.create(tmp_path, f"stopped-{number}")
        asked = iter([False] * (rounds - 1) + [True] + [False] * 999)
        with pytest.raises(Interrupted):
            run(other, config, stop_requested=lambda asked=asked: next(asked))
        state = begin(config)
        checkpoint.restore_newest(state, other, ALONE)
        other.log.keep_until(state.images_seen)
        assert numbers(run(other, config, state=state)) == numbers(expected)
        assert other.log.all(Rollback) == [done]


def test_that_a_run_went_back_is_never_dropped(folder: RunFolder) -> None:
    """A resumed run drops the rows after its checkpoint, but not this one."""
    rollback = Rollback(images_seen=50, why="", from_images_seen=60, lr_scale=0.5)
    folder.log.append(rollback)
    folder.log.append(Evaluation(images_seen=50, when="training", metrics={}))
    early = Divergence(images_seen=20, why="x")
    folder.log.keep_until(20, then=[early])
    assert folder.log.rows() == [rollback, early]


# An early end, and the best so far ----------------------------------------------------------------


def improving_until(best: int) -> Callable[[TrainState], dict[str, float]]:
    return lambda state: {"fid": 1.0 + abs(state.images_seen - best) / 1000}


def test_a_metric_that_no_longer_improves_ends_the_run(folder: RunFolder) -> None:
    """Best after 150 images: with patience for 100, it ends after 250, saved, and says why."""
    config = settings(student_lr=0.1, early_stop_kimg=0.1, keep={"newest": 1})
    state = run(folder, config, measure=improving_until(150))
    assert state.images_seen == 250 == checkpoint.images_saved(folder)
    score = {"images_seen": 250, "metric": "fid", "value": 1.0, "at_images_seen": 150}
    assert folder.log.all(EarlyStop) == [EarlyStop(**score)]
    assert checkpoint.best(folder, WatchedMetric("fid")).name == "000000000150.pt"
    before = folder.log.rows()
    run(folder, config, state=state, measure=improving_until(150))
    assert state.images_seen == 250 and folder.log.rows() == before


def test_a_run_that_goes_on_improving_is_not_ended(folder: RunFolder) -> None:
    """It goes to its end, which is its best: there is nothing to say."""
    config = settings(student_lr=0.1, early_stop_kimg=0.05)
    state = run(folder, config, measure=improving_until(9999))
    assert state.images_seen == config.total_images
    assert folder.log.all(EarlyStop) == []


def test_early_stop_without_measurements_is_refused(folder: RunFolder) -> None:
    """The sentence names both settings."""
    with pytest.raises(UserError, match=r"early_stop_kimg needs .* evaluation\.every_kimg"):
        run(folder, settings(early_stop_kimg=1.0))


def test_a_measurement_that_a_stop_left_out_is_made_up_for(folder: RunFolder) -> None:
    """Asked to stop where a measurement is due, it saves first; resumed, it measures once, and the
    checkpoint knows its score.
    """
    config = settings(student_lr=0.1)
    asked = iter([False] * 4 + [True])
    measure = improving_until(50)
    with pytest.raises(Interrupted):
        run(folder, config, measure=measure, stop_requested=lambda: next(asked))
    assert checkpoint.images_saved(folder) == 50 and evaluated_at(folder) == []
    state = begin(config)
    checkpoint.restore_newest(state, folder, ALONE)
    run(folder, config, state=copy.copy(state), measure=measure)
    assert evaluated_at(folder) == list(range(50, 601, 50))
    best = checkpoint.best(folder, WatchedMetric("fid"))
    assert best is not None and int(best.stem) == 50


def test_a_measurement_that_is_given_up_is_made_up_for(folder: RunFolder) -> None:
    """What was asked to stop while it measured is saved without a score; resumed, it measures."""
    config = settings(student_lr=0.1)
    measure = improving_until(50)

    def cancelled(state: TrainState) -> dict[str, float]:
        if state.images_seen == 100:
            raise EvaluationCancelled
        return measure(state)

    with pytest.raises(Interrupted):
        run(folder, config, measure=cancelled)
    assert checkpoint.images_saved(folder) == 100
    state = begin(config)
    checkpoint.restore_newest(state, folder, ALONE)
    run(folder, config, state=copy.copy(state), measure=measure)
    assert evaluated_at(folder) == list(range(50, 601, 50))


def test_a_resumed_run_goes_back_from_what_it_finds_diverged(folder: RunFolder) -> None:
    """Stopped where a measurement was due, which would have been far too bad: resumed, it measures
    and goes back to the checkpoint before, as a run that nothing stopped.
    """
    config = settings(student_lr=0.1)
    asked = iter([False] * 9 + [True])

    def measure(now: TrainState) -> dict[str, float]:
        return {"fid": 300.0 if now.images_seen == 100 and now.lr_scale == 1 else 2.0}

    with pytest.raises(Interrupted):
        run(folder, config, measure=measure, stop_requested=lambda: next(asked))
    state = begin(config)
    checkpoint.restore_newest(state, folder, ALONE)
    assert state.images_seen == 100
    run(folder, config, state=state, measure=measure)
    (done,) = folder.log.all(Rollback)
    assert (done.from_images_seen, done.images_seen) == (100, 50)
    assert state.images_seen == 600 and state.lr_scale == 0.5


def test_a_measurement_that_fails_costs_no_training(folder: RunFolder) -> None:
    """Out of memory after the last round: what was trained is saved."""

    def measure(now: TrainState) -> dict[str, float]:
        if now.images_seen == 600:
            raise MemoryError
        return {"fid": 1.0}

    with pytest.raises(MemoryError):
        run(folder, settings(student_lr=0.1), measure=measure)
    assert checkpoint.images_saved(folder) == 600
