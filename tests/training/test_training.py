"""The loop: accumulation, checks before weights change, schedules, stats and stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from core.distributed import World
from core.errors import UserError
from core.randomness import Draws
from core.roles import LossOutput, Networks, Phase
from core.run_folder import RunFolder
from core.run_log import Evaluation, Stats
from objectives import _student, diff_instruct
from teachers import gaussian
from training import checkpoint
from training.checkpoint import WatchedMetric
from training.state import OptimizerConfig, TrainState, optimizer_names, start, update_ema
from training.trainer import Config, Diverged, Interrupted, Trainer

ALONE = World.single()
SHAPE = (1, 2, 2)
BATCH = 12


class Student(nn.Module):
    """x = mean + std z, and how often it was called."""

    latent_shape, image_shape, num_classes = SHAPE, SHAPE, 0

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([0.5, -0.3, 0.0, 1.0]).view(SHAPE))
        self.std = nn.Parameter(torch.full(SHAPE, 0.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.mean + self.std * latents


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "run")


def settings(*, rounds: int = 3, **changed: object) -> Config:
    plain = {
        "duration_kimg": rounds * BATCH / 1000,
        "batch_size": BATCH,
        "student_lr": 0.01,
        "score_lr": 0.01,
    }
    return Config.model_validate(plain | changed)


def begin(config: Config) -> TrainState:
    teacher = gaussian.build(gaussian.Config(image_shape=SHAPE, components=2, std=0.3))
    return start(
        Networks(Student(), copy.deepcopy(teacher), teacher),
        student_lr=config.student_lr,
        score_lr=config.score_lr,
        optimizer=config.optimizer,
    )


def run(
    folder: RunFolder,
    *,
    objective: object = None,
    state: TrainState | None = None,
    measure: Callable[[TrainState], dict[str, float]] | None = None,
    measure_every_kimg: float = 0.0,
    stop_requested: Callable[[], bool] = lambda: False,
    **changed: object,
) -> TrainState:
    """Return the state after a few rounds of Diff-Instruct, or of another objective."""
    config = settings(**changed)
    return Trainer(
        state or begin(config),
        objective or diff_instruct.build(diff_instruct.Config()),
        config,
        folder=folder,
        world=ALONE,
        evaluate=measure,
        evaluate_every_kimg=measure_every_kimg,
        watched=WatchedMetric("fid"),
        stop_requested=stop_requested,
    ).train()


@dataclass(frozen=True)
class Alone:
    """An objective of one phase on the student: the given loss of its images."""

    loss: Callable[[Tensor], Tensor]

    @property
    def phases(self) -> tuple[Phase, ...]:
        def loss(networks: Networks, draws: Draws) -> LossOutput:
            return LossOutput(self.loss(_student.make(networks, draws).images), {})

        return (Phase("only", ("student",), loss),)


SLOPE = Alone(lambda images: images.flatten(1).sum(1))
"""The gradient by each of the four pixels of `mean` is 1."""


def frozen_copy(state: TrainState) -> dict[str, object]:
    """Return a copy of every number that may change, apart from gradients."""
    networks = state.networks
    modules = (networks.student, networks.score, networks.teacher, state.student_ema)
    weights = [{n: p for n, p in module.named_parameters()} for module in modules]
    steps = {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()}
    return copy.deepcopy({"weights": weights, "steps": steps, "images_seen": state.images_seen})


def assert_equal(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Updates


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_micro_batches_change_no_weight(folder: RunFolder, micro_batch_size: int) -> None:
    """However a batch of 12 is cut, also unevenly, all weights agree to float rounding."""
    whole = run(folder)
    parts = run(folder, micro_batch_size=micro_batch_size)
    for name in ("student", "score"):
        found, expected = getattr(parts.networks, name), getattr(whole.networks, name)
        for (key, p), (_, q) in zip(
            found.named_parameters(), expected.named_parameters(), strict=True
        ):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=f"{name}.{key}")


def test_micro_batches_change_no_stats(folder: RunFolder) -> None:
    """The stats of uneven parts are means over images, not over parts."""
    run(folder, rounds=1)
    run(folder, rounds=1, micro_batch_size=5)
    whole, parts = (row.values for row in folder.log.all(Stats))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_gradient_is_the_mean_over_the_batch(folder: RunFolder) -> None:
    """With plain SGD and a loss of slope 1, a step moves each mean by the learning rate."""
    state = run(folder, objective=SLOPE, rounds=1, optimizer={"name": "SGD"}, micro_batch_size=5)
    torch.testing.assert_close(state.networks.student.mean, Student().mean - 0.01)


@pytest.mark.parametrize(("limit", "step"), [(0.5, 0.25), (1e9, 1.0)])
def test_gradient_clip_limits_the_norm(folder: RunFolder, limit: float, step: float) -> None:
    """A gradient of norm 2 (1 on each of 4 pixels) is cut to the limit, a shorter one is not."""
    loss = Alone(lambda images: (images - images.detach() + 1).flatten(1).sum(1))
    state = begin(settings(optimizer={"name": "SGD"}))
    state.networks.student.std.requires_grad_(False)
    run(folder, objective=loss, state=state, rounds=1, gradient_clip=limit)
    torch.testing.assert_close(
        state.networks.student.mean, Student().mean - 0.01 * step, rtol=1e-5, atol=0
    )


def test_warmup_shortens_the_first_steps(folder: RunFolder) -> None:
    """Over 4 rounds of warm-up the steps are 1/4, 2/4, 3/4, 1 of the learning rate, then 1."""
    state = run(
        folder,
        objective=SLOPE,
        rounds=5,
        optimizer={"name": "SGD"},
        warmup_kimg=4 * BATCH / 1000,
    )
    moved = Student().mean - state.networks.student.mean
    torch.testing.assert_close(moved, torch.full(SHAPE, 0.01 * (0.25 + 0.5 + 0.75 + 1 + 1)))


def test_score_and_student_have_learning_rates_of_their_own(folder: RunFolder) -> None:
    """Adam's first step is the learning rate of the phase's network, for each parameter."""
    state = run(folder, rounds=1, student_lr=0.002, score_lr=0.03)
    began = begin(settings()).networks
    for name, rate in (("student", 0.002), ("score", 0.03)):
        found, before = getattr(state.networks, name), getattr(began, name)
        for p, q in zip(found.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close((p - q).abs(), torch.full_like(p, rate), rtol=1e-3, atol=0)


def test_the_teacher_never_changes(folder: RunFolder) -> None:
    """Its weights stay, without gradients and in eval mode."""
    before = frozen_copy(begin(settings()))["weights"][2]
    teacher = run(folder).networks.teacher
    assert_equal(dict(teacher.named_parameters()), before)
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_seed_decides_the_run(folder: RunFolder) -> None:
    """The same seed gives the same bytes, whatever torch's own generator did; another does not."""
    first = run(folder, seed=1)
    torch.rand(7)
    assert_equal(frozen_copy(run(folder, seed=1)), frozen_copy(first))
    assert not torch.equal(run(folder, seed=2).networks.student.mean, first.networks.student.mean)


def test_repeats_and_phases_draw_different_numbers(folder: RunFolder) -> None:
    """No latent occurs twice, within a round or from round to round."""
    latents = []

    def loss(networks: Networks, draws: Draws) -> LossOutput:
        latents.append(draws.normal("latents", networks.student.latent_shape))
        return LossOutput(networks.student(latents[-1]).flatten(1).sum(1), {})

    phases = (Phase("a", ("student",), loss, repeats=2), Phase("b", ("student",), loss))
    run(folder, objective=_Phases(phases), rounds=2, micro_batch_size=4)
    rows = torch.cat(latents).flatten(1)
    assert len(rows) == 2 * 3 * BATCH == len(rows.unique(dim=0))


@dataclass(frozen=True)
class _Phases:
    phases: tuple[Phase, ...]


def test_a_head_start_leaves_the_student_as_it_is(folder: RunFolder) -> None:
    """Until 36 images are seen only the score learns; then the student does too."""
    objective = diff_instruct.build(diff_instruct.Config(head_start_kimg=0.036))
    state = begin(settings())
    before = frozen_copy(state)["weights"]
    run(folder, objective=objective, state=state, rounds=3)
    after = frozen_copy(state)["weights"]
    assert_equal([after[0], after[3]], [before[0], before[3]])
    assert not torch.equal(after[1]["means"], before[1]["means"])
    assert state.optimizers["student"].state_dict()["state"] == {}
    run(folder, objective=objective, state=state, rounds=4)
    assert not torch.equal(state.networks.student.mean, before[0]["mean"])


# Optimizers


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_that_is_offered_trains(folder: RunFolder, name: str) -> None:
    """Each takes the settings it knows, leaves out the others, and moves both networks."""
    began = begin(settings()).networks
    state = run(folder, rounds=2, optimizer={"name": name, "eps": 1e-6})
    assert type(state.optimizers["student"]).__name__ == name
    assert not torch.equal(state.networks.student.mean, began.student.mean)
    assert not torch.equal(state.networks.score.means, began.score.means)


def test_settings_reach_the_optimizers_that_know_them() -> None:
    """Adam gets betas, eps and weight decay; SGD the weight decay alone."""
    chosen = {"beta1": 0.5, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.1}
    adam, sgd = (
        begin(settings(optimizer={"name": name, **chosen})).optimizers["score"].defaults
        for name in ("Adam", "SGD")
    )
    assert (adam["betas"], adam["eps"], adam["weight_decay"]) == ((0.5, 0.9), 1e-6, 0.1)
    assert sgd["weight_decay"] == 0.1 and "eps" not in sgd


@pytest.mark.parametrize("name", ["Adma", "Optimizer", "LBFGS", "SparseAdam", "lr_scheduler"])
def test_what_cannot_train_from_gradients_is_refused(name: str) -> None:
    """A wrong name, and an optimizer that needs more than gradients, list those that fit."""
    with pytest.raises(ValidationError, match=f"'{name}' that fits; it has ASGD.*AdamW.*SGD"):
        OptimizerConfig(name=name)


# Divergence


def _poisoned(network: nn.Module, *, from_call: int, value: float = math.nan) -> None:
    """Have the network give NaN from this call on."""
    forward, calls = network.forward, iter(range(10**9))

    def poisoned(*inputs: Tensor | None) -> Tensor:
        bad = next(calls) >= from_call
        return forward(*inputs) * (value if bad else 1.0)

    network.forward = poisoned


def test_a_bad_teacher_stops_the_run_before_the_student_changes(folder: RunFolder) -> None:
    """NaN from the teacher names phase and count; student, average and optimizer stay."""
    state = begin(settings(rounds=2))
    run(folder, state=state, rounds=2)
    before = frozen_copy(state)
    _poisoned(state.networks.teacher, from_call=0)
    with pytest.raises(Diverged, match=r"student phase .* after 24 images.*training\.student_lr"):
        run(folder, state=state, rounds=3)
    after = frozen_copy(state)
    student, _, teacher, average = after["weights"]
    assert_equal([student, teacher, average], [before["weights"][i] for i in (0, 2, 3)])
    assert_equal(after["steps"]["student"], before["steps"]["student"])
    assert after["images_seen"] == 24


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_bad_images_stop_the_run_before_anything_changes(
    folder: RunFolder, value: float, micro_batch_size: int | None
) -> None:
    """A student that gives NaN or infinity stops the score phase: every number stays as it was."""
    state = begin(settings())
    run(folder, state=state, rounds=1)
    before = frozen_copy(state)
    # Only the last micro-batch of the next score phase is bad.
    from_call = 0 if micro_batch_size is None else 2
    _poisoned(state.networks.student, from_call=from_call, value=value)
    with pytest.raises(Diverged, match=r"score phase .* after 12 images.*training\.score_lr"):
        run(folder, state=state, rounds=2, micro_batch_size=micro_batch_size)
    assert_equal(frozen_copy(state), before)


def test_a_bad_gradient_of_a_good_loss_stops_the_run(folder: RunFolder) -> None:
    """sqrt at 0 is finite and its slope is not; clipping does not hide it."""
    state = begin(settings())
    before = frozen_copy(state)
    loss = Alone(lambda images: (images - images.detach()).square().flatten(1).sum(1).sqrt())
    with pytest.raises(Diverged, match=r"only phase gave a loss of 0 and a gradient of norm nan"):
        run(folder, objective=loss, state=state, gradient_clip=1.0)
    assert_equal(frozen_copy(state), before)


# The moving average


def test_the_average_has_the_halflife(folder: RunFolder) -> None:
    """Without ramp-up, each round leaves 0.5^(batch / halflife) of it."""
    state = run(
        folder,
        objective=SLOPE,
        rounds=3,
        optimizer={"name": "SGD"},
        ema_halflife_kimg=2 * BATCH / 1000,
        ema_rampup=None,
    )
    kept, average = 0.5**0.5, 0.0
    for moved in (1, 2, 3):
        average = kept * average + (1 - kept) * moved
    torch.testing.assert_close(state.student_ema.mean, Student().mean - 0.01 * average)


def test_no_halflife_makes_the_average_the_student(folder: RunFolder) -> None:
    """ema_halflife_kimg 0 publishes the student itself."""
    state = run(folder, ema_halflife_kimg=0)
    assert_equal(state.student_ema.state_dict(), state.networks.student.state_dict())


def test_the_average_copies_buffers(folder: RunFolder) -> None:
    """A buffer of the student is the average's too, not a mean of old ones."""
    state = run(folder)
    assert state.student_ema.calls == state.networks.student.calls == 2 * 3


def test_the_average_keeps_to_itself() -> None:
    """It is in eval mode, without gradients, and shares no storage with the student."""
    state = begin(settings())
    assert not state.student_ema.training
    assert not any(p.requires_grad for p in state.student_ema.parameters())
    update_ema(state.student_ema, Student().double().float(), decay=0.5)
    pairs = zip(state.student_ema.parameters(), state.networks.student.parameters(), strict=True)
    assert all(p.data_ptr() != q.data_ptr() for p, q in pairs)


# What a run leaves, and when it stops


def test_stats_have_a_row_when_due(folder: RunFolder) -> None:
    """Every 24 images and after the last: images seen, rate, losses and gradient norms."""
    run(folder, rounds=5, stats_every_kimg=0.024)
    rows = folder.log.all(Stats)
    assert [row.images_seen for row in rows] == [24, 48, 60]
    names = {"score_loss", "ikl_gradient", "score_gradient", "student_gradient"}
    for row in rows:
        assert row.values.keys() == names
        assert row.images_per_second > 0 and all(row.values[name] > 0 for name in names)


def test_stats_are_means_since_the_last_row(folder: RunFolder) -> None:
    """A row over two rounds is the mean of the rows of each."""
    run(folder, rounds=2, stats_every_kimg=0.012)
    run(folder, rounds=2, stats_every_kimg=0.024)
    first, second, both = (row.values for row in folder.log.all(Stats))
    for name in ("score_loss", "ikl_gradient", "score_gradient"):
        assert both[name] == pytest.approx((first[name] + second[name]) / 2)


def test_measuring_is_done_when_due_and_after_the_last_round(folder: RunFolder) -> None:
    """It sees the state of that count, and its numbers stand in the log."""
    seen = []

    def measure(state: TrainState) -> dict[str, float]:
        seen.append(state.images_seen)
        return {"fid": 100.0 - state.images_seen}

    run(folder, rounds=5, measure=measure, measure_every_kimg=0.024)
    assert seen == [24, 48, 60]
    rows = folder.log.all(Evaluation)
    assert [(row.images_seen, row.means["fid"]) for row in rows] == [
        (24, 76.0),
        (48, 52.0),
        (60, 40.0),
    ]


def test_measuring_changes_no_weight(folder: RunFolder) -> None:
    """A run that is measured, with draws from torch's generator, ends as one that is not."""
    measured = run(
        folder, measure=lambda state: {"x": torch.rand(()).item()}, measure_every_kimg=0.012
    )
    assert_equal(frozen_copy(measured), frozen_copy(run(folder)))


def test_a_stop_saves_and_says_so(folder: RunFolder) -> None:
    """Asked to stop in the second round, it finishes the round, saves it and raises."""
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        run(folder, rounds=5, stop_requested=lambda: next(answers))
    assert checkpoint.images_saved(folder) == 24
    assert folder.log.rows()[-1].images_seen == 24


def test_a_stop_in_the_last_round_is_the_end(folder: RunFolder) -> None:
    """There is nothing left to resume, so the run ends as if it had not been asked."""
    state = run(folder, rounds=1, stop_requested=lambda: True)
    assert state.images_seen == BATCH == checkpoint.images_saved(folder)


def test_checkpoints_are_written_when_due_and_at_the_end(folder: RunFolder) -> None:
    """Every 24 images and after the last; what `keep` does not name goes."""
    run(folder, rounds=5, checkpoint_every_kimg=0.024, keep={"newest": 9})
    names = [int(path.stem) for path in sorted(folder.checkpoints.iterdir())]
    assert names == [24, 48, 60]


def test_the_best_checkpoint_stays(folder: RunFolder) -> None:
    """What was measured reaches the checkpoint of that moment: the lowest of it is kept."""
    values = {12: 3.0, 24: 1.0, 36: 2.0, 48: 4.0, 60: 5.0}
    run(
        folder,
        rounds=5,
        checkpoint_every_kimg=0.012,
        keep={"newest": 1},
        measure=lambda state: {"fid": values[state.images_seen]},
        measure_every_kimg=0.012,
    )
    names = [int(path.stem) for path in sorted(folder.checkpoints.iterdir())]
    assert names == [24, 60]


def test_a_run_that_is_done_does_nothing(folder: RunFolder) -> None:
    """Training a state that has seen all images leaves it as it is."""
    state = run(folder)
    before = frozen_copy(state)
    run(folder, state=state)
    assert_equal(frozen_copy(state), before)


def test_a_batch_smaller_than_the_processes_is_refused(folder: RunFolder) -> None:
    """Each process needs an image of each batch; the sentence names both numbers."""
    config = settings(batch_size=2)
    with pytest.raises(UserError, match=r"training\.batch_size is 2, fewer than the 3 processes"):
        Trainer(begin(config), SLOPE, config, folder=folder, world=replace(ALONE, size=3)).train()


def test_a_micro_batch_larger_than_the_batch_is_refused() -> None:
    """The two numbers are named."""
    with pytest.raises(ValidationError, match="micro_batch_size 20 exceeds batch_size 12"):
        settings(micro_batch_size=20)
