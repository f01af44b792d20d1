"""Networks spread over two gloo processes (FSDP2) are trained as whole ones are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core import distributed
from core.distributed import World
from core.errors import UserError
from core.roles import Networks
from core.run_folder import RunFolder
from generators import one_step_edm, stylegan2
from objectives import diff_instruct
from rank_runs import run_as_ranks
from teachers import edm
from tiny_networks import songunet_config
from training import checkpoint, fsdp
from training.loss_scale import LossScale
from training.state import TrainState, start
from training.trainer import Config, Trainer

ALONE = World.single()
BATCH, ROUNDS, HALF = 6, 4, 2
MICRO_BATCH = 2
"""Three images a process: gradients of two micro-batches of unequal size are summed."""
CASES: dict[str, dict[str, object]] = {
    "score": {"shard": ("score",)},
    "all": {"shard": ("student", "score", "teacher"), "gradient_clip": 0.5},
    "float16": {"shard": ("student", "score", "teacher"), "precision": "float16"},
    "Adam": {
        "shard": ("student", "score", "teacher"),
        "optimizer": {"name": "Adam"},
        "student_lr": 1e-3,
    },
}


def networks() -> Networks:
    torch.manual_seed(0)
    teacher = edm.build(songunet_config(label_dim=3, augment_dim=2))
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.2)  # a fresh one's output is next to zero
    score = copy.deepcopy(teacher)
    student = one_step_edm.from_teacher(teacher, one_step_edm.Config())
    return Networks(student, score, teacher)


def config_of(case: str, rounds: int) -> Config:
    return Config.model_validate(
        {
            "duration_kimg": rounds * BATCH / 1000,
            "batch_size": BATCH,
            "micro_batch_size": MICRO_BATCH,
            "student_lr": 0.1,
            "score_lr": 1e-3,
            "optimizer": {"name": "SGD"},
            "ema_rampup": None,
            "ema_halflife_kimg": 0.01,
            "checkpoint_every_kimg": 0,
            **CASES[case],
        }
    )


def trained(case: str, folder: RunFolder, world: World, *, rounds: int = ROUNDS) -> TrainState:
    """Return the state after so many rounds, from the newest checkpoint of the folder, if any."""
    config = config_of(case, rounds)
    state = start(
        networks(),
        student_lr=config.student_lr,
        score_lr=config.score_lr,
        optimizer=config.optimizer,
        shard=config.shard,
        world=world,
    )
    state.loss_scales = {name: LossScale(256.0) for name in ("score", "student")}  # for float16
    checkpoint.restore_newest(state, folder, world)
    objective = diff_instruct.build(diff_instruct.Config())
    return Trainer(state, objective, config, folder=folder, world=world).train()


def saved(folder: RunFolder) -> dict[str, dict[str, Tensor]]:
    """Return the networks of the newest checkpoint."""
    path = checkpoint.newest(folder)
    assert path is not None
    content = torch.load(path, weights_only=True)
    return {name: content[name] for name in ("student", "score", "student_ema")}


def held(network: nn.Module) -> int:
    """Return how many numbers of the network's parameters this process has."""
    parts = [getattr(p, "_local_tensor", p) for p in network.parameters()]
    return sum(part.numel() for part in parts)


def _facts(folder: Path, world: World) -> dict[str, object]:
    """Return what only a process of several can see."""
    state = trained("all", RunFolder(folder / "facts"), world, rounds=1)
    adam = start(
        networks(),
        student_lr=1.0,
        score_lr=1.0,
        optimizer=config_of("Adam", 1).optimizer,
        shard=("score",),
        world=world,
    )
    moments = adam.optimizers["score"]
    for parameter in adam.networks.score.parameters():
        parameter.grad = torch.zeros_like(parameter)
    moments.step()
    first = [getattr(v["exp_avg"], "_local_tensor", v["exp_avg"]) for v in moments.state.values()]
    noisy = torch.ones(world.rank + 1, 1, 8, 8)  # each rank alone, as often as it likes
    for _ in range(world.rank + 1):
        seen = state.networks.teacher(noisy, torch.ones(len(noisy)), None)
    generator = stylegan2.build(
        stylegan2.Config(z_dim=8, w_dim=8, c_dim=0, img_resolution=8, img_channels=1, channel_max=8)
    )
    try:
        fsdp.shard(generator, world)
    except UserError as error:
        refused = str(error)
    else:
        refused = "it was sharded"
    return {
        "student": held(state.networks.student),
        "score": held(state.networks.score),
        "average": held(state.student_ema),
        "moments": sum(value.numel() for value in first),
        "teacher": seen[:1],
        "stylegan2": refused,
    }


def _trained(world: World, folder: Path) -> None:
    """Train every case as one of two ranks, and leave what came out."""
    for case in CASES:
        trained(case, RunFolder(folder / case), world)
        trained(case, RunFolder(folder / f"{case}, resumed"), world, rounds=HALF)
        distributed.barrier(world)
        trained(case, RunFolder(folder / f"{case}, resumed"), world)
    trained("Adam", RunFolder(folder / "begun alone"), world)
    torch.save(_facts(folder, world), folder / f"{world.rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """Return what each of two gloo processes found, and where the runs' folders are."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in (*CASES, *(f"{case}, resumed" for case in CASES), "facts", "begun alone"):
        (folder / name / "checkpoints").mkdir(parents=True)
    trained("Adam", RunFolder(folder / "begun alone"), ALONE, rounds=HALF)
    run_as_ranks(_trained, folder, preload=["torch.distributed.fsdp", "teachers.edm"])
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], folder


def far(
    found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]
) -> dict[str, float]:
    """Return how far each network is from what is expected, as a share of how far that moved."""
    began = networks()
    distances = {}
    for name, tensors in expected.items():
        before = getattr(began, name.removesuffix("_ema")).state_dict()
        lengths = [
            sum(float((tensors[key] - other[key]).double().square().sum()) for key in tensors)
            for other in (found[name], before)
        ]
        assert lengths[1] > 0, "the test must be able to fail"
        distances[name] = (lengths[0] / lengths[1]) ** 0.5
    return distances


@pytest.mark.parametrize(("case", "tolerance"), [("score", 1e-4), ("all", 1e-4), ("float16", 0.05)])
def test_sharded_networks_take_the_steps_of_whole_ones(
    two_ranks: tuple[list[dict], Path], tmp_path: Path, case: str, tolerance: float
) -> None:
    """Two ranks with sharded networks end where one process ends, to rounding: that share of their
    way SGD's weights are apart at most, where a gradient left out or counted twice is of order 1.
    """
    alone = RunFolder.create(tmp_path, "alone")
    trained(case, alone, ALONE)
    distances = far(saved(RunFolder(two_ranks[1] / case)), saved(alone))
    assert max(distances.values()) < tolerance, distances


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_run_resumes_to_the_same_bytes(
    two_ranks: tuple[list[dict], Path], case: str
) -> None:
    """Its checkpoints hold all that a sharded state is, moments of Adam too."""
    straight, resumed = (saved(RunFolder(two_ranks[1] / n)) for n in (case, f"{case}, resumed"))
    for name, tensors in straight.items():
        assert [k for k in tensors if not torch.equal(tensors[k], resumed[name][k])] == []


def test_checkpoints_of_whole_and_sharded_runs_are_one_format(
    two_ranks: tuple[list[dict], Path], tmp_path: Path
) -> None:
    """A run that one process began goes on sharded, and one that was sharded on one process."""
    alone = RunFolder.create(tmp_path, "alone")
    trained("Adam", alone, ALONE)
    reference = saved(alone)
    continued = RunFolder(two_ranks[1] / "begun alone")
    assert max(far(saved(continued), reference).values()) < 1e-2
    begun = RunFolder(two_ranks[1] / "Adam, resumed")
    paths = sorted(begun.checkpoints.iterdir())
    assert [int(path.stem) for path in paths] == [HALF * BATCH, ROUNDS * BATCH]
    paths[-1].unlink()
    trained("Adam", begun, ALONE)
    assert max(far(saved(begun), reference).values()) < 1e-2


def test_each_process_has_its_half(two_ranks: tuple[list[dict], Path]) -> None:
    """Parameters and moments are parted, the average is whole; together they are all."""
    made = networks()
    all_of_score = sum(p.numel() for p in made.score.parameters())
    all_of_student = sum(p.numel() for p in made.student.parameters())
    first, second = two_ranks[0]
    assert first["score"] + second["score"] == all_of_score
    assert first["student"] + second["student"] == all_of_student
    assert first["moments"] == first["score"] and second["moments"] == second["score"]
    assert max(first["score"], second["score"]) < 0.55 * all_of_score
    assert first["average"] == second["average"] == all_of_student


def test_the_teacher_is_whole_again_after_training(two_ranks: tuple[list[dict], Path]) -> None:
    """Each process may then run it without the other, and it says what it said before."""
    expected = networks().teacher.eval()(torch.ones(1, 1, 8, 8), torch.ones(1), None)
    for found in two_ranks[0]:
        torch.testing.assert_close(found["teacher"], expected)


def test_a_stylegan_cannot_be_sharded(two_ranks: tuple[list[dict], Path]) -> None:
    """It has numbers for parameters; the error says what to do."""
    for found in two_ranks[0]:
        assert "leave that network out" in found["stylegan2"]
        assert "noise_strength" in found["stylegan2"]


def test_a_single_process_keeps_networks_whole(tmp_path: Path) -> None:
    """The recipe of many GPUs runs on one."""
    state = trained("all", RunFolder.create(tmp_path, "alone"), ALONE, rounds=1)
    assert not any(fsdp.is_sharded(n) for n in (state.networks.score, state.networks.teacher))


def test_shares_that_would_leave_a_process_waiting_are_refused(tmp_path: Path) -> None:
    """Seven images in micro-batches of three are one part for one process, two for the other."""
    config = config_of("score", 1).model_copy(update={"batch_size": 7, "micro_batch_size": 3})
    state = start(networks(), student_lr=1.0, score_lr=1.0, optimizer=config.optimizer)
    world = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
    objective = diff_instruct.build(diff_instruct.Config())
    folder = RunFolder.create(tmp_path, "uneven")
    with pytest.raises(UserError, match="multiple of 2"):
        Trainer(state, objective, config, folder=folder, world=world).train()
