"""Two gloo processes train the weights that one process trains at the same global batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core import distributed
from core.distributed import World
from core.randomness import Draws
from core.roles import LossOutput, Networks, Phase
from core.run_folder import RunFolder
from core.run_log import Rollback
from generators import stylegan2
from objectives import diff_instruct
from objectives.diff_instruct import make
from rank_runs import run_as_ranks
from teachers import edm, gaussian
from tiny_networks import songunet_config
from training import checkpoint
from training.state import TrainState, start
from training.trainer import Config, Diverged, Interrupted, Trainer

ALONE = World.single()
CLASSES = 3
CASES = {
    "edm": {"batch_size": 4},
    "edm, uneven micro-batches": {"batch_size": 7, "micro_batch_size": 2, "gradient_clip": 0.5},
    "edm, shared batch": {"batch_size": 6, "micro_batch_size": 2},
    "gaussian": {"batch_size": 6},
}
"""Both teachers are conditional; the EDM network has an augmentation input that nothing feeds."""


def networks(case: str) -> Networks:
    torch.manual_seed(0)
    student = stylegan2.build(
        stylegan2.Config(
            z_dim=8, w_dim=8, c_dim=CLASSES, img_resolution=8, img_channels=1, channel_max=8
        )
    )
    teacher = _gaussian() if case == "gaussian" else _edm()
    return Networks(student, copy.deepcopy(teacher), teacher)


def _edm() -> nn.Module:
    teacher = edm.build(songunet_config(label_dim=CLASSES, augment_dim=2))
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.2)  # a fresh one's output is next to zero
    return teacher


def _gaussian() -> nn.Module:
    return gaussian.build(
        gaussian.Config(image_shape=(1, 8, 8), components=CLASSES, num_classes=CLASSES)
    )


def trained(case: str, folder: RunFolder, world: World) -> TrainState:
    """Return the state after four rounds of SGD: Adam makes steps of rounding errors."""
    config = Config.model_validate(
        {
            "duration_kimg": 4 * CASES[case]["batch_size"] / 1000,
            "student_lr": 1e-3,
            "score_lr": 1e-3,
            "optimizer": {"name": "SGD"},
            "ema_rampup": None,
            "ema_halflife_kimg": 0.01,
            "checkpoint_every_kimg": 0,
            **CASES[case],
        }
    )
    state = start(
        networks(case),
        student_lr=config.student_lr,
        score_lr=config.score_lr,
        optimizer=config.optimizer,
    )
    shared = case.endswith("shared batch")
    objective = diff_instruct.build(diff_instruct.Config(score_steps=2, shared_batch=shared))
    return Trainer(state, objective, config, folder=folder, world=world).train()


def weights(state: TrainState) -> dict[str, dict[str, Tensor]]:
    return {
        "student": state.networks.student.state_dict(),
        "score": state.networks.score.state_dict(),
        "student_ema": state.student_ema.state_dict(),
    }


def _diverging(world: World, folder: RunFolder) -> str:
    """Return what rank's loop says where the loss of the last rank alone is not finite."""

    def loss(networks: Networks, draws: Draws) -> LossOutput:
        images = make(networks, draws).images.flatten(1).sum(1)
        return LossOutput(images * (float("nan") if world.rank == world.size - 1 else 1.0), {})

    return _message(loss, world, folder, stop=False)


def _stopped(world: World, folder: RunFolder) -> str:
    """Return what a rank's loop says where the last rank alone is asked to stop."""

    def loss(networks: Networks, draws: Draws) -> LossOutput:
        return LossOutput(make(networks, draws).images.flatten(1).sum(1), {})

    return _message(loss, world, folder, stop=world.rank == world.size - 1)


def _rolled_back(world: World, folder: RunFolder) -> list[float]:
    """Return where a rank's run ends that went back once: images, rate, and the weights' sums."""

    def loss(networks: Networks, draws: Draws) -> LossOutput:
        images = make(networks, draws).images.flatten(1).sum(1)
        bad = world.rank == world.size - 1 and draws.images_seen == 12 and state.lr_scale == 1
        return LossOutput(images * (float("nan") if bad else 1.0), {})

    class Objective:
        phases = (Phase("only", ("student",), loss),)

    config = Config.model_validate(
        {
            "duration_kimg": 0.02,
            "batch_size": 4,
            "checkpoint_every_kimg": 0.004,
            "divergence": {"action": "rollback"},
        }
    )
    state = start(networks("gaussian"), student_lr=1.0, score_lr=1.0, optimizer=config.optimizer)
    Trainer(state, Objective(), config, folder=folder, world=world).train()
    total = torch.stack([p.detach().double().sum() for p in state.networks.student.parameters()])
    return [float(state.images_seen), state.lr_scale, *total.tolist()]


def _message(loss: object, world: World, folder: RunFolder, *, stop: bool) -> str:
    class Objective:
        phases = (Phase("only", ("student",), loss),)

    config = Config(duration_kimg=0.02, batch_size=4)
    state = start(networks("gaussian"), student_lr=0.1, score_lr=0.1, optimizer=config.optimizer)
    try:
        Trainer(
            state, Objective(), config, folder=folder, world=world, stop_requested=lambda: stop
        ).train()
    except (Diverged, Interrupted) as error:
        return f"{type(error).__name__} after {state.images_seen}"
    return "went through"


def _rank(world: World, folder: Path) -> None:
    """Train every case as one of two ranks, and leave what came out."""
    assert dist.get_backend() == "gloo"
    found: dict[str, object] = {
        case: weights(trained(case, RunFolder(folder / case), world)) for case in CASES
    }
    found["diverging"] = _diverging(world, RunFolder(folder / "diverging"))
    found["rolled back"] = _rolled_back(world, RunFolder(folder / "rolled back"))
    found["stopped"] = _stopped(world, RunFolder(folder / "stopped"))
    distributed.barrier(world)
    torch.save(found, folder / f"{world.rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """Return what each of two gloo processes found, and where the runs' folders are."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in (*CASES, "diverging", "rolled back", "stopped"):
        (folder / name / "checkpoints").mkdir(parents=True)
    run_as_ranks(_rank, folder, preload=["generators.stylegan2"])
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return found, folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_the_weights_of_one(
    two_ranks: tuple[list[dict], Path], tmp_path: Path, case: str
) -> None:
    """Student, score and average agree within 1e-5 of how far training moved them."""
    began = networks(case)
    expected = weights(trained(case, RunFolder.create(tmp_path, "alone"), ALONE))
    for name, tensors in expected.items():
        before = getattr(began, name.removesuffix("_ema")).state_dict()
        moved = max(float((tensors[key] - before[key]).abs().max()) for key in tensors)
        assert moved > 1e-4, "the test must be able to fail"
        for key, tensor in tensors.items():
            difference = (two_ranks[0][0][case][name][key] - tensor).abs().max()
            assert difference <= 1e-5 * moved + 1e-6 * tensor.abs().max(), f"{name}.{key}"


@pytest.mark.parametrize("case", CASES)
def test_ranks_end_with_the_same_bytes(two_ranks: tuple[list[dict], Path], case: str) -> None:
    """No rank drifts away from the other."""
    first, second = (found[case] for found in two_ranks[0])
    for name, tensors in first.items():
        assert [key for key in tensors if not torch.equal(tensors[key], second[name][key])] == []


def test_rank_0_alone_writes(two_ranks: tuple[list[dict], Path]) -> None:
    """One row of stats and one checkpoint, which holds the trained weights."""
    folder = RunFolder(two_ranks[1] / "edm")
    assert [row.images_seen for row in folder.log.rows()] == [16]
    (path,) = folder.checkpoints.iterdir()
    assert path == checkpoint.newest(folder)
    saved = torch.load(path, weights_only=True)["student"]
    trained_weights = two_ranks[0][0]["edm"]["student"]
    assert all(torch.equal(saved[key], trained_weights[key]) for key in trained_weights)


def test_a_loss_that_is_bad_on_one_rank_stops_all(two_ranks: tuple[list[dict], Path]) -> None:
    """Every rank raises Diverged in the same round."""
    assert [found["diverging"] for found in two_ranks[0]] == ["Diverged after 0"] * 2


def test_all_ranks_go_back_together(two_ranks: tuple[list[dict], Path]) -> None:
    """A loss that is bad on one rank takes both to the same checkpoint and lower rate, once."""
    first, second = (found["rolled back"] for found in two_ranks[0])
    assert first == second and first[:2] == [20.0, 0.5]
    (done,) = RunFolder(two_ranks[1] / "rolled back").log.all(Rollback)
    assert (done.from_images_seen, done.images_seen) == (12, 12)


def test_a_stop_on_one_rank_stops_all(two_ranks: tuple[list[dict], Path]) -> None:
    """Every rank raises Interrupted after the same round, and the state is saved."""
    assert [found["stopped"] for found in two_ranks[0]] == ["Interrupted after 4"] * 2
    assert checkpoint.images_saved(RunFolder(two_ranks[1] / "stopped")) == 4
