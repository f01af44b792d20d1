"""One global batch, the same steps: on 1, 2 or 4 ranks, in micro-batches of 1, 3 or a whole share.

What differs is the order in which numbers are added: rounding. Adam divides each gradient by its
own size, so that where a gradient is itself little more than rounding, a whole step may differ;
from there on the runs part. So differences are compared with how far training moved the weights, as
lengths of all weights at once, and float64 shows that nothing but rounding is there.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core import distributed
from core.distributed import World
from core.randomness import Draws
from core.roles import LossOutput, Networks, Phase
from core.run_folder import RunFolder
from rank_runs import run_as_ranks
from training import checkpoint
from training.state import TrainState, start
from training.trainer import Config, Trainer

BATCH, ROUNDS, HALF = 10, 20, 10
"""Ten images are shared by four ranks as 2, 3, 2, 3."""
MICRO_BATCHES = (1, 3, None)
RANKS = (1, 2, 4)
TOLERANCE = {"float64": 1e-13, "float32": 1e-5}
"""The most that weights may differ, as a share of how far training moved them."""
ALONE = World.single()


class Layers(nn.Sequential):
    """A student (four latents to three numbers) or a denoiser (three numbers and their sigma)."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 3))


class Objective:
    """Diff-Instruct's two phases on vectors of three numbers, wholly in one precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.phases = (
            Phase("score", ("score",), self.denoise),
            Phase("student", ("student",), self.pull),
        )

    def images(self, networks: Networks, draws: Draws) -> Tensor:
        return networks.student(draws.normal("latents", (4,)).to(self.dtype))

    def seen(self, images: Tensor, draws: Draws) -> Tensor:
        """Return what a denoiser is given: noisy images, and sigma."""
        sigma = draws.uniform("sigma", (1,)).to(self.dtype) + 0.1
        noise = draws.normal("noise", (3,)).to(self.dtype)
        return torch.cat([images.detach() + sigma * noise, sigma], 1)

    def denoise(self, networks: Networks, draws: Draws) -> LossOutput:
        images = self.images(networks, draws).detach()
        return LossOutput((networks.score(self.seen(images, draws)) - images).square().sum(1), {})

    def pull(self, networks: Networks, draws: Draws) -> LossOutput:
        images = self.images(networks, draws)
        seen = self.seen(images, draws)
        with torch.no_grad():
            pull = networks.score(seen) - networks.teacher(seen)
        return LossOutput((pull * images).sum(1), {})


def begun(case: str) -> Networks:
    torch.manual_seed(0)
    student, score, teacher = (Layers().to(getattr(torch, case)) for _ in range(3))
    return Networks(student, score, teacher)


def weights(state: TrainState) -> dict[str, Tensor]:
    """Return all weights of each network, as one vector."""
    networks = {
        "student": state.networks.student,
        "score": state.networks.score,
        "student_ema": state.student_ema,
    }
    return {name: _vector(network) for name, network in networks.items()}


def _vector(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def trained(
    case: str, micro: int | None, folder: Path, world: World, *, rounds: int = ROUNDS
) -> TrainState:
    """Return the state after so many rounds, from the newest checkpoint of the folder, if any."""
    config = Config.model_validate(
        {
            "duration_kimg": rounds * BATCH / 1000,
            "batch_size": BATCH,
            "micro_batch_size": micro,
            "student_lr": 1e-3,
            "score_lr": 1e-3,
            "ema_halflife_kimg": 0.05,
            "ema_rampup": None,
            "checkpoint_every_kimg": 0,
        }
    )
    state = start(begun(case), student_lr=1e-3, score_lr=1e-3, optimizer=config.optimizer)
    objective = Objective(getattr(torch, case))
    run = RunFolder(folder)
    if world.is_main:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    distributed.barrier(world)
    checkpoint.restore_newest(state, run, world)
    return Trainer(state, objective, config, folder=run, world=world).train()


def _rank(world: World, folder: Path) -> None:
    """Train every case as one of several ranks; half a run here, the other half of one there."""
    found = _all(folder / str(world.size), world)
    trained("float64", None, folder / "resumed", world, rounds=HALF * world.size // 2)
    if world.is_main:
        torch.save(found, folder / f"{world.size}.pt")


def _all(folder: Path, world: World) -> dict[str, dict[str, Tensor]]:
    cases = itertools.product(TOLERANCE, MICRO_BATCHES)
    return {
        f"{case} {micro}": weights(trained(case, micro, folder / f"{case} {micro}", world))
        for case, micro in cases
    }


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, dict], Path]:
    """Return the weights at the end of every case, by the number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {1: _all(folder / "1", ALONE)}
    for size in RANKS[1:]:
        run_as_ranks(_rank, folder, size=size, preload=["training.trainer"])
        found[size] = torch.load(folder / f"{size}.pt", weights_only=True)
    return found, folder


def difference(case: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return how far weights are from others, as a share of how far training moved those."""
    at_first = begun(case)
    shares = []
    for name, vector in expected.items():
        moved = (vector - _vector(getattr(at_first, name.removesuffix("_ema")))).norm()
        assert moved > 1e-3, "the test must be able to fail"
        shares.append(float((found[name] - vector).norm() / moved))
    return max(shares)


@pytest.mark.parametrize("micro", MICRO_BATCHES)
@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("case", TOLERANCE)
def test_the_same_weights_on_any_number_of_ranks(
    ended: tuple[dict[int, dict], Path], case: str, size: int, micro: int | None
) -> None:
    """After 20 rounds student, score and average agree with one rank's on the whole batch."""
    found, expected = ended[0][size][f"{case} {micro}"], ended[0][1][f"{case} None"]

    assert difference(case, found, expected) <= TOLERANCE[case]


def test_a_run_goes_on_with_another_number_of_ranks(ended: tuple[dict[int, dict], Path]) -> None:
    """Ten rounds on two ranks, ten more on four, agree with twenty on one."""
    state = trained("float64", None, ended[1] / "resumed", ALONE)
    assert state.images_seen == ROUNDS * BATCH
    assert (
        difference("float64", weights(state), ended[0][1]["float64 None"]) <= TOLERANCE["float64"]
    )
